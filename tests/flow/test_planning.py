"""What planning asks of the store: the record of each step, and listings only where they are needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.run import Config
from pipeline.errors import ConfigError
from pipeline.flow import preflight, warm_start
from pipeline.flow.plan import Once, RunPlan, plan_run, reasons
from pipeline.sources.files import SourceFile
from pipeline.stages import tokenize
from pipeline.stages.stage import PinnedRun
from pipeline.store.locations import tracking_uri
from pipeline.store.objects import Directory
from pipeline.store.records import Student, TeacherCache
from pipeline.sweep.run import plan_sweep
from pipeline.tracking import registry
from tests.conftest import Ran


@dataclass
class Asked:
    """Names that were read and prefixes that were listed, in order."""

    read: list[str] = field(default_factory=list)
    listed: list[str] = field(default_factory=list)
    looked_through: list[str] = field(default_factory=list)  # for folders alone


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What directories are asked from here on."""
    found, read, sizes, folders = Asked(), Directory.read, Directory.sizes, Directory.folders

    def reading(self: Directory, name: str) -> bytes:
        found.read.append(name)
        return read(self, name)

    def listing(self: Directory, prefix: str) -> dict[str, int]:
        found.listed.append(prefix)
        return sizes(self, prefix)

    def looking_through(self: Directory, prefix: str) -> list[str]:
        found.looked_through.append(prefix)
        return folders(self, prefix)

    monkeypatch.setattr(Directory, "folders", looking_through)
    monkeypatch.setattr(Directory, "read", reading)
    monkeypatch.setattr(Directory, "sizes", listing)
    return found


def record_names(plan: RunPlan) -> list[str]:
    return [f"{step.name}/{step.key}/record.json" for step in plan.steps]


def test_a_plan_of_what_is_done_reads_one_record_a_step_and_lists_nothing(finished: Ran, asked: Asked) -> None:
    plan = plan_run(finished.plan.config)
    assert plan.left == []
    assert asked.read == record_names(plan)
    assert set(reasons(plan).values()) == {"done before"}
    assert asked == Asked(read=record_names(plan))


def test_only_reasons_look_at_what_was_run_before(
    finished: Ran, tiny_config: Callable[..., Config], tmp_path: Path, asked: Asked
) -> None:
    store = finished.plan.config.resources.model_dump()
    plan = plan_run(tiny_config(tmp_path, quant={"bits": "4-4-8"}, resources=store))
    assert [step.name for step in plan.left] == ["distill", "evaluate", "pack", "register"]
    assert asked == Asked(read=record_names(plan))
    assert reasons(plan)["distill"] == 'quant.bits: "2-2-8" -> "4-4-8"'
    assert (asked.looked_through, asked.listed) == (["distill/"], [])  # the others follow a step that is not done


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        ({"cache": {"dtype": "float32"}}, "cache"),
        ({"cache": {"dtype": "float32"}, "distill": {"seed": 1}}, "cache"),
        ({"finetune": {"seed": 1}}, "finetune"),
    ],
    ids=str,
)
def test_of_a_cache_to_be_made_the_store_is_asked_for_attempts_alone(
    finished: Ran,
    tiny_config: Callable[..., Config],
    tmp_path: Path,
    asked: Asked,
    fields: dict[str, Any],
    left: str,
) -> None:
    store = finished.plan.config.resources.model_dump()
    plan = plan_run(tiny_config(tmp_path, resources=store, **fields))
    cache = f"cache/{plan.step(TeacherCache).key}/"
    assert plan.left[0].name == left
    assert asked == Asked(read=record_names(plan), looked_through=[cache])  # no attempt made any of it
    reasons(plan)
    assert (asked.looked_through, asked.listed) == ([cache, f"{left}/"], [])


def test_deciding_the_mode_of_the_cache_asks_the_store_for_nothing(
    finished: Ran, tiny_config: Callable[..., Config], tmp_path: Path, asked: Asked
) -> None:
    store = finished.plan.config.resources.model_dump()
    plan = plan_run(tiny_config(tmp_path, cache={"mode": "auto"}, resources=store))
    assert plan.cache_mode[0] == "online"  # each row is read less than twice
    assert asked == Asked(read=record_names(plan))


@pytest.mark.parametrize("done", [True, False], ids=["shared steps are done", "nothing is done"])
def test_plans_of_many_trials_look_once_at_what_they_share(
    cloned: Path,
    tmp_path: Path,
    tiny_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    asked: Asked,
    done: bool,
) -> None:
    folder, counted = cloned if done else tmp_path / "fresh", Counter[str]()

    def counting(where: Any, name: str) -> None:
        sound = getattr(where, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            counted[name] += 1
            return sound(*arguments, **keywords)

        monkeypatch.setattr(where, name, call)

    for where, name in (
        (preflight, "pin_splits"),
        (preflight, "skeleton"),
        (tokenize, "train_bpe"),
        (PinnedRun, "_text_recipe"),
        (SourceFile, "model_dump"),
    ):
        counting(where, name)
    seen = []
    for trials in (3, 9):
        space = {"quant.bits": ["4-4-8", "8-8-8", "2-8-8"], "distill.seed": [*range(trials // 3)]}
        asked.read.clear()
        planned = plan_sweep(tiny_config(folder, resources={"local_cache_gib": 3}, sweep={"space": space}))
        dirs = [planned.step_dir, *(step.dir for trial in planned.known for step in trial.plan.steps)]
        assert {step_dir.local_cache_gib for step_dir in dirs} == {3}
        assert len({trial.key for trial in planned.known}) == trials
        shared = Counter(name.partition("/")[0] for name in asked.read if name.endswith("record.json"))
        assert shared == {
            "tokenize": 1,
            "finetune": 1,
            "cache": 1,
            "sweep": 1,
            **dict.fromkeys(("distill", "evaluate", "pack", "register"), trials + 1),  # and those of the base
        }
        seen.append(dict(counted))
        counted.clear()
    assert seen[0] == seen[1]
    assert seen[0].pop("model_dump") <= 4  # of the only file, whatever the number of trials
    assert seen[0] == {"pin_splits": 1, "skeleton": 1, "_text_recipe": 1, **({} if done else {"train_bpe": 1})}


def test_plans_of_many_trials_ask_once_for_what_they_start_from_and_compare_once(
    finished: Ran, tiny_config: Callable[..., Config], cloned: Path, monkeypatch: pytest.MonkeyPatch, asked: Asked
) -> None:
    resources = {"tracking_uri": tracking_uri(finished.plan.config.resources)}
    counted, resolve, compare = Counter[str](), registry.resolve, warm_start.read_config

    def resolving(client: Any, model: str, knob: str) -> Any:
        counted[model] += 1
        return resolve(client, model, knob)

    def comparing(folder: Path) -> Any:
        counted["compared"] += 1
        return compare(folder)

    monkeypatch.setattr(registry, "resolve", resolving)
    monkeypatch.setattr(warm_start, "read_config", comparing)
    student = f"distill/{finished.plan.step(Student).key}/"
    for trials in (3, 9):
        for space in ({"distill.start": ["tiny@champion"]}, {"distill.start": ["tiny@champion", "tiny/1"]}):
            sweep = {"space": {**space, "distill.seed": [*range(trials)]}}
            asked.listed.clear()
            planned = plan_sweep(tiny_config(cloned, sweep=sweep, resources=resources))
            assert [trial.plan.config.distill.start for trial in planned.known] == ["tiny/1"] * trials
            assert all(trial.values["distill.start"] == "tiny/1" for trial in planned.known)
            assert [name for name in asked.listed if name.startswith(student)] == [f"{student}1/weights.safetensors"]
            assert counted == {"tiny@champion": 1, "compared": 1}  # which tells the version's own name as well
            counted.clear()


def test_a_sweep_whose_alias_moved_is_another(
    finished: Ran, tiny_config: Callable[..., Config], cloned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources = {"tracking_uri": tracking_uri(finished.plan.config.resources)}
    config = tiny_config(cloned, sweep={"space": {"distill.start": ["tiny@champion"]}}, resources=resources)
    before, resolve = plan_sweep(config), registry.resolve

    def resolving(client: Any, model: str, knob: str) -> Any:
        return SimpleNamespace(**{**dict(resolve(client, model, knob)), "version": 2})

    monkeypatch.setattr(registry, "resolve", resolving)
    after = plan_sweep(config)
    assert after.key != before.key
    assert after.config.sweep is not None
    assert after.config.sweep.space == {"distill.start": ["tiny/2"]}


def test_what_a_look_raises_is_raised_again() -> None:
    once, looks = Once(), []

    def look() -> int:
        looks.append(1)
        if len(looks) < 3:
            raise ConfigError("not yet")
        return 7

    for _ in range(2):
        with pytest.raises(ConfigError, match="not yet"):
            once("it", look)
    assert [once("it", look), once("it", look), len(looks)] == [7, 7, 3]


def test_one_plan_does_not_read_all_versions_there_are(finished: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_of_them(uri: str, name: str) -> None:
        raise AssertionError(f"read all versions of {name}")

    monkeypatch.setattr(registry, "held_keys", all_of_them)
    assert not plan_run(finished.plan.config).left
    with pytest.raises(AssertionError, match="all versions"):
        plan_run(finished.plan.config, once=Once())  # of many plans the first does
