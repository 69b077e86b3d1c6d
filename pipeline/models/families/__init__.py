"""Model families, one file each: all that is a family's own."""
