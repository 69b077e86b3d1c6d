"""GPT-2: linears are Conv1D; the input of the MLP's second one follows GELU and is not symmetric."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.models.family import Family, Gguf

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    return {"feed_forward_length": config.n_inner or 4 * config.n_embd, "layer_norm_eps": config.layer_norm_epsilon}


FAMILY = Family(
    name="gpt2",
    linears=(
        (r"transformer\.h\.\d+\.attn\.c_(attn|proj)", True),
        (r"transformer\.h\.\d+\.mlp\.c_fc", True),
        (r"transformer\.h\.\d+\.mlp\.c_proj", False),
    ),
    embedding="transformer.wte",
    unquantized=("transformer.wpe",),
    graph="gpt2",
    gguf=Gguf(
        architecture="gpt2",
        names={
            r"transformer\.wte": "token_embd",
            r"transformer\.wpe": "position_embd",
            r"transformer\.ln_f": "output_norm",
            r"transformer\.h\.(\d+)\.ln_1": "blk.{}.attn_norm",
            r"transformer\.h\.(\d+)\.attn\.c_attn": "blk.{}.attn_qkv",
            r"transformer\.h\.(\d+)\.attn\.c_proj": "blk.{}.attn_output",
            r"transformer\.h\.(\d+)\.ln_2": "blk.{}.ffn_norm",
            r"transformer\.h\.(\d+)\.mlp\.c_fc": "blk.{}.ffn_up",
            r"transformer\.h\.(\d+)\.mlp\.c_proj": "blk.{}.ffn_down",
            r"lm_head": "output",
        },
        settings=_settings,
        requires={
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
        },
    ),
)
