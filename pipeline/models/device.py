"""Where models compute: the only place that looks for a GPU, and at what the CPU is made for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.config.resources import Resources

CPU = torch.device("cpu")


def this_device() -> torch.device:
    """Return the GPU that this process sees, its first; else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else CPU


def device_for(resources: Resources) -> torch.device:
    """Return where this process does the work of a stage: on its GPU if workers are to have one, else on the CPU. Ray
    shows every GPU of a node to a worker that asked for none."""
    return this_device() if resources.gpus_per_worker else CPU


def emulates_bf16() -> bool:
    """Tell whether this machine's CPU has no units for bf16 (as AVX512-BF16 or AMX are), and takes many times as long
    as in fp32."""
    return not any(present for unit, present in torch.cpu.get_capabilities().items() if "bf16" in unit)


def bf16_on_gpu(device: torch.device) -> torch.autocast:
    """Return a context in which a full-precision model's products are bf16 on a GPU, and fp32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def room_on_host(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an empty tensor on the host, pinned if a GPU is to copy into it, which nobody then waits for."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def all_so_far(device: torch.device) -> Callable[[], None]:
    """Return what waits until a device has done what it was asked to do before, and not for what it is asked since."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event(blocking=True)
    event.record()
    return event.synchronize
