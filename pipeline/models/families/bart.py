"""BART: an encoder and a decoder over one table of words, learned positions after two rows of padding."""

from pipeline.models.family import like_bart

FAMILY = like_bart("bart")
