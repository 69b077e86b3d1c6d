"""A student that starts from the latent weights of a registered version: which, from where, and what must fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pipeline.config.run import Config
from pipeline.errors import ConfigError, RunError
from pipeline.flow.plan import plan_run
from pipeline.store.locations import tracking_uri
from pipeline.store.records import Package, Student, Tokens
from pipeline.store.step_store import checksum
from pipeline.tracking import runs
from tests.conftest import ARCHITECTURES, Ran

Make = Callable[..., Config]
Run = Callable[..., Ran]
EARLIER = ["tokenize", "finetune", "cache"]


@pytest.fixture
def started(finished: Ran, tiny_config: Make, tmp_path: Path) -> Make:
    """`started(quant={...}, ...)`: a run in the store of `finished` that starts from its version, only planned."""

    def make(start: str = "tiny@champion", **overrides: Any) -> Config:
        resources = finished.plan.config.resources.model_dump() | overrides.pop("resources", {})
        distill = {"start": start, **overrides.pop("distill", {})}
        return tiny_config(tmp_path, resources=resources, distill=distill, **overrides)

    return make


@pytest.fixture
def apart(finished: Ran, tiny_config: Make, cloned: Path) -> Make:
    """`apart(distill={...}, ...)`: a run in a copy of that store, with the registry of `finished`, which it reads."""

    def make(**overrides: Any) -> Config:
        resources = {"tracking_uri": tracking_uri(finished.plan.config.resources)} | overrides.pop("resources", {})
        return tiny_config(cloned, resources=resources, **overrides)

    return make


@pytest.fixture(scope="module")
def registered(
    finished: Ran, tiny_config: Make, run_flow: Run, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Config]:
    """`registered(distill={...}, ...)`: a run in a store and a registry that hold `finished` and may be written to."""
    folder = tmp_path_factory.mktemp("registered")
    shutil.copytree(
        finished.plan.config.resources.storage_uri, folder / "store", ignore=shutil.ignore_patterns("mlflow*")
    )
    run_flow(tiny_config(folder))
    return partial(tiny_config, folder)


def test_a_student_that_takes_no_step_is_the_version_it_starts_from(
    finished: Ran, run_flow: Run, registered: Make
) -> None:
    again = run_flow(registered(distill={"start": "tiny@champion", "steps": 0}))
    assert again.outcome.status == {s: "reused" if s in EARLIER else "done" for s in again.outcome.status}
    for field in ("digest", "validation_nats"):
        assert getattr(again.record("distill"), field) == getattr(finished.record("distill"), field)
    assert again.record("evaluate").student == finished.record("evaluate").student
    assert again.record("evaluate").validation == finished.record("evaluate").validation

    ours, theirs = (load_file(ran.folder("distill") / Student.WEIGHTS) for ran in (again, finished))
    assert {name for name in ours if name.endswith("gamma")}  # scales that were learned go along
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)

    client = runs.connect(tracking_uri(again.plan.config.resources))
    first, second = (client.get_model_version("tiny", str(number)) for number in (1, 2))
    assert (first.tags.get("bitmill.start"), second.tags["bitmill.start"]) == (None, "tiny/1")
    for version, ran in ((first, finished), (second, again)):
        stored = ran.record("distill").files[Student.WEIGHTS]
        assert version.tags["bitmill.latent_sha256"] == stored.sha256
    assert Path(second.tags["bitmill.latent_uri"]).samefile(again.folder("distill") / Student.WEIGHTS)
    run = client.get_run(second.run_id)
    assert run.data.params["start"] == "tiny/1"


def test_training_goes_on_from_the_version(finished: Ran, apart: Make, run_flow: Run) -> None:
    on = run_flow(apart(distill={"start": "tiny/1", "steps": 3, "eval_every": 3}), until="distill")
    points = json.loads((on.folder("distill") / "history.json").read_text())
    validated = [point for point in points if "validation_nats" in point]
    assert [point["step"] for point in validated] == [0, 3]
    assert validated[0]["validation_nats"] == finished.record("distill").validation_nats
    assert validated[1]["validation_nats"] != validated[0]["validation_nats"]


def test_what_it_starts_from_enters_keys_by_content_and_only_from_distill_on(finished: Ran, started: Make) -> None:
    plan, by_number = plan_run(started("tiny@champion")), plan_run(started("tiny/1"))
    assert plan.config.distill.start == by_number.config.distill.start == "tiny/1"
    assert [step.key for step in plan.steps] == [step.key for step in by_number.steps]
    changed = [s.name for s, other in zip(plan.steps, finished.plan.steps, strict=True) if s.key != other.key]
    assert changed == ["distill", "evaluate", "pack", "register"]
    recipe, before = plan.step(Student).recipe, finished.plan.step(Student).recipe
    stored = finished.record("distill").files[Student.WEIGHTS]
    assert recipe == {**before, "start": stored.sha256}
    assert "start" not in before["distill"]


def test_only_a_line_that_reaches_the_student_asks_for_its_start(started: Make) -> None:
    config = started("nobody@champion")
    assert plan_run(config, "cache").left == []
    with pytest.raises(ConfigError, match="nobody@champion"):
        plan_run(config, "distill")


@pytest.mark.parametrize("start", ["nobody@champion", "tiny@nobody", "tiny/7"])
def test_a_version_that_is_not_registered_is_refused_with_those_that_are(started: Make, start: str) -> None:
    with pytest.raises(ConfigError, match=f"distill.start is '{start}', and the registry .* Registered models: tiny"):
        plan_run(started(start))


def test_a_version_that_names_no_weights_is_refused(registered: Make, tmp_path: Path) -> None:
    config = registered(distill={"start": "foreign/1"})
    client = runs.connect(tracking_uri(config.resources))
    client.create_registered_model("foreign")
    client.create_model_version("foreign", source=str(tmp_path))
    with pytest.raises(ConfigError, match=r"foreign/1 names no latent weights .*bitmill\.latent_sha256.* what bitmill"):
        plan_run(config)


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ({"bits": "4-4-8"}, 'quant.bits is "4-4-8", and tiny/1, .* trained with "2-2-8".*Set quant.bits to "2-2-8"'),
        ({"bits": "2-2-32"}, 'quant.bits is "2-2-32"'),
        ({"quantizer": "lsq"}, 'quant.quantizer is "lsq"'),
        ({"granularity": "per_channel"}, 'quant.granularity is "per_channel"'),
        ({"overrides": {".*c_fc": 8}}, "quant.overrides is {"),
        ({"activation_range": "tensor"}, 'quant.activation_range is "tensor"'),
        ({"attention": "qkv"}, 'quant.attention is "qkv"'),
    ],
    ids=str,
)
def test_weights_that_were_trained_for_another_quantization_are_refused(
    started: Make, quant: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_run(started(quant=quant))


def test_what_does_not_change_what_a_student_computes_may_differ(started: Make) -> None:
    quant = {"gamma_init": "mse", "gamma_gradient": "outer", "ste": "wide", "scale_dtype": "float16"}
    assert plan_run(started(quant=quant, distill={"optimizer": "muon"}, finetune={"seed": 3})).left


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_layer": 3}, "n_layer is 3 here and 2 there"),
        ({"n_head": 4}, "n_head is 4 here and 2 there"),  # of the same shapes
        ({"n_embd": 48, "n_positions": 64}, "n_embd is 48 here and 32 there, n_positions is 64 here and 32 there"),
    ],
    ids=str,
)
def test_weights_of_another_architecture_are_refused(started: Make, changed: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=f"tiny/1, whose weights are of another architecture.*: {message}"):
        plan_run(started(model={"source": {**ARCHITECTURES["gpt2"], **changed}}))


def test_weights_of_another_family_are_refused(started: Make) -> None:
    with pytest.raises(ConfigError, match=r"another architecture .*model_type is llama here and gpt2 there"):
        plan_run(started(model={"source": ARCHITECTURES["llama"]}))


def other_text(corpus: Path, folder: Path) -> str:
    path = folder / "other.txt"
    path.write_text("\n\n".join(reversed(corpus.read_text(encoding="utf-8").split("\n\n")[100:])), encoding="utf-8")
    return str(path)


def test_the_vocabulary_must_be_the_same_wherever_the_tokenizer_comes_from(
    finished: Ran, started: Make, corpus: Path, tmp_path: Path
) -> None:
    data = {"source": other_text(corpus, tmp_path)}
    learned = r"know other tokens than those of model.tokenizer \({'train_bpe': 300}, learned from other text\)"
    with pytest.raises(ConfigError, match=f"{learned}.* `bitmill pull tiny/1` writes"):
        plan_run(started(data=data))
    kept = {"tokenizer": str(finished.package)}
    assert plan_run(started(data=data, model=kept)).left[0].name == "tokenize"
    other = shutil.copytree(finished.package, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"other tokens than those of model.tokenizer \(.*other\)\. Set"):
        plan_run(started(data=data, model={"tokenizer": str(other)}))


def test_a_learned_vocabulary_is_compared_once_it_is_there(
    apart: Make, run_flow: Run, corpus: Path, tmp_path: Path
) -> None:
    same, other = tmp_path / "same.txt", other_text(corpus, tmp_path)
    shutil.copyfile(corpus, same)
    for source, fits in ((str(same), True), (other, False)):
        data = {"source": source, "unit": "line"}  # which makes other rows, and the same words of the same text
        run_flow(apart(data=data), until="tokenize")
        config = apart(data=data, distill={"start": "tiny/1"})
        if fits:
            assert plan_run(config).left
        else:
            with pytest.raises(ConfigError, match="learned from other text"):
                plan_run(config)


def test_the_same_text_and_tokenizer_need_no_comparison(finished: Ran, apart: Make, cloned: Path) -> None:
    (cloned / "store" / "tokenize" / finished.plan.step(Tokens).key / "record.json").unlink()
    assert plan_run(apart(distill={"start": "tiny/1", "steps": 1})).left[0].name == "tokenize"


def test_a_tokenizer_decides_the_size_of_a_new_table_and_must_fit_that_of_a_checkpoint(
    finished: Ran, apart: Make, cloned: Path, checkpoint: Path
) -> None:
    step = cloned / "store" / "pack" / finished.plan.step(Package).key
    config, record = step / "1" / "package" / "config.json", step / "record.json"
    config.write_text(config.read_text().replace('"vocab_size": 300', '"vocab_size": 299'))
    fields = json.loads(record.read_text())
    fields["files"]["package/config.json"] |= checksum(config).model_dump()
    record.write_text(json.dumps(fields))
    start = {"start": "tiny/1", "steps": 1}
    assert plan_run(apart(distill=start)).left  # of what {train_bpe: 300} comes to, the vocabularies are compared
    model = {"source": str(checkpoint), "tokenizer": None}
    with pytest.raises(ConfigError, match=r"model\.source: vocab_size is 300 here and 299 there"):
        plan_run(apart(distill=start, model=model, finetune=None))


def weights_of(ran: Ran, folder: Path) -> Path:
    return folder / "store" / "distill" / ran.plan.step(Student).key / "1" / Student.WEIGHTS


def made_again(record: Path) -> None:
    """What a store has where a student was pruned, and trained again to other weights."""
    fields = json.loads(record.read_text())
    fields["files"][Student.WEIGHTS]["sha256"] = "0" * 64
    record.write_text(json.dumps(fields))


GONE = "latent weights are not, or no longer, in the store.*distill/{key}.*resources.storage_uri"


def test_weights_that_are_no_longer_in_the_store_are_refused_unless_all_is_done(
    finished: Ran, apart: Make, run_flow: Run, cloned: Path, tmp_path: Path
) -> None:
    key = finished.plan.step(Student).key
    on, further = (apart(distill={"start": "tiny/1", "steps": n, "eval_every": 9}) for n in (1, 2))
    run_flow(on, until="distill")
    weights, record = weights_of(finished, cloned), cloned / "store" / "distill" / key / "record.json"
    kept = weights.read_bytes()
    assert plan_run(further, "distill").left
    for go in (weights.unlink, lambda: weights.write_bytes(kept) and made_again(record), record.unlink):
        go()
        with pytest.raises(ConfigError, match=GONE.format(key=key)):
            plan_run(further)
    assert [step.name for step in plan_run(on).left] == ["evaluate", "pack", "register"]
    elsewhere = {"storage_uri": str(tmp_path / "elsewhere")}
    with pytest.raises(ConfigError, match=f"nothing of them at {elsewhere['storage_uri']}/distill/{key}"):
        plan_run(apart(distill={"start": "tiny/1"}, resources=elsewhere))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(b"x" * path.stat().st_size), "tiny/1 cannot be used. .* match its checksum"),
        (lambda path: path.unlink(), "tiny/1 cannot be used. .* lacks its file weights"),
        (lambda path: (path.parent.parent / "record.json").unlink(), "tiny/1 left .* meanwhile"),
        (lambda path: made_again(path.parent.parent / "record.json"), "tiny/1 left .* meanwhile"),
    ],
    ids=["changed", "deleted", "pruned", "made again"],
)
def test_weights_that_go_after_the_plan_was_made_are_not_trained_on_from(
    finished: Ran,
    apart: Make,
    run_flow: Run,
    cloned: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], object],
    message: str,
) -> None:
    config = apart(distill={"start": "tiny/1", "steps": 0})
    plan = plan_run(config, "distill")
    change(weights_of(finished, cloned))
    monkeypatch.setattr("tests.conftest.plan_run", lambda *_: plan)
    with pytest.raises(RunError, match=f"distill.start: the latent weights of {message}"):
        run_flow(config)
