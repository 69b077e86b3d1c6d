"""The commands by family; each imports what it runs on first use, so that `--help` is quick."""
