"""Quantized modules, and the two passes over a model: `prepare` before training, `freeze` after it.

`thaw` puts frozen codes back into a model: the same modules with the weight already on its grid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.quant.grid import dequantize, fake_quantize_activation, quantize
from pipeline.quant.quantizers import QUANTIZERS, StepQuantizer
from pipeline.quant.spec import UNQUANTIZED, ActivationRange, Grid, Levels, Positions, QuantSpec, grid, levels_of

Role = Literal["linear", "embedding", "tied_embedding", "tied_head", "head"]
POSITION_BITS = 8
TIED: tuple[Role, ...] = ("tied_embedding", "tied_head")  # they read the embedding's table and own none


@dataclass(frozen=True)
class Site:
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
        if self.bits == UNQUANTIZED:
            return x
        return fake_quantize_activation(x, self.bits, self.symmetric, self.over)


def on_grid(weight: Tensor, quantizer: StepQuantizer | None, training: bool) -> Tensor:
    """The weight as a forward pass uses it. While quantization fades in, a training pass goes only `share` of the way
    from the latent weight to its level."""
    if quantizer is None:
        return weight
    quantized = cast(Tensor, quantizer(weight))
    if not training or quantizer.share == 1.0:
        return quantized
    return weight + quantizer.share * (quantized - weight)


class QuantizedLinear(nn.Module):
    """A linear layer whose latent weight (out, in) is on its grid in every forward pass."""

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, quantizer: StepQuantizer | None, inputs: InputQuantizer
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous())
        self.bias = bias
        self.quantizer = quantizer
        self.inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inputs(x), on_grid(self.weight, self.quantizer, self.training), self.bias)


class QuantizedEmbedding(nn.Module):
    """A word embedding (vocabulary, hidden) with one scale per row; tied embeddings and heads read the same table.

    `embed_scale` multiplies what is looked up, as in BART's family; it does not touch the table.
    """

    def __init__(self, embedding: nn.Embedding, quantizer: StepQuantizer | None) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.padding_idx = embedding.padding_idx
        self.embed_scale = embed_scale_of(embedding)
        self.quantizer = quantizer

    def table(self) -> Tensor:
        return on_grid(self.weight, self.quantizer, self.training)

    def forward(self, ids: Tensor) -> Tensor:
        return _look_up(ids, self.table(), self.padding_idx, self.embed_scale)


class TiedEmbedding(nn.Module):
    """A further name of the word embedding, such as BART's encoder.embed_tokens; it owns no parameter."""

    def __init__(self, embedding: QuantizedEmbedding, own: nn.Embedding) -> None:
        super().__init__()
        self._embedding = (embedding,)
        self.padding_idx, self.embed_scale = own.padding_idx, embed_scale_of(own)

    def forward(self, ids: Tensor) -> Tensor:
        return _look_up(ids, self._embedding[0].table(), self.padding_idx, self.embed_scale)


def embed_scale_of(embedding: nn.Module) -> float:
    """What the model multiplies looked-up rows by; 1 for most."""
    return float(getattr(embedding, "embed_scale", 1.0) or 1.0)


def _look_up(ids: Tensor, table: Tensor, padding_idx: int | None, scale: float) -> Tensor:
    found = F.embedding(ids, table, padding_idx)
    return found if scale == 1.0 else found * scale


class TiedHead(nn.Module):
    """The output head over the embedding's own table; it owns no parameter, so nothing is stored twice."""

    def __init__(self, embedding: QuantizedEmbedding, inputs: InputQuantizer) -> None:
        super().__init__()
        self._embedding = (embedding,)  # a tuple, so that torch does not register the table a second time
        self.inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inputs(x), self._embedding[0].table())


def prepare(model: nn.Module, sites: Iterable[Site], spec: QuantSpec) -> None:
    """Replace every site by its quantized module, in place; latent weights are the model's own."""

    def weight_quantizer(site: Site, weight: Tensor) -> StepQuantizer | None:
        role: Literal["linear", "embedding"] = "linear" if site.role == "linear" else "embedding"
        bits = spec.weight_bits(site.name, role)
        if bits == UNQUANTIZED:
            return None
        granularity = spec.granularity if role == "linear" else "row"
        return QUANTIZERS[spec.quantizer](weight, bits, granularity, spec)

    for site in sites:
        inputs = InputQuantizer(spec.bits.activations, site.symmetric_input, spec.activation_range)
        module = model.get_submodule(site.name)
        if site.role in TIED:
            table = _embedding_of(model)
            own = cast(nn.Embedding, module)
            tied = TiedHead(table, inputs) if site.role == "tied_head" else TiedEmbedding(table, own)
            model.set_submodule(site.name, tied)
            continue
        weight = cast(Tensor, module.weight).detach()
        weight = weight.T.contiguous() if site.transposed else weight
        if site.role == "embedding":
            embedding = cast(nn.Embedding, module)
            model.set_submodule(site.name, QuantizedEmbedding(embedding, weight_quantizer(site, weight)))
        else:
            bias = cast("nn.Parameter | None", module.bias)
            linear = QuantizedLinear(weight, bias, weight_quantizer(site, weight), inputs)
            model.set_submodule(site.name, linear)


def _embedding_of(model: nn.Module) -> QuantizedEmbedding:
    return next(m for m in model.modules() if isinstance(m, QuantizedEmbedding))


def quantizers(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, StepQuantizer]]:
    """Every weight quantizer with the name and the latent weight of the module it serves."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding) and module.quantizer is not None:
            yield name, cast(nn.Parameter, module.weight), module.quantizer


@dataclass(frozen=True)
class FrozenTensors:
    """What ships: codes with their scales, and every other tensor, each in the dtype that is stored.

    `codes[name]` is int8 (rows, columns) and `scales[name]` (1, 1) or (rows, 1), the step of its grid; `bits[name]`
    is its width, and `levels` the kind of grid, one for all.
    """

    codes: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    bits: dict[str, int] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)
    levels: Levels = "symmetric"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor of the model, by its name there."""
        return {name: tuple(tensor.shape) for name, tensor in self.rest.items()} | {
            f"{name}.weight": tuple(codes.shape) for name, codes in self.codes.items()
        }

    def weight(self, name: str) -> Tensor:
        """The fp32 weight that the codes stand for."""
        return dequantize(self.codes[name], self.scales[name].float(), grid(self.levels, self.bits[name]))

    def digest(self) -> str:
        """SHA-256 over names, widths, dtypes, shapes and bytes of all tensors."""
        sha = hashlib.sha256(b"" if self.levels == "symmetric" else self.levels.encode())
        groups = (("codes", self.codes), ("scales", self.scales), ("rest", self.rest))
        for group, tensors in groups:
            for name in sorted(tensors):
                tensor = tensors[name].detach().contiguous().cpu()
                header = (group, name, self.bits.get(name, 0), str(tensor.dtype), tuple(tensor.shape))
                sha.update(repr(header).encode())
                sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()


@torch.no_grad()
def freeze(
    model: nn.Module,
    spec: QuantSpec,
    scale_dtype: torch.dtype,
    rest_dtype: torch.dtype,
    positions: Mapping[str, Positions] | None = None,
) -> FrozenTensors:
    """Codes, scales and the remaining tensors of a student trained by `spec`, in the dtypes that ship.

    `positions` names the modules of position embeddings that ship otherwise than in `rest_dtype`; int8 is the nearest
    of the grid's levels at 8 bits, with one scale a row.
    """
    frozen = FrozenTensors(levels=levels_of(spec.quantizer))
    for name, weight, quantizer in quantizers(model):
        codes, scale = quantizer.freeze(weight)
        frozen.codes[name], frozen.scales[name] = codes, scale.detach().to(scale_dtype, copy=True)
        frozen.bits[name] = quantizer.bits
    stored = {f"{module}.weight": kind for module, kind in (positions or {}).items()}
    for key, tensor in model.state_dict().items():
        module, _, leaf = key.rpartition(".")
        if ".quantizer." in f".{key}" or (leaf == "weight" and module in frozen.codes):
            continue
        if stored.get(key) == "int8":
            fine = grid(frozen.levels, POSITION_BITS)
            scale = _step_of_rows(tensor, fine).to(scale_dtype)
            frozen.codes[module], frozen.scales[module] = quantize(tensor.float(), scale.float(), fine), scale
            frozen.bits[module] = POSITION_BITS
            continue
        dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(stored.get(key, ""), rest_dtype)
        frozen.rest[key] = tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
    return frozen


def _step_of_rows(table: Tensor, grid: Grid) -> Tensor:
    """(rows, 1): the step at which the largest entry of each row falls on the outermost level."""
    return table.float().abs().amax(-1, keepdim=True) / (grid.high + grid.shift)


@torch.no_grad()
def thaw(model: nn.Module, sites: Iterable[Site], spec: QuantSpec, frozen: FrozenTensors) -> None:
    """Turn `model`, of the student's architecture, into the frozen student, in place.

    Weights are dequantized once to fp32; activations are quantized as in training.

    Raises:
        ValueError: the tensors are not those of this architecture.
    """
    fit(model, sites, spec, frozen.shapes)
    state = {name: tensor.float() for name, tensor in frozen.rest.items()}
    model.load_state_dict(state | {f"{name}.weight": frozen.weight(name) for name in frozen.codes})


def fit(model: nn.Module, sites: Iterable[Site], spec: QuantSpec, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give `model` the modules of a frozen student, in place, if tensors of these names and shapes are its own.

    Raises:
        ValueError: they are not.
    """
    unquantized = QuantSpec(
        bits=type(spec.bits)(UNQUANTIZED, UNQUANTIZED, spec.bits.activations),
        activation_range=spec.activation_range,
    )
    prepare(model, sites, unquantized)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = sorted(set(expected.items()) ^ set(shapes.items()))
    if wrong:
        raise ValueError(f"the tensors do not fit the architecture; first mismatch: {wrong[0][0]} {wrong[0][1]}")
