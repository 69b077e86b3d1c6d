"""The straight line: what runs, what is reused and why, and what a key depends on."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import ray
import torch

from jobs.compress import plan_document
from pipeline.errors import ConfigError, DamagedError, RunError
from pipeline.flow.capacity import estimate
from pipeline.flow.line import LINE, STAGES
from pipeline.flow.plan import plan_run, reasons
from pipeline.flow.run import run_plan
from pipeline.models.student import load_frozen, save_frozen
from pipeline.package.package import load
from pipeline.store.locations import tracking_uri
from pipeline.store.records import Package, Student, TeacherCache
from pipeline.store.step_store import checksum
from pipeline.tracking import registry, runs
from tests.conftest import Recorder
from tests.pickles import pickles_below

FROM_DISTILL = ["distill", "evaluate", "pack", "register"]
ALL = ["tokenize", "finetune", "cache", "distill", "evaluate", "pack", "register"]


def keys(plan):
    return {step.name: step.key for step in plan.steps}


def changed(plan, other):
    return [stage for stage in ALL if keys(plan)[stage] != keys(other)[stage]]


def statuses(ran):
    return [ran.outcome.status[stage] for stage in ALL]


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and "mlflow" not in path.name}


def versions(config):
    return runs.connect(tracking_uri(config.resources)).search_model_versions("name = 'tiny'")


def test_all_seven_stages_are_done_in_order(finished):
    assert [stage.name for stage in LINE] == ALL
    assert finished.listener.events == [(what, stage) for stage in ALL for what in ("started", "done")]
    for step in finished.plan.steps:
        record = finished.record(step.name)
        assert (record.stage, record.key, record.recipe) == (step.name, step.key, step.recipe)
        assert record.inputs == {stage: keys(finished.plan)[stage] for stage in step.inputs}
    assert finished.plan.run_key == finished.record("register").key


def test_a_step_that_was_done_since_the_plan_was_made_is_taken_without_its_lease(tiny_config, tmp_path):
    plan = plan_run(tiny_config(tmp_path), "tokenize")
    for status in ("done", "reused"):
        assert run_plan(plan, Recorder()).status == {"tokenize": status}
    assert json.loads((Path(plan.last.dir.uri) / "lease.json").read_text())["fence"] == 1


def test_a_run_leaves_no_pickle(finished, tmp_path):
    (tmp_path / "a.json").write_bytes(pickle.dumps(["a"]))
    (tmp_path / "b.bin").write_bytes(ray.cloudpickle.dumps(lambda: "b"))
    torch.save(torch.zeros(1), tmp_path / "c.safetensors")
    assert [path.name for path in pickles_below(tmp_path)] == ["a.json", "b.bin", "c.safetensors"]
    assert pickles_below(Path(finished.plan.config.resources.storage_uri)) == []


def test_the_listener_is_told_how_far_each_long_stage_is(finished):
    assert finished.listener.progress == {
        "tokenize": (3, 3),
        "finetune": (20, 20),
        "cache": (1, 1),
        "distill": (12, 12),
        "evaluate": (2, 2),  # a shard of each split
    }


def test_the_first_version_is_champion(finished):
    version = finished.record("register")
    assert (version.name, version.version, version.aliases) == ("tiny", 1, ("champion",))
    client = runs.connect(tracking_uri(finished.plan.config.resources))
    assert registry.find_version(client, "tiny", version.key).version == 1
    run = client.get_run(version.run_id)
    scored = finished.record("evaluate")
    assert run.data.metrics["perplexity"] == pytest.approx(scored.student["perplexity"])
    assert run.data.metrics["validation_perplexity"] == pytest.approx(scored.validation["student"]["perplexity"])
    assert not [name for name in run.data.params if "document" in name]
    assert client.get_metric_history(version.run_id, "distill/loss")[-1].step == 12


def test_a_second_run_reuses_everything_and_starts_nothing(finished, run_flow):
    store = Path(finished.plan.config.resources.storage_uri)
    before = tree(store)
    again = run_flow(finished.plan.config)
    assert list(reasons(again.plan).values()) == ["done before"] * 7
    assert again.plan.rows == finished.record("tokenize").splits["train"].rows
    assert again.plan.tokens == finished.record("tokenize")
    assert again.listener.events == [("reused", stage) for stage in ALL]
    assert [again.record(stage) for stage in ALL] == [finished.record(stage) for stage in ALL]
    assert tree(store) == before
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"quant": {"bits": "4-4-8"}}, FROM_DISTILL),
        ({"quant": {"gamma_init": "mse"}}, FROM_DISTILL),
        ({"distill": {"seed": 1}}, FROM_DISTILL),
        ({"quant": {"scale_dtype": "float16"}}, FROM_DISTILL),  # the student is frozen where it is trained
        ({"quant": {"rest_dtype": "bfloat16"}}, FROM_DISTILL),
        ({"pack": {"encoding": "base3"}}, ["pack", "register"]),
        ({"register": {"gate": {"max_perplexity_ratio": 9.0}}}, ["register"]),
        ({"cache": {"dtype": "float32"}}, ["cache", *FROM_DISTILL]),
        ({"cache": {"mode": "online"}}, ["cache", *FROM_DISTILL]),
        ({"cache": {"mode": "logits"}, "distill": {"contrast_weight": 0.0}}, ["cache", *FROM_DISTILL]),
        ({"finetune": {"lr": 1e-3}}, ["finetune", "cache", *FROM_DISTILL]),
        ({"task": {"block_length": 16}}, ALL),
        ({"data": {"holdout": 0.06}}, ALL),
        ({"model": {"tokenizer": {"train_bpe": 290}}}, ALL),
        ({"resources": {"workers": 2, "micro_batch": 2, "inference_batch": 3, "checkpoint_minutes": 7}}, []),
        ({"resources": {"namespace": "elsewhere", "cpus_per_worker": 3, "max_failures": 0}}, []),
    ],
    ids=str,
)
def test_a_setting_changes_its_own_key_and_those_after_it(finished, tiny_config, tmp_path, overrides, expected):
    assert changed(plan_run(tiny_config(tmp_path, **overrides)), finished.plan) == expected


def test_data_enters_by_content_and_not_by_place(finished, tiny_config, corpus, tmp_path):
    moved = shutil.copyfile(corpus, tmp_path / "moved.txt")
    assert changed(plan_run(tiny_config(tmp_path, data={"source": str(moved)})), finished.plan) == []
    moved.write_text(moved.read_text() + "\n\nOne more paragraph.\n")
    assert changed(plan_run(tiny_config(tmp_path, data={"source": str(moved)})), finished.plan) == ALL


def test_until_stops_after_a_stage_and_the_rest_goes_on_from_there(tiny_config, run_flow, tmp_path):
    config = tiny_config(tmp_path)
    first = run_flow(config, until="tokenize")
    assert first.listener.events == [("started", "tokenize"), ("done", "tokenize")]
    assert list(first.outcome.steps) == ["tokenize"]
    second = run_flow(config, until="finetune")
    assert second.outcome.status == {"tokenize": "reused", "finetune": "done"}
    with pytest.raises(ConfigError, match="'nonsense' is not a stage; valid: tokenize, finetune"):
        plan_run(config, "nonsense")


def test_the_plan_says_why_a_step_would_run(finished, tiny_config, tmp_path):
    fresh = reasons(plan_run(tiny_config(tmp_path)))
    assert fresh["tokenize"] == "never run before"
    assert fresh["finetune"] == "follows tokenize"
    store = finished.plan.config.resources
    config = tiny_config(tmp_path, quant={"bits": "4-4-8"}, distill={"lr": 1e-3}, resources=store.model_dump())
    other = reasons(plan_run(config))
    assert [other[stage] for stage in ALL[:3]] == ["done before"] * 3
    assert other["distill"] == 'distill.lr: 0.002 -> 0.001; quant.bits: "2-2-8" -> "4-4-8"'
    assert other["evaluate"] == "follows distill"
    assert other["register"] == "follows distill, evaluate, pack"


def test_a_lost_registry_is_filled_again_and_only_the_first_version_gets_an_alias(tiny_config, run_flow, cloned):
    config = tiny_config(cloned)
    reason = reasons(plan_run(config))["register"]
    assert "the registry at sqlite:///" in reason
    assert reason.endswith("does not hold it")
    again = run_flow(config)
    assert statuses(again) == ["reused"] * 6 + ["done"]
    assert (again.record("register").version, again.record("register").aliases) == (1, ("champion",))

    wider = run_flow(tiny_config(cloned, quant={"bits": "4-4-8"}))
    assert statuses(wider) == ["reused"] * 3 + ["done"] * 4
    assert (wider.record("register").version, wider.record("register").aliases) == (2, ())
    assert statuses(run_flow(config)) == ["reused"] * 7
    assert sorted(int(version.version) for version in versions(config)) == [1, 2]


def test_a_version_deleted_from_the_registry_is_registered_again(tiny_config, run_flow, cloned):
    config = tiny_config(cloned)
    run_flow(config)
    client = runs.connect(tracking_uri(config.resources))
    client.delete_registered_model_alias("tiny", registry.CHAMPION)
    client.delete_model_version("tiny", "1")
    assert statuses(run_flow(config)) == ["reused"] * 6 + ["done"]
    assert len(versions(config)) == 1


def test_a_student_that_fails_the_gate_is_kept_and_not_registered(tiny_config, run_flow, cloned):
    config = tiny_config(cloned, register={"gate": {"max_perplexity_ratio": 1.0001}})
    package = Path(plan_run(config).step(Package).dir.uri, "1", Package.FOLDER)
    with pytest.raises(RunError, match=r"max_perplexity_ratio \(1\.0001\).* not registered; .* kept at") as error:
        run_flow(config)
    assert str(package) in str(error.value)
    assert load(package).config.model_type == "gpt2"
    assert versions(config) == []
    assert run_flow(tiny_config(cloned)).record("register").version == 1


def test_what_was_scored_must_be_what_was_packed(finished, tiny_config, run_flow, cloned):
    record = cloned / "store" / "evaluate" / finished.record("evaluate").key / "record.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"digest": "0" * 64}))
    with pytest.raises(RunError, match=r"What was scored is not what was packed.*Nothing was registered"):
        run_flow(tiny_config(cloned))
    assert versions(tiny_config(cloned)) == []


def test_student_scores_package_and_version_carry_one_digest(finished):
    student = finished.record("distill")
    frozen = load_frozen(finished.folder("distill") / Student.FROZEN)
    assert frozen.digest() == student.digest
    assert finished.record("evaluate").digest == finished.record("pack").digest == student.digest
    assert json.loads((finished.package / "manifest.json").read_text())["digest"] == student.digest
    client = runs.connect(tracking_uri(finished.plan.config.resources))
    assert registry.find_version(client, "tiny", finished.plan.run_key).tags["bitmill.digest"] == student.digest


@pytest.mark.parametrize(
    ("its_checksum_too", "error", "message", "kept"),
    [
        (False, DamagedError, r"frozen\.safetensors of the distill step .* does not match its checksum", []),
        (True, RunError, r"does not unpack to the tensors that were scored; nothing was stored", ["evaluate"]),
    ],
)
def test_another_file_in_place_of_the_frozen_student_is_noticed(
    tiny_config, run_flow, cloned, its_checksum_too, error, message, kept
):
    config = tiny_config(cloned)
    plan = plan_run(config)
    steps = {name: Path(plan.step(STAGES[name].record).dir.uri) for name in ("distill", "evaluate", "pack")}
    path, record = steps["distill"] / "1" / Student.FROZEN, steps["distill"] / "record.json"
    frozen = load_frozen(path)
    other = copy.deepcopy(frozen)
    next(iter(other.rest.values())).flatten()[0] += 1.0
    assert other.digest() != frozen.digest()
    save_frozen(other, path)
    if its_checksum_too:
        fields = json.loads(record.read_text())
        fields["files"][Student.FROZEN] |= checksum(path).model_dump()
        record.write_text(json.dumps(fields))
    for name in ("evaluate", "pack"):
        shutil.rmtree(steps[name])
    with pytest.raises(error, match=message):
        run_flow(config)
    assert [name for name in ("evaluate", "pack") if (steps[name] / "record.json").exists()] == kept
    assert versions(config) == []


@pytest.mark.parametrize(("most_gib", "mode", "other"), [(50.0, "states", 1e-6), (1e-6, "online", 50.0)])
def test_auto_is_resolved_in_the_plan_and_kept_once_begun(tiny_config, run_flow, tmp_path, most_gib, mode, other):
    def auto(limit):
        distill = {"steps": 1000}  # every row is read more than twice
        return tiny_config(tmp_path, cache={"mode": "auto"}, distill=distill, resources={"max_cache_gib": limit})

    plan = plan_run(auto(most_gib))
    assert plan.step(TeacherCache).recipe["cache"]["mode"] == mode
    assert plan.cache_mode[0] == mode
    assert plan.cache_mode[1].startswith(f"{mode}: each row is read about ")
    assert (plan.cache_bytes > 0) == (mode == "states")
    explicit = plan_run(tiny_config(tmp_path, cache={"mode": mode}, distill={"steps": 1000}))
    assert keys(plan) == keys(explicit)
    assert plan_run(auto(other)).step(TeacherCache).key != plan.step(TeacherCache).key

    assert run_flow(auto(most_gib), until="cache").record("cache").mode == mode
    later = plan_run(auto(most_gib))
    assert later.rows != later.pinned.estimated_rows  # they are counted by now, which must not change the mode
    assert keys(later) == keys(plan)
    assert reasons(later)["cache"] == "done before"


def test_auto_stores_states_that_are_read_twice_and_fit(tiny_config, tmp_path):
    def mode(most_gib=50.0, layer=-1, **length):
        distill = {"steps": None, "epochs": None, "batch_size": 8, "contrast_layer": layer} | length
        cache, resources = {"mode": "auto", "dtype": "float32"}, {"max_cache_gib": most_gib}
        plan = plan_run(tiny_config(tmp_path, cache=cache, distill=distill, resources=resources))
        return plan.step(TeacherCache).recipe["cache"]["mode"]

    rows = plan_run(tiny_config(tmp_path)).rows
    enough = -(-2 * rows // 8)
    assert (mode(steps=enough), mode(steps=enough - 1)) == ("states", "online")
    assert (mode(epochs=2), mode(epochs=1)) == ("states", "online")
    assert mode(epochs=2, layer=-2) == "online"  # the states of the last layer are stored
    size = rows * 32 * 32 * 4 / 2**30
    assert (mode(size, epochs=2), mode(size * 0.999, epochs=2)) == ("states", "online")


def test_auto_tells_what_draws_would_take_where_they_would_do(tiny_config, tmp_path):
    def reason(most_gib, weight=0.0, epochs=3):
        distill = {"steps": None, "epochs": epochs, "contrast_weight": weight}
        plan = plan_run(
            tiny_config(tmp_path, cache={"mode": "auto"}, distill=distill, resources={"max_cache_gib": most_gib})
        )
        return plan.cache_mode[1]

    positions = plan_run(tiny_config(tmp_path)).pinned.estimated_rows * 32
    told = f"; cache.mode: logits takes about {positions * 50 * 2 / 2**30:.2f} GiB"  # of a vocabulary of 300
    assert reason(1e-6).startswith("online: ")
    assert told in reason(1e-6)
    for other in (reason(50.0), reason(1e-6, weight=0.1), reason(1e-6, epochs=1)):
        assert "logits" not in other
    plan = plan_run(tiny_config(tmp_path, cache={"mode": "logits", "draws": 8}, distill={"contrast_weight": 0.0}))
    assert plan.cache_bytes == plan.rows * 32 * 8 * 2
    assert plan.step(TeacherCache).recipe == {"cache": {"mode": "logits", "draws": 8, "max_kl_nats": 2e-3}}


def test_draws_distil_to_a_like_student(finished, tiny_config, run_flow, cloned):
    config = tiny_config(cloned, cache={"mode": "logits", "draws": 60}, distill={"contrast_weight": 0.0})
    plan = plan_run(config)
    planned = plan_document(plan, estimate(plan))
    ran = run_flow(config)
    assert statuses(ran) == ["reused"] * 2 + ["done"] * 5
    record, rows = ran.record("cache"), ran.record("tokenize").splits["train"].rows
    assert (record.mode, record.dtype, record.draws, record.kl_nats) == ("logits", "uint16", 60, 0.0)
    tokens = rows * 32 * 60 * 2
    assert planned["cache_bytes"] == tokens < record.bytes < tokens + 4096 * len(record.shards)
    assert planned["cache_mode"] == "logits: as configured"
    history = json.loads((ran.folder("distill") / "history.json").read_text())
    online = run_flow(tiny_config(cloned, cache={"mode": "online"}, distill={"contrast_weight": 0.0}), until="distill")
    exact = json.loads((online.folder("distill") / "history.json").read_text())
    for name in ("distillation_nats", "validation_nats"):  # of the same loss, of which draws give an estimate
        ours, theirs = ([point[name] for point in points if name in point] for points in (history, exact))
        assert ours == pytest.approx(theirs, rel=0.02)
    stored = finished.record("evaluate").student["perplexity"]
    assert ran.record("evaluate").student["perplexity"] == pytest.approx(stored, rel=0.02)


def test_online_distills_without_a_cache_to_a_like_student(finished, tiny_config, run_flow, cloned):
    ran = run_flow(tiny_config(cloned, cache={"mode": "online"}))
    assert statuses(ran) == ["reused"] * 2 + ["done"] * 5
    record = ran.record("cache")
    assert (record.mode, record.shards, record.bytes) == ("online", (), 0)
    assert not list(ran.folder("cache").rglob("*.arrow"))
    stored = finished.record("evaluate").student["perplexity"]
    assert ran.record("evaluate").student["perplexity"] == pytest.approx(stored, rel=0.02)


def test_llama_from_text_to_registry(tiny_llama, run_flow, tmp_path):
    ran = run_flow(tiny_llama(tmp_path))
    assert statuses(ran) == ["done"] * 7
    assert (ran.record("finetune").family, ran.record("register").version) == ("llama", 1)
    model = load(ran.package)
    assert model.config.model_type == "llama"
    assert not model.config.tie_word_embeddings
    modules = json.loads((ran.package / "config.json").read_text())["quantization_config"]["modules"]
    assert {"model.embed_tokens", "lm_head", "model.layers.1.mlp.down_proj"} <= modules.keys()
    ratio = ran.record("evaluate").student["perplexity"] / ran.record("evaluate").teacher["perplexity"]
    assert 0.9 < ratio < 3


def test_a_checkpoint_is_the_teacher_as_it_is(finished, tiny_config, run_flow, checkpoint, tmp_path):
    model = {"source": str(checkpoint), "tokenizer": None}
    ran = run_flow(tiny_config(tmp_path, model=model, finetune=None), until="evaluate")
    assert ran.record("finetune").steps == 0
    assert ran.record("evaluate").teacher == finished.record("evaluate").teacher
    moved = {"source": str(shutil.copytree(checkpoint, tmp_path / "moved")), "tokenizer": None}
    assert keys(plan_run(tiny_config(tmp_path, model=moved, finetune=None), "evaluate")) == keys(ran.plan)
    further = run_flow(tiny_config(tmp_path, model=model, finetune={"steps": 3}), until="finetune")
    assert further.outcome.status == {"tokenize": "reused", "finetune": "done"}
    assert further.record("finetune").validation_nats < finished.record("finetune").validation_nats
