"""Pegasus: Marian with norms before each part of a layer."""

from pipeline.models.family import like_bart

FAMILY = like_bart("pegasus", first_position=0, normed_embedding=False, norm_first=True)
