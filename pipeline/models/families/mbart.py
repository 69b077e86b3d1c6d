"""mBART: BART with norms before each part of a layer."""

from pipeline.models.family import like_bart

FAMILY = like_bart("mbart", norm_first=True)
