"""A schedule: ticks shown, decisions listed, lineage drawn, and a demonstration of it all."""
