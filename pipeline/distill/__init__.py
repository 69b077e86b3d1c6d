"""Distillation in pure torch: `losses` (sums and counts), `memory_bank`, `negatives`, `random`."""
