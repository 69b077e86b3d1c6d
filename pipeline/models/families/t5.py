"""T5: relative positions as a bias of attention, no scale of its scores, and a head that is tied and scaled."""

from pipeline.models.family import Family

FAMILY = Family(
    name="t5",
    linears=(
        (r"(encoder|decoder)\.block\.\d+\.layer\.\d+\.(SelfAttention|EncDecAttention)\.[qkvo]", True),
        (r"(encoder|decoder)\.block\.\d+\.layer\.\d+\.DenseReluDense\.wi(_[01])?", True),
        # whose input follows ReLU, with a gate in newer ones
        (r"(encoder|decoder)\.block\.\d+\.layer\.\d+\.DenseReluDense\.wo", False),
    ),
    embedding="shared",
    tied_embeddings=("encoder.embed_tokens", "decoder.embed_tokens"),
    unquantized=(
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    ),
    encoder_decoder=True,
)
