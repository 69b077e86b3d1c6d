"""What nothing needs goes; what a version, a process or the grace period needs stays, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.config.laid_over import laid_over
from pipeline.config.resources import Resources
from pipeline.config.run import Config
from pipeline.errors import ConfigError, DamagedError, RunError
from pipeline.flow.lineage import Steps, lineage_of, made_of, step_dirs_of, steps_behind
from pipeline.flow.plan import plan_run
from pipeline.flow.run import run_plan
from pipeline.retrain import gc
from pipeline.retrain.decisions import Decision, Decisions, now
from pipeline.retrain.gc import Collector, Garbage
from pipeline.retrain.rollback import rollback
from pipeline.retrain.tick import plan_tick
from pipeline.store.objects import Directory
from pipeline.store.records import Contest, SweepRecord
from pipeline.store.step_store import RECORD, FinishedStep, StepDir
from pipeline.tracking import registry, runs
from tests.conftest import Recorder
from tests.retrain.schedule import DATABASE, NAME, Schedule
from tests.retrain.test_promotion import KILLED, ended, in_a_process_of_its_own

HOUR = 3600.0
HEAVY = {"tokenize", "finetune", "cache", "distill"}
SMALL = {"evaluate", "pack", "register"}


@pytest.fixture
def aged(undecided: Schedule) -> Schedule:
    """Two versions, the second one champion, none previous; all was written two hours ago."""
    decide(undecided, champion=2, previous=None)
    age(undecided)
    return undecided


def decide(schedule: Schedule, champion: int, previous: int | None) -> None:
    fields = {"name": NAME, "at": now(), "champion": champion, "previous": previous}
    with Decisions.of(NAME, schedule.config().resources).held() as deciding:
        deciding.append(Decision(decision="rolled back", reason="a test", **fields))
        deciding.put_aliases()


def age(schedule: Schedule, hours: float = 2) -> None:
    then = time.time() - hours * HOUR
    for path in (schedule.folder / "store").rglob("*"):
        if path.suffix != ".db":
            os.utime(path, (then, then))


def collector(schedule: Schedule, keep: int = 1, grace_s: float = HOUR) -> Collector:
    return Collector(schedule.config().resources, keep, grace_s)


def steps_of(schedule: Schedule, version: int) -> Steps:
    """What the store has of a version."""
    resources = schedule.config().resources
    known = registry.registered_version(schedule.uri, NAME, version)
    assert known is not None
    lineage = {"register": known.key, **known.lineage}
    return steps_behind(step_dirs_of(resources), lineage)


def done(steps: Steps) -> set[str]:
    """The stages of which the record is there still."""
    return {stage for stage, step in steps.items() if step.dir.record(type(step.record)) is not None}


def names(garbage: list[Garbage]) -> set[tuple[str, str]]:
    return {(item.stage, item.place) for item in garbage}


def step(schedule: Schedule, stage: str, key: str = "0" * 32) -> StepDir:
    resources = schedule.config().resources
    return StepDir(resources.storage_uri, stage, key, str(resources.local_cache_dir))


def test_what_made_older_versions_goes_but_their_packages(aged: Schedule) -> None:
    first, second = steps_of(aged, 1), steps_of(aged, 2)
    collection = collector(aged)
    garbage = collection.find()
    assert names(garbage) == {(stage, first[stage].record.key) for stage in HEAVY}
    assert {item.why for item in garbage} == {"only versions before the newest 1 of their name were made of it"}
    assert steps_of(aged, 1).keys() == HEAVY | SMALL  # nothing went yet
    sizes = {item.stage: sum(first[item.stage].dir.sizes().values()) for item in garbage}
    assert all(0 < sizes[item.stage] <= item.bytes for item in garbage)
    assert collection.delete(garbage) == garbage
    assert steps_of(aged, 1).keys() == SMALL
    assert all(step.folder().is_dir() for stage, step in first.items() if stage == "pack")  # every byte is checked
    assert steps_of(aged, 2).keys() == second.keys() == HEAVY | SMALL
    assert list((aged.folder / "store" / Contest.stage).glob(f"*/{RECORD}"))
    assert collector(aged).find() == []
    left = Path(first["cache"].dir.uri)
    assert {path.name for path in left.iterdir() if not path.name.startswith(".")} == {
        "lease.json",
        "former.json",
        RECORD,
    }


def test_nothing_is_decided_or_deleted_where_two_could_hold_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources = Resources(storage_uri=str(tmp_path / "store"), tracking_uri=f"sqlite:///{tmp_path}/m.db")
    runs.connect(f"sqlite:///{tmp_path}/m.db")
    collection = Collector(resources, 1, HOUR)
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with pytest.raises(ConfigError, match="cannot keep two commands from running one step: its locks hold nobody off"):
        collection.delete([])
    with (
        pytest.raises(ConfigError, match="its locks hold nobody off"),
        Decisions.of("x", resources).held(seize=True),
    ):
        pytest.fail("it was held")
    assert not (tmp_path / "store" / "retrain").exists()


def test_what_made_a_version_is_known_for_ever(aged: Schedule) -> None:
    def told() -> dict[str, Any]:
        resources = aged.config().resources
        versions = registry.registered_versions(runs.client_of(aged.uri))
        lineage = lineage_of(next(v for v in versions if v.version == 1), versions, step_dirs_of(resources))
        records = {stage: step.record for stage, step in lineage.steps.items()}
        went = made_of(text, versions, step_dirs_of(resources))
        return {"records": records, "went": {split: {v.title for v in of} for split, of in went.items()}}

    text = steps_of(aged, 1)["tokenize"].record.recipe["data"]["train"][0]["content"]
    before, config = told(), first_config(aged)
    assert before["records"].keys() == HEAVY | SMALL
    assert before["went"] == {"train": {"tiny/1", "tiny/2"}}
    for _ in range(2):  # and once more, when what went was made again
        collector(aged).delete(collector(aged).find())
        assert steps_of(aged, 1).keys() == SMALL
        assert told() == before
        run_plan(plan_run(config, until="cache"), Recorder())
        age(aged)
    assert names(collector(aged).find()) == {(stage, before["records"][stage].key) for stage in HEAVY - {"distill"}}


def test_a_version_whose_rows_went_becomes_no_champion_before_they_are_made_again(aged: Schedule) -> None:
    collector(aged).delete(collector(aged).find())
    before = [d.champion for d in aged.decisions]
    said = r"tiny/1 cannot become champion: the rows that trained it \(step tokenize .*rollback tiny --to VERSION`"
    with pytest.raises(ConfigError, match=said):
        rollback(NAME, 1, "worse", aged.config().resources)
    assert ([d.champion for d in aged.decisions], aged.aliases) == (before, {"champion": 2})
    run_plan(plan_run(first_config(aged), until="tokenize"), Recorder())
    assert rollback(NAME, 1, "worse", aged.config().resources).champion == 1
    assert plan_tick(aged.config({"distill.steps": 3})).champion is not None  # which a challenger may meet


def test_what_was_left_of_a_version_by_a_killed_collection_is_remembered_by_the_next(aged: Schedule) -> None:
    first = steps_of(aged, 1)
    for stage in ("distill", "cache", "finetune", "tokenize"):
        (item,) = (item for item in collector(aged).find() if item.stage == stage)
        collector(aged).delete([item])
        assert first[stage].dir.former(type(first[stage].record)) == first[stage].record


def test_however_many_go_the_store_is_looked_through_a_few_times(
    aged: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    stored_steps = gc.stored_steps

    def counted(storage_uri: str, stage: str) -> Any:
        looks.append(stage)
        return stored_steps(storage_uri, stage)

    monkeypatch.setattr(gc, "AT_ONCE", 1)
    monkeypatch.setattr(gc, "LOOKS", 3)
    for number in range(9):
        with step(aged, "distill", f"{number:032d}").hold(False, print) as held:
            held.write("attempt/state", b"unfinished")
    age(aged)
    garbage = [item for item in collector(aged).find() if item.why.startswith("unfinished")]
    monkeypatch.setattr(gc, "stored_steps", counted)
    with step(aged, "distill", f"{7:032d}").hold(False, print):
        assert len(collector(aged).delete(garbage)) == len(garbage) - 1 == 8
    assert looks.count("distill") == 3


def test_newest_shown_and_decided_versions_keep_what_made_them(aged: Schedule) -> None:
    assert collector(aged, keep=2).find() == []
    client = MlflowClient(aged.uri, aged.uri)
    client.set_registered_model_alias(NAME, "mine", "1")
    assert collector(aged).find() == []
    client.delete_registered_model_alias(NAME, "mine")
    assert collector(aged).find()
    with Decisions.of(NAME, aged.config().resources).held() as deciding:  # MLflow is yet to be told
        deciding.append(Decision(decision="rolled back", reason="", name=NAME, at=now(), champion=1, previous=2))
    assert collector(aged).find() == []


def test_what_is_young_stays_with_what_it_was_made_of(aged: Schedule) -> None:
    assert collector(aged, grace_s=3 * HOUR).find() == []
    first = steps_of(aged, 1)
    os.utime(Path(first["cache"].dir.uri) / RECORD)
    assert names(collector(aged).find()) == {("distill", first["distill"].record.key)}
    os.utime(Path(first["distill"].dir.uri) / RECORD)
    assert collector(aged).find() == []


def test_what_a_live_process_runs_stays_with_all_that_its_plan_names(aged: Schedule) -> None:
    first = steps_of(aged, 1)
    garbage = collector(aged).find()
    running = step(aged, "distill")
    with running.hold(False, print) as held:
        held.write("attempt/state", b"unfinished")
        assert names(collector(aged, grace_s=0).find()) >= names(garbage)
        held.announce([first["cache"].dir, held])
        assert names(collector(aged).find()) == {("distill", first["distill"].record.key)}
    assert len(collector(aged).find()) == len(garbage)  # young, though nobody runs it
    age(aged)
    extra = names(collector(aged).find()) - names(garbage)
    assert extra == {("distill", running.key)}


def test_a_run_announces_what_it_needs(schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    announce = StepDir.announce

    def announced(self: StepDir, steps: Any) -> None:
        announce(self, steps)
        seen[self.stage] = self.needed()

    monkeypatch.setattr(StepDir, "announce", announced)
    plan = plan_run(shorter(schedule), until="distill")
    run_plan(plan, Recorder())
    assert seen == {"distill": [(planned.name, planned.key) for planned in plan.steps]}
    assert plan.last.dir.needed() is None
    assert not plan.last.dir.sizes("attempt/")


def test_what_is_held_when_its_turn_comes_is_left(aged: Schedule) -> None:
    collection = collector(aged)
    garbage, first = {item.stage: item for item in collection.find()}, steps_of(aged, 1)
    with first["cache"].dir.hold(False, print):
        assert not collection.delete([garbage["cache"]])
        others = [garbage["tokenize"], garbage["distill"]]  # the cache was made of the first
        assert collection.delete(others) == others[1:]
    os.utime(Path(first["finetune"].dir.uri) / RECORD)  # as if it had been made again meanwhile
    assert not collection.delete([garbage["finetune"]])
    assert done(first) == SMALL | HEAVY - {"distill"}


def test_unfinished_and_unregistered_steps_go_and_sweeps_stay(aged: Schedule) -> None:
    plan = plan_run(shorter(aged), until="distill")
    run_plan(plan, Recorder())
    sweep = step(aged, SweepRecord.stage)
    with sweep.hold(False, print) as held:
        held.write("trials/0.json", b'{"trial": {"step_keys": {"distill": "%s"}}}' % plan.last.key.encode())
        age(aged)
        os.utime(Path(sweep.uri) / "lease.json")  # its heart beats
        assert collector(aged, keep=2).find() == []
    age(aged)
    found = collector(aged, keep=2).find()
    assert names(found) == {(planned.name, planned.key) for planned in plan.steps}
    assert {item.why for item in found} == {"no registered version was made of it"}


def test_what_an_unfinished_tick_goes_on_from_stays_while_its_schedule_ticks(aged: Schedule) -> None:
    plan = plan_run(shorter(aged), until="distill")
    run_plan(plan, Recorder())
    steps = tuple((planned.name, planned.key) for planned in plan.steps)
    decisions = Decisions.of(NAME, aged.config().resources)
    with decisions.held() as deciding:
        deciding.note(unfinished=steps)
    age(aged)
    assert collector(aged, keep=2).find() == []
    age(aged, hours=99 * 24)
    assert collector(aged, keep=2).find() == []
    age(aged, hours=101 * 24)
    assert names(collector(aged, keep=2).find()) == {*steps}
    for facts, left in (({"max_worker_hours": 1.0}, steps), ({}, ())):  # ended by worker-hours, and once and for all
        with decisions.held() as deciding:
            fields = {"reason": "a test", "name": NAME, "at": now(), "champion": 2, **facts}
            deciding.append(Decision.model_validate({"decision": "rejected", **fields}))
        assert decisions.notes().unfinished == left
    age(aged)
    assert names(collector(aged, keep=2).find()) == {*steps}


def test_without_the_registry_of_the_store_nothing_goes(aged: Schedule, tmp_path: Path) -> None:
    away = aged.config().resources.model_copy(update={"tracking_uri": "http://127.0.0.1:9"})
    with pytest.raises(ConfigError, match="cannot be reached"):
        Collector(away, 1, 0)
    nowhere = away.model_copy(update={"storage_uri": str(tmp_path / "typo"), "tracking_uri": None})
    with pytest.raises(ConfigError, match="There is no registry at"):
        Collector(nowhere, 1, 0)
    assert not (tmp_path / "typo").exists()
    file = aged.folder / "text" / "0.jsonl"
    with pytest.raises(ConfigError, match=r"The store .* cannot be written to"):
        Collector(nowhere.model_copy(update={"storage_uri": str(file), "tracking_uri": aged.uri}), 1, 0)
    empty = f"sqlite:///{shutil.copy(aged.folder / 'begun' / 'store' / DATABASE, tmp_path)}"
    runs.client_of(empty).delete_registered_model(NAME)
    other = away.model_copy(update={"tracking_uri": empty})
    with pytest.raises(ConfigError, match="holds none of the 2 versions that were registered from the store"):
        Collector(other, 1, 0).find()
    garbage = collector(aged).find()
    for resources in (away, other):
        collection = collector(aged)
        collection.resources = resources
        with pytest.raises(ConfigError):
            collection.delete(garbage)
    assert steps_of(aged, 1).keys() == HEAVY | SMALL


def killed_after(deletions: int, work: Any) -> bool:
    """Run work in a process that is gone after so many deletions; tell whether there were more."""
    seen = iter(range(10_000))

    def child() -> None:
        for name in ("delete", "delete_below"):
            whole = getattr(Directory, name)

            def counted(self: Directory, at: str, whole: Any = whole) -> None:
                if next(seen) == deletions:
                    os._exit(KILLED)
                whole(self, at)

            setattr(Directory, name, counted)
        work()

    status = ended(in_a_process_of_its_own(child))
    assert status in (0, KILLED)
    return status == KILLED


def shorter(schedule: Schedule) -> Config:
    """The configuration of a run that nothing else knows of."""
    return laid_over(schedule.config(), {"distill.steps": 5})


def first_config(schedule: Schedule) -> Config:
    """The configuration of version 1, with the text that there was."""
    (schedule.folder / "text" / "1.jsonl").unlink()
    return schedule.config()


def test_killed_at_every_point_a_collection_leaves_a_step_that_is_there_or_made_again(
    aged: Schedule, tmp_path: Path
) -> None:
    first, config, deletions = steps_of(aged, 1), first_config(aged), 0
    tokens = first["tokenize"]
    garbage = next(item for item in collector(aged).find() if item.stage == "tokenize")
    shutil.copytree(tokens.dir.uri, tmp_path / "whole")
    collection, ends = collector(aged), []
    while killed_after(deletions, lambda: collection.delete([garbage])):
        ends.append("reused" if done({"tokenize": tokens}) else "done")
        assert run_plan(plan_run(config, until="tokenize"), Recorder()).status == {"tokenize": ends[-1]}
        again = steps_of(aged, 1)["tokenize"]
        assert {name: file.sha256 for name, file in again.record.files.items()} == {
            name: file.sha256 for name, file in tokens.record.files.items()
        }
        assert all(again.local(name) for name in again.record.files)
        shutil.rmtree(tokens.dir.uri)
        shutil.copytree(tmp_path / "whole", tokens.dir.uri)
        deletions += 1
    assert ends == sorted(ends, reverse=True)  # it is there until the record's place is taken, and never again
    assert ends.count("done") > 5


def test_who_holds_a_record_that_goes_is_told_and_the_same_command_makes_the_step_again(aged: Schedule) -> None:
    first, config = steps_of(aged, 1), first_config(aged)
    collection, before = collector(aged), plan_run(config)
    reader: FinishedStep[Any] = first["distill"]
    assert before.left == []
    assert collection.delete(collection.find())
    with pytest.raises(DamagedError, match=r"The distill step .* lacks its file frozen\.safetensors"):
        reader.local("frozen.safetensors")
    assert (
        not (Path(str(aged.config().resources.local_cache_dir)) / "folders" / "tokenize")
        .joinpath(first["tokenize"].record.key)
        .exists()
    )
    again = run_plan(plan_run(config), Recorder())
    assert again.status == dict.fromkeys(HEAVY, "done") | dict.fromkeys(SMALL, "reused")
    assert again.steps["distill"].record.digest == reader.record.digest
    assert len(list(registry.registered_versions(runs.client_of(aged.uri)))) == 2


def raced_by_collections(schedule: Schedule, count: int) -> None:
    """Have a command that reuses what no version was made of, which is just what goes, raced so many times."""
    config, draw = shorter(schedule), random.Random(count)
    run_plan(plan_run(config, until="cache"), Recorder())
    age(schedule)
    schedule.keep(f"raced {count}")

    def collecting(begins: float) -> None:
        time.sleep(begins)
        collection = collector(schedule)
        collection.delete(collection.find())

    def command() -> None:
        for _ in range(3):
            with contextlib.suppress(RunError):  # the same command goes on from there
                run_plan(plan_run(config), Recorder())
                return
        raise AssertionError("it was never done")

    for _ in range(count):
        schedule.put_back(f"raced {count}")
        processes = [in_a_process_of_its_own(command)]
        for begins in (draw.uniform(0, 0.3), draw.uniform(0, 1)):
            processes.append(in_a_process_of_its_own(lambda begins=begins: collecting(begins)))  # type: ignore[misc]
        assert [*map(ended, processes)] == [0, 0, 0]
        assert plan_run(config).left == []
        collecting(0)  # what one of two held in its hands, with what that was made of, was not the other's to delete
        third = steps_of(schedule, 3)
        assert third.keys() == HEAVY | SMALL
        assert all(step.local(name) for step in third.values() for name in step.record.files)
        assert steps_of(schedule, 2).keys() == HEAVY | SMALL
        assert steps_of(schedule, 1).keys() == SMALL


def test_raced_by_collections_a_command_ends_as_it_would_alone(aged: Schedule) -> None:
    raced_by_collections(aged, 2)


@pytest.mark.soak
def test_raced_by_collections_a_command_ends_as_it_would_alone_thirty_times(aged: Schedule) -> None:
    raced_by_collections(aged, 30)


def test_a_probe_goes_that_a_killed_command_left(aged: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    """A young one may be in use."""
    probes = aged.folder / "store" / "probes"
    monkeypatch.setattr(Directory, "delete", lambda store, name: None)  # as where a command ends before it
    collector(aged)
    age(aged)
    collection = collector(aged)
    assert len(list(probes.iterdir())) == 2
    monkeypatch.undo()
    collection.delete([])
    assert len(list(probes.iterdir())) == 1


def test_scratch_that_is_old_goes_and_what_is_to_be_sent_stays(aged: Schedule) -> None:
    folder = Path(str(aged.config().resources.local_cache_dir))
    old = time.time() - 2 * HOUR
    for name in ("tmpold/a/b", "tmpnew/a", "tmpread/a", "copies/old", "copies/unfinished/old", "outbox/old", "own/old"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"four")
        os.utime(path, (time.time() if "read" in name else old, old))
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            os.utime(path, (old, old))
    os.utime(folder / "tmpnew" / "a")
    collection = collector(aged, keep=2)
    garbage = collection.find()
    went = {"tmpold", "copies/old", "copies/unfinished/old"}
    assert {Path(item.place).relative_to(folder).as_posix(): item.bytes for item in garbage} == dict.fromkeys(went, 4)
    os.utime(folder / "copies" / "old")  # used again
    assert [item.place for item in collection.delete(garbage)] == [
        str(folder / name) for name in ("copies/unfinished/old", "tmpold")
    ]
    assert {path.name for path in folder.iterdir()} >= {"tmpnew", "tmpread", "copies", "outbox", "own"}
    assert not (folder / "tmpold").exists()
    for name in ("tmpnew", "tmpread", "copies", "outbox", "own"):
        shutil.rmtree(folder / name)
