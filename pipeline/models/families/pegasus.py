"""Pegasus: Marian with norms before each part of a layer."""

from pipeline.models.blocks import Sides
from pipeline.models.family import like_bart

FAMILY = like_bart("pegasus", Sides(norm_first=True, normed_embedding=False, first_position=0))
