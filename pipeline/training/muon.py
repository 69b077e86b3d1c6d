"""Muon (Jordan et al. 2024), orthogonalised in what the device is fast at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

UPDATE_RMS = 0.2  # what torch's "match_rms_adamw" makes the root mean square of an update, at a rate of 1


def muon_for(device: torch.device) -> type[torch.optim.Muon]:
    """Return the Muon of a device: torch's own, which orthogonalises in bf16, and on CPUs the same in fp32."""
    return MuonInFp32 if device.type == "cpu" else torch.optim.Muon


class MuonInFp32(torch.optim.Muon):
    """Torch's Muon with `nesterov` and `match_rms_adamw`, its settings and its state, without bf16.

    A CPU that has no units for bf16 emulates it, at 30 times the time of fp32, and what is emulated differs from what
    is not: in fp32 CPUs agree with each other.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        momentum, rate, state = group["momentum"], group["lr"], self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        average = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        ahead = grad.lerp(average, momentum)
        update = orthogonalised(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"])
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.add_(update, alpha=-rate * UPDATE_RMS * max(parameter.shape) ** 0.5)


def orthogonalised(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Return about U V^T of a matrix U S V^T, in its own dtype: each step of Newton and Schulz turns X into
    (a + b G + c G^2) X with G = X X^T, and singular values end near 1."""
    a, b, c = coefficients
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T
