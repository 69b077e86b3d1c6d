"""Under autocast levels, codes, scales and their gradients are those of fp32; what is multiplied is rounded to bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.quant import Quant
from pipeline.config.training import Distill
from pipeline.quant.grid import fake_quantize_activation
from pipeline.quant.modules import InputQuantizer, QuantizedEmbedding, QuantizedLinear, QuantizedWeight, TiedHead
from pipeline.quant.quantizers import QUANTIZERS, WeightQuantizer
from pipeline.quant.quantizers.base import after_step
from tests.quant.cases import make
from tests.training.cases import Case

WIDTHS = {"twn": (2,), "statistics": (2,)}
CASES = [(name, bits) for name in QUANTIZERS for bits in WIDTHS.get(name, (2, 4, 8))]
PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm")


def autocast(on: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


class Products(TorchDispatchMode):
    """Keeps what matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func.overloadpacket) in PRODUCTS:
            self.factors += args[-2:]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", {"per_group": 32}], ids=str)
@pytest.mark.parametrize(("name", "bits"), CASES)
def test_a_weight_on_its_grid_and_all_gradients_are_bit_for_bit_those_of_fp32(
    name: str, bits: int, granularity: Any
) -> None:
    weight, upstream = normal(16, 64), normal(64, 16).T

    def computed(on: bool) -> list[Tensor]:
        quantizer, latent = make(name, weight, bits, granularity), nn.Parameter(weight.clone())
        with autocast(on):
            level = quantizer(latent)
            quantizer.blend = 0.25
            faded = QuantizedWeight(latent, quantizer).on_grid()
            quantizer.blend = 1.0
            frozen = quantizer.freeze(latent)
            (level * upstream).sum().backward()
            after_step([(quantizer, latent, torch.ones_like(latent))])
        gradients = [p.grad for p in (latent, *quantizer.parameters()) if p.grad is not None]
        return [level, faded, *frozen, *gradients, *(p.detach().clone() for p in quantizer.parameters())]

    plain, cast = computed(on=False), computed(on=True)
    assert len(plain) == len(cast)
    for ours, theirs in zip(plain, cast, strict=True):
        assert theirs.dtype == ours.dtype
        assert theirs.dtype in (torch.float32, torch.int8)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("over", ["token", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_activations_are_quantized_in_fp32(bits: int, symmetric: bool, over: Any) -> None:
    x = 3 * normal(4, 7, 32)
    plain = fake_quantize_activation(x, bits, symmetric, over)
    with autocast():
        assert torch.equal(fake_quantize_activation(x, bits, symmetric, over), plain)
    rounded = fake_quantize_activation(x.bfloat16(), bits, symmetric, over)  # of what a product gave in bf16
    assert torch.equal(rounded, fake_quantize_activation(x.bfloat16().float(), bits, symmetric, over).bfloat16())


def layers(quantizer: WeightQuantizer, weight: Tensor) -> dict[str, nn.Module]:
    inputs = InputQuantizer(8, True, "token")
    embedding = nn.Embedding(*weight.shape, _weight=weight.clone())
    table = QuantizedEmbedding(embedding, quantizer)
    return {"linear": QuantizedLinear(weight, None, quantizer, inputs), "head": TiedHead(table, inputs)}


@pytest.mark.parametrize(("bits", "moved"), [(2, 0.004), (4, 0.03), (8, 0.5)])
@pytest.mark.parametrize("layer", ["linear", "head"])
def test_what_is_multiplied_is_the_level_rounded_once(layer: str, bits: int, moved: float) -> None:
    weight, x = normal(48, 64), normal(5, 64)
    quantizer = make("quantgpt", weight, bits, "per_channel")
    level, codes = quantizer(weight).detach(), fake_quantize_activation(x, 8, True)
    module = layers(quantizer, weight)[layer]
    with Products() as products, autocast():
        product = module(x)
    x_factor, weight_factor = products.factors
    assert torch.equal(x_factor, codes.bfloat16())
    assert torch.equal(weight_factor.T, level.bfloat16())
    assert torch.equal(product, F.linear(codes.bfloat16(), level.bfloat16()))
    steps = (level.bfloat16().float() - level).abs() / quantizer.scale_of(weight).detach()
    assert moved / 4 < float(steps.max()) < moved
    assert torch.equal(module(x), F.linear(codes, level))  # and without autocast the level itself


def test_a_training_pass_multiplies_in_bf16_and_validation_in_fp32(tmp_path: Path) -> None:
    case = Case.make(tmp_path)
    recipe = Distill(steps=2, batch_size=4, eval_rows=4, precision="bf16", contrast_weight=0.0)
    loop = case.loop(case.run(recipe, "bf16"), Quant(bits="8-8-8"))
    with Products() as trained:
        loop.train_step(0)
    with Products() as validated:
        loop.validate()
    assert torch.bfloat16 in {factor.dtype for factor in trained.factors}
    assert {factor.dtype for factor in validated.factors} == {torch.float32}
