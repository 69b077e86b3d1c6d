"""Logits part by part: every position once, never more than the limit, and the gradients of the whole."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.config.data import TaskSettings
from pipeline.models.hidden_states import FinishedHead, teachers_logits
from pipeline.tasks import chunks
from pipeline.tasks.batch import Batch
from pipeline.tasks.chunks import backward_by_parts, parts_of
from pipeline.tasks.language_modeling import LanguageModeling
from pipeline.tasks.losses import losses_of_logits
from tests.operations import Launches

VOCABULARY, HIDDEN = 40, 8
SHARE = torch.tensor(0.25, dtype=torch.float64)


def batch_of(sequences: int, length: int, group: int = 1) -> Batch:
    ids = torch.arange(sequences * length).reshape(sequences, length) % VOCABULARY
    lengths = torch.tensor([length - n % 3 for n in range(sequences)]).clamp(min=1)
    batch = LanguageModeling(TaskSettings(block_length=max(8, length))).batch(ids, lengths)
    return Batch(**{**vars(batch), "group": group})


@given(st.integers(1, 9), st.integers(2, 12), st.sampled_from([1, 2, 4]), st.integers(1, 600))
def test_parts_hold_every_position_once_and_no_more_logits_than_the_limit(
    rows: int, length: int, group: int, limit: int
) -> None:
    batch = batch_of(rows * group, length, group)
    times = torch.zeros(rows * group, length)
    for part in parts_of(batch, VOCABULARY, limit):
        times[part] += 1
        sequences, positions = times[part].shape
        assert sequences % group == 0
        assert sequences * positions * VOCABULARY <= max(
            limit, group * length * VOCABULARY if group > 1 else VOCABULARY
        )
    assert (times == 1).all()


def test_rows_that_can_be_divided_are_all_of_one_shape() -> None:
    assert {part[0].stop - part[0].start for part in parts_of(batch_of(12, 4), VOCABULARY, 5 * 4 * VOCABULARY)} == {4}


@pytest.mark.parametrize("learned", ["targets", "states", "draws"])
@pytest.mark.parametrize("limit", [3 * VOCABULARY, 20 * VOCABULARY])
def test_losses_and_gradients_are_those_of_the_whole_table(
    monkeypatch: pytest.MonkeyPatch, learned: str, limit: int
) -> None:
    torch.manual_seed(0)
    batch, head, teacher = batch_of(4, 9), nn.Linear(HIDDEN, VOCABULARY), nn.Linear(HIDDEN, VOCABULARY)
    states, taught, tokens = torch.randn(4, 9, HIDDEN), torch.randn(4, 9, HIDDEN), torch.randint(VOCABULARY, (4, 9, 6))
    whole_of = {"targets": None, "states": (teacher, taught), "draws": (None, tokens)}[learned]
    largest = []

    def losses(prepared: torch.Tensor, part: Batch, at: Any) -> dict[str, torch.Tensor]:
        largest.append(prepared.shape[:-1].numel() * VOCABULARY)
        return losses_of_logits(head, prepared, part, whole_of and (whole_of[0], whole_of[1][at]), False)

    def learn(size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        monkeypatch.setitem(chunks.CHUNK_LOGITS, "cpu", size)
        largest.clear()
        head.zero_grad()
        given = states.clone().requires_grad_()
        shares = dict.fromkeys(("next_token_nats", "distillation_nats"), SHARE)
        sums, prepared, gradient = backward_by_parts(head, VOCABULARY, given, batch, losses, shares)
        prepared.backward(gradient)
        assert given.grad is not None
        assert head.weight.grad is not None
        return sums, given.grad, head.weight.grad.clone()

    whole, parts = learn(2**20), learn(limit)
    assert max(largest) <= limit
    assert whole[0].keys() == parts[0].keys()
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(parts[1:], whole[1:], rtol=1e-5, atol=1e-7)
    direct = losses_of_logits(head, states, batch, whole_of, False)
    torch.testing.assert_close(whole[0], {name: loss.detach() for name, loss in direct.items()})


def test_a_teacher_in_bf16_keeps_its_distribution_wherever_its_logits_lie(device: torch.device) -> None:
    """About -100, as GPT-2's, where bf16 has a number every half: they are moved to where it has more."""
    torch.manual_seed(0)
    head, states = nn.Linear(HIDDEN, VOCABULARY), torch.randn(50, 3, HIDDEN)
    with torch.no_grad():
        states[..., 0], head.weight[:, 0] = 10.0, -10.0

        def kl(finish: tuple[float, float], given: torch.device) -> float:
            """Finished by a divisor and a soft cap, which bounds what is there, not what was moved."""
            whole = FinishedHead(head, None, *finish).to(given)
            logits = teachers_logits(whole, states.to(given)).cpu().double().log_softmax(-1)
            exact = FinishedHead(copy.deepcopy(head).cpu(), None, *finish)(states).double().log_softmax(-1)
            return float((exact.exp() * (exact - logits)).sum(-1).mean())

        assert abs(kl((1.0, 0.0), torch.device("cpu"))) < 1e-8
        assert 0 < kl((1.0, 0.0), device) < 1e-5
        assert 0 < kl((2.0, 0.0), device) < 1e-5
        assert 1e-4 < kl((1.0, 300.0), device) < 0.05


def test_a_gpus_table_is_filled_up_to_whole_tiles() -> None:
    from pipeline.models.hidden_states import head_product
    from tests.second_device import second_device

    head, states = nn.Linear(HIDDEN, VOCABULARY), torch.randn(2, 3, HIDDEN)
    expected = head(states)
    with second_device() as device, Launches() as launched:
        logits = head_product(head.to(device), states.to(device))
        assert logits.shape == expected.shape
    assert "constant_pad_nd" in launched.names
    torch.testing.assert_close(logits.detach(), expected.detach())
