"""A device that every machine has: it computes on the CPU, and refuses what a GPU refuses.

Inside `second_device()` tensors can be made on and moved to `SECOND`, and say that they are there. An operation on
tensors of both devices raises, as torch does, and so does `numpy()` of one that is not on the CPU. The device is a
label on a tensor's storage, which views, copies that share memory, and what autograd saves have in common.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU, SECOND = torch.device("cpu"), torch.device("cuda", 0)
COPIES = ("copy_", "_to_copy")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
CPU_ALONE = ("numpy", "__array__")
WAITING = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
_reads: list[str] = []


@contextlib.contextmanager
def second_device() -> Iterator[torch.device]:
    """Have the second device while inside."""
    group = torch._C._group_tensors_by_device_and_dtype

    def grouped(lists: Any, with_indices: bool = False) -> Any:  # else by the device of the data beneath
        by_dtype = group(lists, with_indices)
        return {(device_of(found[0][0][0]), dtype): found for (_, dtype), found in by_dtype.items()}

    torch._C._group_tensors_by_device_and_dtype = grouped  # by which torch clips
    try:
        with _Operations(), _Functions():
            yield SECOND
    finally:
        torch._C._group_tensors_by_device_and_dtype = group


@contextlib.contextmanager
def product_devices() -> Iterator[set[str]]:
    """Tell on which kinds of devices matrices are multiplied while inside."""
    with _Products() as products:
        yield products.devices


@contextlib.contextmanager
def host_reads() -> Iterator[list[str]]:
    """List, once it is left, the operations inside by which the host waited for values of the second device: copies to
    the CPU, and what has a shape or a branch that depends on values."""
    _reads.clear()
    reads: list[str] = []
    yield reads
    reads += _reads


def device_of(tensor: Tensor) -> torch.device:
    """Return the device that a tensor is on."""
    label: torch.device = getattr(tensor.untyped_storage(), "label", tensor.device)
    return label


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    tensor.untyped_storage().label = device  # type: ignore[attr-defined]
    return tensor


class Event:
    """An event of the second device, for which the host may wait."""

    def __init__(self, blocking: bool = False) -> None:
        self.recorded = False

    def record(self) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded
        _reads.append("event")


class _Operations(TorchDispatchMode):
    """Refuses operations on tensors of both devices, and places what the others return."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        device = device_of(args[0]) if name in COPIES else self._common_device(name, args, kwargs)
        returned = func(*args, **kwargs)
        if name == "copy_" and device == CPU and device_of(args[1]) == SECOND and args[2:] != (True,):
            _reads.append("copy to the CPU")
        if device == SECOND and WAITING.intersection(func.tags) and not _takes_places(name, args):
            _reads.append(name)
        if device == SECOND:  # else what is made is on the CPU, and a view or what was changed is where it was
            for tensor in _tensors([returned]):
                if not hasattr(storage := tensor.untyped_storage(), "label"):
                    storage.label = SECOND
        return returned

    def _common_device(self, name: str, args: Any, kwargs: Any) -> torch.device:
        devices = set()
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, Tensor):
                # A scalar on the CPU goes with everything.
                devices |= {device_of(argument)} - ({CPU} if argument.ndim == 0 else set())
            elif isinstance(argument, list | tuple):
                # And so does an index, but not an element of a list that is stacked.
                devices |= {*map(device_of, _tensors(argument))} - ({CPU} if name in INDEXING else set())
        if len(devices) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found cpu and {SECOND}")
        return next(iter(devices), CPU)


class _Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm"):
            self.devices.add(device_of(args[-1]).type)
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Makes and moves tensors, and tells where they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(func, torch._ops.OpOverload):  # what C++ asks for, which names the device of the data beneath
            return func(*args, **kwargs)
        if func in (Tensor.backward, torch.autograd.backward):
            with self:  # a mode is off in what it calls, and Python has a part in the backward pass
                ends = (args[0],) if isinstance(args[0], Tensor) else tuple(args[0])
                starts = tuple(kwargs.get("grad_tensors") or map(torch.ones_like, ends))
                engine = torch.autograd.Variable._execution_engine
                return engine.run_backward(ends, starts, False, False, (), True, True)
        if func == Tensor.device.__get__:
            return device_of(args[0])
        if func in (Tensor.is_cuda.__get__, Tensor.is_cpu.__get__):
            return device_of(args[0]).type == ("cpu" if func == Tensor.is_cpu.__get__ else "cuda")
        if getattr(func, "__name__", "") in CPU_ALONE and device_of(args[0]) == SECOND:
            raise TypeError(f"can't do {func.__name__} on a tensor of {SECOND}; copy it to the CPU first")
        if func is Tensor.pin_memory:
            return args[0]
        kwargs.pop("pin_memory", None)
        if func is Tensor.tolist and device_of(args[0]) == SECOND:
            _reads.append("tolist")
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return _moved(func, *args, **kwargs)
        if kwargs.get("device") is None or torch.device(kwargs["device"]).type not in (CPU.type, SECOND.type):
            return func(*args, **kwargs)
        device = torch.device(kwargs.pop("device"))
        return _placed(func(*args, **kwargs, device=CPU), CPU if device.type == CPU.type else SECOND)


def _moved(
    func: Any, tensor: Tensor, *args: Any, copy: bool = False, non_blocking: bool = False, **kwargs: Any
) -> Tensor:
    """Do what Tensor.to, cpu and cuda do."""
    given = [*args, *kwargs.values()]
    device = {Tensor.cpu: CPU, Tensor.cuda: SECOND}.get(func)
    dtype = next((value for value in given if isinstance(value, torch.dtype)), None)
    for value in given if device is None else ():
        if isinstance(value, Tensor):
            device, dtype = device_of(value), value.dtype
        elif isinstance(value, str | int | torch.device) and not isinstance(value, bool):
            device = torch.device(value)
    if device is not None and device.type not in (CPU.type, SECOND.type):  # meta
        return tensor.to(device, dtype)
    cast = tensor if dtype is None else tensor.to(dtype)
    if device is None or device.type == device_of(tensor).type:
        return cast.clone() if copy and cast is tensor else cast
    if device.type == CPU.type:
        _reads.append("copy to the CPU")
    elif not non_blocking:
        _reads.append("copy from the CPU")
    moved: Tensor = _Move.apply(cast, CPU if device.type == CPU.type else SECOND)
    return moved


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device) -> Tensor:
        ctx.origin = device_of(tensor)
        return _placed(tensor.clone(), device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _placed(grads[0].clone(), ctx.origin), None


def _takes_places(name: str, args: Any) -> bool:
    """Tell whether an indexing takes places, of which it has as many results; not a mask, whose are counted first."""
    return name == "index" and not any(index.dtype == torch.bool for index in _tensors(args[1]))


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
