"""BART: encoder and decoder over one table of words; fc2's input follows GELU and is not symmetric. Siblings with the
same module names are taken with `model.family: bart`: mBART, and M2M100, which computes positions."""

from pipeline.models.family import Family

FAMILY = Family(
    name="bart",
    linears=(
        (r"model\.(encoder|decoder)\.layers\.\d+\.self_attn\.([qkv]|out)_proj", True),
        (r"model\.decoder\.layers\.\d+\.encoder_attn\.([qkv]|out)_proj", True),
        (r"model\.(encoder|decoder)\.layers\.\d+\.fc1", True),
        (r"model\.(encoder|decoder)\.layers\.\d+\.fc2", False),
    ),
    embedding="model.shared",
    tied_embeddings=("model.encoder.embed_tokens", "model.decoder.embed_tokens"),
    unquantized=("model.encoder.embed_positions", "model.decoder.embed_positions"),
    encoder_decoder=True,
    graph="bart",
)
