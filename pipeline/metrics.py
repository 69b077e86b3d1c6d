"""Every metric once: its unit, which way is better, how it is printed, and the task it measures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A number that is measured of a model. `task` is the only one that has it; empty: all have. `of_text`: it differs
    between the splits, and validation's chooses."""

    name: str
    unit: str
    larger_is_better: bool = False
    form: str = ".4f"  # for people
    task: str = ""
    objective: bool = False  # of a sweep
    of_text: bool = True


_ALL = (
    Metric("gap", "nats a token, log(student's perplexity / teacher's)", objective=True),
    Metric("bytes", "bytes of packed weights", form=",.0f", objective=True, of_text=False),
    Metric("perplexity", "", form=".2f", objective=True),
    Metric("kl_nats", "nats a token, student from teacher", objective=True),
    Metric("top1_agreement", "share of tokens", larger_is_better=True, form=".1%", objective=True),
    Metric("bits_per_byte", "bits a byte of text", objective=True),
    Metric("nats_per_token", "nats a token"),
    Metric("accuracy", "share of rows", larger_is_better=True, form=".1%", task="next_utterance", objective=True),
    Metric("rouge1", "F-measure, 0-100", larger_is_better=True, form=".2f", task="summarization", objective=True),
    Metric("rouge2", "F-measure, 0-100", larger_is_better=True, form=".2f", task="summarization", objective=True),
    Metric("rougeL", "F-measure, 0-100", larger_is_better=True, form=".2f", task="summarization", objective=True),
    Metric("packed_bytes", "bytes of packed weights", form=",.0f", of_text=False),
    Metric("ratio", "times smaller than fp32", larger_is_better=True, form=".1f", of_text=False),
    Metric("paper_ratio", "times smaller, by the paper's counting", larger_is_better=True, form=".1f", of_text=False),
)
METRICS = {metric.name: metric for metric in _ALL}
MEASURE = {"next_utterance": "accuracy", "summarization": "rougeL"}  # what a task is measured by; others: perplexity


def measure_of(task: str) -> str:
    """Return the metric that a task is measured by."""
    return MEASURE.get(task, "perplexity")


def larger_is_better(name: str) -> bool:
    """Tell whether the larger value is better; of a metric that is not ours, the smaller is."""
    return name in METRICS and METRICS[name].larger_is_better


def minimised(name: str, value: float) -> float:
    """Return a metric's value so that less is better."""
    return -value if larger_is_better(name) else value


def gap_nats(teacher: Mapping[str, float], student: Mapping[str, float]) -> float:
    """Return log(student's perplexity / teacher's), nats a token, from the metrics of both on one split."""
    return math.log(student["perplexity"] / teacher["perplexity"])


def objectives(task: str | None = None) -> tuple[str, ...]:
    """Return the metrics that a sweep may minimise or maximise; with a task, those that its trials report."""
    return tuple(m.name for m in _ALL if m.objective and (task is None or m.task in ("", task)))


def printed(name: str, value: float | None) -> str:
    """Return a value for people; four digits of a metric that is not ours, nothing where there is none."""
    if value is None:
        return ""
    return format(value, METRICS[name].form if name in METRICS else ".4g")
