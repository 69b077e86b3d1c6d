"""Attention whose matmul operands are quantized, through transformers' AttentionInterface.

`qkv`: queries, keys and values, one symmetric range per token and head. `qkv_probabilities`: the softmax rows as
well, asymmetric from zero, one range per query. SDPA hides the probabilities, so these run the plain formula.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.quant.grid import fake_quantize_activation
from pipeline.quant.spec import UNQUANTIZED, ActivationRange, QuantSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CAUSAL = "bitmill_causal"


def use_quantized_attention(model: PreTrainedModel, spec: QuantSpec) -> None:
    """Switch a model to the attention its spec asks for, in place."""
    if spec.attention == "none" or spec.bits.activations == UNQUANTIZED:
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    name = f"bitmill_{spec.attention}_{spec.bits.activations}_{spec.activation_range}"
    rows_too = spec.attention == "qkv_probabilities"
    forward = partial(_attend, bits=spec.bits.activations, over=spec.activation_range, probabilities=rows_too)
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, eager_mask)
    model.set_attn_implementation(name)


def use_causal_attention(model: PreTrainedModel) -> None:
    """Have a decoder attend causally without a mask, in place, where rows are padded on the right alone: to find out
    whether it needs one, transformers reads positions from the device in each pass. Left as they are: models with an
    encoder or a sliding window, and attention of our own."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    config = model.config
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    if config.is_encoder_decoder or windowed or config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(CAUSAL, sdpa_attention_forward)  # and no mask of that name
    model.set_attn_implementation(CAUSAL)


def keep_apart(model: PreTrainedModel, positions: Tensor) -> Any:
    """Return the masks by which a decoder attends causally, and within its windows, to tokens of the same document
    alone: documents are those that `positions` (batch, length) number anew from 0. The model is one that attends by
    masks from here on. Some read no documents from positions, so that all are given what transformers makes of them."""
    from transformers.masking_utils import create_masks_for_generate

    if model.config._attn_implementation == CAUSAL:
        model.set_attn_implementation("sdpa")
    embedded = torch.empty(*positions.shape, 1, dtype=model.dtype, device=positions.device)  # asked for its shape alone
    return create_masks_for_generate(model.config, embedded, None, None, positions)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    bits: int,
    over: ActivationRange,
    probabilities: bool,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend from query (batch, heads, length, head_dim) to key and value with as many or fewer heads."""
    query, key, value = (fake_quantize_activation(x, bits, symmetric=True, over=over) for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    if probabilities:
        weights = fake_quantize_activation(weights, bits, symmetric=False, over=over, from_zero=True)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), None
