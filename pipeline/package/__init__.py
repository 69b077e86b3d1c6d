"""The packed model on disk: written, checked, loaded, brought elsewhere."""
