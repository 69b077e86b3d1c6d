"""Tokens drawn from a teacher: as often as their probability says, whatever the batch, and right on average."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.distill.draws import drawn, starts
from pipeline.distill.losses import drawn_distillation_loss, logit_distillation_loss

VOCABULARY = 9


def shares(tokens: torch.Tensor, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """The share of the draws that each token of the vocabulary has, fp64 (..., vocabulary)."""
    counts = torch.zeros(*tokens.shape[:-1], vocabulary, dtype=torch.float64)
    return counts.scatter_add_(-1, tokens, torch.ones_like(tokens, dtype=torch.float64)) / tokens.shape[-1]


@given(st.integers(0, 2**32), st.integers(1, 60), st.floats(0, 0.999), st.sampled_from([0.1, 1.0, 6.0]))
@settings(max_examples=40, deadline=None)
def test_a_token_is_drawn_as_often_as_its_probability_says_but_for_less_than_once(
    seed: int, draws: int, start: float, spread: float
) -> None:
    logits = torch.randn(2, 3, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * spread
    tokens = drawn(logits, torch.full((2, 3), start), draws)
    assert tokens.shape == (2, 3, draws)
    assert (tokens.diff() >= 0).all()
    assert float((shares(tokens) - logits.double().softmax(-1)).abs().max()) * draws < 1 + 1e-4


@pytest.mark.parametrize("draws", [1, 3, 50])
def test_the_shares_of_all_starts_together_are_the_probabilities(draws: int) -> None:
    logits = 2 * torch.randn(1, 1, VOCABULARY, generator=torch.Generator().manual_seed(1))
    every = 4000
    start = ((torch.arange(every) + 0.5) / every)[:, None]
    found = shares(drawn(logits.expand(every, 1, -1), start, draws)).mean((0, 1))
    torch.testing.assert_close(found, logits.double().softmax(-1)[0, 0], rtol=0, atol=2 / every)


def test_what_cannot_be_is_never_drawn() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf]).expand(1, 2, -1)
    start = torch.tensor([[0.0, 1 - 2**-24]])  # the least and the most
    for draws in (1, 50, 10_000):
        assert set(drawn(logits, start, draws).flatten().tolist()) <= {1, 3}


def test_a_wide_vocabulary_keeps_its_tail() -> None:
    """Half of the mass is on tokens of 2e-6 each, which sums in fp32 would lose beside the other half."""
    logits = torch.cat([torch.tensor([math.log(250_000.0)]), torch.zeros(250_000)])
    tokens = drawn(logits.expand(1, 4, -1), starts(torch.arange(4)[None]), 1000)
    torch.testing.assert_close((tokens > 0).double().mean(-1), torch.full((1, 4), 0.5).double(), rtol=0, atol=1e-3)
    assert (tokens.diff()[:, :, 500:] - 500).abs().max() <= 1


def test_the_start_depends_on_the_row_and_the_position_alone() -> None:
    rows = torch.randint(0, 300, (5, 7), generator=torch.Generator().manual_seed(0))
    all_at_once = starts(rows)
    assert ((all_at_once >= 0) & (all_at_once < 1)).all()
    assert len(all_at_once.unique()) == rows.numel()
    assert torch.equal(starts(rows[[3, 1]]), all_at_once[[3, 1]])


def test_loss_and_gradient_are_on_average_those_of_the_whole_distribution() -> None:
    """Over 600 rows, whose starts are independent: within four standard errors, in each of the logits."""
    generator = torch.Generator().manual_seed(3)
    rows, draws, length = 600, 4, 2
    student, teacher = 2 * torch.randn(2, 1, length, VOCABULARY, generator=generator)
    ids = torch.randint(0, 50_000, (rows, length), generator=generator)
    tokens = drawn(teacher.expand(rows, -1, -1), starts(ids), draws)
    valid = torch.ones(1, length, dtype=torch.bool)

    def of(loss: object, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = student.clone().requires_grad_()
        nats, _ = loss(leaf, given, valid)  # type: ignore[operator]
        nats.backward()
        return nats.detach(), leaf.grad.double()

    exact, sampled = of(logit_distillation_loss, teacher), [of(drawn_distillation_loss, t[None]) for t in tokens]
    for expected, values in zip(exact, zip(*sampled, strict=True), strict=True):
        each = torch.stack(values)
        error = each.std(0) / math.sqrt(rows)
        assert (error > 0).any()
        assert ((each.mean(0) - expected).abs() <= 4 * error + 1e-7).all()


def test_draws_at_equal_distances_scatter_less_than_independent_ones() -> None:
    logits = 2 * torch.randn(1, 1, VOCABULARY, generator=torch.Generator().manual_seed(1))
    rows, draws = 500, 10
    found = shares(drawn(logits.expand(rows, 1, -1), starts(torch.arange(rows)[:, None]), draws))
    exact = logits.double().softmax(-1)
    scattered = float((found - exact).square().sum(-1).mean())
    independent = float((1 - exact.square().sum()) / draws)
    assert scattered < 0.5 * independent
