"""Data sets of several files: splits that a README names, folders of `save_to_disk`, weights, objects in clouds."""

import contextlib
import gzip
import http.server
import importlib
import json
import os
import subprocess
import sys
import threading

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.config.data import Data, Source
from pipeline.errors import ConfigError, RunError
from pipeline.sources.files import pin_splits, pin_text
from pipeline.sources.splits import split_parts
from pipeline.sources.text import documents, parts
from pipeline.store.records import SPLITS
from tests.conftest import ROOT

README = """---
configs:
- config_name: en
  data_files:
  - {split: train, path: data/train-*.jsonl.gz}
  - {split: test, path: data/test.jsonl}
- config_name: de
  data_files: data/de.jsonl
---
"""


@pytest.fixture
def set_folder(tmp_path):
    """A folder as a repository of the hub is."""
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "README.md").write_text(README)
    for number in range(2):
        packed = gzip.compress(json.dumps({"text": f"train {number}"}).encode())
        (tmp_path / "set" / "data" / f"train-{number}.jsonl.gz").write_bytes(packed)
    for name in ("test", "de"):
        (tmp_path / "set" / "data" / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    return tmp_path / "set"


def texts_of(files):
    return [text for file in files for part in parts(file) for text in documents(part, "document", "text")]


@pytest.mark.parametrize(
    ("knob", "config", "split", "expected"),
    [
        ("data.source", "en", None, ["train 0", "train 1"]),
        ("data.test", "en", None, ["test"]),
        ("data.source", "en", "test", ["test"]),
        ("data.source", "de", None, ["de"]),
    ],
)
def test_a_split_of_a_set_is_the_files_that_its_readme_names(set_folder, memo, knob, config, split, expected):
    assert texts_of(pin_text(str(set_folder), knob, memo, config, split)) == expected


@pytest.mark.parametrize(
    ("config", "split", "message"),
    [
        ("en", "dev", "has no split 'dev'; valid: train, test"),
        ("fr", None, r"no data set that can be read: .*fr"),
        (None, None, r"no data set that can be read: Config name is missing"),
    ],
)
def test_a_split_that_a_set_has_not_is_refused(set_folder, memo, config, split, message):
    with pytest.raises(ConfigError, match=rf"data\.source: .*{message}"):
        pin_text(str(set_folder), "data.source", memo, config, split)


def test_what_is_no_set_has_no_split(tmp_path, memo):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    for path in (str(tmp_path / "a.jsonl"), "python://pydoc", "hf://org/name@main/*.jsonl"):
        with pytest.raises(ConfigError, match="names files and no data set"):
            pin_text(path, "data.source", memo, split="train")


def test_a_saved_set_is_read_file_by_file_in_order(tmp_path, memo):
    from datasets import Dataset, DatasetDict

    texts = [f"document {i}" for i in range(50)]
    whole = Dataset.from_dict({"text": texts, "turns": [["a", "b"]] * 50})
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    assert texts_of(pin_text(str(tmp_path / "one"), "data.source", memo)) == texts
    assert texts_of(pin_text(str(tmp_path / "one" / "*.arrow"), "data.source", memo)) == texts
    DatasetDict(train=whole, dev=whole.select([3, 1])).save_to_disk(tmp_path / "several")
    assert texts_of(pin_text(str(tmp_path / "several"), "data.source", memo)) == texts
    assert texts_of(pin_text(str(tmp_path / "several"), "data.test", memo, split="dev")) == [texts[3], texts[1]]
    assert texts_of(pin_text(str(tmp_path / "several" / "dev"), "data.test", memo)) == [texts[3], texts[1]]
    with pytest.raises(ConfigError, match=r"data\.test: .*several has no split 'test'; valid: train, dev"):
        pin_text(str(tmp_path / "several"), "data.test", memo)
    with pytest.raises(ConfigError, match="no config or split to choose"):
        pin_text(str(tmp_path / "one"), "data.source", memo, split="train")


def divided(memo, section):
    files = pin_splits(section, memo)
    recipe = {"data": {**section.model_dump(), "validation": files.get("validation"), "test": files.get("test")}}
    work = split_parts(recipe, {split: [file.model_dump() for file in pinned] for split, pinned in files.items()})
    return work, files


def test_a_weight_says_how_often_training_text_is_read(tmp_path, memo):
    from pipeline.stages.tokenize import documents_of

    for name in ("a", "b"):
        rows = [json.dumps({"text": f"{name} {i}"}) for i in range(1000)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    a, b = (str(tmp_path / f"{name}.jsonl") for name in "ab")

    def counted(sources, **data):
        section = Data(source=sources, **data)
        work, _ = divided(memo, section)
        recipe = {"data": {**section.model_dump()}, "task": {"name": "language_modeling"}}
        return {split: [t for p in work if p.split == split for t in documents_of(p, recipe)] for split in SPLITS}

    plain = counted([a, b], holdout=0.1)
    weighted = counted([{"path": a, "weight": 2.5}, {"path": b, "weight": 0.25}], holdout=0.1)
    assert all(weighted[split] == plain[split] for split in SPLITS[1:]), "what measures is read once"
    ours, others = ([t for t in plain["train"] if t[0] == name] for name in "ab")
    times = {text: weighted["train"].count(text) for text in plain["train"]}
    assert {times[text] for text in ours} == {2, 3}
    assert {times[text] for text in others} == {0, 1}
    assert sum(times[text] for text in ours) == pytest.approx(2.5 * len(ours), rel=0.1)
    assert sum(times[text] for text in others) == pytest.approx(0.25 * len(others), rel=0.25)
    assert {*weighted["train"]} <= {*plain["train"]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"validation": {"path": "a.txt", "weight": 2}}, "what measures is read once"),
        ({"source": [{"path": "a.txt", "weight": 0}]}, "greater than 0"),
        ({"source": []}, "at least 1 item"),
        ({"source": {"path": "https://user:secret@host/a.txt"}}, "takes no user or password"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(given, message):
    with pytest.raises(ValueError, match=message) as refused:
        Data(**{"source": "a.txt", **given})
    assert "secret" not in str(refused.value)


def test_several_sources_are_one_in_their_order():
    section = Data(source=["a.txt", {"path": "b", "split": "train"}])
    assert section.sources("train") == (Source(path="a.txt"), Source(path="b", split="train"))
    assert section.sources("test") == ()


class Bucket(MemoryFileSystem):
    """Objects with ETags, as a cloud's are."""

    protocol = "az"
    store = {}
    pseudo_dirs = [""]

    def info(self, path, **keywords):
        held = super().info(path, **keywords)
        if held["type"] == "file":
            held["etag"] = str(hash(self.store[self._strip_protocol(path)].getvalue()))
        return held

    def find(self, path, **keywords):
        names = [name.lstrip("/") for name in super().find(path)]
        return {name: {**self.info(name), "name": name} for name in names}


@pytest.fixture
def cloud(monkeypatch):
    monkeypatch.setitem(importlib.import_module("fsspec.registry")._registry, "az", Bucket)
    files = fsspec.filesystem("az")
    for name, data in {"a.txt": b"one\n\ntwo", "b/c.jsonl.gz": gzip.compress(b'{"text": "three"}')}.items():
        files.pipe(f"bucket/corpus/{name}", data)
    yield files
    Bucket.store.clear()


def test_text_in_a_cloud_reads_like_any_other(cloud, memo, read):
    assert read("az://bucket/corpus/*.txt") == ["one\n", "two"]
    assert read("az://bucket/corpus/**/*.*") == ["one\n", "two", "three"]
    (file,) = pin_text("az://bucket/corpus/*.txt", "data.source", memo)
    assert file.uri == "az://bucket/corpus/a.txt"
    cloud.pipe("bucket/corpus/a.txt", b"ONE\n\ntwo")
    (other,) = pin_text("az://bucket/corpus/*.txt", "data.source", memo)
    assert file.content != other.content
    with pytest.raises(RunError, match=r"az://bucket/corpus/a\.txt changed after the plan"):
        texts_of([file])
    with pytest.raises(ConfigError, match="no file matches it"):
        read("az://bucket/corpus/*.csv")


def test_a_cloud_without_its_package_or_versions_is_said(cloud, memo, monkeypatch):
    with pytest.raises(ConfigError, match=r"data\.source is 'gs://bucket/\*\.txt'.*pip install gcsfs"):
        pin_text("gs://bucket/*.txt", "data.source", memo)
    monkeypatch.setattr("pipeline.sources.cloud.VERSIONS", ("generation",))
    with pytest.raises(ConfigError, match="has none of generation, by which it is pinned"):
        pin_text("az://bucket/corpus/*.txt", "data.source", memo)
    monkeypatch.setattr(Bucket, "find", lambda *_, **__: (_ for _ in ()).throw(PermissionError("no")))
    with pytest.raises(ConfigError, match="cannot be listed: PermissionError"):
        pin_text("az://bucket/corpus/*.txt", "data.source", memo)


COMMIT = "c0ffee" * 6 + "c0ff"
ASKED = """
import json, sys
from pipeline.errors import ConfigError
from pipeline.sources.content import ContentMemo
from pipeline.sources.files import pin_text
for knob, config, split in json.loads(sys.argv[1]):
    try:
        files = pin_text("hf://org/name@main", knob, ContentMemo(sys.argv[2]), config, split)
        print(json.dumps([[file.uri, file.content] for file in files]))
    except ConfigError as error:
        print(json.dumps(str(error)))
"""


@contextlib.contextmanager
def serve_set(folder):
    """A hub on this machine with one data set, of the files in a folder; yields its address."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path, status, answer = self.path.partition("?")[0], 200, None
            tree, resolve = f"/api/datasets/org/name/tree/{COMMIT}", f"/datasets/org/name/resolve/{COMMIT}/"
            if path.startswith(resolve) and path.removeprefix(resolve) in names:
                answer = (folder / path.removeprefix(resolve)).read_bytes()
            elif path.startswith(tree):
                below = path.removeprefix(tree).strip("/")
                inside = [name for name in names if name.startswith(f"{below}/" if below else "")]
                files = [name for name in inside if "/" not in name[len(below) :].strip("/")]
                folders = {name.split("/")[0] for name in inside} if not below else set()
                listed = [{"type": "file", "path": name, "size": 1, "oid": name} for name in files]
                listed += [{"type": "directory", "path": name, "oid": name} for name in folders - {*files}]
                answer = json.dumps(listed).encode()
            elif path.startswith("/api/datasets/org/name"):
                siblings = [{"rfilename": name, "size": (folder / name).stat().st_size} for name in names]
                answer = json.dumps({"id": "org/name", "sha": COMMIT, "tags": [], "siblings": siblings}).encode()
            else:
                status = 404
            self.send_response(status)
            for name, value in {"Content-Length": len(answer or b""), "ETag": '"x"', "X-Repo-Commit": COMMIT}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET" and answer:
                self.wfile.write(answer)

        do_HEAD = do_GET  # noqa: N815 - the name that http.server asks for

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_set_of_the_hub_is_pinned_by_commit_and_its_splits_are_those_of_its_readme(set_folder, tmp_path):
    asked = [("data.source", "en", None), ("data.test", "en", None), ("data.source", "de", None)]
    asked += [("data.source", "en", "dev"), ("data.source", "fr", None)]
    with serve_set(set_folder) as endpoint:
        changed = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", ASKED, json.dumps(asked), str(tmp_path / "memo")]
        shown = subprocess.run(command, env={**os.environ, **changed}, capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    *given, no_split, no_config = map(json.loads, shown.stdout.splitlines())
    expected = [["data/train-0.jsonl.gz", "data/train-1.jsonl.gz"], ["data/test.jsonl"], ["data/de.jsonl"]]
    named = [[f"org/name@{COMMIT}/{name}" for name in names] for names in expected]
    assert given == [[[f"hf://{name}", f"hub:{name}"] for name in names] for names in named]
    assert "has no split 'dev'; valid: train, test" in no_split
    assert "no data set that can be read" in no_config


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "state.json",
            {"_data_files": [{"filename": "../secret.arrow"}]},
            "names '../secret.arrow', which lies in another",
        ),
        ("dataset_dict.json", {"splits": [".."]}, "names '..', which lies in another folder"),
        ("state.json", {"_data_files": 7}, "state.json is damaged"),
        ("dataset_dict.json", [], "dataset_dict.json is damaged"),
    ],
)
def test_a_saved_folder_names_nothing_outside_itself(tmp_path, name, content, message):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / name).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        pin_text(str(tmp_path / "saved"), "data.source", None)
