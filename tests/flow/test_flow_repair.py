"""Damage that is found and undone, and steps that another process holds."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.bench.chaos.processes import start
from pipeline.errors import BusyError, DamagedError
from pipeline.flow.line import STAGES
from pipeline.flow.plan import plan_run
from pipeline.flow.run import run_plan
from pipeline.store.records import Evaluation, Student
from pipeline.store.shards import open_shard
from tests.conftest import ROOT

HOLD = """
import sys, time
from pathlib import Path
from pipeline.store.records import Evaluation, read_record
from pipeline.store.step_store import StepDir

storage, stage, key, scratch, release, record = sys.argv[1:]
with StepDir(storage, stage, key, scratch).hold(True, print) as held:
    print("held", flush=True)
    while not Path(release).exists():
        time.sleep(0.05)
    if record:
        held.commit(read_record(Path(record).read_bytes(), Evaluation, record))
"""


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def reshape(path):
    path.write_bytes(b"{}")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def shards_of(config, stage):
    """The shards of a finished stage by name: the attempt that each is of, and what is in it."""
    step = plan_run(config, "cache").step(STAGES[stage].record)
    splits = step.record.splits.values() if stage == "tokenize" else [step.record]
    shards = [shard for split in splits for shard in split.shards]
    return {shard.name: (shard.file.fence, sha256(open_shard(step.dir, shard))) for shard in shards}


def weights_of(ran):
    return sha256(ran.outcome.steps["distill"].local(Student.WEIGHTS))


@pytest.fixture(scope="module")
def sharded(tiny_config, run_flow, tmp_path_factory):
    """A run up to its cache, in shards of 32 rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.store.shards.SHARD_TOKENS", 1024)
        ran = run_flow(tiny_config(tmp_path_factory.mktemp("sharded")), until="cache")
        assert len(ran.record("cache").shards) > 10
        yield ran


@pytest.fixture(scope="module")
def undamaged(sharded, tiny_config, run_flow, tmp_path_factory):
    """SHA-256 of the student's weights when nothing was damaged."""
    folder = tmp_path_factory.mktemp("undamaged")
    return weights_of(run_flow(copy_of(sharded, tiny_config, folder), until="distill"))


def copy_of(ran, tiny_config, folder):
    shutil.copytree(ran.plan.config.resources.storage_uri, folder / "store")
    return tiny_config(folder)


@pytest.mark.parametrize(
    ("stage", "pattern", "damage"),
    [
        ("cache", "rows/*.arrow", flip),
        ("cache", "rows/*.arrow", truncate),
        ("cache", "rows/*.arrow", Path.unlink),
        ("tokenize", "rows/train-*.parquet", flip),
        ("tokenize", "rows/validation-*.parquet", truncate),
        ("tokenize", "rows/train-*.parquet", Path.unlink),
    ],
)
def test_a_damaged_shard_is_remade_and_the_student_is_the_same(
    sharded, undamaged, tiny_config, run_flow, tmp_path, stage, pattern, damage
):
    config = copy_of(sharded, tiny_config, tmp_path)
    before, record = shards_of(config, stage), sharded.record(stage)
    folder = tmp_path / "store" / stage / record.key
    damage(sorted(folder.glob(f"1/{pattern}"))[0])

    ran = run_flow(config, until="distill")
    assert weights_of(ran) == undamaged
    after = shards_of(config, stage)
    assert {name: digest for name, (_, digest) in after.items()} == {
        name: digest for name, (_, digest) in before.items()
    }
    remade = [name for name, (fence, _) in after.items() if fence == 2]
    assert len(remade) == 1 if stage == "cache" else 0 < len(remade) < len(after)  # of tokens a part, which has several
    assert ran.record(stage).provenance == record.provenance  # what the step cost when it was made
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == [
        "1",
        "2",
        "lease.json",
        "record.json",
    ]


@pytest.mark.parametrize("damage", [Path.unlink, truncate, reshape])
def test_a_piece_that_nobody_knows_of_any_more_is_made_again(
    sharded, undamaged, tiny_config, run_flow, tmp_path, damage
):
    config = copy_of(sharded, tiny_config, tmp_path)
    folder = tmp_path / "store" / "cache" / sharded.record("cache").key / "1"
    damage(sorted(folder.glob("parts/rows/*.json"))[0])
    damage(next((tmp_path / "store" / "tokenize" / sharded.record("tokenize").key / "1").glob("parts/train-*.json")))
    truncate(sorted(folder.glob("rows/*.arrow"))[1])
    assert weights_of(run_flow(config, until="distill")) == undamaged
    assert sorted(fence for fence, _ in shards_of(config, "cache").values())[-3:] == [1, 2, 2]


def test_two_damaged_stages_are_both_repaired(sharded, undamaged, tiny_config, run_flow, tmp_path):
    config = copy_of(sharded, tiny_config, tmp_path)
    for stage, pattern in (("tokenize", "rows/*.parquet"), ("cache", "rows/*.arrow")):
        for shard in (tmp_path / "store" / stage / sharded.record(stage).key / "1").glob(pattern):
            truncate(shard)
    assert weights_of(run_flow(config, until="distill")) == undamaged


def test_damaged_weights_are_never_read(tiny_config, run_flow, finished, cloned):
    config = tiny_config(cloned, quant={"bits": "4-4-8"})
    flip(cloned / "store" / "finetune" / finished.record("finetune").key / "1" / "model" / "model.safetensors")
    with pytest.raises(DamagedError, match=r"model/model\.safetensors.*does not match its checksum"):
        run_flow(config)


class Releasing:
    """A listener that lets the other process go once it has been told of it."""

    def __init__(self, release):
        self.release, self.owners, self.statuses = release, [], {}

    def named(self, stage, key):
        pass

    def started(self, stage):
        pass

    def advanced(self, stage, done, total, note):
        pass

    def measured(self, stage, points):
        pass

    def finished(self, stage, status, seconds):
        self.statuses[stage] = status

    def waiting(self, stage, owner):
        self.owners.append((stage, owner))
        self.release.touch()


@pytest.fixture
def evaluation(tiny_config, cloned):
    """A plan whose only step to run is evaluate; the record that was there is at `cloned`/record.json."""
    config = tiny_config(cloned)
    step_dir = plan_run(config, "evaluate").step(Evaluation).dir
    shutil.move(Path(step_dir.uri) / "record.json", cloned / "record.json")
    return plan_run(config, "evaluate")


@pytest.fixture
def held(evaluation, cloned):
    """Another live process holds the step until `cloned`/release exists; it commits a record if it is given one."""
    processes = []

    def hold(record=""):
        step = evaluation.step(Evaluation).dir
        names = [step.storage_uri, step.stage, step.key, step.scratch, str(cloned / "release"), str(record)]
        command = [sys.executable, "-c", HOLD, *names]
        process = start(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    (cloned / "release").touch()
    for process in processes:
        process.communicate(timeout=60)


def test_a_step_held_by_a_live_process_is_waited_for_by_name_and_then_run(finished, evaluation, held, cloned):
    process, listener = held(), Releasing(cloned / "release")
    outcome = run_plan(evaluation, listener)
    [(stage, owner)] = listener.owners
    assert (stage, owner.pid) == ("evaluate", process.pid)
    assert str(process.pid) in str(owner)
    assert listener.statuses["evaluate"] == "done"
    assert outcome.steps["evaluate"].record.student == finished.record("evaluate").student


def test_what_the_live_process_finished_is_adopted(finished, evaluation, held, cloned):
    held(cloned / "record.json")
    listener = Releasing(cloned / "release")
    outcome = run_plan(evaluation, listener)
    assert listener.statuses == dict.fromkeys(("tokenize", "finetune", "cache", "distill", "evaluate"), "reused")
    assert outcome.steps["evaluate"].record == finished.record("evaluate")


def test_a_caller_who_does_not_wait_is_told_who_is_busy(evaluation, held, cloned):
    process, listener = held(), Releasing(cloned / "release")
    with pytest.raises(BusyError, match=f"evaluate step .* is being run by process {process.pid} on "):
        run_plan(evaluation, listener, wait=False)
    assert listener.owners == []


def test_a_step_of_a_killed_process_is_taken_over(evaluation, held, cloned):
    process = held()
    process.kill()
    process.wait()
    listener = Releasing(cloned / "release")
    run_plan(evaluation, listener, wait=False)
    assert (listener.owners, listener.statuses["evaluate"]) == ([], "done")
