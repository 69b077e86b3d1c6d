"""SmolLM 3: Llama, of which every fourth layer knows no positions."""

from pipeline.models.blocks import Blocks
from pipeline.models.family import Gguf, decoder_only

FAMILY = decoder_only(
    "smollm3",
    Blocks(),
    gguf=Gguf(
        architecture="smollm3",
        side_by_side=True,
        unturned_every=4,
        requires={"attention_bias": False, "mlp_bias": False},
    ),
)
