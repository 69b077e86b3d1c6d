"""Packed models in the formats of other runtimes, one a file: `write(package, out)` and `open_logits(out, threads)`."""
