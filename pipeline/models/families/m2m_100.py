"""M2M100 and NLLB: mBART with computed positions, and an embedding without a norm."""

from pipeline.models.family import like_bart

FAMILY = like_bart("m2m_100", normed_embedding=False, norm_first=True, computed_positions=True)
