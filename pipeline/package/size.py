"""The layout and size of a model's weights file, to the byte, before anything is trained: from shapes alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config.quant import Quant
from pipeline.models.family import Family
from pipeline.models.student import make_student, quant_targets, walked
from pipeline.quant.granularity import PER_CHANNEL
from pipeline.quant.modules import TIED, Role
from pipeline.quant.packing import encoding_of, packed_columns
from pipeline.quant.spec import UNQUANTIZED, BitWidths, Encoding, QuantSpec

if TYPE_CHECKING:  # which takes long to import
    from transformers import PreTrainedModel

# As safetensors writes it: wider dtypes first, tensors of one dtype by name.
ORDER = {"I64": 8, "F32": 7, "BF16": 4, "F16": 3, "U8": 1, "BOOL": 0}
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "uint8": "U8", "bool": "BOOL"}
BYTES = {"I64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "BOOL": 1}
POSITIONS = {"fp32": "float32", "fp16": "float16"}
ALIGNED = 8
Tensors = dict[str, tuple[str, tuple[int, ...]]]  # dtype as safetensors names it, shape


@dataclass(frozen=True)
class Layout:
    """A model's tensors by module: `modules` (rows, columns) that may be quantized, `roles` which of W-E-A applies."""

    modules: dict[str, tuple[int, int]]
    roles: dict[str, Role]
    spec: QuantSpec
    rest: Tensors
    scale_dtype: str
    rest_dtype: str
    encoding: Encoding = "dense"

    def of_module(self, name: str, bits: int) -> Tensors:
        """Return the tensors that a module stores at a width."""
        rows, columns = self.modules[name]
        if bits == UNQUANTIZED:
            return {f"{name}.weight": (self.rest_dtype, (rows, columns))}
        packed = rows * packed_columns(columns, bits, encoding_of(bits, self.encoding))
        scales = self.spec.granularity_of(self.roles[name]).scale_shape((rows, columns))
        return {f"{name}.weight": ("U8", (packed,)), f"{name}.weight_scale": (self.scale_dtype, scales)}

    def bytes_of(self, name: str, bits: int) -> int:
        """Count the bytes of what a module stores at a width."""
        return _data_bytes(self.of_module(name, bits))

    def packed_bytes(self, widths: Mapping[str, int]) -> int:
        """Count the bytes of the whole file with its header; an all-zero bias is not stored and makes it shorter."""
        tensors = dict(self.rest)
        for name, bits in widths.items():
            tensors |= self.of_module(name, bits)
        return header_bytes(tensors) + _data_bytes(tensors)

    def paper_bytes(self, widths: Mapping[str, int]) -> int:
        """Count as the paper does: codes at nominal width, the rest fp32, without scales and header."""
        code_bits = sum(math.prod(self.modules[name]) * bits for name, bits in widths.items())
        rest = sum(math.prod(shape) for name, (_, shape) in self.rest.items() if not name.endswith(".weight_scale"))
        return code_bits // 8 + 4 * rest


def layout(shape: PreTrainedModel, family: Family, quant: Quant, encoding: Encoding = "dense") -> Layout:
    """Return the layout of a model on the meta device, which is changed."""
    family = walked(shape, family)
    targets = [target for target in quant_targets(shape, family) if target.role not in TIED]
    make_student(shape, QuantSpec(BitWidths(UNQUANTIZED, UNQUANTIZED, UNQUANTIZED)), family)
    state = shape.state_dict()
    modules: dict[str, tuple[int, int]] = {}
    for target in targets:
        rows, columns = state.pop(f"{target.name}.weight").shape
        modules[target.name] = (int(rows), int(columns))
    rest: Tensors = {}
    for name, tensor in state.items():
        module, size = name.rpartition(".")[0], tuple(tensor.shape)
        if module in family.unquantized and quant.positions == "int8":
            rest[name] = ("U8", (tensor.numel(),))
            rest[f"{module}.weight_scale"] = (CODES[quant.scale_dtype], PER_CHANNEL.scale_shape((size[0], size[1])))
            continue
        kept = POSITIONS[quant.positions] if module in family.unquantized and quant.positions else quant.rest_dtype
        rest[name] = (CODES[kept if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")], size)
    return Layout(
        modules=modules,
        roles={target.name: "linear" if target.role == "linear" else "embedding" for target in targets},
        spec=quant.spec(),
        rest=rest,
        scale_dtype=CODES[quant.scale_dtype],
        rest_dtype=CODES[quant.rest_dtype],
        encoding=encoding,
    )


def header_bytes(tensors: Tensors) -> int:
    """Count the bytes of a safetensors header: 8, then JSON with each tensor's offsets, padded with blanks."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda entry: (-ORDER[entry[1][0]], entry[0])):
        end = start + _data_bytes({name: (dtype, shape)})
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    written = len(json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-written // ALIGNED) * ALIGNED


def _data_bytes(tensors: Tensors) -> int:
    return sum(BYTES[dtype] * math.prod(shape) for dtype, shape in tensors.values())
