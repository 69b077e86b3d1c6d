"""M2M100 and NLLB: mBART with computed positions, and an embedding without a norm."""

from pipeline.models.blocks import Sides
from pipeline.models.family import like_bart

FAMILY = like_bart("m2m_100", Sides(norm_first=True, normed_embedding=False, computed_positions=True))
