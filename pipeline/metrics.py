"""Every metric once: its unit, which way is better, how it is printed, and the task it measures."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A number that is measured of a model. `task` is the only one that has it; empty: all have. `suite` is that of
    `evaluate.suites` which measures it; empty: none is needed. `of_text`: it differs between the splits, and
    validation's chooses."""

    name: str
    unit: str
    larger_is_better: bool = False
    form: str = ".4f"  # for people
    task: str = ""
    objective: bool = False  # of a sweep
    of_text: bool = True
    suite: str = ""


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
    Metric(
        "generated_first_agreement",
        "share of prompts whose first token is the teacher's",
        larger_is_better=True,
        form=".1%",
        suite="generated",
    ),
    Metric("generated_flips", "share of tokens that the student would not write", form=".1%", suite="generated"),
    Metric("generated_kl_nats", "nats a token of what the teacher writes", suite="generated"),
    Metric("packed_bytes", "bytes of packed weights", form=",.0f", of_text=False),
    Metric("ratio", "times smaller than fp32", larger_is_better=True, form=".1f", of_text=False),
    Metric("paper_ratio", "times smaller, by the paper's counting", larger_is_better=True, form=".1f", of_text=False),
)
METRICS = {metric.name: metric for metric in _ALL}
LM_EVAL = "lm_eval"  # before task and metric, in the names of its metrics, and before the task, in that of a suite
LOWER = ("perplexity", "bits_per_byte", "brier_score", "bleurt_diff", "ter")  # of lm-eval's metrics
MEASURE = {"next_utterance": "accuracy", "summarization": "rougeL"}  # what a task is measured by; others: perplexity


def metric_of(name: str) -> Metric | None:
    """Return a metric of ours, or of a task of lm-eval; None: it is neither."""
    if name.startswith(f"{LM_EVAL}_") and name not in METRICS:
        return Metric(name, "as lm-eval has it", larger_is_better=not name.endswith(LOWER), suite=LM_EVAL)
    return METRICS.get(name)


def named_by_lm_eval(task: str, metric: str) -> str:
    """Return our name of a metric of a task: `lm_eval_TASK_METRIC`, in letters, digits and underscores; a task of a
    YAML file of one's own goes by the file's name."""
    task = re.sub(r".*/|\.ya?ml$", "", task)
    return re.sub(r"[^A-Za-z0-9]+", "_", f"{LM_EVAL}_{task}_{metric}").rstrip("_")


def measure_of(task: str) -> str:
    """Return the metric that a task is measured by."""
    return MEASURE.get(task, "perplexity")


def larger_is_better(name: str) -> bool:
    """Tell whether the larger value is better; of a metric that is not ours, the smaller is."""
    metric = metric_of(name)
    return metric is not None and metric.larger_is_better


def minimised(name: str, value: float) -> float:
    """Return a metric's value so that less is better."""
    return -value if larger_is_better(name) else value


def bounded(knob: str, metric: str, bound: float, scores: Mapping[str, float]) -> tuple[bool, str]:
    """Return whether scores of the validation split keep a bound, `at_least` or `at_most`, and the numbers in words."""
    wanted = f"{knob.replace('_', ' ')} {bound:g}"
    if metric not in scores:
        return False, f"{metric} was not measured on validation; wanted {wanted}"
    value = scores[metric]
    return value <= bound if knob == "at_most" else value >= bound, f"{metric} is {value:.4g} on validation; {wanted}"


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
    metric = metric_of(name)
    return format(value, metric.form if metric is not None else ".4g")
