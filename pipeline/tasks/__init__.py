"""Tasks: how text becomes rows, and how a model is scored. One file a task."""
