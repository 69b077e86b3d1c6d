"""Forward products of integers are exact, and the layers around them train as those of floating point do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config.quant import Quant
from pipeline.quant import integers
from pipeline.quant.grid import activation_codes, fake_quantize_activation
from pipeline.quant.integers import _exact
from pipeline.quant.modules import QuantizedLinear, QuantTarget, multiply_integers, prepare, quantizers
from pipeline.quant.quantizers import QUANTIZERS
from pipeline.quant.stacks import Stacks

EXACT_AT_8 = _exact(torch.device("cpu"), 127)


def layer_of(quantizer: str, bits: str, granularity: object, symmetric: bool, over: str = "token") -> nn.Module:
    """One quantized layer, 72 inputs and 40 outputs, whose products are integers where they can be."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(72 if granularity != {"per_group": 32} else 96, 40))
    model[0].weight.data[3] = 0.0  # a row of zeros
    fields = {"quantizer": quantizer, "bits": bits, "granularity": granularity, "activation_range": over}
    prepare(model, [QuantTarget("0", "linear", symmetric)], Quant.model_validate(fields).spec())
    for _, _, each in quantizers(model):
        for parameter in each.parameters():
            parameter.data *= 1.1
    multiply_integers(model)
    return model.train()


def inputs_of(model: Any, tokens: int = 34) -> Tensor:
    x = torch.randn(2, tokens // 2, model[0].weight.shape[1], generator=torch.Generator().manual_seed(1)) ** 3
    return x.requires_grad_()


class Multiplied:
    """Counts products of integers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, real = 0, torch._int_mm

        def counting(a: Tensor, b: Tensor) -> Tensor:
            self.count += 1
            return real(a, b)

        monkeypatch.setattr(torch, "_int_mm", counting)


CASES = [
    pytest.param(
        *(name, bits, granularity),
        id=f"{name}-{bits}-{granularity}",
        marks=pytest.mark.skipif(bits == 8 and not EXACT_AT_8, reason="this CPU's 8-bit products are inexact"),
    )
    for name in QUANTIZERS
    for bits in (2, 4, 8)
    for granularity in ("per_channel", "per_tensor")
    if (bits == 2 or name not in ("twn", "statistics")) and (name, bits) != ("seq", 8)
]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("quantizer", "bits", "granularity"), CASES)
def test_a_layer_gives_the_product_of_the_codes_that_ship(quantizer, bits, granularity, symmetric, monkeypatch):
    model: Any = layer_of(quantizer, f"{bits}-{bits}-8", granularity, symmetric)
    x, counted = inputs_of(model), Multiplied(monkeypatch)
    with torch.no_grad(), Stacks(model).quantized_once():
        given = model(x)
        assert torch.equal(model(x), given)  # a further pass, by the same codes
    assert counted.count >= 2  # one may be the first look at what this CPU can
    layer = model[0]
    frozen, scale = layer.quantizer.freeze(layer.weight)
    doubled = 2 * frozen.long() + int(2 * layer.quantizer.grid.shift)
    codes, step, low = activation_codes(x.detach().flatten(0, 1), symmetric)
    whole = codes.long() + (0 if low is None else 128)
    expected = (whole @ doubled.T).double() * step.double()
    if low is not None:
        expected += low.double() * doubled.sum(1).double()
    expected = expected * (scale.double() / 2).reshape(1, -1) + layer.bias.detach().double()
    error = (given.flatten(0, 1).double() - expected).abs().amax(1) / expected.abs().amax(1)
    assert float(error.max()) < 1e-6


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_of_inputs_are_those_of_floating_point(symmetric):
    x = torch.randn(50, 72, generator=torch.Generator().manual_seed(2)) ** 3
    x[7] = 0.0
    codes, step, low = activation_codes(x, symmetric)
    values = codes * step if low is None else (codes.float() + 128) * step + low
    torch.testing.assert_close(values, fake_quantize_activation(x, 8, symmetric), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_floating_point(symmetric, autocast):
    """And gather over micro-batches as those do."""
    model: Any = layer_of("seq", "2-2-8", "per_channel", symmetric)
    plain: Any = copy.deepcopy(model)
    plain[0].integers = False
    results = []
    for each in (model, plain):
        x = inputs_of(each, 80)
        with Stacks(each).quantized_once():
            for part in x.split(1):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    given = each(part)
                given.float().square().sum().backward()
        results.append((given, [x.grad, *(parameter.grad for parameter in each.parameters())]))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert ours.dtype == theirs.dtype == (torch.bfloat16 if autocast else torch.float32)
    for a, b in zip([ours, *our_gradients], [theirs, *their_gradients], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert float((a - b).detach().norm() / b.detach().norm()) < (2e-2 if autocast else 1e-5)


@pytest.mark.parametrize(
    ("changed", "tokens"),
    [
        ({"granularity": {"per_group": 32}}, 34),
        ({"bits": "8-8-8", "quantizer": "seq"}, 34),  # 256 levels with none at zero do not fit into 8 bits
        ({"bits": "2-2-32"}, 34),
        ({"bits": "32-32-8"}, 34),
        ({"over": "tensor"}, 34),
        ({}, 16),
    ],
    ids=str,
)
def test_what_integers_cannot_give_stays_floating_point(changed, tokens, monkeypatch):
    settings = {"quantizer": "lsq", "bits": "2-2-8", "granularity": "per_channel", "symmetric": True, **changed}
    model, counted = layer_of(**settings), Multiplied(monkeypatch)
    x = inputs_of(model, tokens)
    with torch.no_grad(), Stacks(model).quantized_once():
        given = model(x)
    assert torch.equal(given, model(x))
    assert counted.count == 0


def test_what_fades_in_or_validates_stays_floating_point(monkeypatch):
    model: Any = layer_of("lsq", "2-2-8", "per_channel", True)
    x, counted = inputs_of(model), Multiplied(monkeypatch)
    model[0].quantizer.blend = 0.5
    with Stacks(model).quantized_once():
        model(x)
    model[0].quantizer.blend = 1.0
    model(x)
    model.eval()(x)
    assert counted.count == 0
    assert isinstance(model[0], QuantizedLinear)
    assert model[0].codes is None


def test_a_diverged_weight_is_seen_in_the_product():
    model: Any = layer_of("lsq", "2-2-8", "per_channel", True)
    model[0].weight.data[2, 1] = float("nan")
    with torch.no_grad(), Stacks(model).quantized_once():
        given = model(inputs_of(model))
    assert given[..., 2].isnan().all()
    assert given[..., 4].isfinite().all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_diverged_input_is_seen_in_the_product(symmetric):
    model: Any = layer_of("lsq", "2-2-8", "per_channel", symmetric)
    x = inputs_of(model).detach()
    x[0, 3, 5], x[1, 2] = float("nan"), float("nan")
    with torch.no_grad(), Stacks(model).quantized_once():
        given = model(x)
    assert given[0, 3].isnan().all()
    assert given[1, 2].isnan().all()
    assert given.isnan().sum() == 2 * given.shape[-1]


def test_a_processor_whose_products_are_inexact_multiplies_in_floating_point(monkeypatch):
    model: Any = layer_of("lsq", "2-2-8", "per_channel", True)
    multiplied = Multiplied(monkeypatch)
    monkeypatch.setattr(integers, "_exact", lambda device, edge: False)
    with torch.no_grad(), Stacks(model).quantized_once():
        model(inputs_of(model))
    assert multiplied.count == 0
