"""What ships of a student: codes, scales and the rest, frozen once, and put back into a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pipeline.quant.granularity import PER_CHANNEL, Granularity
from pipeline.quant.grid import dequantize, quantize
from pipeline.quant.modules import QuantTarget, prepare, quantizers
from pipeline.quant.quantizers.base import max_abs
from pipeline.quant.spec import UNQUANTIZED, Levels, Positions, QuantSpec, grid, levels_of

POSITION_BITS = 8


@dataclass(frozen=True)
class FrozenTensors:
    """What ships: codes with their scales, and every other tensor, each in the dtype that is stored.

    `codes[name]` is int8 (rows, columns), `scales[name]` the distance of its levels, as `Granularity` stores
    it; `bits[name]` is its width, and `levels` the kind of grid, one for all.
    """

    codes: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    bits: dict[str, int] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)
    levels: Levels = "symmetric"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of the model, by its name there."""
        tensors = self.rest | {f"{name}.weight": codes for name, codes in self.codes.items()}
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def weight(self, name: str) -> Tensor:
        """Return the fp32 weight that the codes stand for."""
        codes, scale = self.codes[name], self.scales[name].float()
        granularity = self.granularity(name)
        folded = dequantize(granularity.fold(codes), granularity.fold_scale(scale), grid(self.levels, self.bits[name]))
        return granularity.unfold(folded, codes.shape)

    def row_scales(self, name: str) -> Tensor:
        """Return the fp32 scales of each row of a module (rows, scales of a row): one, or one a group."""
        return self.scales[name].float().expand(len(self.codes[name]), -1).contiguous()

    def granularity(self, name: str) -> Granularity:
        """Return the granularity of the scales of a module."""
        rows, columns = self.codes[name].shape
        return Granularity.of_scale(tuple(self.scales[name].shape), (rows, columns))

    def digest(self) -> str:
        """Return the SHA-256 over names, widths, dtypes, shapes and bytes of all tensors."""
        sha = hashlib.sha256(b"" if self.levels == "symmetric" else self.levels.encode())
        for group, tensors in (("codes", self.codes), ("scales", self.scales), ("rest", self.rest)):
            for name in sorted(tensors):
                tensor = tensors[name].detach().contiguous().cpu()
                header = (group, name, self.bits.get(name, 0), str(tensor.dtype), tuple(tensor.shape))
                sha.update(repr(header).encode())
                sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()


@torch.no_grad()
def freeze(
    model: nn.Module,
    spec: QuantSpec,
    scale_dtype: torch.dtype,
    rest_dtype: torch.dtype,
    positions: Mapping[str, Positions] | None = None,
) -> FrozenTensors:
    """Return codes, scales and the remaining tensors of a student trained by `spec`, in the dtypes that ship.
    `positions` names the modules of position embeddings that ship otherwise than in `rest_dtype`; int8 is the nearest
    of the grid's levels at 8 bits, with one scale a row."""
    frozen = FrozenTensors(levels=levels_of(spec.quantizer))
    for name, weight, quantizer in quantizers(model):
        frozen.codes[name], scale = quantizer.freeze(weight)
        frozen.scales[name], frozen.bits[name] = scale.to(scale_dtype, copy=True), quantizer.bits
    stored = {f"{module}.weight": kind for module, kind in (positions or {}).items()}
    for key, tensor in model.state_dict().items():
        module, _, leaf = key.rpartition(".")
        if ".quantizer." in f".{key}" or (leaf == "weight" and module in frozen.codes):
            continue
        if stored.get(key) == "int8":
            fine = grid(frozen.levels, POSITION_BITS)  # whose outermost level is the largest entry of a row
            scale = (max_abs(PER_CHANNEL.fold(tensor.float())) / (fine.high + fine.shift)).to(scale_dtype)
            frozen.codes[module], frozen.scales[module] = quantize(tensor.float(), scale.float(), fine), scale
            frozen.bits[module] = POSITION_BITS
        else:
            dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(stored.get(key, ""), rest_dtype)
            frozen.rest[key] = tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
    return frozen


@torch.no_grad()
def thaw(model: nn.Module, targets: Iterable[QuantTarget], spec: QuantSpec, frozen: FrozenTensors) -> None:
    """Turn `model`, of the student's architecture, into the frozen student, in place. Weights are dequantized once to
    fp32; activations are quantized as in training. Raises ValueError for tensors of another architecture."""
    give_modules(model, targets, spec, frozen.shapes)
    state = {name: tensor.float() for name, tensor in frozen.rest.items()}
    model.load_state_dict(state | {f"{name}.weight": frozen.weight(name) for name in frozen.codes})


def give_modules(
    model: nn.Module, targets: Iterable[QuantTarget], spec: QuantSpec, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Give `model` the modules of a frozen student, in place. Raises ValueError unless tensors of these names and
    shapes are its own."""
    bits = replace(spec.bits, weights=UNQUANTIZED, embedding=UNQUANTIZED)
    prepare(model, targets, QuantSpec(bits, activation_range=spec.activation_range))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = sorted(set(expected.items()) ^ set(shapes.items()))
    if wrong:
        raise ValueError(f"the tensors do not fit the architecture; first mismatch: {wrong[0][0]} {wrong[0][1]}")
