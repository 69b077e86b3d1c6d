"""Quantized modules, and the pass over a model that puts them in place before training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.quant.grid import fake_quantize_activation
from pipeline.quant.integers import Codes, codes_of, fit, integer_linear
from pipeline.quant.quantizers import QUANTIZERS, WeightQuantizer
from pipeline.quant.spec import UNQUANTIZED, ActivationRange, QuantSpec

Role = Literal["linear", "embedding", "tied_embedding", "tied_head", "head"]
TIED: tuple[Role, ...] = ("tied_embedding", "tied_head")  # they read the embedding's table and own none


@dataclass(frozen=True)
class QuantTarget:
    """One module to quantize, as its family names it."""

    name: str
    role: Role
    symmetric_input: bool = True
    transposed: bool = False  # GPT-2's Conv1D keeps its weight as (in, out)


class InputQuantizer(nn.Module):
    """Dynamic quantization of a matmul's input; the identity at 32 bits."""

    def __init__(self, bits: int, symmetric: bool, over: ActivationRange) -> None:
        super().__init__()
        self.bits, self.symmetric, self.over = bits, symmetric, over

    def forward(self, x: Tensor) -> Tensor:
        return x if self.bits == UNQUANTIZED else fake_quantize_activation(x, self.bits, self.symmetric, self.over)


class QuantizedWeight(nn.Module):
    """A module's latent weight, and what forward passes use in its place: the weight on its grid.

    While quantization fades in, a training pass goes only `blend` of the way from the latent weight to its level.
    """

    def __init__(self, weight: nn.Parameter, quantizer: WeightQuantizer | None) -> None:
        super().__init__()
        self.weight, self.quantizer = weight, quantizer
        self.held: Tensor | None = None  # on the grid already: see `stacks.quantized_once`
        self.codes: Codes | None = None  # of `held`, once they are used

    def on_grid(self) -> Tensor:
        """Return the weight as a forward pass uses it."""
        if self.held is not None or self.quantizer is None:
            return self.weight if self.held is None else self.held
        blend = self.quantizer.blend if self.training else 1.0
        return faded_in(self.weight, cast(Tensor, self.quantizer(self.weight)), blend)


class QuantizedLinear(QuantizedWeight):
    """A linear layer whose latent weight (out, in) is on its grid in every forward pass.

    Levels and activations are computed in fp32, under autocast too. There the product itself rounds its factors to
    bf16, as that of any layer does: a level by up to half a scale at 8 bits, 0.03 at 4. Only training has autocast.
    """

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, quantizer: WeightQuantizer | None, inputs: InputQuantizer
    ) -> None:
        super().__init__(nn.Parameter(weight.contiguous()), quantizer)
        self.bias, self.inputs, self.integers = bias, inputs, False

    def forward(self, x: Tensor) -> Tensor:
        if self.held is not None and (codes := self._codes_for(x)) is not None:
            return integer_linear(x, self.held, self.bias, codes, self.inputs.symmetric)
        return F.linear(self.inputs(x), self.on_grid(), self.bias)

    def _codes_for(self, x: Tensor) -> Codes | None:
        """Return the codes of the weight that is held, made once; None where integers cannot give this product, or are
        not to."""
        q, held = self.quantizer, self.held
        if not self.integers or held is None or q is None or q.blend != 1.0 or q.granularity.kind == "per_group":
            return None
        if self.inputs.bits != 8 or self.inputs.over != "token" or not fit(x, held, q.grid):
            return None
        if self.codes is None:
            with torch.no_grad():
                self.codes = codes_of(held, q.distance(q.granularity.fold(self.weight)), q.grid)
        return self.codes


def faded_in(weight: Tensor, quantized: Tensor, blend: float | Tensor) -> Tensor:
    """Return what lies `blend` of the way from a latent weight to its level; 1 is the level itself."""
    return quantized if isinstance(blend, float) and blend == 1.0 else torch.lerp(weight, quantized, blend)


class QuantizedEmbedding(QuantizedWeight):
    """A word embedding (vocabulary, hidden) with one scale per row; tied embeddings and heads read the same table.
    `embed_scale` multiplies what is looked up, as in BART's family; it does not touch the table."""

    def __init__(self, embedding: nn.Embedding, quantizer: WeightQuantizer | None) -> None:
        super().__init__(cast(nn.Parameter, embedding.weight), quantizer)
        self.padding_idx, self.embed_scale = embedding.padding_idx, embed_scale_of(embedding)

    def forward(self, ids: Tensor) -> Tensor:
        return _look_up(ids, self.on_grid(), self.padding_idx, self.embed_scale)


class TiedEmbedding(nn.Module):
    """A further name of the word embedding, such as BART's encoder.embed_tokens; it owns no parameter."""

    def __init__(self, embedding: QuantizedEmbedding, own: nn.Embedding) -> None:
        super().__init__()
        self._embedding = (embedding,)
        self.padding_idx, self.embed_scale = own.padding_idx, embed_scale_of(own)

    @property
    def weight(self) -> nn.Parameter:
        """Return the table (vocabulary, hidden), which models that have no other name for it ask for here."""
        return self._embedding[0].weight

    def forward(self, ids: Tensor) -> Tensor:
        return _look_up(ids, self._embedding[0].on_grid(), self.padding_idx, self.embed_scale)


def embed_scale_of(embedding: nn.Module) -> float:
    """Return the factor by which the model multiplies looked-up rows; 1 for most. Gemma keeps it as a number, and as a
    buffer that has no value on the meta device."""
    return float(getattr(embedding, "scalar_embed_scale", None) or getattr(embedding, "embed_scale", None) or 1.0)


def _look_up(ids: Tensor, table: Tensor, padding_idx: int | None, scale: float) -> Tensor:
    rows = F.embedding(ids, table, padding_idx)
    return rows if scale == 1.0 else rows * scale


class TiedHead(nn.Module):
    """The output head over the embedding's own table; it owns no parameter, so nothing is stored twice."""

    def __init__(self, embedding: QuantizedEmbedding, inputs: InputQuantizer) -> None:
        super().__init__()
        self._embedding = (embedding,)  # a tuple, so that torch does not register the table a second time
        self.inputs = inputs

    def on_grid(self) -> Tensor:
        """Return the table as a forward pass uses it."""
        return self._embedding[0].on_grid()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inputs(x), self.on_grid())


def prepare(model: nn.Module, targets: Iterable[QuantTarget], spec: QuantSpec) -> None:
    """Replace every target by its quantized module, in place; latent weights are the model's own."""

    def weight_quantizer(target: QuantTarget, weight: Tensor) -> WeightQuantizer | None:
        bits, granularity = spec.weight_bits(target.name, target.role), spec.granularity_of(target.role)
        return None if bits == UNQUANTIZED else QUANTIZERS[spec.quantizer](weight, bits, granularity, spec)

    for target in targets:
        inputs = InputQuantizer(spec.bits.activations, target.symmetric_input, spec.activation_range)
        module: Any = model.get_submodule(target.name)
        prepared: nn.Module
        if target.role in TIED:
            table = next(m for m in model.modules() if isinstance(m, QuantizedEmbedding))
            prepared = TiedHead(table, inputs) if target.role == "tied_head" else TiedEmbedding(table, module)
        else:
            weight = module.weight.detach()
            weight = weight.T.contiguous() if target.transposed else weight
            quantizer = weight_quantizer(target, weight)
            if target.role == "embedding":
                prepared = QuantizedEmbedding(module, quantizer)
            else:
                prepared = QuantizedLinear(weight, module.bias, quantizer, inputs)
        model.set_submodule(target.name, prepared)


def multiply_integers(model: nn.Module) -> None:
    """Have linear layers multiply integers in the forward passes of training, in place, where that is exact."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.integers = True


def quantizers(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, WeightQuantizer]]:
    """Yield every weight quantizer with the name and the latent weight of the module it serves."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight) and module.quantizer is not None:
            yield name, module.weight, module.quantizer
