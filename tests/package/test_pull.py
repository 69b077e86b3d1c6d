"""A package arrives whole and checked, or not at all; nothing is written anywhere else."""

from __future__ import annotations

import json
import shutil
import uuid

import pytest
from mlflow.exceptions import MlflowException

import pipeline
from pipeline.errors import BitmillError, ConfigError, DamagedError
from pipeline.package import manifest
from pipeline.package.pull import from_store, pull
from pipeline.store.locations import tracking_uri
from pipeline.store.objects import open_objects
from pipeline.store.step_store import checksum
from pipeline.tracking import registry, runs
from tests.store.test_step_store import serve_s3


@pytest.fixture(scope="module")
def s3():
    with serve_s3() as uri:
        yield uri


@pytest.fixture(params=["directory", "s3", "registry"])
def fetch(request, finished):
    """Where the package of `finished` can be fetched from."""
    if request.param == "directory":
        return from_store(str(finished.package))
    if request.param == "registry":
        uri = tracking_uri(finished.plan.config.resources)
        return registry.files(runs.connect(uri), "tiny@champion")
    uri = f"{request.getfixturevalue('s3')}/{uuid.uuid4()}"
    for path in finished.package.iterdir():
        open_objects(uri).upload(path.name, path)
    return from_store(uri)


def counted(fetch):
    names = []

    def counting(name, scratch):
        names.append(name)
        return fetch(name, scratch)

    return counting, names


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_package_arrives_as_it_was(finished, fetch, tmp_path):
    pulled = pull(fetch, tmp_path / "new" / "model", "m")
    assert content(tmp_path / "new" / "model") == content(finished.package)
    assert set(pulled.fetched) == set(content(finished.package)) - {"manifest.json"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    again, asked = counted(fetch)
    assert pull(again, tmp_path / "new" / "model", "m").fetched == ()
    assert asked == ["manifest.json"]


def test_an_interrupted_pull_goes_on(finished, fetch, tmp_path):
    def breaking(name, scratch):
        if name == "tokenizer.json":
            raise KeyboardInterrupt
        return fetch(name, scratch)

    with pytest.raises(KeyboardInterrupt):
        pull(breaking, tmp_path / "model", "m")
    assert not (tmp_path / "model").exists()
    staging = tmp_path / ".model.pulling"
    assert "model.safetensors" in content(staging)
    (staging / "config.json").write_text("{")  # a partly written file, as a power cut could leave it
    (staging / "tokenizer.json").mkdir()
    (staging / "stray").write_text("of another package")
    counting, asked = counted(fetch)
    pulled = pull(counting, tmp_path / "model", "m")
    assert sorted(asked) == sorted(["manifest.json", *pulled.fetched])
    assert "model.safetensors" in pulled.kept
    assert {"config.json", "tokenizer.json"} <= set(pulled.fetched)
    assert content(tmp_path / "model") == content(finished.package)
    assert not staging.exists()


def test_two_pulls_to_one_place_do_not_mix(finished, fetch, tmp_path):
    refused = []

    def meanwhile(name, scratch):
        if name == "tokenizer.json":
            with pytest.raises(ConfigError, match="another command is pulling"):
                pull(fetch, tmp_path / "model", "m")
            refused.append(name)
        return fetch(name, scratch)

    pull(meanwhile, tmp_path / "model", "m")
    assert refused
    assert content(tmp_path / "model") == content(finished.package)


def refusing(**_):
    raise MlflowException("503 try later")


def test_a_registry_that_goes_away_is_not_a_missing_file(finished, tmp_path, monkeypatch):
    uri = tracking_uri(finished.plan.config.resources)
    fetch = registry.files(runs.connect(uri), "tiny@champion")
    monkeypatch.setattr(registry, "download_artifacts", refusing)
    with pytest.raises(ConfigError, match=r"whose manifest\.json cannot be brought to .*: 503 try later"):
        pull(fetch, tmp_path / "model", "tiny@champion")


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "config.json"])
def test_a_byte_that_differs_ends_the_pull(finished, tmp_path, name):
    source = shutil.copytree(finished.package, tmp_path / "source")
    data = bytearray((source / name).read_bytes())
    data[len(data) // 2] ^= 1
    (source / name).write_bytes(data)
    with pytest.raises(DamagedError, match=f"its {name} is not what its manifest says"):
        pull(from_store(str(source)), tmp_path / "model", "m")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/b", "..", ".", "", "manifest.json", "a\0b", "a\\b"])
def test_a_manifest_cannot_name_a_file_elsewhere(finished, tmp_path, name):
    source = shutil.copytree(finished.package, tmp_path / "source")
    manifest = json.loads((source / "manifest.json").read_text())
    manifest["files"][name] = checksum(source / "README.md").model_dump()
    (source / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "inner").mkdir()
    with pytest.raises(DamagedError, match="which is not a plain name"):
        pull(from_store(str(source)), tmp_path / "inner" / "model", "m")
    assert not (tmp_path / "inner" / "model").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "inner"}


def test_links_are_neither_followed_nor_written_through(finished, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    source = shutil.copytree(finished.package, tmp_path / "source")
    secret = tmp_path / "secret"
    shutil.copy(source / "README.md", secret)
    (source / "README.md").unlink()
    (source / "README.md").symlink_to(secret)
    with pytest.raises(BitmillError, match="leads outside"):
        pull(from_store(str(source)), tmp_path / "model", "m")
    with pytest.raises(DamagedError, match=r"README\.md is a link"):
        pipeline.load(source)
    for name in ("model", ".model.pulling"):
        shutil.rmtree(tmp_path / ".model.pulling", ignore_errors=True)
        (tmp_path / name).symlink_to(outside)
        with pytest.raises(ConfigError, match="is a link to somewhere else"):
            pull(from_store(str(finished.package)), tmp_path / "model", "m")
        (tmp_path / name).unlink()
    (tmp_path / ".model.pulling").mkdir()
    (tmp_path / ".model.pulling" / "README.md").symlink_to(outside / "written")
    pull(from_store(str(finished.package)), tmp_path / "model", "m")
    assert list(outside.iterdir()) == []
    assert manifest.check(tmp_path / "model")


@pytest.mark.parametrize("there", ["file", "other files", "another package"])
def test_what_lies_at_the_destination_is_left_alone(finished, tmp_path, there):
    destination = tmp_path / "model"
    if there == "file":
        destination.write_text("mine")
    elif there == "other files":
        destination.mkdir()
        (destination / "notes.txt").write_text("mine")
    else:
        shutil.copytree(finished.package, destination)
        manifest = json.loads((destination / "manifest.json").read_text()) | {"name": "other"}
        (destination / "manifest.json").write_text(json.dumps(manifest))
    before = destination.read_text() if destination.is_file() else content(destination)
    with pytest.raises(ConfigError, match="where something else lies already"):
        pull(from_store(str(finished.package)), destination, "m")
    assert before == (destination.read_text() if destination.is_file() else content(destination))


def test_an_empty_directory_will_do(finished, tmp_path):
    (tmp_path / "model").mkdir()
    pull(from_store(str(finished.package)), tmp_path / "model", "m")
    assert content(tmp_path / "model") == content(finished.package)


def test_a_place_without_a_package_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"no packed model lies there: it has no manifest\.json"):
        pull(from_store(str(tmp_path)), tmp_path / "model", "m")


@pytest.mark.parametrize("model", ["nobody@champion", "tiny@nobody", "tiny/99", "tiny", "tiny/x"])
def test_a_model_that_is_not_registered_is_refused(finished, model):
    uri = tracking_uri(finished.plan.config.resources)
    with pytest.raises(ConfigError, match=r"the registry does not have it.*Registered models: tiny"):
        registry.files(runs.connect(uri), model)
