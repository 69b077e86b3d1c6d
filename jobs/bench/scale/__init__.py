"""`bitmill bench scale`: text, stores and registries that grow."""
