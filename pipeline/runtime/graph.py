"""An ONNX graph in the making: nodes, inputs, outputs and tensors, in the terms that all families share.

Every quantized matrix goes into one MatMulNBits as packed codes. Its level 4 quantizes activations to 8 bits, one
symmetric range a block, and multiplies whole numbers; its level 1 keeps activations in fp32 and unpacks a matrix at
each call, which is exact and slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from pipeline.errors import ConfigError
from pipeline.quant.spec import UNQUANTIZED
from pipeline.runtime.weights import Weights

CONTRIB = "com.microsoft"
OPSET, IR_VERSION = 21, 10
INLINE_BYTES, ALIGNMENT = 1024, 4096  # larger tensors lie in a file of their own, each at the start of a page
EXACT, EIGHT_BITS = 1, 4  # accuracy_level of MatMulNBits
ACTIVATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gelu_new": ("FastGelu", CONTRIB, {}),
    "gelu_pytorch_tanh": ("FastGelu", CONTRIB, {}),
    "gelu": ("Gelu", CONTRIB, {}),
    "relu": ("Relu", "", {}),
    "silu": ("QuickGelu", CONTRIB, {"alpha": 1.0}),
    "swish": ("QuickGelu", CONTRIB, {"alpha": 1.0}),
}


class Graph:
    """Collects nodes and tensors; methods return the name of what they compute."""

    def __init__(self, weights: Weights, activations: int) -> None:
        self.weights = weights
        self.level = accuracy(activations)
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._tensors: dict[str, NDArray[Any]] = {}

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        """Add an input of the graph; `kind` is its TensorProto type."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, shape: Sequence[int | str]) -> None:
        """Add an output of the graph, in fp32."""
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def tensor(self, name: str, value: NDArray[Any]) -> str:
        """Add a tensor, once by its name."""
        self._tensors.setdefault(name, value)
        return name

    def number(self, value: int) -> str:
        """Add a whole number, int64, without dimensions."""
        return self.tensor(f"number_{value}", np.array(value, np.int64))

    def vector(self, *values: int) -> str:
        """Add a vector of whole numbers, int64."""
        return self.tensor("vector_" + "_".join(map(str, values)), np.array(values, np.int64))

    def op(self, kind: str, *inputs: str, named: str = "", domain: str = "", **settings: Any) -> str:
        """Add a node of one output, which is called `named` where that is given."""
        (result,) = self.ops([named or f"{kind}_{len(self._nodes)}"], kind, *inputs, domain=domain, **settings)
        return result

    def ops(self, results: Sequence[str], kind: str, *inputs: str, domain: str = "", **settings: Any) -> Sequence[str]:
        """Add a node of several outputs."""
        name = f"{kind}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, results, name, domain=domain, **settings))
        return results

    def rest(self, name: str) -> str:
        """Add a tensor that is not quantized."""
        return self.tensor(name, self.weights.rest[name])

    def linear(self, x: str, *modules: str) -> str:
        """Pass x (1, length, columns) through one layer, or through several side by side."""
        matrices = [self.weights.matrices.get(module) for module in modules]
        biases = [self.weights.rest.get(f"{module}.bias") for module in modules]
        if len({matrix and (matrix.bits, matrix.block, matrix.shift, matrix.grouped) for matrix in matrices}) > 1 or (
            len(modules) > 1 and (matrices[0] is None or len({bias is None for bias in biases}) > 1)
        ):
            return self.op("Concat", *(self.linear(x, module) for module in modules), axis=-1)
        bias = None if biases[0] is None else np.concatenate([b for b in biases if b is not None])
        return self._product(x, modules, f"{'+'.join(modules)}.bias", bias)

    def head(self, x: str, module: str, bias: str | None, named: str) -> str:
        """Turn x (1, length, columns) into logits, by the word embedding itself if they are tied."""
        extra = self.weights.rest.get(bias) if bias else None
        added = extra.reshape(-1) if extra is not None and extra.any() else None
        return self._product(x, (module,), "logits.bias", added, named)

    def embed(self, ids: str, module: str) -> str:
        """Look up ids (1, length), or places (length,): rows (1, length, columns) or (length, columns) of a table. A
        tied head reads the same bytes of the file under a name of its own: its kernel takes them into its own order and
        lets go of them, and of the table here only the rows that are looked up come into memory."""
        matrix = self.weights.matrices.get(module)
        if matrix is None:
            return self.op("Gather", self.rest(f"{module}.weight"), ids)
        if matrix.grouped:
            raise ValueError(f"{module} is a table with one scale a group, and no student has one")
        data = self.tensor(f"{module}.rows", matrix.data)
        scales = self.tensor(f"{module}.row_scales", matrix.scales[..., None])
        kernel: dict[str, Any] = {"bits": matrix.bits, "block_size": matrix.block, "quantize_axis": 2, "gather_axis": 0}
        blocks = self.op("GatherBlockQuantized", data, ids, scales, domain=CONTRIB, **kernel)
        width = matrix.data.shape[1] * matrix.block
        rows = self.op("Reshape", blocks, self.vector(1, -1, width))
        if width != matrix.columns:
            rows = self.op("Slice", rows, self.vector(0), self.vector(matrix.columns), self.vector(2))
        if matrix.shift:
            shifts = self.tensor(f"{module}.shifts", matrix.shift * matrix.scales[:, :1])
            rows = self.op("Add", rows, self.op("Gather", shifts, ids))
        return rows

    def activate(self, x: str, name: str) -> str:
        """Apply an activation by transformers' name of it: see `check_activation`."""
        kind, domain, settings = ACTIVATIONS[name]
        return self.op(kind, x, domain=domain, **settings)

    def scale(self, x: str, factor: float, named: str = "") -> str:
        """Multiply x by a number; by 1 it is x itself."""
        if factor == 1.0 and not named:
            return x
        return self.op("Mul", x, self.tensor(f"factor_{factor}", np.array(factor, np.float32)), named=named)

    def columns(self, tensor: str) -> int:
        """Return the last dimension of a tensor that was added."""
        return int(self._tensors[tensor].shape[-1])

    def norm(self, x: str, module: str, epsilon: float, offset: float = 0.0) -> str:
        """Return LayerNorm of x; the RMS norm where the module has no bias. `offset` is added to its weight."""
        kind, parameters = self._norm(module, offset)
        return self.op(f"{kind}LayerNormalization", x, *parameters, epsilon=epsilon)

    def add_and_norm(self, x: str, residual: str, module: str, epsilon: float, offset: float = 0.0) -> tuple[str, str]:
        """Return what `norm` makes of x + residual, and that sum."""
        result, total = f"{module}.normed", f"{module}.sum"
        kind, parameters = self._norm(module, offset)
        kind = f"Skip{kind}LayerNormalization"
        self.ops([result, "", "", total], kind, x, residual, *parameters, domain=CONTRIB, epsilon=epsilon)
        return result, total

    def _norm(self, module: str, offset: float) -> tuple[str, list[str]]:
        """Return what the operators of a norm are called by, and its parameters."""
        weight = f"{module}.weight"
        scale = self.tensor(weight, self.weights.rest[weight] + np.float32(offset)) if offset else self.rest(weight)
        if f"{module}.bias" not in self.weights.rest:
            return "Simplified", [scale]
        return "", [scale, self.rest(f"{module}.bias")]

    def save(self, folder: Path, name: str) -> None:
        """Write `name`.onnx, and its large tensors into `name`.onnx.data."""
        folder.mkdir(parents=True, exist_ok=True)
        data, protos, places = f"{name}.onnx.data", [], dict[tuple[int, int], int]()
        with (folder / data).open("wb") as file:
            for key, value in self._tensors.items():
                if value.nbytes <= INLINE_BYTES:
                    protos.append(numpy_helper.from_array(np.ascontiguousarray(value), key))
                    continue
                place = (value.ctypes.data, value.nbytes)
                if place not in places:  # the same bytes under two names are written once
                    file.write(bytes(-file.tell() % ALIGNMENT))
                    places[place] = file.tell()
                    file.write(np.ascontiguousarray(value).data)
                protos.append(_external(key, value, data, places[place]))
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, protos)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="bitmill")
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())

    def _product(
        self, x: str, modules: Sequence[str], bias_name: str, bias: NDArray[Any] | None, named: str = ""
    ) -> str:
        """Multiply x by the weights of modules that are alike, side by side, and add a bias where there is one."""
        matrices = [self.weights.matrices[module] for module in modules if module in self.weights.matrices]
        if not matrices:
            weight = self.rest(f"{modules[0]}.weight")
            y = self.op("FusedMatMul", x, weight, domain=CONTRIB, named=named if bias is None else "", transB=1)
            return y if bias is None else self.op("Add", y, self.tensor(bias_name, bias), named=named)
        name, matrix = "+".join(modules), matrices[0]
        data = self.tensor(f"{name}.codes", _joined([m.data for m in matrices]))
        scales = self.tensor(f"{name}.scales", _joined([m.scales for m in matrices]))
        inputs = [x, data, scales] + ([] if bias is None else ["", "", self.tensor(bias_name, bias)])
        size: dict[str, Any] = {"K": matrix.columns, "N": len(self._tensors[data])}
        kernel: dict[str, Any] = {"bits": matrix.bits, "block_size": matrix.block, "accuracy_level": self.level}
        if not matrix.shift:
            return self.op("MatMulNBits", *inputs, domain=CONTRIB, named=named, **size, **kernel)
        # (code + shift) * scale . x  =  code * scale . x  +  shift * scale * sum(x): the 2-bit kernel takes no
        # fractional zero point, and 4 bits would double the bytes
        y = self.op("MatMulNBits", *inputs, domain=CONTRIB, **size, **kernel)
        each = matrix.shift * self._tensors[scales]  # (rows, blocks)
        if not matrix.grouped:
            shifts = self.tensor(f"{scales}.shifts", np.ascontiguousarray(each[:, 0]))
            return self.op("Add", y, self.op("Mul", self.op("ReduceSum", x, self.vector(-1)), shifts), named=named)
        parts = self.op("Reshape", x, self.vector(1, -1, each.shape[1], matrix.block))
        sums = self.op("ReduceSum", parts, self.vector(-1), keepdims=0)  # (1, length, blocks)
        shifts = self.tensor(f"{scales}.shifts", np.ascontiguousarray(each.T))
        return self.op("Add", y, self.op("MatMul", sums, shifts), named=named)


def check_activation(name: str) -> None:
    """Raise ConfigError for an activation that has no operator that computes the same."""
    if name not in ACTIVATIONS:
        valid = ", ".join(ACTIVATIONS)
        raise ConfigError(f"model: the activation {name!r} has no operator in ONNX Runtime; valid: {valid}")


def with_activations(path: Path, activations: int) -> bytes:
    """Return the graph of a file, its tensors left where they are, with activations of another width."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = accuracy(activations)
    return bytes(model.SerializeToString())


def accuracy(activations: int) -> int:
    """Return the accuracy_level of MatMulNBits for activations of 8 or 32 bits."""
    return EXACT if activations == UNQUANTIZED else EIGHT_BITS


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _external(name: str, value: NDArray[Any], file: str, offset: int) -> TensorProto:
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    proto = TensorProto(name=name, data_type=kind, dims=value.shape, data_location=TensorProto.EXTERNAL)
    for key, entry in (("location", file), ("offset", offset), ("length", value.nbytes)):
        proto.external_data.add(key=key, value=str(entry))
    return proto
