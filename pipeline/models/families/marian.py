"""Marian: BART with computed positions that are kept as a table, and an embedding without a norm."""

from pipeline.models.blocks import Sides
from pipeline.models.family import like_bart

FAMILY = like_bart("marian", Sides(normed_embedding=False, first_position=0))
