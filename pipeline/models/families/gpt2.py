"""GPT-2: linears are Conv1D; the input of the MLP's second one follows GELU and is not symmetric."""

from pipeline.models.family import Family

FAMILY = Family(
    name="gpt2",
    linears=(
        (r"transformer\.h\.\d+\.attn\.c_(attn|proj)", True),
        (r"transformer\.h\.\d+\.mlp\.c_fc", True),
        (r"transformer\.h\.\d+\.mlp\.c_proj", False),
    ),
    embedding="transformer.wte",
    unquantized=("transformer.wpe",),
)
