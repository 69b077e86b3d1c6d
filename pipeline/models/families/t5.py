"""T5: relative positions as a bias of attention, no scale of its scores, and a head that is tied and scaled."""

from pipeline.models.family import Family

BLOCKS = r"(encoder|decoder)\.block\.\d+\.layer\.\d+\."
BIASES = tuple(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias" for side in ("encoder", "decoder"))

FAMILY = Family(
    name="t5",
    linears=(
        (rf"{BLOCKS}(SelfAttention|EncDecAttention)\.[qkvo]", True),
        (rf"{BLOCKS}DenseReluDense\.wi(_[01])?", True),
        (rf"{BLOCKS}DenseReluDense\.wo", False),  # whose input follows ReLU, with a gate in newer ones
    ),
    embedding="shared",
    tied_embeddings=("encoder.embed_tokens", "decoder.embed_tokens"),
    unquantized=BIASES,
    encoder_decoder=True,
)
