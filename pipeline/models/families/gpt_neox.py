"""GPT-NeoX and Pythia: attention and MLP read the same states; each head's queries, keys and values lie together."""

from pipeline.models.blocks import Blocks
from pipeline.models.family import Gguf, decoder_only

FAMILY = decoder_only(
    "gpt_neox",
    Blocks(
        layers="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        last_norm="gpt_neox.final_layer_norm",
        qkv=("attention.query_key_value",),
        by_head=True,
        out="attention.dense",
        into_mlp=("mlp.dense_h_to_4h",),
        gated=False,
        out_of_mlp="mlp.dense_4h_to_h",
        epsilon="layer_norm_eps",
    ),
    gguf=Gguf(architecture="gptneox", activations=("gelu", "gelu_new", "gelu_fast")),
)
