"""The store's objects, the same on a directory and on S3."""

import contextlib
import errno
import fcntl
import os
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest
from botocore.awsrequest import AWSResponse

from jobs.bench.chaos.server import CLEARED, SETTINGS, atomic_s3, served
from pipeline.errors import ConfigError, RunError
from pipeline.store import objects as objects_module
from pipeline.store.objects import Directory, open_objects
from pipeline.store.records import Evaluation
from pipeline.store.step_store import check_store, now_of

KEY = "0" * 32
EVERYWHERE = ["directory", "s3"]


@contextlib.contextmanager
def serve_s3(application=None, faults=None):
    """S3 on this machine, for many clients side by side, perhaps behind a FaultProxy; yields the URI of an empty
    bucket."""
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        port = stack.enter_context(served(application))
        if faults is not None:
            port = stack.enter_context(faults.before(port))
        for name, value in {**SETTINGS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
            patch.setenv(name, value)
        for name in CLEARED:
            patch.delenv(name, raising=False)
        open_objects.cache_clear()
        bucket = f"bucket-{uuid.uuid4().hex}"
        boto3.Session().client("s3").create_bucket(Bucket=bucket)
        yield f"s3://{bucket}"
        open_objects.cache_clear()


@pytest.fixture(scope="module")
def s3():
    with serve_s3() as uri:
        yield uri


@pytest.fixture(params=EVERYWHERE)
def uri(request, tmp_path):
    (tmp_path / "neighbour.txt").write_text("not of the store")
    return (
        str(tmp_path / "store") if request.param == "directory" else f"{request.getfixturevalue('s3')}/{uuid.uuid4()}"
    )


@pytest.fixture
def objects(uri):
    return open_objects(uri)


def evaluation(digest, **files):
    common = {"key": KEY, "stage_version": 1, "recipe": {}, "inputs": {}, "provenance": {}, "files": files}
    return Evaluation(**common, protocol="p", digest=digest, teacher={}, student={}, validation={})


def content(step_dir, name):
    """What the newest attempt that has a file of this name keeps in it."""
    return step_dir.read(step_dir.newest(name)[name])


def file_of(tmp_path, data):
    path = tmp_path / uuid.uuid4().hex
    path.write_bytes(data)
    return path


def at_once(function, threads=8):
    """Call function(0), function(1), ... from threads that start together."""
    barrier = threading.Barrier(threads)

    def call(number):
        barrier.wait(30)
        return function(number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(call, range(threads)))


def test_an_object_is_written_replaced_and_deleted(objects):
    with pytest.raises(FileNotFoundError):
        objects.read("a/b.json")
    for data in (b"first", b"", b"second" * 1000):
        objects.write("a/b.json", data)
        assert objects.read("a/b.json") == data
    objects.delete("a/b.json")
    objects.delete("a/b.json")
    with pytest.raises(FileNotFoundError):
        objects.read("a/b.json")


def test_create_writes_once(objects):
    assert objects.create("a/b", b"first")
    assert not objects.create("a/b", b"second")
    assert objects.read("a/b") == b"first"


def test_swap_replaces_only_what_was_expected(objects):
    assert not objects.swap("a/b", b"", b"new")  # neither object nor folder
    objects.write("a/b", b"old")
    assert not objects.swap("a/b", b"other", b"new")
    assert objects.read("a/b") == b"old"
    assert objects.swap("a/b", b"old", b"new")
    assert objects.read("a/b") == b"new"
    objects.delete("a/b")
    assert not objects.swap("a/b", b"new", b"newer")


def test_a_race_to_create_has_one_winner(uri, objects):
    clients = [open_objects.__wrapped__(uri) for _ in range(8)]
    for turn in range(5):
        won = at_once(lambda i, turn=turn: clients[i].create(f"race/{turn}", b"%d" % i))
        assert sum(won) == 1
        assert objects.read(f"race/{turn}") == b"%d" % won.index(True)


def test_a_race_to_create_files_has_one_winner_to_the_last_moment(tmp_path, monkeypatch):
    objects, barrier = open_objects(str(tmp_path / "store")), threading.Barrier(8)
    monkeypatch.setattr(objects_module, "_sync", lambda path: barrier.wait(30))  # all have written, none has committed
    for turn in range(50):
        assert sum(at_once(lambda i, turn=turn: objects.create(f"race/{turn}", b"%d" % i))) == 1


def test_a_file_that_was_created_though_the_file_server_lost_the_answer_is_ours(tmp_path, monkeypatch):
    objects, link = open_objects(str(tmp_path / "store")), os.link

    def asked_twice(source, target):
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", asked_twice)
    assert objects.create("a", b"ours")
    assert not objects.create("a", b"ours")


def test_a_race_to_swap_has_one_winner(uri, objects):
    clients = [open_objects.__wrapped__(uri) for _ in range(8)]
    for turn in range(5):
        objects.write(f"race/{turn}", b"old")
        won = at_once(lambda i, turn=turn: clients[i].swap(f"race/{turn}", b"old", b"%d" % i))
        assert sum(won) == 1
        assert objects.read(f"race/{turn}") == b"%d" % won.index(True)


def test_a_race_on_s3_has_one_winner_though_all_requests_are_under_way():
    """None is answered before the server holds all of them, which one that takes them in turn would never do."""
    barrier, answer = threading.Barrier(8), atomic_s3()

    def gathering(environ, start_response):
        if {"HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"} & environ.keys():
            barrier.wait(30)
        return answer(environ, start_response)

    with serve_s3(gathering) as uri:
        clients = [open_objects.__wrapped__(uri) for _ in range(8)]
        for turn in range(5):
            assert sum(at_once(lambda i, turn=turn: clients[i].create(f"race/{turn}", b"old"))) == 1
            won = at_once(lambda i, turn=turn: clients[i].swap(f"race/{turn}", b"old", b"%d" % i))
            assert sum(won) == 1
            assert clients[0].read(f"race/{turn}") == b"%d" % won.index(True)


def test_a_reader_sees_the_old_object_or_the_new_one(objects):
    versions = [bytes([i]) * 300_000 for i in range(2)]
    objects.write("big", versions[0])
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(lambda: [objects.write("big", versions[i % 2]) for i in range(10)])
        while not writing.done():
            assert objects.read("big") in versions
        writing.result()


def test_sizes_lists_by_prefix(objects):
    for name in ("a/1", "a/22", "a/deep/333", "ab/1", "b"):
        objects.write(name, name.encode())
    assert objects.sizes("a/") == {"a/1": 3, "a/22": 4, "a/deep/333": 10}
    assert objects.sizes("a/2") == {"a/22": 4}
    assert objects.sizes("a") == {"a/1": 3, "a/22": 4, "a/deep/333": 10, "ab/1": 4}
    assert objects.sizes("none/") == {}
    assert set(objects.sizes("")) == {"a/1", "a/22", "a/deep/333", "ab/1", "b"}


def test_stats_are_bytes_and_times_of_the_store_itself(uri, objects):
    objects.write("a/1", b"four")
    before = now_of(uri)
    objects.write("a/2", b"")
    stats = objects.stats("a/")
    assert {name: stat.bytes for name, stat in stats.items()} == {"a/1": 4, "a/2": 0}
    assert stats["a/1"].written <= before <= stats["a/2"].written
    assert [*objects.sizes("")] == ["a/1", "a/2"]  # the probe is gone


def test_folders_are_what_lies_directly_below_and_holds_objects(objects):
    for name in ("a/1", "a/x/2", "a/x/deep/3", "a/y/deep/4", "ab/z/5"):
        objects.write(name, b"")
    assert objects.folders("a/") == ["x", "y"]
    assert objects.folders("none/") == objects.folders("a/1/") == []


def test_sizes_are_at_ease_with_what_vanishes_meanwhile(tmp_path):
    objects = open_objects(str(tmp_path / "store"))
    objects.write("kept/x", b"x")
    stop = threading.Event()

    def coming_and_going():
        while not stop.is_set():
            for number in range(20):
                objects.write(f"gone/{number}/deep/x", b"x")
            objects.delete_below("gone/")

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(coming_and_going)
        try:
            assert all("kept/x" in objects.sizes("") for _ in range(300))
        finally:
            stop.set()
        working.result()


def test_delete_below_takes_the_folder_alone(objects):
    for name in ("a/1", "a/deep/2", "ab"):
        objects.write(name, b"x")
    objects.delete_below("a/")
    objects.delete_below("none/")
    assert objects.sizes("a") == {"ab": 1}


def test_upload_and_local_copy(objects, tmp_path):
    data = os.urandom(100_000)
    objects.upload("a/file", file_of(tmp_path, data))
    assert objects.local("a/file", tmp_path / "scratch").read_bytes() == data
    with pytest.raises(FileNotFoundError):
        objects.local("a/other", tmp_path / "scratch")
    copies = at_once(lambda i: objects.local("a/file", tmp_path / "shared").read_bytes())
    assert copies == [data] * 8
    assert not list(tmp_path.rglob("unfinished/*"))


def test_a_write_that_fails_halfway_leaves_the_old_object_and_nothing_else(tmp_path, monkeypatch):
    objects = open_objects(str(tmp_path / "store"))
    objects.write("a/b", b"old")

    def full(path):
        raise OSError("No space left on device")

    monkeypatch.setattr(objects_module, "_sync", full)
    source = file_of(tmp_path, b"new")
    for write in (lambda: objects.write("a/b", b"new"), lambda: objects.create("a/c", b"new")):
        with pytest.raises(OSError, match="No space"):
            write()
    with pytest.raises(OSError, match="No space"):
        objects.upload("a/b", source)
    assert objects.read("a/b") == b"old"
    assert [path.name for path in (tmp_path / "store").rglob("*") if path.is_file()] == ["b"]


def test_an_unfinished_upload_is_neither_listed_nor_read(s3, tmp_path):
    bucket = open_objects(f"{s3}/{uuid.uuid4()}")
    upload = bucket.client.create_multipart_upload(Bucket=bucket.bucket, Key=f"{bucket.prefix}a/b")
    bucket.client.upload_part(
        Bucket=bucket.bucket, Key=upload["Key"], UploadId=upload["UploadId"], PartNumber=1, Body=b"half"
    )
    assert bucket.sizes("") == {}
    with pytest.raises(FileNotFoundError):
        bucket.local("a/b", tmp_path)


def test_what_killed_writers_left_is_deleted_where_it_was_asked_for_alone(tmp_path):
    objects = open_objects(str(tmp_path / "store"))
    for name in ("a/b", "a/deep/b", "a/kept/b", "ab"):
        objects.write(name, b"x")
        path = tmp_path / "store" / name
        path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp").write_bytes(b"half")
    objects.delete_unfinished("a/", lambda name: not name.startswith("kept/"))
    objects.delete_unfinished("none/", lambda name: True)
    assert set(objects.sizes("")) == {"a/b", "a/deep/b", "a/kept/b", "ab"}
    left = {path.parent.name: path.name.split(".")[1] for path in (tmp_path / "store").rglob("*.tmp")}
    assert left == {"kept": "b", "store": "ab"}


def test_unfinished_uploads_are_ended_where_it_was_asked_for_alone(s3):
    bucket = open_objects(f"{s3}/{uuid.uuid4()}")
    bucket.write("a/b", b"whole")
    for name in ("a/b", "a/deep/b", "a/kept/b", "ab"):
        bucket.client.create_multipart_upload(Bucket=bucket.bucket, Key=bucket.prefix + name)
    bucket.delete_unfinished("a/", lambda name: not name.startswith("kept/"))
    left = bucket.client.list_multipart_uploads(Bucket=bucket.bucket, Prefix=bucket.prefix)["Uploads"]
    assert [upload["Key"].removeprefix(bucket.prefix) for upload in left] == ["a/kept/b", "ab"]
    assert bucket.read("a/b") == b"whole"


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/hostname", "link/x"])
def test_names_that_lead_outside_the_store_are_refused(tmp_path, name):
    objects = open_objects(str(tmp_path / "store"))
    objects.write("a/x", b"inside")
    (tmp_path / "x").write_bytes(b"outside")
    (tmp_path / "store" / "link").symlink_to(tmp_path)
    for use in (
        lambda: objects.read(name),
        lambda: objects.write(name, b""),
        lambda: objects.create(name, b""),
        lambda: objects.swap(name, b"outside", b""),
        lambda: objects.delete(name),
        lambda: objects.local(name, tmp_path),
    ):
        with pytest.raises(RunError, match="leads outside the store"):
            use()
    assert (tmp_path / "x").read_bytes() == b"outside"


def test_a_directory_may_be_spelled_as_a_uri(tmp_path):
    open_objects(f"file://{tmp_path}/store").write("a", b"x")
    assert open_objects(str(tmp_path / "store")).read("a") == b"x"


@pytest.mark.parametrize(
    "uri", ["gs://bucket/x", "http://host/x", "S4://x", "s3://", "s3:///x", "s3://b/../x", "s3://b/x/..", "s3://b//x"]
)
def test_what_is_neither_a_directory_nor_a_plain_prefix_is_refused(uri):
    with pytest.raises(ConfigError, match=r"resources\.storage_uri .*s3://bucket/prefix"):
        open_objects(uri)


def test_a_sound_store_is_taken_and_left_as_it_was(uri, objects, tmp_path):
    check_store(uri)
    assert objects.sizes("") == {}
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "neighbour.txt"]


def test_a_store_that_cannot_be_written_to_is_refused_with_what_to_do(tmp_path, s3):
    (tmp_path / "file").write_text("x")
    for uri in (str(tmp_path / "file" / "store"), "s3://no-such-bucket/x"):
        with pytest.raises(ConfigError, match=r"resources\.storage_uri .*cannot be written to"):
            check_store(uri)


UNFIT = r"resources\.storage_uri .* cannot keep two commands from running one step: "


@pytest.mark.parametrize("header", ["If-None-Match", "If-Match"])
def test_an_s3_that_ignores_a_condition_is_found_out(s3, header):
    def unheard(params, **_):
        params["headers"].pop(header, None)

    uri = f"{s3}/{uuid.uuid4()}"
    bucket = open_objects(uri)
    bucket.client.meta.events.register("before-call.s3.PutObject", unheard)
    with pytest.raises(ConfigError, match=f"{UNFIT}it writes in spite of {header}"):
        check_store(uri)
    assert bucket.sizes("") == {}


@pytest.mark.parametrize(
    ("status", "message"), [(501, f"{UNFIT}it has no conditional writes"), (403, "cannot be written to")]
)
def test_an_s3_without_conditional_writes_is_told_from_one_that_may_not_be_written_to(s3, status, message):
    def answer(**_):
        return AWSResponse("", status, {}, None), {"Error": {}, "ResponseMetadata": {"HTTPStatusCode": status}}

    uri = f"{s3}/{uuid.uuid4()}"
    open_objects(uri).client.meta.events.register("before-call.s3.PutObject", answer)
    with pytest.raises(ConfigError, match=message):
        check_store(uri)


def refuse(*_, **__):
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


@pytest.mark.parametrize(
    ("module", "function", "instead", "message"),
    [
        (os, "link", refuse, r"it has no hard links \(Operation not supported\)"),
        (os, "link", os.replace, "a hard link takes the place of a file that is there"),
        (fcntl, "flock", refuse, r"it has no locks \(Operation not supported\)"),
        (fcntl, "flock", lambda *_: None, "its locks hold nobody off"),
    ],
    ids=["no hard links", "links that overwrite", "no locks", "locks that hold nobody off"],
)
def test_a_file_system_without_links_or_locks_is_found_out(tmp_path, monkeypatch, module, function, instead, message):
    monkeypatch.setattr(module, function, instead)
    with pytest.raises(ConfigError, match=UNFIT + message):
        check_store(str(tmp_path / "store"))
    assert not list((tmp_path / "store" / "probes").iterdir())


def test_space_left_is_known_for_directories(objects):
    free = objects.free_bytes()
    assert (free > 0) if isinstance(objects, Directory) else free is None
