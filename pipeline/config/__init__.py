"""The closed schema of a run, one file a part: unknown keys are refused by name. Imports no torch."""
