"""What the tests of single quantizers share: examples, a pass through one quantizer, sums in numpy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from pipeline.quant.granularity import Granularity
from pipeline.quant.quantizers import QUANTIZERS, WeightQuantizer
from pipeline.quant.quantizers.base import after_step
from pipeline.quant.spec import BitWidths, QuantSpec

GRANULARITIES = ("per_tensor", "per_channel")


def make(
    name: str, weight: torch.Tensor, bits: int = 2, granularity: str | Mapping[str, int] = "per_tensor", **options: str
) -> WeightQuantizer:
    """A quantizer of a weight; the granularity is given as a configuration writes it."""
    parsed = Granularity.parse(granularity)
    spec = QuantSpec(BitWidths(bits, bits, 32), quantizer=name, granularity=parsed, **options)
    return QUANTIZERS[name](weight, bits, parsed, spec)


def example(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights with heavy tails and a mean that is not zero, and an upstream gradient."""
    generator = torch.Generator().manual_seed(11)
    weight = (torch.randn(9, 31, generator=generator, dtype=torch.float64) ** 3 + 0.1) * scale
    return weight.to(dtype), torch.randn(9, 31, generator=generator, dtype=torch.float64).to(dtype)


def clipping_steps(weight: torch.Tensor, bits: int, granularity: str) -> torch.Tensor:
    """Steps for which some weights lie beyond the grid at any width, each a little different."""
    magnitude = (
        weight.abs().mean(1, keepdim=True) if granularity == "per_channel" else weight.abs().mean().reshape(1, 1)
    )
    factors = 0.8 + torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(3))
    return magnitude * factors.to(weight.dtype) / 2 ** (bits - 2)


def passed(quantizer: WeightQuantizer, weight: torch.Tensor, upstream: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The quantized weight and the gradient of the weight; those of parameters are left in their `grad`."""
    latent = weight.clone().requires_grad_()
    quantized = quantizer(latent)
    quantized.backward(upstream)
    return quantized.detach().numpy(), latent.grad.numpy()


def total(values: np.ndarray, granularity: str) -> np.ndarray:
    return values.sum(axis=1, keepdims=True) if granularity == "per_channel" else values.sum().reshape(1, 1)


def mean(values: np.ndarray, granularity: str) -> np.ndarray:
    return values.mean(axis=1, keepdims=True) if granularity == "per_channel" else values.mean().reshape(1, 1)


def nearest(places: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The nearest of some levels."""
    return levels[np.abs(places[..., None] - levels).argmin(-1)]


def trained(
    quantizer: WeightQuantizer, weight: torch.Tensor, upstream: torch.Tensor, steps: int = 5, lr: float = 1e-2
) -> torch.Tensor:
    """The latent weight after some steps of Adam along `upstream`, as the training loop takes them."""
    latent = torch.nn.Parameter(weight.clone())
    learned = [parameter for parameter in quantizer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([latent, *learned], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        quantizer(latent).backward(upstream)
        optimizer.step()
        after_step([(quantizer, latent, optimizer.state[latent]["exp_avg_sq"])])
    return latent.detach()
