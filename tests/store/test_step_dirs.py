"""The files of one step: its record, what is checked before it is read, what goes and what stays."""

import contextlib
import json
import os
import pickle
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import DamagedError, FencedOffError
from pipeline.store import objects as objects_module
from pipeline.store.lease import Lease, Owner
from pipeline.store.objects import Directory, open_objects
from pipeline.store.records import Evaluation, Shard, Split, StoredFile, TeacherCache, Tokens
from pipeline.store.step_store import FinishedStep, StepDir, StoredStep, checksum, now_of, records, stored_steps
from tests.store.test_step_store import EVERYWHERE, KEY, at_once, content, evaluation, file_of, serve_s3


@pytest.fixture(scope="module")
def s3():
    with serve_s3() as uri:
        yield uri


@pytest.fixture(params=EVERYWHERE)
def uri(request, tmp_path):
    return (
        str(tmp_path / "store") if request.param == "directory" else f"{request.getfixturevalue('s3')}/{uuid.uuid4()}"
    )


@pytest.fixture
def step_dir(uri, tmp_path):
    """A step's directory, its lease held by this process."""
    with StepDir(uri, Evaluation.stage, KEY, str(tmp_path / "scratch")).hold(False, print) as held:
        yield held


def test_what_a_killed_writer_left_is_neither_listed_nor_read(tmp_path):
    step_dir = StepDir(str(tmp_path), Evaluation.stage, KEY, str(tmp_path / "scratch"))
    folder = tmp_path / Evaluation.stage / KEY
    folder.mkdir(parents=True)
    (folder / f".record.json.{uuid.uuid4().hex}.tmp").write_bytes(evaluation("half").to_json()[:40])
    assert step_dir.record(Evaluation) is None
    assert step_dir.sizes() == {}
    assert records(str(tmp_path), Evaluation) == []


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_whoever_lets_go_of_a_step_clears_away_what_killed_writers_left(tmp_path, ends):
    killed = StepDir(str(tmp_path), Evaluation.stage, KEY, str(tmp_path / "scratch"))
    with contextlib.suppress(ZeroDivisionError), killed.hold(False, print) as step_dir:
        step_dir.write("rows/a", b"whole")
        for name in ("1/rows/.b", "1/.weights"):
            (tmp_path / Evaluation.stage / KEY / f"{name}.{uuid.uuid4().hex}.tmp").write_bytes(b"half")
        if ends == "badly":
            raise ZeroDivisionError
    assert content(killed, "rows/a") == b"whole"
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_step_that_ends_disturbs_nobody_who_is_about_to_ask_for_its_lease(tmp_path, monkeypatch):
    step = StepDir(str(tmp_path), Evaluation.stage, KEY, str(tmp_path / "scratch"))
    first = threading.Event()
    sync = objects_module._sync

    def late(path):
        sync(path)
        if threading.current_thread() is not threading.main_thread():
            asked.set()
            assert first.wait(30)

    asked = threading.Event()
    monkeypatch.setattr(objects_module, "_sync", late)

    def second():
        with step.hold(True, print) as step_dir:
            return step_dir.fence

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(second)  # has seen no lease, and is writing its own
        assert asked.wait(30)
        with step.hold(False, print):
            pass
        first.set()
        assert found.result(30) == 2


def test_whoever_was_taken_over_clears_nothing_away(tmp_path):
    step_dir = StepDir(str(tmp_path), Evaluation.stage, KEY, str(tmp_path / "scratch"))
    temporary = tmp_path / Evaluation.stage / KEY / "2" / f".weights.{uuid.uuid4().hex}.tmp"
    with step_dir.hold(False, print):
        mine = open_objects(str(tmp_path)).read(f"{Evaluation.stage}/{KEY}/lease.json")
        theirs = json.dumps(json.loads(mine) | {"fence": 2}).encode()
        open_objects(str(tmp_path)).write(f"{Evaluation.stage}/{KEY}/lease.json", theirs)
        temporary.parent.mkdir()
        temporary.write_bytes(b"being written")
    assert temporary.exists()


def test_a_record_is_none_until_it_is_committed_once(step_dir):
    assert step_dir.record(Evaluation) is None
    assert step_dir.commit(evaluation("first")) == evaluation("first")
    assert step_dir.commit(evaluation("second")) == evaluation("first")
    assert step_dir.record(Evaluation) == evaluation("first")
    assert step_dir.commit(evaluation("third"), instead_of=evaluation("second")) == evaluation("first")
    assert step_dir.commit(evaluation("third"), instead_of=evaluation("first")) == evaluation("third")
    assert step_dir.record(Evaluation) == evaluation("third")


def test_whoever_loses_the_race_to_commit_adopts_the_winners_record(step_dir):
    winners = at_once(lambda i: step_dir.commit(evaluation(str(i))))
    assert winners == [step_dir.record(Evaluation)] * 8
    replaced = at_once(lambda i: step_dir.commit(evaluation(f"again {i}"), instead_of=winners[0]))
    assert replaced == [step_dir.record(Evaluation)] * 8
    assert replaced[0] != winners[0]


def test_commit_removes_what_the_attempt_left_and_keeps_the_rest(step_dir):
    step_dir.write("attempt/checkpoint/1", b"x")
    step_dir.write("weights", b"w")
    path, filesystem = step_dir.run_folder()
    if filesystem is None:
        Path(path, "trial").write_bytes(b"y")
    else:
        filesystem.create_dir(path)  # as Ray does: a mark for each folder above
        with filesystem.open_output_stream(f"{path}/trial") as stream:
            stream.write(b"y")
    files = {name: size for name, size in step_dir.sizes("attempt/").items() if not name.endswith("/")}
    assert files == {"1/attempt/checkpoint/1": 1, "1/attempt/trial": 1}
    step_dir.commit(evaluation("d"))
    assert step_dir.sizes() == {"1/weights": 1}


def test_each_attempt_writes_for_itself_and_what_no_record_names_goes(uri, tmp_path):
    step, held = StepDir(uri, Evaluation.stage, KEY, str(tmp_path / "scratch")), []
    for number in range(1, 4):
        with step.hold(False, print) as attempt:
            stored = attempt.write("weights", b"of attempt %d" % number)
            attempt.write(f"rows/{number}", b"")
            attempt.write("attempt/state", b"")
            attempt.write("parts/b.json", b"of a shard that each made")
            held.append(attempt)
    assert [*attempt.sizes("w")] == ["1/weights", "2/weights", "3/weights"]
    assert [*held[1].sizes("w")] == ["1/weights", "2/weights"]
    rows = {"rows/1": "1/rows/1", "rows/2": "2/rows/2", "rows/3": "3/rows/3"}
    held[2].write("parts/a.json", b"from which damaged shards are made again")
    rows |= {"parts/a.json": "3/parts/a.json", "parts/b.json": "3/parts/b.json"}
    assert step.newest() == rows | {"weights": "3/weights", "attempt/state": "3/attempt/state"}
    with step.hold(False, print) as attempt:
        record = attempt.commit(evaluation("d", weights=stored))
    assert [*step.sizes()] == ["3/parts/a.json", "3/parts/b.json", "3/weights"]
    assert FinishedStep(record, step).local("weights").read_bytes() == b"of attempt 3"


def test_of_shards_those_stay_that_the_record_names_where_it_names_them(uri, tmp_path):
    common = {"key": KEY, "stage_version": 1, "recipe": {}, "inputs": {}, "provenance": {}}
    step, shards = StepDir(uri, TeacherCache.stage, KEY, str(tmp_path / "scratch")), []
    for number in range(3):
        with step.hold(False, print) as attempt:
            for name in ("rows/a", "rows/b", f"rows/of-a-part-cut-otherwise-{number}"):
                shards.append(Shard(name=name, rows=1, tokens=1, file=attempt.write(name, b"%d" % number)))
    with step.hold(False, print) as attempt:
        open_objects(uri).write(f"{TeacherCache.stage}/{KEY}/9/rows/b", b"of an attempt that took over")
        record = TeacherCache(**common, mode="states", dtype="float32", hidden=1, shards=(shards[3], shards[1]))
        attempt.commit(record)
    assert [*step.sizes()] == ["1/rows/b", "2/rows/a", "9/rows/b"]
    split = Split(shards=(shards[0],))
    tokens = Tokens(**common, vocabulary=1, end_of_text=None, splits={"train": split}, files={"x": shards[1].file})
    assert tokens.stored == {"rows/a": shards[0].file, "x": shards[1].file}


def test_a_step_is_cleared_but_for_its_lease_the_record_first(uri, step_dir, monkeypatch):
    record = step_dir.commit(evaluation("d", weights=step_dir.write("weights", b"four")))
    step_dir.write("parts/weights.json", b"{}")
    open_objects(uri).write(f"{Evaluation.stage}/{KEY}/report.html", b"<p>")
    there = stored_steps(uri, Evaluation.stage)[KEY]
    assert (there.done, there.bytes) == (True, len(record.to_json()) + 4 + 2 + 3)
    assert max(there.written, there.leased) <= now_of(uri)
    order = []
    delete = StepDir.delete
    monkeypatch.setattr(StepDir, "delete", lambda self, place: order.append(place) or delete(self, place))
    step_dir.clear()
    assert order[0] == "1/parts/weights.json"
    assert {*order[1:]} == {"1/weights", "report.html"}
    assert step_dir.record(Evaluation) is None
    left = stored_steps(uri, Evaluation.stage)[KEY]
    assert left == StoredStep(leased=there.leased)
    with pytest.raises(DamagedError, match="lacks its file weights"):
        FinishedStep(record, step_dir).local("weights")
    assert [*open_objects(uri).sizes("")] == [
        f"{Evaluation.stage}/{KEY}/{name}" for name in ("lease.json", "record.json")
    ]


def test_a_step_that_was_cleared_is_made_again_from_nothing_of_before(uri, tmp_path):
    step = StepDir(uri, Evaluation.stage, KEY, str(tmp_path / "scratch"))
    with step.hold(False, print) as first:
        first.write("rows/a", b"x")
        first.clear()
    open_objects(uri).write(f"{Evaluation.stage}/{KEY}/1/rows/late", b"whose deletion may be on its way")
    for token in (2, 3):
        with step.hold(False, print) as again:
            assert (again.fence, again.cleared, again.newest()) == (token, 1, {})
    record = again.commit(evaluation("again", weights=again.write("weights", b"w")))
    assert step.record(Evaluation) == record
    assert content(again, "weights") == b"w"


def test_who_lost_a_step_clears_nothing_of_it(step_dir):
    step_dir.commit(evaluation("d"))
    step_dir._lease.objects.write(f"{Evaluation.stage}/{KEY}/lease.json", Lease(None, 2).to_json())
    with pytest.raises(FencedOffError):
        step_dir.clear()
    assert step_dir.record(Evaluation) is not None


def test_what_a_command_announced_is_told_while_it_holds_the_step(uri, tmp_path):
    step = StepDir(uri, Evaluation.stage, KEY, str(tmp_path / "scratch"))
    assert step.needed() is None
    with step.hold(False, print) as held:
        assert step.needed() == []
        held.announce([replace(step, stage="cache"), held])
        assert step.needed() == [("cache", KEY), (Evaluation.stage, KEY)]
        held.commit(evaluation("d"))
        assert step.needed() == []
    assert step.needed() is None
    gone = Lease(replace(Owner.this_process(), pid=2**22 + 1), 5)
    open_objects(uri).write(f"{Evaluation.stage}/{KEY}/lease.json", gone.to_json())
    assert step.needed() is None


def test_records_of_a_stage_skip_the_damaged_ones(uri, step_dir):
    step_dir.commit(evaluation("d"))
    open_objects(uri).write(f"{Evaluation.stage}/{'1' * 32}/record.json", b"{")
    open_objects(uri).write(f"{Evaluation.stage}/{KEY}/package/record.json", evaluation("inner").to_json())
    assert records(uri, Evaluation) == [evaluation("d")]


def test_records_are_read_up_to_a_limit_and_no_file_of_a_step_is_listed(tmp_path, monkeypatch):
    objects = open_objects(str(tmp_path))
    for number in range(60):
        objects.write(f"{Evaluation.stage}/{number:032x}/record.json", evaluation(str(number)).to_json())
        objects.write(f"{Evaluation.stage}/{number:032x}/1/rows/a", b"")
    names, read = [], Directory.read
    monkeypatch.setattr(Directory, "read", lambda self, name: names.append(name) or read(self, name))
    monkeypatch.setattr(Directory, "sizes", lambda self, prefix: pytest.fail(f"listed {prefix}"))
    assert [record.digest for record in records(str(tmp_path), Evaluation)] == [str(number) for number in range(10, 60)]
    assert len(names) == 50
    assert len(records(str(tmp_path), Evaluation, limit=3)) == 3
    assert len(names) == 53


def test_steps_without_a_record_take_no_place_of_those_that_have_one(tmp_path):
    objects = open_objects(str(tmp_path))
    for number in range(5):
        objects.write(f"{Evaluation.stage}/{number:032x}/record.json", evaluation(str(number)).to_json())
    for number in range(5, 12):
        objects.write(f"{Evaluation.stage}/{number:032x}/lease.json", b"")
    assert [record.digest for record in records(str(tmp_path), Evaluation, limit=3)] == ["2", "3", "4"]
    assert [record.digest for record in records(str(tmp_path), Evaluation, limit=2)] == ["4"]  # of eight looks
    assert len(records(str(tmp_path), Evaluation)) == 5


def test_a_step_dir_without_a_fence_reads_only(step_dir):
    step_dir.write("a", b"x")
    reader = pickle.loads(pickle.dumps(replace(step_dir, fence=None)))
    assert content(reader, "a") == b"x"
    with pytest.raises(FencedOffError):
        reader.write("a", b"y")


def test_a_file_is_there_in_its_size_and_under_its_own_name(step_dir):
    stored = step_dir.write("weights", b"w")
    assert step_dir.holds("weights", stored)
    assert not step_dir.holds("weight", stored)
    assert not step_dir.holds("weights", stored.model_copy(update={"bytes": 2}))
    assert not step_dir.holds("weights", stored.model_copy(update={"fence": 7}))
    step_dir.delete(stored.place("weights"))
    assert not step_dir.holds("weights", stored)


def test_a_stored_file_is_checked_before_it_is_read(step_dir, tmp_path):
    stored = step_dir.upload("weights", file_of(tmp_path, b"sound"))
    assert stored == StoredFile(**checksum(file_of(tmp_path, b"sound")).model_dump(), fence=1)
    assert stored.bytes == 5
    assert step_dir.local("weights", stored).read_bytes() == b"sound"
    for other in (stored.model_copy(update={"bytes": 6}), stored.model_copy(update={"sha256": "0" * 64})):
        with pytest.raises(DamagedError, match="weights"):
            step_dir.local("weights", other)


@pytest.mark.parametrize("damaged", [b"Sound", b"soun", b"sound!", b"", None], ids=repr)
def test_a_damaged_file_is_refused(uri, step_dir, tmp_path, damaged):
    stored = step_dir.upload("weights", file_of(tmp_path, b"sound"))
    name = f"{Evaluation.stage}/{KEY}/1/weights"
    if damaged is None:
        open_objects(uri).delete(name)
    else:
        open_objects(uri).write(name, damaged)
    with pytest.raises(DamagedError, match=f"weights.*{KEY}|{KEY}.*weights"):
        step_dir.local("weights", stored)
    with pytest.raises(DamagedError):
        step_dir.folder({"weights": stored}, "")


def test_a_spoilt_scratch_copy_of_a_sound_object_is_fetched_again(s3, tmp_path):
    with StepDir(f"{s3}/{uuid.uuid4()}", Evaluation.stage, KEY, str(tmp_path / "scratch")).hold(
        False, print
    ) as step_dir:
        stored = step_dir.upload("weights", file_of(tmp_path, b"sound"))
        copy = step_dir.local("weights", stored)
        assert copy.is_relative_to(tmp_path / "scratch")
        for spoilt in (b"SOUND", b"s"):
            copy.write_bytes(spoilt)
            os.utime(copy, ns=(1, 1))
            assert step_dir.local("weights", stored).read_bytes() == b"sound"


def test_a_rewritten_file_is_read_as_the_new_one(step_dir, tmp_path):
    for data in (b"first", b"second"):
        stored = step_dir.upload("weights", file_of(tmp_path, data))
        assert step_dir.local("weights", stored).read_bytes() == data
        assert step_dir.write("weights", data) == stored


def test_a_folder_holds_the_listed_files_and_no_others(step_dir, tmp_path):
    files = {f"model/{name}": step_dir.upload(f"model/{name}", file_of(tmp_path, name.encode())) for name in ("a", "b")}
    step_dir.write("model/left-by-an-earlier-attempt", b"unchecked")
    folder = step_dir.folder(files | {"other": files["model/a"]}, "model/")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": b"a", "b": b"b"}
