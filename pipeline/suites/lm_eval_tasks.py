"""Tasks of lm-eval, which is an extra: its prompts, its metrics, its way of asking a model, with data on this machine.

A task's validation split is asked, whose metrics may choose; of one that has a test split alone they are shown. A
model of conversations is asked as lm-eval's `--apply_chat_template` does: by its template, each shot a turn. What is
keyed is every request with its document, so that another version of data, prompt, template or split is another step.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import ipaddress
import json
import re
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache, partial, wraps
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from pipeline.errors import ConfigError, RunError
from pipeline.metrics import named_by_lm_eval
from pipeline.sources.content import ContentMemo
from pipeline.store.records import SplitName
from pipeline.tasks.chat import template_of
from pipeline.tasks.tokenizers import read_tokenizer

if TYPE_CHECKING:  # which takes long to import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KNOB = "evaluate.suites"
ASKED_AT_ONCE = 8  # requests of a pass, at most
SHOTS_SEED = 1234  # lm-eval's own default
DIGEST = 1  # of the form of what is remembered: another `_digest` is another number
REFUSED = {  # settings of tasks, and why
    "class": "is code of its own",
    "group": "is several tasks",
    "unsafe_code": "runs what a model writes",
    "doc_to_image": "shows more than text",
    "doc_to_audio": "shows more than text",
}
FUNCTION = "!function"  # in a YAML file, what names code
WHERE = (
    "dataset_path",
    "dataset_name",
    "dataset_kwargs",
    "metadata",
)  # settings that may name paths, not what is there
NETWORKS = (socket.AF_INET, socket.AF_INET6)
YAML = (".yaml", ".yml")


def recipe(
    task: str, encoder_decoder: bool, memo: ContentMemo, words: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """Return what a task's numbers depend on beside the models; `words` is the tokenizer by whose chat template they
    are asked, None: without one. Nothing is fetched, and requests are made once for the same files and template.

    Raises:
        ConfigError: lm-eval is not installed, does not know the task, or lacks its data, or a package, here.
    """
    if encoder_decoder:
        raise ConfigError(f"{KNOB}: lm_eval:{task} asks a decoder alone, and the model has an encoder; leave it out.")
    loaded, split = _load(task)
    filters = [own.name for own in loaded._filters]
    measured = sorted({_name(task, metric, own) for metric in loaded.aggregation() for own in filters})
    with _explained(task):
        made_of, asked = _made_of(loaded, words), partial(_digest, loaded, words)
        digest = asked() if made_of is None else memo.known(made_of, asked)
    as_chat = {} if words is None else {"chat_template": True}
    return {"lm_eval": metadata.version("lm_eval"), "split": split, "metrics": measured, "requests": digest, **as_chat}


def measure(
    task: str,
    pinned: Mapping[str, Any],
    models: Mapping[str, PreTrainedModel],
    tokenizer: Path,
    at_once: int = ASKED_AT_ONCE,
) -> dict[str, Any]:
    """Return the metrics of each model, under our names, and the split they are of; of the requests no more than
    `at_once` are in a pass. Raises RunError: the task is not, on this machine, what it was when it was `pinned`."""
    loaded, split = _load(task)
    as_chat = pinned.get("chat_template", False)
    with _explained(task):
        digest = _digest(loaded, read_tokenizer(tokenizer) if as_chat else None)
    if digest != pinned["requests"]:
        raise RunError(
            f"{KNOB}: lm_eval:{task} asks other questions here than where the plan was made; nothing is kept."
        )
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    scores = {}
    for who, model in models.items():
        asked = HFLM(pretrained=model, tokenizer=read_tokenizer(tokenizer), batch_size=min(ASKED_AT_ONCE, at_once))
        loaded.set_fewshot_seed(SHOTS_SEED)  # requests are made again
        tasks = {"tasks": {loaded.task_name: loaded}, "groups": {}, "group_map": {}}
        with offline():
            results = evaluate(asked, tasks, bootstrap_iters=0, log_samples=False, **_chat_settings(as_chat))
        scores[who] = _named(task, results["results"][loaded.task_name])
    return {"split": split, "questions": len(loaded.eval_docs), **scores, "tables": {}}


def _named(task: str, result: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a result, `metric,filter`, under our names, without their errors."""
    named = {}
    for key, value in result.items():
        metric, _, filtered = key.partition(",")
        if filtered and not metric.endswith("_stderr") and isinstance(value, int | float):
            named[_name(task, metric, filtered)] = float(value)
    return named


def _name(task: str, metric: str, filtered: str) -> str:
    return named_by_lm_eval(task, metric if filtered == "none" else f"{metric}_{filtered}")


def _load(task: str) -> tuple[Any, SplitName]:
    """Return a task of lm-eval that asks its validation split if it has one, and which split it asks. Raises
    ConfigError as `recipe` does."""
    try:
        import lm_eval.api.metrics  # noqa: F401  which registers them
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
    with _explained(task):
        if why := _refused(Path(task) if task.endswith(YAML) else manager.task_index[task].yaml_path):
            raise ConfigError(f"{KNOB}: lm_eval:{task} {why}, which is not done here; leave it out.")
        (loaded,) = manager.load([task])["tasks"].values()
        return _settled(loaded)


@contextlib.contextmanager
def _explained(task: str) -> Iterator[None]:
    """Keep what a task does off the network, and turn what it, its code or its data raise into ConfigError."""
    try:
        with offline():
            yield
    except ConfigError:
        raise
    except ImportError as error:
        needed = repr(error.name) if error.name else f"packages ({str(error).splitlines()[0]})"
        raise ConfigError(
            f"{KNOB}: lm_eval:{task} needs {needed}, which `pip install 'bitmill[eval]'` does not bring: install it "
            "beside, or leave the task out."
        ) from error
    except TemplateError as error:
        raise ConfigError(
            f"{KNOB}: lm_eval:{task} cannot be asked by the chat template of model.tokenizer, which refuses what it "
            f"says: {error}; leave it out."
        ) from error
    except Exception as error:
        raise ConfigError(
            f"{KNOB}: lm_eval:{task} cannot be asked here without the network: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}. Load its data once where there is "
            f"one (`lm-eval run --model dummy --tasks {task} --limit 1`), or leave it out."
        ) from error


def _refused(path: Path) -> str:
    """Return what a task's file asks for that is not done here, read before anything that it names is run or fetched;
    empty: nothing."""
    from lm_eval.api.registry import metric_registry
    from lm_eval.tasks._yaml_loader import load_yaml

    if code := _code_of(path):
        return f"names code, {FUNCTION} {code}"
    asked = load_yaml(path, resolve_func=False)
    for setting, why in REFUSED.items():
        if asked.get(setting):
            return f"has {setting}: it {why}"
    if asked.get("process_results"):  # which names metrics of its own
        return ""
    for metric in asked.get("metric_list") or ():
        name = str(metric.get("metric"))
        if metric.get("hf_evaluate"):
            return f"has hf_evaluate: it fetches the code of its metric {name}"
        if not Path(name).is_absolute() and name not in metric_registry:  # a function goes by its file
            return f"measures {name}, no metric of lm-eval's own: its code is fetched"
    return ""


def _code_of(path: Path) -> str:
    """Return what a YAML file of the user's own, or one that it includes, names as a function; empty: nothing."""
    import lm_eval.tasks
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    path = path.expanduser().resolve()
    if path.is_relative_to(Path(lm_eval.tasks.__file__).parent):
        return ""
    for event in yaml.parse(path.read_text()):
        if isinstance(event, yaml.ScalarEvent) and event.tag == FUNCTION:
            return str(event.value)
    included = load_yaml(path, resolve_func=False, recursive=False).get("include") or ()
    several = [included] if isinstance(included, str) else included
    return next(filter(None, (_code_of(path.parent / file) for file in several)), "")


def _settled(loaded: Any) -> tuple[Any, SplitName]:
    """Set a task to the split that it is asked of. Shots that are of no split by name are of the first that there is,
    which is named: lm-eval leaves the document that is asked out of shots of its split."""
    split: SplitName = "validation" if loaded.has_validation_docs() else "test"
    if split == "validation":
        loaded.config.test_split = loaded.config.validation_split  # of which lm-eval asks
    if loaded.config.num_fewshot is None:
        loaded.set_config("num_fewshot", 0)
    shots, of = loaded.fewshot_cfg, loaded.config
    if shots.split is None and shots.samples is None:
        shots.split = of.training_split or of.validation_split or of.test_split
    return loaded, split


@lru_cache(maxsize=2)
def _tasks(all_there_are: bool) -> Any:
    """Return lm-eval's index, of the tasks that come with it unless a file is named; reading it takes seconds."""
    import logging

    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_defaults=all_there_are)


def _chat_settings(as_chat: bool) -> dict[str, bool]:
    """Return the settings of lm-eval by which a model is asked: a shot is a turn of its own, as its command has it."""
    return {"apply_chat_template": as_chat, "fewshot_as_multiturn": as_chat}


def _made_of(loaded: Any, words: PreTrainedTokenizerBase | None) -> str | None:
    """Return a name of all that a task's digest is made of, read without making a request: lm-eval's version, the
    settings, the files that datasets keeps its splits in, and the chat template. None: data that is in no file."""
    splits = loaded.dataset if isinstance(loaded.dataset, dict) else {}
    if not splits or not all(split.cache_files for split in splits.values()):
        return None
    files = {file["filename"] for split in splits.values() for file in split.cache_files}
    kept = [(name, (at := Path(name).stat()).st_ino, at.st_size, at.st_mtime_ns) for name in sorted(files)]
    template = None if words is None else [template_of(words, "model.tokenizer"), words.special_tokens_map]
    whole = [DIGEST, metadata.version("lm_eval"), str(loaded.VERSION), loaded.dump_config(), kept, template]
    return f"requests of lm-eval {hashlib.sha256(_said(loaded, whole).encode()).hexdigest()}"


def _digest(loaded: Any, words: PreTrainedTokenizerBase | None) -> str:
    """Return a hash of all that a task asks, what counts as right, and what is measured."""
    settings = {name: value for name, value in loaded.dump_config().items() if name not in WHERE}
    loaded.set_fewshot_seed(SHOTS_SEED)
    loaded.build_all_requests(**_chat_settings(words is not None), chat_template=_written(words))
    asked = hashlib.sha256(_said(loaded, [sorted(loaded.aggregation()), str(loaded.VERSION), settings]).encode())
    for document in loaded.eval_docs:
        asked.update(_said(loaded, loaded.doc_to_target(document)).encode())
    for request in loaded.instances:
        asked.update(_said(loaded, [request.request_type, request.args, request.doc]).encode())
    return asked.hexdigest()[:32]


def _written(words: PreTrainedTokenizerBase | None) -> Callable[..., str] | None:
    """Return how lm-eval's models write messages by the template of a tokenizer, of which no model is needed."""
    if words is None:
        return None
    from lm_eval.models.huggingface import HFLM

    return partial(HFLM.apply_chat_template, SimpleNamespace(tokenizer=words, chat_template_args={}))


def _said(loaded: Any, value: Any) -> str:
    """Return a value as JSON, in which functions are as they are written, and nothing tells its place in memory."""

    def plain(other: Any) -> str:
        written = loaded.config.serialize_function(other) if callable(other) else other
        return re.sub(r" at 0x[0-9a-f]+", "", str(written))

    return json.dumps(value, sort_keys=True, default=plain)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keep this thread, and those that it starts, from asking anything that is not on this machine; threads that were
    there before, which may have a lease to keep, go on. One at a time in a process."""
    import datasets
    import evaluate
    import huggingface_hub.constants as hub

    kept = {*threading.enumerate()} - {threading.current_thread()}
    with _ALONE, contextlib.ExitStack() as restored:
        for place, name in (
            (datasets.config, "HF_HUB_OFFLINE"),
            (evaluate.config, "HF_EVALUATE_OFFLINE"),
            (hub, "HF_HUB_OFFLINE"),
        ):
            restored.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, True)
        for place, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
            own = getattr(place, name)
            restored.callback(setattr, place, name, own)
            setattr(place, name, _local(own, kept))
        yield


_ALONE = threading.RLock()


def _local(call: Callable[..., Any], kept: Collection[threading.Thread]) -> Callable[..., Any]:
    """Return a call of the socket module that raises ConnectionError for what is not on this machine, but in threads
    that are kept."""

    @wraps(call)
    def asked(first: Any, *rest: Any, **named: Any) -> Any:
        if threading.current_thread() not in kept:
            opened = isinstance(first, socket.socket)
            host = rest[0][0] if opened and first.family in NETWORKS else None if opened else first
            if not _is_here(host):
                raise ConnectionError(f"it asks the network for {host}")
        return call(first, *rest, **named)

    return asked


def _is_here(host: Any) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
