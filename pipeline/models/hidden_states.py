"""What a model computes on its way: the hidden states that distillation compares, and the logits from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.attention import keep_apart, use_causal_attention
from pipeline.models.blocks import logit_divisor_of
from pipeline.models.device import bf16_on_gpu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAST = -1
PROBED = 8  # tokens
TILE = 64  # columns of a product


class WithStates(nn.Module):
    """A language model that returns hidden states and leaves its head to those who have losses: see `layer_states`."""

    def __init__(self, model: PreTrainedModel, layer: int = LAST) -> None:
        super().__init__()
        self.model, self.layer = model, layer
        spare_operations(model)
        self.padding_row = _keep_padding_row(model)

    def forward(self, ids: Tensor, *given: Tensor | None) -> Any:
        """Return the last states and those of `layer`, (batch, length, hidden) each, of what `Batch.inputs` has: ids
        (batch, length) and what belongs to them. Decoder rows are padded on the right, so the causal mask alone keeps
        padding out of every valid token. What an encoder reads, (batch, source length), has its padding masked."""
        return layer_states(self.model, self.layer, ids, *given)


def spare_operations(model: PreTrainedModel) -> None:
    """Have a model compute the same in fewer operations, in place: causal attention without a mask, and the GELU of
    GPT-2, which transformers writes out in eight and their gradients in twelve more, as torch's own of that formula."""
    from transformers.activations import NewGELUActivation

    use_causal_attention(model)
    for name, module in [*model.named_modules()]:
        if isinstance(module, NewGELUActivation):
            model.set_submodule(name, nn.GELU("tanh"))


def last_states(model: PreTrainedModel, ids: Tensor, *given: Tensor | None) -> Tensor:
    """Return the hidden states that the head reads, after the final norm; of the decoder where there is an encoder."""
    return layer_states(model, LAST, ids, *given)[0]


def layer_states(
    model: PreTrainedModel,
    layer: int,
    ids: Tensor,
    source_ids: Tensor | None = None,
    source_mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the last states, and those of one decoder layer counted from the end: -1 what the head reads, -2 the
    output of the layer before the last one, and so on down to the embedding. With `positions`, which begin anew at 0
    with each document of a row, no token sees another document's."""
    given: dict[str, Any] = {"input_ids": ids}
    if source_ids is not None:
        given = {"input_ids": source_ids, "attention_mask": source_mask, "decoder_input_ids": ids}
    elif positions is not None:
        given |= {"position_ids": positions, "attention_mask": keep_apart(model, positions)}
    base, asked = model.base_model, {"use_cache": False, "output_hidden_states": layer != LAST}
    apart = base is model  # with encoder and decoder beside the head
    if apart:
        encoded = model.get_encoder()(input_ids=source_ids, attention_mask=source_mask).last_hidden_state
        given = {"input_ids": ids, "encoder_hidden_states": encoded, "encoder_attention_mask": source_mask}
        base = model.get_decoder()
    output = base(**given, **asked)
    if layer == LAST:
        return output.last_hidden_state, output.last_hidden_state
    hidden = output.hidden_states if source_ids is None or apart else output.decoder_hidden_states
    return output.last_hidden_state, hidden[layer]


def logits_of(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Return logits (batch, length, vocabulary) from the states of `last_states`."""
    logits: Tensor = head_of(model)(states)
    return logits


def head_of(model: PreTrainedModel) -> nn.Module:
    """Return the module that turns last states into logits: the output embedding, and what the model does to its
    product where it does something, as BART, Gemma 2, Granite and T5 do."""
    head: nn.Module = model.get_output_embeddings()
    bias, config = getattr(model, "final_logits_bias", None), model.config
    divisor = logit_divisor_of(config)
    cap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
    return head if bias is None and divisor == 1.0 and not cap else FinishedHead(head, bias, divisor, cap)


@torch.no_grad()
def refuse_other_head(model: PreTrainedModel) -> None:
    """Raise ConfigError for a model that makes its logits otherwise than `head_of` does of its last states: what is
    trained and scored here would be another model."""
    training = model.training
    model.eval()
    ids = torch.arange(min(PROBED, int(model.config.vocab_size)))[None]
    theirs, ours = model(input_ids=ids, use_cache=False).logits, logits_of(model, last_states(model, ids))
    model.train(training)
    if not torch.allclose(theirs, ours, rtol=1e-3, atol=1e-3 * float(theirs.std())):
        raise ConfigError(
            f"model: no family knows a {model.config.model_type} model, and its logits are not the product of its last "
            f"states and its head: they differ by up to {float((theirs - ours).abs().max()):.3g}. Such a model cannot "
            "be compressed without a family of its own."
        )


def head_input(head: nn.Module, states: Tensor) -> Tensor:
    """Return what a head multiplies: last states, on the grid of its input where it has one."""
    if isinstance(head, FinishedHead):
        return head_input(head.head, states)
    inputs: Any = getattr(head, "inputs", None)
    return states if inputs is None else inputs(states)


def teachers_logits(head: nn.Module, states: Tensor) -> Tensor:
    """Return the logits of a head that is not quantized, from last states, up to a number of each position's own, which
    no distribution shows. On a GPU, in bf16, that number makes them 0 on average, for bf16 tells apart what is near 0:
    GPT-2's logits lie about -100, where its next number is half a nat away."""
    with bf16_on_gpu(states.device):
        return head_product(head, states, centred=states.is_cuda)


def head_product(head: nn.Module, prepared: Tensor, centred: bool = False) -> Tensor:
    """Return the logits of any part of what `head_input` gave, as the head itself would of its states; `centred`: less
    their mean over the vocabulary, but where a soft cap bounds them.

    A GPU multiplies by a table that is filled up to whole tiles: of other widths it makes slower products.
    """
    if isinstance(head, FinishedHead):
        return head.finished(head_product(head.head, prepared, centred and not head.cap))
    on_grid: Any = getattr(head, "on_grid", None)
    table: Any = head.weight if on_grid is None else on_grid()
    if centred:
        table = table - table.mean(0)
    bias: Any = getattr(head, "bias", None)
    short = -len(table) % TILE if prepared.is_cuda else 0
    if not short:
        return F.linear(prepared, table, bias)
    logits = F.linear(prepared, F.pad(table, (0, 0, 0, short)))[..., : len(table)]
    return logits if bias is None else logits + bias


class FinishedHead(nn.Module):
    """An output embedding and what the model does to its product: a bias (1, vocabulary) is added, a divisor divides,
    a soft cap bounds."""

    def __init__(self, head: nn.Module, bias: Tensor | None, divisor: float, cap: float) -> None:
        super().__init__()
        self.head, self.divisor, self.cap = head, divisor, cap
        self.bias: Tensor | None
        self.register_buffer("bias", bias, persistent=False)

    def finished(self, product: Tensor) -> Tensor:
        """Return logits from the product of states and table."""
        logits = product if self.bias is None else product + self.bias
        logits = logits if self.divisor == 1.0 else logits / self.divisor
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits

    def forward(self, states: Tensor) -> Any:
        return self.finished(self.head(states))


def _keep_padding_row(model: PreTrainedModel) -> int | None:
    """Keep a padding row of zeros at zeros: a tied head would otherwise move it, as it moves every row. Return which
    row it is, if there is one."""
    embedding = model.get_input_embeddings()
    row, weight = getattr(embedding, "padding_idx", None), embedding.weight
    if row is None or weight.is_meta or not weight.requires_grad or weight[row].any():
        return None
    weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([row], device=gradient.device), 0.0))
    return int(row)
