"""Lineage, both ways: what a version was made of, by the keys that records name, and what else was made of the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.resources import Resources
from pipeline.flow.line import STAGES
from pipeline.store.locations import scratch_dir, storage_uri
from pipeline.store.records import ModelVersion, Tokens
from pipeline.store.step_store import FinishedStep, StepDir
from pipeline.tracking.registry import Registered

Steps = dict[str, FinishedStep[Any]]  # by stage
StepDirs = Callable[[str, str], StepDir]  # of a step, by stage and key


def step_dirs_of(resources: Resources) -> StepDirs:
    """Return what finds the directory of a step in the store of these resources, by stage and key."""
    root, scratch, cached = storage_uri(resources), scratch_dir(resources), resources.local_cache_gib
    return lambda stage, key: StepDir(root, stage, key, scratch, local_cache_gib=cached)


def steps_behind(step_dir_of: StepDirs, keys: Mapping[str, str], former: bool = False) -> Steps:
    """Return the steps of these keys, by stage, and all that they were made of; those that the store does not have any
    more are left out, and what only they name with them: with `former`, only where nothing is remembered of them. They
    have no files then."""
    behind: Steps = {}
    waiting = list(keys.items())
    while waiting:
        stage, key = waiting.pop()
        if stage not in STAGES or stage in behind:
            continue
        step_dir = step_dir_of(stage, key)
        record = step_dir.record(STAGES[stage].record)
        if record is None and former:
            record = step_dir.former(STAGES[stage].record)
        if record is not None:
            behind[stage] = FinishedStep(record, step_dir)
            waiting += record.inputs.items()
    return behind


@dataclass(frozen=True)
class Lineage:
    """A registered version, the steps behind it, those of them whose files are gone; the other versions that share a
    step with it, by stage, and those that share a file of text, by its content; the versions that its student was
    trained on from, the nearest first, and those that were trained on from it."""

    version: Registered
    steps: Steps
    gone: frozenset[str]
    shared: dict[str, list[Registered]]
    sharing_text: dict[str, list[Registered]]
    ancestors: list[str]
    descendants: list[str]


def lineage_of(version: Registered, others: Sequence[Registered], step_dir_of: StepDirs) -> Lineage:
    """Return the lineage of a version among all that there are."""
    steps = steps_behind(step_dir_of, {ModelVersion.stage: version.key, **version.lineage}, former=True)
    gone = (stage for stage, step in steps.items() if step.dir.record(STAGES[stage].record) is None)
    texts = _contents(steps.get(Tokens.stage))
    shared, sharing_text = dict[str, list[Registered]](), dict[str, list[Registered]]()
    for other in others:
        if (other.name, other.version) == (version.name, version.version):
            continue
        behind = steps_behind(step_dir_of, other.lineage, former=True)
        for stage, step in behind.items():
            if stage in steps and steps[stage].record.key == step.record.key:
                shared.setdefault(stage, []).append(other)
        for content in texts & _contents(behind.get(Tokens.stage)):
            sharing_text.setdefault(content, []).append(other)
    ancestors, descendants = _ancestors(version.title, _starts(others)), trained_on_from([version], others)
    return Lineage(version, steps, frozenset(gone), shared, sharing_text, ancestors, descendants)


def trained_on_from(versions: Sequence[Registered], others: Sequence[Registered]) -> list[str]:
    """Return the titles of the versions that were trained on from some, or from one that was."""
    titles, starts = {version.title for version in versions}, _starts(others)
    return [title for title in starts if not titles.isdisjoint(_ancestors(title, starts))]


def _starts(versions: Sequence[Registered]) -> dict[str, str | None]:
    return {version.title: version.start for version in versions}


def _ancestors(title: str, starts: Mapping[str, str | None]) -> list[str]:
    """Return the version from which that of a title was trained on, then the one from which that was, and so on."""
    ancestors: dict[str, None] = {}  # in order, and looked up at once
    while (start := starts.get(title)) is not None and start not in ancestors:
        ancestors[start] = None
        title = start
    return [*ancestors]


def made_of(content: str, others: Sequence[Registered], step_dir_of: StepDirs) -> dict[str, list[Registered]]:
    """Return the versions that a file of text went into, by the split that has it as its source."""
    went: dict[str, list[Registered]] = {}
    for version in others:
        tokens = steps_behind(step_dir_of, version.lineage, former=True).get(Tokens.stage)
        for split, files in data_of(tokens).items():
            if content in [file["content"] for file in files]:
                went.setdefault(split, []).append(version)
    return went


def data_of(tokens: FinishedStep[Tokens] | None) -> dict[str, list[dict[str, str]]]:
    """Return the files that rows were made of, by the split whose source they are: content and format of each."""
    data = {} if tokens is None else tokens.record.recipe["data"]
    return {split: data[split] for split in ("train", "validation", "test") if data.get(split)}


def _contents(tokens: FinishedStep[Tokens] | None) -> set[str]:
    return {file["content"] for files in data_of(tokens).values() for file in files}
