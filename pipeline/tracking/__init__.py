"""MLflow: runs by key, versions and aliases, lookups, and curves while a run goes on."""
