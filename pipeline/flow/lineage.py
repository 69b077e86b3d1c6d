"""Lineage, both ways: what a version was made of, by the keys that records name, and what else was made of the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.flow.line import STAGES
from pipeline.store.records import ModelVersion, Tokens
from pipeline.store.step_store import FinishedStep, StepDir
from pipeline.tracking.registry import Registered

Steps = dict[str, FinishedStep[Any]]  # by stage


def steps_behind(storage_uri: str, scratch: str, keys: Mapping[str, str]) -> Steps:
    """Return the steps of these keys, by stage, and all that they were made of; those that the store does not have any
    more are left out, and what only they name with them."""
    behind: Steps = {}
    waiting = list(keys.items())
    while waiting:
        stage, key = waiting.pop()
        if stage not in STAGES or stage in behind:
            continue
        place = StepDir(storage_uri, stage, key, scratch)
        record = place.record(STAGES[stage].record)
        if record is not None:
            behind[stage] = FinishedStep(record, place)
            waiting += record.inputs.items()
    return behind


@dataclass(frozen=True)
class Lineage:
    """A registered version, the steps behind it, and by stage the other versions that share its step."""

    version: Registered
    steps: Steps
    shared: dict[str, list[Registered]]


def lineage_of(version: Registered, others: Sequence[Registered], storage_uri: str, scratch: str) -> Lineage:
    """Return the lineage of a version among all that there are."""
    steps = steps_behind(storage_uri, scratch, {ModelVersion.stage: version.key, **version.lineage})
    shared: dict[str, list[Registered]] = {}
    for other in others:
        if (other.name, other.version) == (version.name, version.version):
            continue
        for stage, step in steps_behind(storage_uri, scratch, other.lineage).items():
            if stage in steps and steps[stage].record.key == step.record.key:
                shared.setdefault(stage, []).append(other)
    return Lineage(version, steps, shared)


def made_of(content: str, others: Sequence[Registered], storage_uri: str, scratch: str) -> dict[str, list[Registered]]:
    """Return the versions that a file of text went into, by the split that has it as its source."""
    went: dict[str, list[Registered]] = {}
    for version in others:
        tokens = steps_behind(storage_uri, scratch, version.lineage).get(Tokens.stage)
        for split, files in data_of(tokens).items():
            if content in [file["content"] for file in files]:
                went.setdefault(split, []).append(version)
    return went


def data_of(tokens: FinishedStep[Tokens] | None) -> dict[str, list[dict[str, str]]]:
    """Return the files that rows were made of, by the split whose source they are: content and format of each."""
    data = {} if tokens is None else tokens.record.recipe["data"]
    return {split: data[split] for split in ("train", "validation", "test") if data.get(split)}
