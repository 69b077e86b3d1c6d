"""Tasks of lm-eval, which is an extra: its prompts, its metrics, its way of asking a model, with data on this machine.

A task's validation split is asked, whose metrics may choose; of one that has a test split alone they are shown. What
is keyed is every request with its document, so that another version of data, prompt or split is another step.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, RunError
from pipeline.metrics import named_by_lm_eval
from pipeline.store.records import SplitName
from pipeline.tasks.tokenizers import read_tokenizer

if TYPE_CHECKING:  # which takes long to import
    from transformers import PreTrainedModel

KNOB = "evaluate.suites"
ASKED_AT_ONCE = 8  # requests of a pass
SHOTS_SEED = 1234  # lm-eval's own default
REFUSED = ("UNSAFE_CODE", "MULTIMODAL")  # kinds of tasks, by lm-eval's names
YAML = (".yaml", ".yml")


def recipe(task: str, encoder_decoder: bool) -> dict[str, Any]:
    """Return what a task's numbers depend on beside the models. Nothing is fetched.

    Raises:
        ConfigError: lm-eval is not installed, does not know the task, or its data is not on this machine.
    """
    if encoder_decoder:
        raise ConfigError(f"{KNOB}: lm_eval:{task} asks a decoder alone, and the model has an encoder; leave it out.")
    loaded, split = _load(task)
    return {"lm_eval": metadata.version("lm_eval"), "split": split, "requests": _digest(loaded)}


def measure(
    task: str, pinned: Mapping[str, Any], models: Mapping[str, PreTrainedModel], tokenizer: Path
) -> dict[str, Any]:
    """Return the metrics of each model, under our names, and the split they are of. Raises RunError: the task is not,
    on this machine, what it was when it was `pinned`."""
    loaded, split = _load(task)
    if _digest(loaded) != pinned["requests"]:
        raise RunError(
            f"{KNOB}: lm_eval:{task} asks other questions here than where the plan was made; nothing is kept."
        )
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    scores = {}
    for who, model in models.items():
        asked = HFLM(pretrained=model, tokenizer=read_tokenizer(tokenizer), batch_size=ASKED_AT_ONCE)
        loaded.set_fewshot_seed(SHOTS_SEED)  # requests are made again
        tasks = {"tasks": {loaded.task_name: loaded}, "groups": {}, "group_map": {}}
        with offline():
            results = evaluate(lm=asked, task_dict=tasks, bootstrap_iters=0, log_samples=False)
        scores[who] = _named(task, results["results"][loaded.task_name])
    return {"split": split, "questions": len(loaded.eval_docs), **scores, "tables": {}}


def _named(task: str, result: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a result, `metric,filter`, under our names, without their errors."""
    named = {}
    for key, value in result.items():
        metric, _, filtered = key.partition(",")
        if filtered and not metric.endswith("_stderr") and isinstance(value, int | float):
            kind = metric if filtered == "none" else f"{metric}_{filtered}"
            named[named_by_lm_eval(task, kind)] = float(value)
    return named


def _load(task: str) -> tuple[Any, SplitName]:
    """Return a task of lm-eval that asks its validation split if it has one, and which split it asks. Raises
    ConfigError as `recipe` does."""
    try:
        from lm_eval.api.task import ConfigurableTask
    except ImportError as error:
        raise ConfigError(
            f"{KNOB} names lm_eval:{task}, and lm-eval cannot be imported ({error}): `pip install 'bitmill[eval]'`, or "
            "leave it out."
        ) from error
    manager = _tasks(not task.endswith(YAML))
    if not task.endswith(YAML) and task not in manager.all_subtasks:
        groups = {*manager.all_groups, *manager.all_tags}
        near = difflib.get_close_matches(task, manager.all_subtasks, 3)
        why = "is a group of tasks of lm-eval: name them one by one" if task in groups else "is no task of lm-eval"
        raise ConfigError(
            f"{KNOB}: {task!r} {why}{f'; near: {chr(44).join(near)}' if near else ''}. `lm-eval ls tasks` lists them."
        )
    try:
        with offline():
            (loaded,) = manager.load([task])["tasks"].values()
            if not isinstance(loaded, ConfigurableTask) or any(getattr(loaded, kind, False) for kind in REFUSED):
                raise ValueError("it is code of its own, runs what a model writes, or shows more than text")
            return _settled(loaded)
    except Exception as error:  # whatever a task, its code or its data may raise
        raise ConfigError(
            f"{KNOB}: lm_eval:{task} cannot be asked here without the network: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}. Load its data once where there is "
            f"one (`lm-eval run --model dummy --tasks {task} --limit 1`), or leave it out."
        ) from error


def _settled(loaded: Any) -> tuple[Any, SplitName]:
    """Set a task to the split that it is asked of, and make its requests."""
    split: SplitName = "validation" if loaded.has_validation_docs() else "test"
    if split == "validation":
        loaded.config.test_split = loaded.config.validation_split  # of which lm-eval asks
    if loaded.config.num_fewshot is None:
        loaded.set_config("num_fewshot", 0)
    loaded.set_fewshot_seed(SHOTS_SEED)
    loaded.build_all_requests()
    return loaded, split


@lru_cache(maxsize=2)
def _tasks(all_there_are: bool) -> Any:
    """Return lm-eval's index, of the tasks that come with it unless a file is named; reading it takes seconds."""
    import logging

    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_defaults=all_there_are)


def _digest(loaded: Any) -> str:
    """Return a hash of all that a task asks, what counts as right, and what is measured."""
    asked = hashlib.sha256(json.dumps([sorted(loaded.aggregation()), str(loaded.VERSION)]).encode())
    for request in loaded.instances:
        line = [request.request_type, request.args, request.doc]
        asked.update(json.dumps(line, sort_keys=True, default=str).encode())
    return asked.hexdigest()[:32]


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keep `datasets` and the hub's client from asking for anything that is not on this machine."""
    import datasets
    import huggingface_hub.constants as hub

    before = datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before
