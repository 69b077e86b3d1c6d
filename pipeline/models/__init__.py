"""Models: built, checked against their family, made into students."""
