"""The labelled device keeps tensors apart as a GPU does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.second_device import SECOND, second_device

CPU = torch.device("cpu")
REFUSED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sum": lambda here, there: here + there,
    "comparison": lambda here, there: here != there,
    "in place": lambda here, there: here.add_(there),
    "product": lambda here, there: here @ there,
    "stack": lambda here, there: torch.stack([here, there]),
    "where": lambda here, there: torch.where(here > 0, here, there),
    "index there": lambda here, there: here[there.long().clamp(0, 1)],
    "gather": lambda here, there: there.gather(0, here.long().clamp(0, 1)),
    "view": lambda here, there: here.T + there[1:].reshape(-1, 2).T,
    "scalar there": lambda here, there: here * there.sum(),
    "made there": lambda here, there: here + there.new_zeros(2) + torch.ones(2, device=there.device),
}


@pytest.fixture(autouse=True)
def _second() -> Iterator[None]:
    with second_device():
        yield


@pytest.mark.parametrize("operation", REFUSED)
def test_tensors_of_two_devices_do_not_mix(operation: str) -> None:
    here, there = torch.randn(2, 2), torch.randn(2, 2).to(SECOND)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        REFUSED[operation](here, there)


def test_scalars_and_indices_of_the_cpu_go_with_everything() -> None:
    there = torch.randn(3, 2, device=SECOND)
    assert (there * torch.tensor(2.0)).device == there[torch.tensor([0, 2])].device == SECOND
    assert torch.where(there > 0, there, torch.tensor(0.0)).device == SECOND
    there[0].copy_(torch.ones(2))
    assert there[0].tolist() == [1.0, 1.0]


def test_tensors_say_where_they_are_and_are_copied_to_the_cpu() -> None:
    here = torch.ones(2)
    there = here.to("cuda")
    assert (here.device, there.device, there.cpu().device, there.float().device) == (CPU, SECOND, CPU, SECOND)
    assert (here.is_cuda, there.is_cuda, there.is_cpu) == (False, True, False)
    there[0] = 5  # in a memory of its own
    assert here.tolist() == [1.0, 1.0]
    with pytest.raises(TypeError, match="copy it to the CPU first"):
        there.numpy()
    assert there.cpu().numpy().tolist() == [5.0, 1.0]


def test_gradients_are_where_their_parameters_are() -> None:
    layer, here = nn.Linear(2, 3).to(SECOND), torch.randn(4, 2, requires_grad=True)
    layer(here.to(SECOND)).cpu().square().sum().backward()
    assert layer.weight.grad is not None
    assert here.grad is not None
    assert (layer.weight.device, layer.weight.grad.device, here.grad.device) == (SECOND, SECOND, CPU)
