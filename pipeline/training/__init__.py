"""The one trainer, and what varies in it as values."""
