"""Text and models that lie elsewhere: on S3 and on the hub."""

import contextlib
import http.server
import io
import itertools
import json
import random
import socket
import threading
import uuid
from functools import partial
from types import SimpleNamespace

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ResponseStreamingError
from huggingface_hub import HfApi, HfFileSystem, constants
from huggingface_hub.hf_api import DatasetInfo

from pipeline.config.data import Data
from pipeline.errors import ConfigError, RunError
from pipeline.sources import text as sources
from pipeline.sources.fields import rows
from pipeline.sources.files import open_text, pin_text, s3_bucket
from pipeline.sources.models import pin_model
from pipeline.sources.splits import split_parts
from pipeline.sources.text import documents, parts
from tests.store.test_step_store import serve_s3


@pytest.fixture(scope="module")
def s3():
    with serve_s3() as uri:
        yield uri


@pytest.fixture
def put(s3):
    """Put objects under a prefix of their own."""
    root, client = f"{s3}/{uuid.uuid4()}", boto3.Session().client("s3")

    def put(name, data):
        bucket, _, key = f"{root}/{name}".removeprefix("s3://").partition("/")
        client.put_object(Bucket=bucket, Key=key, Body=data)
        return root

    return put


def test_text_on_s3_reads_like_local_text(put, memo, read):
    put("part-1.txt", b"one\n\ntwo\n")
    put("other.bin", b"x")
    root = put("part-2.jsonl", b'{"text": "three"}')
    assert read(f"{root}/part-*") == ["one\n", "two\n", "three"]
    assert read(f"{root}/part-1.txt") == ["one\n", "two\n"]
    (before,) = pin_text(f"{root}/part-1.txt", "data.source", memo)
    put("part-1.txt", b"one\n\nTWO\n")
    (after,) = pin_text(f"{root}/part-1.txt", "data.source", memo)
    assert before.content != after.content
    assert read(f"{root}/part-1.txt") == ["one\n", "TWO\n"]
    with pytest.raises(ConfigError, match="no file matches"):
        read(f"{root}/none*.txt")


GLOBS = {
    "part-?.txt": ["part-1.txt"],
    "part-[1].txt": ["part-1.txt"],
    "*-[0-9].t?t": ["part-1.txt"],
    "*.txt": [".hidden.txt", "part-1.txt"],
    "*/*.txt": [".b/part-5.txt", "a/part-2.txt"],
    "**/*.txt": [".b/part-5.txt", ".hidden.txt", "a/b/part-3.txt", "a/part-2.txt", "part-1.txt"],
    "a/**/*.txt": ["a/b/part-3.txt", "a/part-2.txt"],
    "**/b/*.txt": ["a/b/part-3.txt"],
    "a/**": ["a/b/part-3.txt", "a/part-2.txt"],
    "**/part-3.txt": ["a/b/part-3.txt"],
    "**/**/part-2.*": ["a/part-2.txt"],
    "a*/part*": ["a/part-2.txt"],
    "a?b*": [],
}


@pytest.fixture(scope="module")
def trees(s3, tmp_path_factory):
    """The same files on a disk, on S3 and on the hub: the roots of the first two, and the names of all."""
    names = {name for matching in GLOBS.values() for name in matching}
    root, (bucket, _, prefix) = (
        tmp_path_factory.mktemp("tree"),
        f"{s3}/{uuid.uuid4()}".removeprefix("s3://").partition("/"),
    )
    client = boto3.Session().client("s3")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
        client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=name.encode())
    return root, f"s3://{bucket}/{prefix}", names


@pytest.mark.parametrize("glob", GLOBS)
def test_a_glob_means_the_same_files_wherever_they_lie(trees, memo, monkeypatch, glob):
    folder, uri, names = trees
    siblings = [SimpleNamespace(rfilename=name, size=3) for name in names]
    info = SimpleNamespace(siblings=siblings, sha="a" * 40)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *arguments, **keywords: info)
    roots = {str(folder): f"{folder}/", uri: f"{uri}/", "hf://org/name": f"hf://org/name@{'a' * 40}/"}
    for given, resolved in roots.items():
        try:
            files = pin_text(f"{given}/{glob}", "data.source", memo)
        except ConfigError as error:
            assert "no file matches" in str(error)  # noqa: PT017 - which some globs are for
            files = ()
        assert sorted(file.uri.removeprefix(resolved) for file in files) == GLOBS[glob]


def test_a_missing_bucket_is_said(s3, memo):
    with pytest.raises(ConfigError, match=r"data\.source.*no-such-bucket"):
        pin_text("s3://no-such-bucket/*.txt", "data.source", memo)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_an_object_that_changed_after_the_plan_is_not_read(put, tmp_path, memo, name):
    def content(text):
        pq.write_table(pa.table({"text": [text] * 3}), tmp_path / "file", row_group_size=1)
        return (tmp_path / "file").read_bytes() if name == "a.parquet" else b'{"text": "%s"}\n' % text.encode() * 3

    root = put(name, content("pinned"))
    (file,) = pin_text(f"{root}/{name}", "data.source", memo)
    (part,) = parts(file)
    assert len(list(documents(part, "document", "text"))) >= 1
    put(name, content("change"))
    with pytest.raises(RunError, match=rf"{name} changed after the plan was made"):
        list(documents(part, "document", "text"))
    put(name, content("pinned"))
    boto3.client("s3").delete_object(**dict(zip(("Bucket", "Key"), file.uri[5:].split("/", 1), strict=True)))
    with pytest.raises(RunError, match="changed after the plan"):
        list(documents(part, "document", "text"))


def random_texts(count, length):
    draw = random.Random(0)
    return [draw.randbytes(length // 2).hex() for _ in range(count)]


TEXTS = random_texts(600, 2000)  # which no compression makes small


@pytest.fixture(scope="module")
def big_parquet(tmp_path_factory):
    """Some 1.3 MB of random text and as much of another column, in twelve row groups."""
    path = tmp_path_factory.mktemp("big") / "big.parquet"
    pq.write_table(pa.table({"text": TEXTS, "other": TEXTS[::-1]}), path, row_group_size=50, write_statistics=False)
    return path.read_bytes()


@contextlib.contextmanager
def serve_hub(files, monkeypatch):
    """A hub on this machine with one data set, as its client sees it; yields a list of the bytes of each answer."""
    sent = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path, answer, status = self.path.partition("?")[0], b"", 404
            if path.startswith("/datasets/org/name/resolve/c0ffee/") and (span := self.headers["Range"]):
                start, end = map(int, span.removeprefix("bytes=").split("-"))
                answer, status = files[path.removeprefix("/datasets/org/name/resolve/c0ffee/")][start : end + 1], 206
                sent.append(len(answer))
            elif path.startswith("/api/datasets/org/name/tree/c0ffee/"):
                listed = [{"type": "file", "path": n, "size": len(data), "oid": n} for n, data in files.items()]
                answer, status = json.dumps(listed).encode(), 200
            elif path.startswith("/api/datasets/org/name"):
                siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
                answer = json.dumps({"id": "org/name", "sha": "c0ffee", "tags": [], "siblings": siblings}).encode()
                status = 200
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    HfFileSystem.clear_instance_cache()
    try:
        yield sent
    finally:
        HfFileSystem.clear_instance_cache()
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def fetched_from(root):
    """A list of the bytes of every object, or range of one, that is fetched from a bucket."""
    sent = []
    events = s3_bucket(root.removeprefix("s3://").partition("/")[0]).client.meta.events
    events.register("after-call.s3.GetObject", lambda parsed, **_: sent.append(parsed["ContentLength"]), "count")
    yield sent
    events.unregister("after-call.s3.GetObject", unique_id="count")


@pytest.fixture(params=["s3", "hub"])
def remote(request, monkeypatch, big_parquet):
    """The URI of the big Parquet file, and a list of the bytes of every answer that is asked for from now on."""
    if request.param == "hub":
        with serve_hub({"data/big.parquet": big_parquet}, monkeypatch) as sent:
            yield "hf://org/name@main/data/big.parquet", sent
        return
    root = request.getfixturevalue("put")("big.parquet", big_parquet)
    with fetched_from(root) as sent:
        yield f"{root}/big.parquet", sent


def test_a_part_of_a_remote_parquet_file_is_some_of_its_row_groups_and_fetches_no_more(
    remote, monkeypatch, memo, big_parquet
):
    uri, sent = remote
    monkeypatch.setattr(sources, "PART_BYTES", len(big_parquet) // 12)
    (file,) = pin_text(uri, "data.source", memo)
    pieces = parts(file)
    assert [(piece.start, piece.stop) for piece in pieces] == [(i, i + 50) for i in range(0, 600, 50)]
    assert sum(sent) < len(big_parquet) / 12, "to count the rows takes the footer alone"
    asked = len(sent)
    assert parts(file) == pieces
    assert len(sent) == asked, "and once"
    ahead, group = sources.PARQUET_AHEAD_BYTES, len(big_parquet) / 24
    for i in (0, 7):
        sent.clear()
        assert list(documents(pieces[i], "document", "text")) == TEXTS[50 * i : 50 * i + 50]
        assert sum(sent) < group + 3 * ahead
    sent.clear()
    assert [text for ((text,),) in rows(pieces[11], ("other",))] == TEXTS[::-1][550:]
    assert sum(sent) < group + 3 * ahead
    assert [text for piece in pieces for text in documents(piece, "document", "text")] == TEXTS


def test_footers_are_read_side_by_side_and_once(put, monkeypatch, memo):
    rows = io.BytesIO()
    pq.write_table(pa.table({"text": ["a text"]}), rows)
    for i in range(8):
        root = put(f"{i}.parquet", rows.getvalue())
    opened, together = [], threading.Barrier(4)

    def opening(file, ahead):
        opened.append(file.uri)
        together.wait(10)  # breaks unless four are open at once
        return open_text(file, ahead)

    monkeypatch.setattr(sources, "open_text", opening)
    section = Data(source=f"{root}/*.parquet")
    places = {"train": [file.model_dump() for file in pin_text(section.source, "data.source", memo)]}
    cut = [split_parts({"data": section.model_dump()}, places) for _ in range(2)]
    assert cut[0] == cut[1]
    assert sorted(opened) == [f"{root}/{i}.parquet" for i in range(8)]


def test_an_object_that_changes_while_it_is_read_is_not_read_on(put, memo, big_parquet):
    root = put("big.parquet", big_parquet)
    (file,) = pin_text(f"{root}/big.parquet", "data.source", memo)
    reading = documents(parts(file)[0], "document", "text")
    assert next(reading) == TEXTS[0]
    put("big.parquet", big_parquet[:-1] + b"?")
    with pytest.raises(RunError, match="changed after the plan"):
        list(reading)


@pytest.mark.parametrize("broken", [2, 3])
def test_a_connection_that_breaks_is_tried_again(put, memo, broken, monkeypatch):
    class Broken:
        def read(self):
            raise ResponseStreamingError(error="broken")

    def break_some(parsed, **_):
        if next(numbers) < broken:
            parsed["Body"] = Broken()

    root, numbers = put("a.txt", b"one\n"), itertools.count()
    (part,) = parts(*pin_text(f"{root}/a.txt", "data.source", memo))
    bucket = s3_bucket(root.removeprefix("s3://").partition("/")[0])
    monkeypatch.setattr(bucket.patience, "tries", 3)
    events = bucket.client.meta.events
    events.register("after-call.s3.GetObject", break_some, "break")
    with contextlib.nullcontext() if broken == 2 else pytest.raises(OSError, match="broken"):
        assert list(documents(part, "document", "text")) == ["one\n"]
    events.unregister("after-call.s3.GetObject", unique_id="break")
    assert next(numbers) == 3


def test_a_part_of_a_remote_text_fetches_what_it_reads(put, memo, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 100_000)
    monkeypatch.setattr(sources, "open_text", partial(open_text, ahead=10_000))
    root = put("big.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode())
    (file,) = pin_text(f"{root}/big.jsonl", "data.source", memo)
    pieces = parts(file)
    with fetched_from(root) as sent:
        assert len(list(documents(pieces[6], "document", "text"))) in (49, 50)
    assert 100_000 <= sum(sent) < 130_000


def test_a_remote_file_that_is_not_parquet_or_not_there_is_said_when_it_is_cut(put, memo, monkeypatch):
    root = put("a.parquet", b"PAR1 and no more")
    (file,) = pin_text(f"{root}/a.parquet", "data.source", memo)
    with pytest.raises(ConfigError, match=r"a\.parquet is not Parquet"):
        parts(file)
    with serve_hub({"a.parquet": b"x"}, monkeypatch):
        (file,) = pin_text("hf://org/name/a.parquet", "data.source", memo)
    with pytest.raises(ConfigError, match=r"hf://org/name@c0ffee/a\.parquet cannot be read"):
        parts(file)


@pytest.fixture(params=["offline", "nobody answers"])
def no_hub(request, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", request.param == "offline")
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")


@pytest.mark.usefixtures("no_hub")
def test_text_on_a_hub_that_cannot_be_reached_is_said(memo):
    with pytest.raises(ConfigError, match=r"data\.source.*org/name"):
        pin_text("hf://org/name@main/*.parquet", "data.source", memo)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("source", ["org/name", "org/name@abc", "name"])
def test_a_model_on_a_hub_that_cannot_be_reached_is_said(memo, source):
    with pytest.raises(ConfigError, match=rf"model\.source is '{source}'"):
        pin_model(source, "model.source", memo)


def test_a_name_that_no_hub_has_is_said(memo):
    with pytest.raises(ConfigError, match=r"data\.source"):
        pin_text("hf://o rg/na me/*.parquet", "data.source", memo)


def test_hub_text_is_pinned_by_commit_and_scripts_are_refused(monkeypatch, memo):
    asked = []

    def info(self, repo_id, *, revision, files_metadata):
        asked.append((repo_id, revision))
        siblings = [{"rfilename": name, "size": 9} for name in ("b.txt", "data/a.txt", "load.py")]
        return DatasetInfo(id=repo_id, sha="c0ffee", tags=[], siblings=siblings)

    monkeypatch.setattr(HfApi, "dataset_info", info)
    files = pin_text("hf://org/name@refs%2Fpr%2F1/**/*.txt", "data.source", memo)
    assert [file.uri for file in files] == ["hf://org/name@c0ffee/b.txt", "hf://org/name@c0ffee/data/a.txt"]
    assert all("c0ffee" in file.content for file in files)
    with pytest.raises(ConfigError, match=r"scripts are not run.*refs%2Fconvert%2Fparquet"):
        pin_text("hf://org/name/*.parquet", "data.source", memo)
    assert asked == [("org/name", "refs/pr/1"), ("org/name", None)]
