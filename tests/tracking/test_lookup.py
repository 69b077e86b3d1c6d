"""Lookups against a real registry: the join against a plain filter in Python, paging, aliases, near misses."""

from __future__ import annotations

import contextlib
import math
import socket
import subprocess
import sys
import time

import psutil
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow.entities import LoggedModelStatus, Metric

import pipeline
from jobs.bench.chaos.processes import start
from pipeline.errors import ConfigError
from pipeline.tracking import lookup as lookups
from pipeline.tracking import runs
from pipeline.tracking.lookup import matches, nearest_misses, reach
from pipeline.tracking.query import MIB, Query, RegisteredModel, ranked, shortcomings

# name, bits, task, MiB, perplexity and accuracy on validation, formats; the test split ranks them the other way round
MODELS = [
    ("chat", "2-2-8", "language_modeling", 33.0, 17.5, None, "gguf,onnx"),
    ("chat", "4-4-8", "language_modeling", 62.4, 15.0, None, "gguf"),
    ("chat", "8-8-8", "language_modeling", 121.3, 14.2, None, ""),
    ("chat", "2-2-8", "language_modeling", 33.0, 16.9, None, ""),
    ("reply", "2-2-8", "next_utterance", 33.0, 19.0, 0.71, "onnx"),
    ("reply", "4-4-8", "next_utterance", 62.4, 18.0, 0.78, ""),
    ("o'brien", "2-2-8", "language_modeling", 20.0, 40.0, None, ""),
    ("chat", "2-2-8", "language_modeling", None, None, None, ""),  # registered before anything was measured
]


def on_test(value):
    return None if value is None else 100 - value


def add(client, number, name, bits, task, mib, perplexity, accuracy, formats):
    known = client.get_experiment_by_name(f"project {number % 3}")
    experiment = known.experiment_id if known else client.create_experiment(f"project {number % 3}")
    tags = {
        "bitmill.key": f"{number:032x}",
        "bitmill.bits": bits,
        "bitmill.task": task,
        "bitmill.quantizer": "seq",
        "bitmill.package_uri": f"/store/pack/{number}/package/",
        **({"bitmill.formats": formats} if formats else {}),
    }
    run = client.create_run(experiment).info.run_id
    model = client.create_logged_model(experiment, name="package", source_run_id=run, tags=tags).model_id
    client.finalize_logged_model(model, LoggedModelStatus.READY)
    values = {"validation_perplexity": perplexity, "validation_accuracy": accuracy}
    values |= {name.removeprefix("validation_"): on_test(value) for name, value in values.items()}
    values["packed_bytes"] = None if mib is None else mib * MIB
    points = [
        Metric(key, value, 1000 + number, 0, model_id=model) for key, value in values.items() if value is not None
    ]
    if points:
        client.log_batch(run, metrics=points)
    return client.create_model_version(name, f"models:/{model}", run, tags=tags, model_id=model), run, model


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """A SQLite registry with the models above, one of somebody else, and one whose registration was interrupted."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('registry') / 'mlflow.db'}"
    client = runs.connect(uri)
    for name in ("chat", "reply", "o'brien", "theirs"):
        client.create_registered_model(name)
    for number, fields in enumerate(MODELS):
        _, run, model = add(client, number, *fields)
        if number == 1:  # registered twice: the later metrics hold
            client.log_batch(run, metrics=[Metric("validation_perplexity", 15.5, 9000, 0, model_id=model)])
    client.create_model_version("theirs", "/somewhere/else")
    client.create_logged_model("1", name="half", tags={"bitmill.key": "f" * 32})
    client.set_registered_model_alias("chat", "champion", "2")
    client.set_registered_model_alias("chat", "small", "4")
    client.set_registered_model_alias("chat", "phone", "4")
    client.set_registered_model_alias("reply", "champion", "1")
    return uri


@pytest.fixture(scope="module")
def client(uri):
    return reach(uri)


@pytest.fixture(scope="module")
def everything(client):
    return matches(client, Query(), None, None)


def _answers(address):
    with contextlib.suppress(requests.RequestException):
        return requests.get(address, timeout=5).ok
    return False


@pytest.fixture(scope="module")
def server(uri, tmp_path_factory):
    """A real MLflow server over the same registry."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--backend-store-uri", uri, "--artifacts-destination", str(folder), "--port", str(port)]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1", *options]
    with open(folder / "log", "w") as log:
        process = start(command, cwd=folder, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 300
        while not _answers(f"{address}/health"):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.2)
        yield address
    finally:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:  # it takes long to go by itself
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


@pytest.fixture(params=[1, 3, 1000], ids=lambda size: f"pages of {size}")
def pages(request, monkeypatch):
    monkeypatch.setattr("pipeline.tracking.registry.PAGE", request.param)
    monkeypatch.setattr(lookups, "RUNS_A_CALL", max(1, request.param // 2))
    monkeypatch.setattr(lookups, "EXPERIMENTS_A_CALL", min(2, request.param))
    monkeypatch.setattr(lookups, "FEW_RUNS", 0 if request.param == 3 else 500)


@pytest.fixture
def unused_port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def names(found):
    return [f"{one.name}/{one.version}" for one in found]


def test_the_best_model_under_40_mib_and_perplexity_18_now(uri):
    found = pipeline.lookup(max_size_mib=40, max_perplexity=18, tracking_uri=uri)
    assert names(found) == ["chat/4", "chat/1"]
    best = found[0]
    assert best.aliases == ("phone", "small")
    assert (best.validation["perplexity"], best.metrics["perplexity"]) == (16.9, 100 - 16.9)
    assert best.size_mib == pytest.approx(33.0)
    assert best.package_uri == "/store/pack/3/package/"
    assert best.created_at.endswith("+00:00")


def test_a_join_on_pages_of_any_size_finds_all_of_ours(client, pages):
    found = matches(client, Query(), None, None)
    assert len(found) == len(MODELS)
    by_place = {one.package_uri: one for one in found}
    for number, (name, bits, task, mib, perplexity, accuracy, formats) in enumerate(MODELS):
        one = by_place[f"/store/pack/{number}/package/"]
        assert (one.name, one.bits, one.task, one.quantizer) == (name, bits, task, "seq")
        assert one.size_mib == mib
        assert one.validation.get("perplexity") == (15.5 if number == 1 else perplexity)
        assert one.validation.get("accuracy") == accuracy
        assert (one.metrics.get("perplexity"), one.metrics.get("accuracy")) == (on_test(perplexity), on_test(accuracy))
        assert not [name for name in one.metrics if name.startswith("validation")]
        assert ",".join(one.formats) == (formats or "bitmill")
    aliased = {f"{one.name}/{one.version}": one.aliases for one in found if one.aliases}
    assert aliased == {"chat/2": ("champion",), "chat/4": ("phone", "small"), "reply/1": ("champion",)}


def test_a_server_gives_the_same_answers_as_its_database(server, everything, monkeypatch):
    monkeypatch.setattr("pipeline.tracking.registry.PAGE", 3)
    remote = reach(server)
    assert matches(remote, Query(), None, None) == everything
    fitting = matches(remote, Query(max_size_mib=40, max_perplexity=18), None, None)
    assert names(fitting) == ["chat/4", "chat/1"]
    assert names(matches(remote, Query(name="o'brien"), None, None)) == ["o'brien/1"]


def maybe(strategy):
    return st.one_of(st.none(), strategy)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=maybe(st.sampled_from(["chat", "reply", "o'brien", "none"])),
    bits=maybe(st.sampled_from(["2-2-8", "4-4-8"])),
    task=maybe(st.sampled_from(["language_modeling", "next_utterance"])),
    mib=maybe(st.sampled_from([10, 33.0, 62.4, 500])),
    perplexity=maybe(st.sampled_from([14.2, 15.2, 17, 50])),
    accuracy=maybe(st.sampled_from([0.5, 0.71, 0.9])),
    form=maybe(st.sampled_from(["gguf", "onnx"])),
    alias=maybe(st.sampled_from(["champion", "small"])),
)
def test_what_matches_is_what_a_plain_filter_finds(
    client, everything, name, bits, task, mib, perplexity, accuracy, form, alias
):
    wanted = Query(name, task, bits, form, alias, mib, perplexity, accuracy)
    expected = {
        one.package_uri
        for one in everything
        if (name is None or one.name == name)
        and (bits is None or one.bits == bits)
        and (task is None or one.task == task)
        and (mib is None or (one.size_mib is not None and one.size_mib <= mib))
        and (perplexity is None or one.validation.get("perplexity", 1e9) <= perplexity)
        and (accuracy is None or one.validation.get("accuracy", -1) >= accuracy)
        and (form is None or form in one.formats)
        and (alias is None or alias in one.aliases)
    }
    assert {one.package_uri for one in matches(client, wanted, None, None)} == expected
    if not expected:
        misses = nearest_misses(client, wanted, 100)
        assert len(misses) == len(everything)
        assert all(miss.reasons for miss in misses)


def model(number, **validation):
    size = validation.pop("mib", 10.0)
    metrics = {"ratio": 5.0 * number, "packed_bytes": math.nan if size is None else size * MIB}
    metrics |= {name: -value for name, value in validation.items()}
    created = f"2026-01-{number:02}"
    return RegisteredModel("m", number, (), "", "2-2-8", "seq", size, metrics, validation, "", (), created)


def test_each_metric_has_its_natural_direction():
    found = [model(1, perplexity=3.0, rougeL=10.0), model(2, perplexity=2.0, rougeL=30.0), model(3), model(4, mib=None)]
    assert [one.version for one in ranked(found, "perplexity", True)][:2] == [2, 1]
    assert [one.version for one in ranked(found, "rougeL", True)][:2] == [2, 1]
    assert [one.version for one in ranked(found, "size_mib", True)] == [3, 2, 1, 4]  # equals: the newest first
    assert [one.version for one in ranked(found, "ratio", True)] == [4, 3, 2, 1]  # of no split


def test_a_metric_nobody_has_is_named_with_those_there_are(client):
    with pytest.raises(ConfigError, match=r"--order-by 'bleu'.*perplexity.*size_mib"):
        matches(client, Query(), "bleu", None)
    assert len(matches(client, Query(), "accuracy", 3)) == 3


def test_near_misses_come_by_failed_constraints_and_then_by_how_far(client):
    misses = nearest_misses(client, Query(max_size_mib=40, max_perplexity=16))
    assert [miss.model.validation["perplexity"] for miss in misses] == [16.9, 17.5, 19.0]
    assert misses[0].reasons == ("16.9 on validation is 5.6% above max_perplexity 16",)
    (reason,) = shortcomings(model(1, mib=50.0), Query(max_size_mib=40))
    assert reason == ("50 is 25.0% above max_size_mib 40", pytest.approx(0.25))
    (reason,) = shortcomings(model(1, accuracy=0.4), Query(min_accuracy=0.5))
    assert reason == ("0.4 on validation is 20.0% below min_accuracy 0.5", pytest.approx(0.2))
    assert shortcomings(model(1), Query(min_rouge_l=5.0)) == [("rougeL was not measured on validation", 1.0)]
    assert shortcomings(model(1), Query(name="n", format="gguf", alias="a")) == [
        ("name is m, wanted n", 1.0),
        ("format: has none, wanted gguf", 1.0),
        ("alias: has none, wanted a", 1.0),
    ]


def test_what_best_means_depends_on_the_question():
    assert Query().measure == "perplexity"
    assert Query(task="summarization").measure == Query(min_rouge_l=1.0).measure == "rougeL"
    assert Query(task="next_utterance").measure == Query(min_accuracy=0.1).measure == "accuracy"


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"max_size": 3}, "no 'max_size'.*max_size_mib"),
        ({"bits": "3-3-8"}, "bits"),
        ({"max_perplexity": float("nan")}, "--max-perplexity is nan"),
        ({"limit": 0}, "--limit is 0"),
        ({"name": "a'\"b"}, "both kinds of quotes"),
    ],
)
def test_questions_that_make_no_sense(uri, question, message):
    with pytest.raises(ConfigError, match=message):
        pipeline.lookup(tracking_uri=uri, **question)


def test_a_registry_that_is_not_there_is_not_made(tmp_path, unused_port):
    with pytest.raises(ConfigError, match="nothing was registered there yet"):
        pipeline.lookup(storage_uri=str(tmp_path / "store"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=r"cannot be reached.*--tracking-uri"):
        pipeline.lookup(tracking_uri=f"http://127.0.0.1:{unused_port}")
    (tmp_path / "mlflow.db").write_bytes(b"not a database at all, but text" * 40)
    with pytest.raises(ConfigError, match="cannot be reached"):
        pipeline.lookup(storage_uri=str(tmp_path))


def test_looking_up_imports_neither_torch_nor_ray(uri):
    code = (
        f"import sys, pipeline; assert len(pipeline.lookup(max_size_mib=40, tracking_uri={uri!r})) == 4; "
        "print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
