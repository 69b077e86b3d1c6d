"""A package becomes one version of a name, however often it is registered."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import ConfigError, RunError
from pipeline.tracking import registry, runs


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"


@pytest.fixture
def client(uri):
    return runs.connect(uri)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "package"


def run_of(client, tmp_path, key):
    experiment = runs.experiment_id(client, tmp_path.name, (tmp_path / "artifacts").as_uri())
    return runs.find_or_create_run(client, experiment, key, "2-2-8")


def test_a_package_that_is_registered_twice_is_one_version_of_one_logged_model(client, uri, folder, tmp_path):
    run = run_of(client, tmp_path, "a" * 32)
    registered = [
        registry.register_package(
            client, run, "twice", "a" * 32, folder, {"bitmill.bits": "2-2-8"}, {"perplexity": 9.0}
        )
        for _ in range(2)
    ]
    assert [str(version.version) for version, _ in registered] == ["1", "1"]
    (model_id,) = {model_id for _, model_id in registered}
    logged = client.get_logged_model(model_id)
    assert logged.tags["bitmill.bits"] == "2-2-8"
    assert [metric.value for metric in logged.metrics] == [9.0]
    fetch = registry.files(client, "twice@champion")
    (tmp_path / "fetched").mkdir()
    assert Path(fetch("model.safetensors", tmp_path / "fetched")).read_bytes() == b"weights"


def test_the_first_version_is_the_champion_until_another_is_promoted(client, uri, folder, tmp_path):
    for key in ("a" * 32, "b" * 32):
        registry.register_package(client, run_of(client, tmp_path, key), "crowned", key, folder, {}, {})
    assert registry.aliases_of(client, "crowned", "1") == ("champion",)
    assert registry.aliases_of(client, "crowned", "2") == ()
    client.set_registered_model_alias("crowned", "champion", "2")
    registry.register_package(client, run_of(client, tmp_path, "a" * 32), "crowned", "a" * 32, folder, {}, {})
    assert registry.aliases_of(client, "crowned", "2") == ("champion",)
    assert registry.held_keys(uri, "crowned") == {"a" * 32, "b" * 32}


def test_what_an_interrupted_registration_logged_is_used(client, folder, tmp_path, monkeypatch):
    run = run_of(client, tmp_path, "a" * 32)

    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(client), "create_model_version", interrupted)
        with pytest.raises(KeyboardInterrupt):
            registry.register_package(client, run, "interrupted", "a" * 32, folder, {}, {})
    assert registry.find_version(client, "interrupted", "a" * 32) is None
    (logged,) = client.search_logged_models([run.info.experiment_id])
    assert registry.register_package(client, run, "interrupted", "a" * 32, folder, {}, {})[1] == logged.model_id


def test_a_server_that_went_away_is_a_fault_and_no_setting():
    away = "http://127.0.0.1:9"
    said = r"MLflow refused the verdict on chat/1: API request to http://127\.0\.0\.1:9/.*Connection refused"
    with pytest.raises(RunError, match=said) as refused:  # the command reached it when it began
        registry.keep_verdict(away, "chat/1", "gguf", True, {})
    assert "tracking_uri" not in str(refused.value)
    with pytest.raises(RunError, match=r"^Nobody asks: tags\. Again\.$"), runs.refusal("Nobody asks", "Again."):
        raise ConfigError("tags")
