"""The losses of a batch against their definitions, one number after another in fp64."""

import math

import pytest
import torch

from pipeline.tasks.batch import Batch
from pipeline.tasks.losses import candidate_scores, distilling_losses, reference_nats, teaching_losses

VOCABULARY, LENGTH, ROWS, GROUP = 11, 6, 3, 4
DRAW = torch.Generator().manual_seed(1)
STUDENT, TEACHER = torch.randn(2, ROWS * GROUP, LENGTH, VOCABULARY, generator=DRAW, dtype=torch.float64)
IDS = torch.randint(VOCABULARY, (ROWS * GROUP, LENGTH), generator=DRAW)
STARTS = [1 + i % 3 for i in range(ROWS * GROUP)]
LENGTHS = [STARTS[i] + 1 + i % 2 for i in range(ROWS * GROUP)]


def batch():
    distilled = torch.zeros(ROWS * GROUP, LENGTH, dtype=torch.bool)
    for i, (start, length) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        distilled[i, start - 1 : length - 1] = True
    return Batch(IDS, torch.tensor(LENGTHS), IDS[:, 1:], distilled[:, :-1], distilled, group=GROUP)


def log_softmax(values):
    largest = max(values)
    total = largest + math.log(sum(math.exp(v - largest) for v in values))
    return [v - total for v in values]


def nats_of(logits, sequence):
    return [
        -log_softmax(logits[sequence, i - 1].tolist())[int(IDS[sequence, i])]
        for i in range(STARTS[sequence], LENGTHS[sequence])
    ]


def scores_of(logits):
    means = [-sum(nats_of(logits, s)) / len(nats_of(logits, s)) for s in range(ROWS * GROUP)]
    return [means[row * GROUP : (row + 1) * GROUP] for row in range(ROWS)]


def test_scores_are_mean_log_probabilities_of_replies():
    torch.testing.assert_close(
        candidate_scores(STUDENT, batch()), torch.tensor(scores_of(STUDENT)).double(), rtol=1e-5, atol=1e-6
    )


def test_teaching_counts_the_true_reply_and_the_choice():
    found = teaching_losses(STUDENT, batch())
    expected = sum(sum(nats_of(STUDENT, row * GROUP)) for row in range(ROWS))
    assert float(found["next_token_nats"]) == pytest.approx(expected, rel=1e-5)
    choice = -sum(log_softmax(scores)[0] for scores in scores_of(STUDENT))
    assert float(found["candidates_nats"]) == pytest.approx(choice, rel=1e-5)
    nats, count = reference_nats(STUDENT, batch())
    assert float(nats) == pytest.approx(expected, rel=1e-5)
    assert int(count) == sum(LENGTHS[row * GROUP] - STARTS[row * GROUP] for row in range(ROWS))


def test_distilling_compares_tokens_and_choices_with_the_teacher():
    found = distilling_losses(STUDENT, TEACHER, batch())
    tokens = 0.0
    for sequence in range(ROWS * GROUP):
        for i in range(STARTS[sequence] - 1, LENGTHS[sequence] - 1):
            ours, theirs = (log_softmax(logits[sequence, i].tolist()) for logits in (STUDENT, TEACHER))
            tokens -= sum(math.exp(t) * o for t, o in zip(theirs, ours, strict=True))
    assert float(found["distillation_nats"]) == pytest.approx(tokens, rel=1e-5)
    choices = 0.0
    for mine, other in zip(scores_of(STUDENT), scores_of(TEACHER), strict=True):
        ours, theirs = (log_softmax(scores) for scores in (mine, other))
        choices -= sum(math.exp(t) * o for t, o in zip(theirs, ours, strict=True))
    assert float(found["candidates_nats"]) == pytest.approx(choices, rel=1e-5)


def test_the_gradient_of_the_choice_reaches_every_candidate():
    logits = STUDENT.float().requires_grad_()
    distilling_losses(logits, TEACHER.float(), batch())["candidates_nats"].backward()
    touched = logits.grad.abs().sum((1, 2)) > 0
    assert touched.all()
    assert not logits.grad[~batch().distilled].any()


def test_one_sequence_a_row_has_no_choice():
    alone = batch().references()
    assert alone.group == 1
    assert set(teaching_losses(STUDENT[::GROUP], alone)) == {"next_token_nats"}
    assert set(distilling_losses(STUDENT[::GROUP], TEACHER[::GROUP], alone)) == {"distillation_nats"}
