"""The store behind a proxy that does harm: all is done as if there were none, or a clear error says that it is not."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest

from jobs.bench.chaos.proxy import FAULTS, Fault, FaultProxy
from pipeline.errors import ConfigError, DamagedError, FencedOffError
from pipeline.store import lease as lease_module
from pipeline.store import s3 as s3_module
from pipeline.store.journal import Journal
from pipeline.store.lease import Owner
from pipeline.store.objects import Objects, open_objects
from pipeline.store.records import Evaluation
from pipeline.store.s3 import REFUSED_TRIES, TRIES, Patience, S3Error
from pipeline.store.step_store import StepDir, check_store
from tests.store.test_leases import lease_of, set_lease
from tests.store.test_step_store import KEY, at_once, evaluation, file_of, serve_s3

MIB = 2**20
BIG = os.urandom(9 * MIB)  # which S3 is given in two parts


@pytest.fixture(scope="module")
def proxy() -> FaultProxy:
    return FaultProxy(seed=16)


@pytest.fixture(scope="module")
def s3(proxy: FaultProxy) -> Iterator[str]:
    with serve_s3(faults=proxy) as uri:
        yield uri


@pytest.fixture
def uri(s3: str) -> str:
    return f"{s3}/{uuid.uuid4()}"


@pytest.fixture
def bucket(uri: str) -> Any:
    return open_objects(uri)


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other at once."""
    monkeypatch.setattr(s3_module, "FIRST_WAIT_S", 0.001)


def story(objects: Objects, scratch: Path) -> list[Any]:
    """Do all that a store does; return what it said."""
    scratch.mkdir()
    small, big = scratch / "small", scratch / "big"
    small.write_bytes(b"small")
    big.write_bytes(BIG)
    objects.write("a/1", b"one")
    said: list[Any] = [
        objects.create("a/2", b"two"),
        objects.create("a/2", b"other"),
        objects.swap("a/2", b"two", b"2"),
        objects.swap("a/2", b"two", b"other"),
        objects.swap("none", b"", b"other"),
        objects.read("a/1"),
        objects.read("a/2"),
    ]
    for name, path in (("b/small", small), ("b/deep/big", big)):
        objects.upload(name, path)
        said.append(hashlib.sha256(objects.local(name, scratch).read_bytes()).hexdigest())
    said += [objects.sizes(""), objects.folders(""), objects.folders("b/"), list(objects.stats("b/"))]
    objects.delete("a/1")
    objects.delete("a/1")
    objects.delete_unfinished("", lambda name: True)
    objects.delete_below("b/")
    for gone in (lambda: objects.read("a/1"), lambda: objects.local("b/none", scratch)):
        with pytest.raises(FileNotFoundError):
            gone()
    said += [objects.flaw("probe"), objects.sizes("a/")]
    objects.delete("probe")
    return said


@pytest.mark.parametrize("kind", FAULTS)
def test_all_that_a_store_does_is_done_though_each_request_meets_a_fault_once(
    proxy: FaultProxy, bucket: Objects, tmp_path: Path, kind: Fault
) -> None:
    undisturbed = story(open_objects(str(tmp_path / "store")), tmp_path / "here")
    with proxy.each(kind) as injected:
        assert story(bucket, tmp_path / "there") == undisturbed
    assert injected[kind] >= (9 if kind == "half upload" else 30)


@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_of_many_that_count_together_none_is_lost_and_none_counts_twice(
    proxy: FaultProxy, uri: str, bucket: Objects, rate: float
) -> None:
    clients = [open_objects.__wrapped__(uri) for _ in range(4)]
    bucket.write("count", b"0")

    def count(number: int) -> int:
        first = sum(clients[number].create(f"first/{turn}", b"%d" % number) for turn in range(6))
        counted = 0
        while counted < 8:
            current = clients[number].read("count")
            counted += clients[number].swap("count", current, b"%d" % (int(current) + 1))
        return first

    with proxy.at(rate) as injected:
        assert sum(at_once(count, 4)) == 6
        assert bucket.read("count") == b"32"
    assert injected.total() >= (1 if rate == 0.01 else 15)


def lives(step: StepDir, tmp_path: Path) -> list[Any]:
    """Live through a step's life: worked at, given up, taken over, done, done again, cleared away; return what it
    said."""
    said: list[Any] = []
    with step.hold(False, print) as first:
        said += [first.fence, first.write("weights", b"first"), first.needed()]
    set_lease(step, replace(Owner.this_process(), started_ticks=0), fence=1)
    with step.hold(False, print) as second:
        files = {"weights": second.write("weights", b"second"), "big": second.upload("big", file_of(tmp_path, b"big"))}
        with pytest.raises(FencedOffError):
            first.write("weights", b"late")
        said += [second.fence, second.commit(evaluation("ours", **files)), second.commit(evaluation("again"))]
    said += [step.record(Evaluation), step.sizes(), [step.local(name, files[name]).read_bytes() for name in files]]
    with step.hold(False, print) as third:
        third.clear(remember=True)
    return [*said, step.record(Evaluation), step.former(Evaluation), step.sizes()]


@pytest.mark.parametrize("kind", ["refused", "cut", "answer lost"])
def test_a_step_lives_as_it_does_undisturbed(proxy: FaultProxy, uri: str, tmp_path: Path, kind: Fault) -> None:
    here, there = (StepDir(root, Evaluation.stage, KEY, str(tmp_path)) for root in (str(tmp_path / "store"), uri))
    undisturbed = lives(here, tmp_path)
    with proxy.each(kind) as injected:
        assert lives(there, tmp_path) == undisturbed
    assert injected[kind] >= 25


def test_the_heart_beats_through_faults_and_the_lease_is_let_go(
    proxy: FaultProxy, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.01)
    step = StepDir(uri, Evaluation.stage, KEY, str(tmp_path))
    with proxy.at(0.1) as injected:
        with step.hold(False, print) as held:
            while injected.total() < 10:
                assert held.check_fence() == 1
        assert lease_of(step).owner is None


def test_a_journal_holds_each_entry_once(proxy: FaultProxy, bucket: Objects) -> None:
    journal = Journal(bucket, "journal/", "journal")
    journal.claim(1)
    with proxy.each("answer lost"):
        for number in range(4):
            journal.append({"number": number}, 1)
            journal.tell(number + 1, 1)
    assert [entry["number"] for entry in journal.entries()] == [3, 2, 1, 0]
    assert (journal.head().count, journal.head().told) == (4, 4)


def test_what_is_damaged_on_its_way_is_sent_again(proxy: FaultProxy, bucket: Any, tmp_path: Path) -> None:
    with proxy.each("damaged") as injected:
        bucket.write("small", b"small")
        assert bucket.read("small") == b"small"
        bucket.upload("file", file_of(tmp_path, b"file"))
    assert injected["damaged"] == 3
    assert bucket.local("file", tmp_path / "scratch").read_bytes() == b"file"


def test_what_arrives_damaged_time_and_again_is_not_taken(proxy: FaultProxy, uri: str, tmp_path: Path) -> None:
    bucket = open_objects.__wrapped__(uri)
    step = StepDir(uri, Evaluation.stage, KEY, str(tmp_path))
    with step.hold(False, print) as held:
        stored = held.write("weights", b"weights")
        record = held.commit(evaluation("ours", weights=stored))
    with proxy.at(1.0, "damaged"):
        with pytest.raises(S3Error, match="arrived damaged: its SHA-256"):
            bucket.read(f"{Evaluation.stage}/{KEY}/1/weights")
        with pytest.raises(DamagedError, match="does not match its checksum"):
            step.local("weights", stored)
    assert step.record(Evaluation) == record
    assert step.local("weights", stored).read_bytes() == b"weights"


def test_an_endpoint_that_falls_silent_is_asked_again(
    proxy: FaultProxy, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "ANSWER_S", 0.5)
    bucket = open_objects.__wrapped__(uri)
    with proxy.each("silent") as injected:
        bucket.write("a", b"x")
        assert bucket.read("a") == b"x"
    assert injected["silent"] >= 2


@pytest.mark.parametrize(
    ("kind", "tries", "message"),
    [
        ("503", TRIES, r"SlowDown"),
        ("cut", TRIES, rf"tried {TRIES} times, or as often as AWS_MAX_ATTEMPTS says"),
        ("refused", REFUSED_TRIES, rf"AccessDenied.* asked {REFUSED_TRIES} times: see which credentials boto3 finds"),
        ("unknown key", 1, r"InvalidAccessKeyId.* asked 1 times: see which credentials"),
    ],
)
def test_what_does_not_pass_ends_with_an_error_that_says_why(
    proxy: FaultProxy, uri: str, kind: Fault, tries: int, message: str
) -> None:
    bucket = open_objects.__wrapped__(uri)
    calls: list[Callable[[], Any]] = [
        lambda: bucket.read("a"),
        lambda: bucket.create("a", b"x"),
        lambda: bucket.sizes(""),
        lambda: bucket.delete("a"),
    ]
    for call in calls:
        with proxy.at(1.0, kind), pytest.raises(S3Error, match=message):
            call()
        assert len(proxy.requests) == tries
    with proxy.at(1.0, kind), pytest.raises(ConfigError, match=f"cannot be written to.*{message}"):
        check_store(uri)


def test_the_standard_knob_says_how_often_is_tried(
    proxy: FaultProxy, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    bucket = open_objects.__wrapped__(uri)
    for kind in ("500", "refused"):
        with proxy.at(1.0, kind), pytest.raises(S3Error):
            bucket.read("a")
        assert len(proxy.requests) == 2


def test_arrow_tries_as_often_on_every_node(proxy: FaultProxy, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "4")
    path, filesystem = open_objects.__wrapped__(uri).arrow("a")
    elsewhere = pickle.loads(pickle.dumps(filesystem))
    with proxy.at(1.0, "503"), pytest.raises(OSError, match=r"SLOW_DOWN|SlowDown|503"):
        elsewhere.open_input_stream(path)
    assert len(proxy.requests) == 4


def test_an_upload_that_another_has_ended_meanwhile_is_ended(proxy: FaultProxy, bucket: Any) -> None:
    for name in "ab":
        bucket.client.create_multipart_upload(Bucket=bucket.bucket, Key=f"{bucket.prefix}{name}")
    with proxy.each("answer lost", lambda request: request[0] == "DELETE") as injected:
        bucket.delete_unfinished("", lambda name: True)
    assert injected["answer lost"] == 2
    assert "Uploads" not in bucket.client.list_multipart_uploads(Bucket=bucket.bucket, Prefix=bucket.prefix)


def test_waits_double_and_none_is_like_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "FIRST_WAIT_S", 0.2)
    for attempts, most in ((1, 0.2), (2, 0.4), (5, 3.2), (9, 20.0)):
        waits = [Patience.pause_s(attempts) for _ in range(200)]
        assert 0 <= min(waits) < most / 4
        assert most * 3 / 4 < max(waits) <= most
        assert len(set(waits)) == 200


def test_other_endpoints_than_aws_are_asked_nothing_that_they_may_not_know(
    proxy: FaultProxy, uri: str, bucket: Any, tmp_path: Path
) -> None:
    with proxy.at(0.0):
        story(bucket, tmp_path / "scratch")
    for (method, path), headers in proxy.requests:
        assert path.startswith(f"/{bucket.bucket}")  # the bucket is no part of the host's name
        assert not [
            name for name in headers if re.match("x-amz-(sdk-)?checksum|x-amz-trailer|transfer-enc", name, re.I)
        ]
        if method == "PUT":
            assert headers["Content-MD5"]


def test_a_missing_bucket_is_no_missing_object(s3: str) -> None:
    with pytest.raises(S3Error, match="NoSuchBucket"):
        open_objects("s3://no-such-bucket/x").read("a")


def test_credentials_are_those_of_the_standard_chain_and_nobody_else_learns_of_them(
    proxy: FaultProxy, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "credentials"
    file.write_text("[tester]\naws_access_key_id = named-by-profile\naws_secret_access_key = s3cret\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "tester")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    with caplog.at_level("DEBUG"):
        bucket = open_objects.__wrapped__(uri)
        with proxy.at(0.0):
            bucket.write("a", b"x")
        with proxy.at(1.0, "unknown key"), pytest.raises(S3Error) as caught:
            bucket.read("a")
        _, filesystem = bucket.arrow("a")
    assert all("Credential=named-by-profile/" in headers["Authorization"] for _, headers in proxy.requests)
    assert "s3cret" not in f"{caplog.text} {caught.value!r}"
    assert b"s3cret" not in pickle.dumps(filesystem)


UP_AND_DOWN = """
import sys, time, tracemalloc
from pathlib import Path
from s3transfer.download import IOWriteTask
from pipeline.store.objects import open_objects
write = IOWriteTask._main
def slowly(self, **chunk):
    time.sleep(0.01)
    write(self, **chunk)
IOWriteTask._main = slowly  # a disk that is slower than the network
bucket, scratch = open_objects(sys.argv[1]), Path(sys.argv[2])
with open(scratch / "file", "wb") as file:
    file.truncate(int(sys.argv[3]))
for call in (lambda: bucket.upload("a", scratch / "file"), lambda: bucket.local("a", scratch)):
    tracemalloc.start()
    call()
    print(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
"""


def test_a_large_object_goes_up_and_down_in_the_memory_of_a_few_parts(uri: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", UP_AND_DOWN, uri, str(tmp_path), str(40 * MIB)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    up, down = map(int, done.stdout.split())
    print(f"peak of 40 MiB: {up / MIB:.1f} MiB up, {down / MIB:.1f} MiB down")
    assert up < 16 * MIB
    assert down < 16 * MIB
