"""What is known of each metric: which way is better, whose it is, what a task is measured by, how it is printed."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from pipeline.config.data import TaskSettings
from pipeline.config.sweep import Sweep
from pipeline.metrics import (
    METRICS,
    bounded,
    larger_is_better,
    measure_of,
    metric_of,
    minimised,
    named_by_lm_eval,
    objectives,
    printed,
)
from pipeline.store.records import Size
from pipeline.tasks.scoring import Scores

TASKS = get_args(TaskSettings.model_fields["name"].annotation)
OF_ALL = ("gap", "bytes", "perplexity", "kl_nats", "top1_agreement", "bits_per_byte")
SMALLER = {*OF_ALL, "nats_per_token", "packed_bytes", "generated_flips", "generated_kl_nats"} - {"top1_agreement"}
LARGER = {
    "top1_agreement",
    "accuracy",
    "rouge1",
    "rouge2",
    "rougeL",
    "ratio",
    "paper_ratio",
    "generated_first_agreement",
}


def test_every_metric_is_known_by_its_own_name():
    assert {metric.name for metric in METRICS.values()} == METRICS.keys() == SMALLER | LARGER
    assert all(name == metric.name for name, metric in METRICS.items())


@pytest.mark.parametrize("name", sorted(LARGER | SMALLER))
def test_each_metric_has_its_direction(name):
    assert larger_is_better(name) == (name in LARGER)
    better, worse = (2.0, 1.0) if name in LARGER else (1.0, 2.0)
    assert minimised(name, better) < minimised(name, worse)
    assert abs(minimised(name, better)) == better


def test_of_a_metric_that_is_not_ours_the_smaller_is_better():
    assert not larger_is_better("somebody's own")
    assert minimised("somebody's own", 3.0) == 3.0


def test_a_metric_of_lm_eval_has_our_name_and_its_direction():
    assert named_by_lm_eval("arc_easy", "acc_norm") == "lm_eval_arc_easy_acc_norm"
    assert (
        named_by_lm_eval("my/own-task.yaml", "exact_match_strict-match") == "lm_eval_own_task_exact_match_strict_match"
    )
    assert larger_is_better("lm_eval_arc_easy_acc")
    assert not larger_is_better("lm_eval_wikitext_word_perplexity")
    assert metric_of("lm_eval_arc_easy_acc").of_text
    assert metric_of("somebody's own") is None


def test_a_bound_is_kept_or_not_in_words():
    scores = {"generated_flips": 0.1}
    assert bounded("at_most", "generated_flips", 0.1, scores)[0]
    assert not bounded("at_least", "generated_flips", 0.2, scores)[0]
    kept, said = bounded("at_least", "lm_eval_x_acc", 0.2, scores)
    assert (kept, said) == (False, "lm_eval_x_acc was not measured on validation; wanted at least 0.2")


@pytest.mark.parametrize(
    ("task", "measure"),
    [
        ("language_modeling", "perplexity"),
        ("next_utterance", "accuracy"),
        ("summarization", "rougeL"),
        ("", "perplexity"),
    ],
)
def test_each_task_is_measured_by_one_of_its_metrics(task, measure):
    assert measure_of(task) == measure
    assert METRICS[measure].task in ("", task)


def test_every_task_reports_the_objectives_of_all_and_its_own():
    own = {"next_utterance": ("accuracy",), "summarization": ("rouge1", "rouge2", "rougeL")}
    assert set(TASKS) == {"language_modeling", "chat", *own}
    for task in TASKS:
        assert objectives(task) == (*OF_ALL, *own.get(task, ()))
        assert measure_of(task) in objectives(task)
    assert set(objectives()) == {name for task in TASKS for name in objectives(task)}
    assert {metric.task for metric in METRICS.values()} <= {"", *TASKS}


def test_what_no_text_shows_in_is_of_no_split():
    assert {name for name, metric in METRICS.items() if not metric.of_text} == {
        "bytes",
        *Size.model_fields,
    } & METRICS.keys()


def test_a_sweep_takes_every_objective_and_nothing_else():
    assert Sweep(space={"distill.lr": [1e-3]}, objectives=objectives()).objectives == objectives()
    for name in METRICS.keys() - set(objectives()):
        with pytest.raises(ValueError, match=f"no trial reports '{name}'; valid: {', '.join(objectives())}"):
            Sweep(space={"distill.lr": [1e-3]}, objectives=(name,))


def test_what_is_scored_and_what_is_packed_is_known():
    scores = Scores([2.0], [4], bytes=3, kl_nats=1.0, agreed=1, compared=2, of_rows={"accuracy": [1.0, 0.0]})
    assert scores.metrics().keys() <= METRICS.keys()
    assert {"packed_bytes", "ratio", "paper_ratio"} <= Size.model_fields.keys()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("perplexity", 17.456, "17.46"),
        ("perplexity", 12345.678, "12345.68"),
        ("gap", -0.012345, "-0.0123"),
        ("kl_nats", 0.1, "0.1000"),
        ("bits_per_byte", 1.23456, "1.2346"),
        ("nats_per_token", 2.0, "2.0000"),
        ("top1_agreement", 0.9876, "98.8%"),
        ("accuracy", 1.0, "100.0%"),
        ("rougeL", 31.25, "31.25"),
        ("bytes", 34567890.0, "34,567,890"),
        ("packed_bytes", 1234, "1,234"),
        ("ratio", 14.44, "14.4"),
        ("paper_ratio", 7.0, "7.0"),
        ("somebody's own", 123456.0, "1.235e+05"),
        ("somebody's own", 0.12345, "0.1235"),
        ("perplexity", math.nan, "nan"),
        ("perplexity", None, ""),
        ("somebody's own", None, ""),
    ],
)
def test_each_metric_is_printed_in_its_own_form(name, value, text):
    assert printed(name, value) == text


def test_every_metric_can_be_printed():
    assert all(printed(name, 0.5) for name in METRICS)
