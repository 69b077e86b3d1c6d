"""The straight line of stages: planned, checked before it starts, run."""
