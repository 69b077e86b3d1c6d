import math
from functools import partial

import numpy as np
import pytest
import torch

from pipeline.distill.losses import (
    contrastive_loss,
    directions,
    drawn_distillation_loss,
    logit_distillation_loss,
    target_loss,
    valid_tokens,
)
from pipeline.distill.negatives import draw_offsets, other_positions

LENGTHS = torch.tensor([7, 1, 4, 2])
WIDTH, VOCABULARY, HIDDEN, TAU = 7, 11, 6, 0.1


def example():
    generator = torch.Generator().manual_seed(2)
    return {
        "ids": torch.randint(0, VOCABULARY, (4, WIDTH), generator=generator),
        "student": torch.randn(4, WIDTH, VOCABULARY, generator=generator) * 2,
        "teacher": torch.randn(4, WIDTH, VOCABULARY, generator=generator) * 2,
        "query": torch.randn(4, WIDTH, HIDDEN, generator=generator),
        "states": torch.randn(4, WIDTH, HIDDEN, generator=generator),
        "drawn": torch.randint(0, VOCABULARY, (4, WIDTH, 5), generator=generator),
    }


def offsets_of(lengths, rows, negatives=3):
    return [draw_offsets(5, 9, row, int(length), negatives) for row, length in zip(rows, lengths, strict=True)]


def negatives_of(states, lengths, rows, negatives=3):
    return other_positions(states, lengths, offsets_of(lengths, rows, negatives))


def hard(data, rows):
    return next_tokens(data["student"][rows], data["ids"][rows], LENGTHS[rows])


def next_tokens(logits, ids, lengths):
    """The first token of a row is context only."""
    return target_loss(logits, ids[:, 1:], valid_tokens(lengths, ids.shape[1])[:, 1:])


def soft(data, rows):
    return logit_distillation_loss(data["student"][rows], data["teacher"][rows], valid_tokens(LENGTHS[rows], WIDTH))


def sampled(data, rows):
    return drawn_distillation_loss(data["student"][rows], data["drawn"][rows], valid_tokens(LENGTHS[rows], WIDTH))


def contrast(data, rows):
    negatives = negatives_of(data["states"][rows], LENGTHS[rows], rows)
    valid = valid_tokens(LENGTHS[rows], WIDTH)
    return contrastive_loss(data["query"][rows], data["states"][rows], valid, negatives, TAU)


LOSSES = {"hard": hard, "soft": soft, "sampled": sampled, "contrast": contrast}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
EVERY_ROW = [0, 1, 2, 3]


def log_softmax(z):
    return z - z.max() - math.log(np.exp(z - z.max()).sum())


def cosine(a, b):
    return a @ b / math.sqrt((a @ a) * (b @ b))


def test_valid_tokens_are_the_first_of_each_row():
    assert valid_tokens(torch.tensor([2, 0, 3]), 3).tolist() == [[True, True, False], [False] * 3, [True] * 3]


def test_target_loss_matches_the_reference():
    data = example()
    z, ids = data["student"].double().numpy(), data["ids"].numpy()
    nats = [-log_softmax(z[r, t])[ids[r, t + 1]] for r, n in enumerate(LENGTHS) for t in range(n - 1)]
    total, count = hard(data, EVERY_ROW)
    assert count.item() == len(nats) == 6 + 0 + 3 + 1
    assert total.item() == pytest.approx(sum(nats), rel=1e-6)


def test_distillation_loss_matches_the_reference():
    data = example()
    s, t = data["student"].double().numpy(), data["teacher"].double().numpy()
    places = [(r, i) for r, n in enumerate(LENGTHS) for i in range(n)]
    total, count = soft(data, EVERY_ROW)
    assert count.item() == len(places) == 14
    expected = -sum(np.exp(log_softmax(t[p])) @ log_softmax(s[p]) for p in places)
    assert total.item() == pytest.approx(expected, rel=1e-6)


def test_drawn_tokens_teach_what_the_distribution_of_their_shares_does():
    data, totals, grads = example(), [], []
    shares = torch.nn.functional.one_hot(data["drawn"], VOCABULARY).double().mean(2)
    for loss, given in ((sampled, data["drawn"]), (soft, shares.log())):
        student = data["student"].clone().requires_grad_()
        changed = {**data, "student": student, ("drawn" if loss is sampled else "teacher"): given}
        total, count = loss(changed, EVERY_ROW)
        total.backward()
        assert count.item() == 14
        totals.append(total.item())
        grads.append(student.grad)
    assert totals[0] == pytest.approx(totals[1], rel=1e-6)
    torch.testing.assert_close(grads[0], grads[1])
    least, _ = sampled({**data, "student": shares.log().clamp(min=-30)}, EVERY_ROW)
    entropy = -(shares * shares.clamp(min=1e-300).log()).sum(-1)[valid_tokens(LENGTHS, WIDTH)].sum()
    assert least.item() == pytest.approx(entropy.item(), rel=1e-6)


def test_contrastive_loss_matches_the_reference():
    data = example()
    q, h = data["query"].double().numpy(), data["states"].double().numpy()
    expected = 0.0
    for row, (n, offsets) in enumerate(zip(LENGTHS.tolist(), offsets_of(LENGTHS, EVERY_ROW), strict=True)):
        for i in range(n):
            positive = math.exp(cosine(q[row, i], h[row, i]) / TAU)
            negatives = [math.exp(cosine(q[row, i], h[row, (i + k) % n]) / TAU) for k in offsets.tolist()]
            expected -= math.log(positive / (positive + sum(negatives)))
    total, count = contrast(data, EVERY_ROW)
    assert count.item() == 14
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_distillation_reaches_the_teachers_entropy_where_student_is_teacher():
    teacher = example()["teacher"]
    student = teacher.clone().requires_grad_()
    valid = valid_tokens(LENGTHS, WIDTH)
    total, count = logit_distillation_loss(student, teacher, valid)
    total.backward()
    p = teacher.double().softmax(-1)
    entropy = -(p * p.log()).sum(-1)[valid].sum()
    assert abs(total.item() - entropy.item()) / count.item() < 1e-6
    assert student.grad.abs().max().item() < 1e-6
    worse, _ = logit_distillation_loss(student + torch.randn_like(student) * 0.05, teacher, valid)
    assert worse > total


@each_loss
@pytest.mark.parametrize("split", [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[3, 1], [0, 2]], [[2, 0, 3, 1]]])
def test_sums_and_counts_do_not_depend_on_the_split_or_the_order_of_rows(loss, split):
    data = example()
    total, count = loss(data, EVERY_ROW)
    parts = [loss(data, rows) for rows in split]
    assert sum(c for _, c in parts) == count
    torch.testing.assert_close(sum(s for s, _ in parts), total, rtol=1e-8, atol=0)  # products are fp32


@each_loss
def test_padding_changes_neither_the_loss_nor_the_gradient(loss):
    padding = ~valid_tokens(LENGTHS, WIDTH)
    results = []
    for fill in (0.0, 1e4):
        data = example()
        data["ids"][padding] = int(fill) % VOCABULARY
        for name in ("student", "teacher", "query", "states"):
            data[name][padding] = torch.randn(int(padding.sum()), data[name].shape[-1]) * fill
            data[name].requires_grad_()
        total, _ = loss(data, EVERY_ROW)
        total.backward()
        results.append((total, data["query" if loss is contrast else "student"].grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not results[0][1][padding].any()


@each_loss
def test_wider_padding_changes_nothing(loss):
    data = example()
    narrow = {name: tensor[2:, :4] for name, tensor in data.items()}
    rows, lengths = [2, 3], LENGTHS[2:]
    total, count = {
        hard: lambda: next_tokens(narrow["student"], narrow["ids"], lengths),
        soft: lambda: logit_distillation_loss(narrow["student"], narrow["teacher"], valid_tokens(lengths, 4)),
        sampled: lambda: drawn_distillation_loss(narrow["student"], narrow["drawn"], valid_tokens(lengths, 4)),
        contrast: lambda: contrastive_loss(
            narrow["query"],
            narrow["states"],
            valid_tokens(lengths, 4),
            negatives_of(narrow["states"], lengths, rows),
            TAU,
        ),
    }[loss]()
    wide_total, wide_count = loss(data, rows)
    assert count == wide_count
    torch.testing.assert_close(total, wide_total, rtol=1e-6, atol=0)


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_fp32_and_summed_in_fp64(loss, dtype):
    half = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in example().items()}
    full = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in half.items()}
    total, _ = loss(half, EVERY_ROW)
    assert total.dtype == torch.float64
    assert torch.equal(total, loss(full, EVERY_ROW)[0])


@each_loss
def test_a_row_of_one_token_adds_nothing_without_a_context_or_a_negative(loss):
    total, count = loss(example(), [1])
    assert torch.isfinite(total)
    assert count.item() == (0 if loss is hard else 1)
    assert (total.item() == 0) == (loss not in (soft, sampled))


def test_directions_and_their_gradient_are_those_of_states_over_their_lengths():
    generator = torch.Generator().manual_seed(2)
    states, upstream = (torch.randn(3, 4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    states[0, 0] = 0
    ours, theirs = (states.clone().requires_grad_() for _ in range(2))
    for given, function in ((ours, directions), (theirs, partial(torch.nn.functional.normalize, dim=-1))):
        result = function(given)
        torch.testing.assert_close(result[1].norm(dim=-1), torch.ones(4, dtype=torch.float64))
        result.backward(upstream)
    assert ours.grad is not None
    torch.testing.assert_close(directions(states), torch.nn.functional.normalize(states, dim=-1))
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_contrastive_loss_falls_as_the_positives_cosine_rises():
    length, negatives = 4, 3
    teacher = torch.eye(length, length + 1).unsqueeze(0)
    drawn = other_positions(teacher, torch.tensor([length]), [draw_offsets(0, 0, 0, length, negatives)])
    valid = torch.ones(1, length, dtype=torch.bool)
    totals = []
    for cos in (-1.0, -0.5, 0.0, 0.3, 0.6, 0.9, 1.0):
        query = cos * teacher
        query[..., -1] = math.sqrt(1 - cos**2)  # the rest points away from every teacher state
        total, _ = contrastive_loss(query * 3, teacher, valid, drawn, TAU)
        expected = math.log1p(negatives * math.exp(-cos / TAU))
        assert total.item() / length == pytest.approx(expected, abs=2e-6)  # two ulp of the score cos / tau = 10
        totals.append(total.item())
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == len(totals)


def test_more_negatives_cost_more():
    data = example()
    few, many = (
        contrastive_loss(
            data["query"],
            data["states"],
            valid_tokens(LENGTHS, WIDTH),
            negatives_of(data["states"], LENGTHS, EVERY_ROW, k),
            TAU,
        )[0]
        for k in (1, 6)
    )
    assert many > few
