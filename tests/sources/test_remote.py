"""Text and models that lie elsewhere: on S3 and on the hub."""

import socket
import uuid

import boto3
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.hf_api import DatasetInfo

from pipeline.errors import BitmillError, ConfigError
from pipeline.sources.models import pin_model
from pipeline.sources.text import documents, parts, pin_text
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


@pytest.mark.parametrize("glob", ["part-?.txt", "part-[1].txt", "*-[0-9].t?t"])
def test_globs_on_s3_are_those_of_local_files(put, read, glob):
    root = put("part-1.txt", b"one\n")
    assert read(f"{root}/{glob}") == ["one\n"]


def test_a_missing_bucket_is_said(s3, memo):
    with pytest.raises(ConfigError, match=r"data\.source.*no-such-bucket"):
        pin_text("s3://no-such-bucket/*.txt", "data.source", memo)


def test_an_object_that_changed_after_the_plan_is_not_read_as_what_was_pinned(put, tmp_path, memo):
    root = put("a.txt", b"pinned\n")
    (file,) = pin_text(f"{root}/a.txt", "data.source", memo)
    put("a.txt", b"change\n")
    try:
        texts = [text for part in parts(file) for text in documents(part, "document", "text", str(tmp_path))]
    except BitmillError:
        return
    assert texts == ["pinned\n"]


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
    files = pin_text("hf://org/name@refs%2Fpr%2F1/*.txt", "data.source", memo)
    assert [file.uri for file in files] == ["hf://org/name@c0ffee/b.txt", "hf://org/name@c0ffee/data/a.txt"]
    assert all("c0ffee" in file.content for file in files)
    with pytest.raises(ConfigError, match=r"scripts are not run.*refs%2Fconvert%2Fparquet"):
        pin_text("hf://org/name/*.parquet", "data.source", memo)
    assert asked == [("org/name", "refs/pr/1"), ("org/name", None)]
