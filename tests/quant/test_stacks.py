"""Weights quantized in stacks are what each is by itself, and so are the gradients."""

import copy

import pytest
import torch
from torch import nn

from pipeline.config.quant import Quant
from pipeline.quant import stacks
from pipeline.quant.modules import QuantTarget, prepare, quantizers
from pipeline.quant.quantizers import QUANTIZERS
from pipeline.quant.stacks import Stacks
from tests.operations import Launches

LINEAR = [QuantTarget(f"{n}", "linear") for n in range(1, 5)]


def model_of(quantizer: str, granularity: object, bits: str = "2-2-32") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(9, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(128, 64)
    )
    fields = {"quantizer": quantizer, "granularity": granularity, "bits": bits}
    prepare(model, [QuantTarget("0", "embedding"), *LINEAR], Quant.model_validate(fields).spec())
    for number, (_, _, each) in enumerate(quantizers(model)):
        for parameter in each.parameters():  # no two alike
            parameter.data *= 1 + 0.1 * number
    return model.train()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", {"per_group": 32}], ids=str)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("blend", [1.0, 0.3])
def test_a_stack_gives_each_weight_its_own_levels_and_gradients(quantizer, granularity, blend):
    alone = model_of(quantizer, granularity)
    for _, _, each in quantizers(alone):
        each.blend = blend
    together, ids = copy.deepcopy(alone), torch.arange(9)
    alone(ids).square().sum().backward()
    with Stacks(together).quantized_once():
        for part in ids.split(4):  # in parts, whose gradients gather
            together(part).square().sum().backward()
    expected, given = gradients(alone), gradients(together)
    assert given.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(given[name], gradient, rtol=1e-4, atol=1e-5)


def test_matrices_that_are_alike_share_operations():
    few, many = (model_of("quantgpt", "per_channel", bits) for bits in ("2-2-32", "2-4-32"))
    counts = []
    for model in (few, many):
        with Launches() as launched, Stacks(model).quantized_once():
            pass
        counts.append(launched.count)
    # Three with 64 columns and one with 128; the embedding is one of the three, unless its levels are others.
    assert counts[0] < counts[1] < 3 * 15


def test_a_large_matrix_is_no_part_of_a_stack(monkeypatch):
    monkeypatch.setitem(stacks.LARGE, "cpu", 64 * 64 - 1)
    model = model_of("quantgpt", "per_channel")
    with Launches() as launched, Stacks(model).quantized_once():
        pass
    assert "cat" not in launched.names  # which would have copied it


def test_nothing_moves_where_what_is_inside_fails():
    model = model_of("seq", "per_channel")

    def failing():
        with Stacks(model).quantized_once():
            model(torch.arange(9)).sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert all(weight.grad is None for _, weight, _ in quantizers(model))
    assert torch.isfinite(model(torch.arange(9))).all()  # and each is quantized anew
