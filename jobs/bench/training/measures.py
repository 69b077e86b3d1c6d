"""What is measured of a step: time, memory, what it launches, and what the device could do."""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

# Views move no number, and what only makes room or asks for facts about a tensor launches nothing.
FREE = {
    *("detach", "alias", "_unsafe_view", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"),
    *("_record_function_enter_new", "_record_function_exit"),
}
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
TOP_KERNELS, NAME_WIDTH = 10, 120
KINDS = ("H100", "H200")  # of GPUs that have floors
Take = Callable[[int], Any]  # a step by its number


class Launches(TorchDispatchMode):
    """Counts the operations, inside, that compute something; of a list of tensors at once it is one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    @property
    def count(self) -> int:
        """Return how many there were."""
        return len(self.names)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Spread:
    """Median, least and most of several measurements."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Return the spread of some values."""
        return cls(statistics.median(values), min(values), max(values))


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_a_step(take: Take, first: int, steps: int, device: torch.device) -> float:
    """Return the mean time of steps from number `first` on; nothing waits between them that the step does not."""
    wait(device)
    begun = time.perf_counter()
    for step in range(first, first + steps):
        take(step)
    wait(device)
    return (time.perf_counter() - begun) / steps


class Memory:
    """The memory, bytes, of what is made and run after this object was: allocated on a GPU, else resident."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        _let_go(device)
        self._before = self._now()

    def peak_of(self, take: Take, step: int) -> int:
        """Return the most that a step holds, with all that was made for it."""
        _let_go(self._device)  # an allocator may keep what was freed since, and it would count as the step's
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # from here the kernel's peak counts anew
        take(step)
        wait(self._device)
        return self._most() - self._before

    def _now(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else _status("VmRSS")

    def _most(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _status("VmHWM")


def _let_go(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def peak_flops(device: torch.device) -> float:
    """Return the floating-point operations a second of a large product, the best of five: bf16 on a GPU, else fp32."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = [seconds_a_step(lambda step: left @ right, 0, 4, device) for _ in range(6)]
    return float(2 * size**3 / min(times[1:]))


def counted(take: Take, step: int, device: torch.device) -> dict[str, float]:
    """Return how much a step launches: on a GPU by the profiler, with what the host waits for and how long the GPU is
    busy; else the operations that torch dispatches."""
    if device.type != "cuda":
        with Launches() as launched:
            take(step)
        return {"launches": launched.count}
    recorded = profiled(take, step, device)
    launches, waits, kernels, busy_us = 0, -1, 0, 0.0  # our own wait is no step's
    for event in recorded.events() or ():
        if event.device_type == DeviceType.CUDA:
            if not event.is_user_annotation:  # such as an optimizer's step, over its kernels
                kernels += 1
                busy_us += event.time_range.elapsed_us()
        elif event.name.startswith(LAUNCHES):
            launches += 1
        elif event.name in WAITS:
            waits += 1
    return {"launches": launches, "waits": max(0, waits), "kernels": kernels, "busy_ms": busy_us / 1e3}


def profiled(take: Take, step: int, device: torch.device) -> Any:
    """Return what torch's profiler records of one step."""
    gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *gpu]) as recorded:
        take(step)
        wait(device)
    return recorded


def top_table(take: Take, step: int, device: torch.device) -> str:
    """Return what takes the most time of a step: kernels of a GPU, and operations on the host."""
    recorded = profiled(take, step, device)
    kernels: dict[str, list[float]] = {}
    for event in recorded.events() or ():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            kernels.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)
    longest = sorted(kernels.items(), key=lambda kernel: -sum(kernel[1]))[:TOP_KERNELS]
    lines = [f"{sum(times):9.3f} ms {len(times):6d} calls  {name[:NAME_WIDTH]}" for name, times in longest]
    table = recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=TOP_KERNELS)
    return "\n".join([*lines, table])


def described(device: torch.device) -> dict[str, str]:
    """Return what was measured when, and with which libraries."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    kind = next((known for known in KINDS if known in name), name) if device.type == "cuda" else "cpu"
    versions = {library: metadata.version(library) for library in ("torch", "transformers")}
    return {"device": name, "kind": kind, "date": datetime.now(UTC).date().isoformat(), **versions}
