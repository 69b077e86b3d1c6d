"""Quantization in pure torch: `spec`, `granularity` (values), `grid` (arithmetic), `quantizers`, `modules`, `frozen`
(what ships), `packing`."""
