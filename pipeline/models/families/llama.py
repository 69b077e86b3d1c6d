"""Llama: every linear is symmetric, down_proj included, since SiLU times up has both signs."""

from pipeline.models.family import Family

FAMILY = Family(
    name="llama",
    linears=(
        (r"model\.layers\.\d+\.self_attn\.[qkvo]_proj", True),
        (r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj", True),
    ),
    embedding="model.embed_tokens",
    unquantized=(),
)
