"""Quantization in pure torch: `spec` (values), `grid` (arithmetic), `quantizers`, `layers` (modules), `packing`."""
