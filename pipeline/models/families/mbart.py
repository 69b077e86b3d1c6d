"""mBART: BART with norms before each part of a layer."""

from pipeline.models.blocks import Sides
from pipeline.models.family import like_bart

FAMILY = like_bart("mbart", Sides(norm_first=True))
