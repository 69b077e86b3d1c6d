"""Marian: BART with computed positions that are kept as a table, and an embedding without a norm."""

from pipeline.models.family import like_bart

FAMILY = like_bart("marian", first_position=0, normed_embedding=False)
