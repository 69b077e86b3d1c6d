"""The straight line: what runs, what is reused and why, and what a key depends on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import ray

from pipeline.errors import ConfigError, RunError
from pipeline.flow import run as flow
from pipeline.flow.run import STAGES
from pipeline.package.package import load
from pipeline.tracking import registry, runs

FROM_DISTILL = ["distill", "evaluate", "pack", "register"]
ALL = list(STAGES)


def keys(plan):
    return {step.stage: step.place.key for step in plan.steps}


def changed(plan, other):
    return [stage for stage in STAGES if keys(plan)[stage] != keys(other)[stage]]


def statuses(ran):
    return [ran.outcome.status[stage] for stage in STAGES]


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and "mlflow" not in path.name}


def versions(config):
    return runs.connect(flow.tracking_uri(config.resources)).search_model_versions("name = 'tiny'")


def test_all_seven_stages_are_done_in_order(finished):
    assert STAGES == ("tokenize", "finetune", "cache", "distill", "evaluate", "pack", "register")
    assert finished.observer.events == [(what, stage) for stage in STAGES for what in ("started", "done")]
    for step in finished.plan.steps:
        record = finished.record(step.stage)
        assert (record.stage, record.key, record.recipe) == (step.stage, step.place.key, step.recipe)
        assert record.inputs == {stage: finished.plan.step(stage).place.key for stage in step.inputs}
    assert finished.plan.run_key == finished.record("register").key


def test_the_observer_is_told_how_far_each_long_stage_is(finished):
    assert finished.observer.progress == {
        "tokenize": (3, 3),
        "finetune": (20, 20),
        "cache": (1, 1),
        "distill": (12, 12),
        "evaluate": (1, 1),
    }


def test_the_first_version_is_champion(finished):
    version = finished.record("register")
    assert (version.name, version.version, version.aliases) == ("tiny", 1, ("champion",))
    client = runs.connect(flow.tracking_uri(finished.plan.config.resources))
    assert registry.find_version(client, "tiny", version.key).version == 1
    run = client.get_run(version.run_id)
    assert run.data.metrics["perplexity"] == pytest.approx(finished.record("evaluate").student["perplexity"])
    assert client.get_metric_history(version.run_id, "distill/loss")[-1].step == 12


def test_a_second_run_reuses_everything_and_starts_nothing(finished, run_flow):
    store = Path(finished.plan.config.resources.storage_uri)
    before = tree(store)
    again = run_flow(finished.plan.config)
    assert [step.reason for step in again.plan.steps] == ["done before"] * 7
    assert again.plan.rows == finished.record("tokenize").splits["train"].rows
    assert again.plan.rows_are_exact
    assert again.observer.events == [("reused", stage) for stage in STAGES]
    assert [again.record(stage) for stage in STAGES] == [finished.record(stage) for stage in STAGES]
    assert tree(store) == before
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"quant": {"bits": "4-4-8"}}, FROM_DISTILL),
        ({"quant": {"gamma_init": "mse"}}, FROM_DISTILL),
        ({"distill": {"seed": 1}}, FROM_DISTILL),
        ({"quant": {"scale_dtype": "float16"}}, ["evaluate", "pack", "register"]),
        ({"quant": {"rest_dtype": "bfloat16"}}, ["evaluate", "pack", "register"]),
        ({"pack": {"encoding": "base3"}}, ["pack", "register"]),
        ({"register": {"gate": {"max_perplexity_ratio": 9.0}}}, ["register"]),
        ({"cache": {"dtype": "float32"}}, ["cache", *FROM_DISTILL]),
        ({"cache": {"mode": "online"}}, ["cache", *FROM_DISTILL]),
        ({"finetune": {"lr": 1e-3}}, ["finetune", "cache", *FROM_DISTILL]),
        ({"task": {"block_length": 16}}, ALL),
        ({"data": {"holdout": 0.06}}, ALL),
        ({"model": {"tokenizer": {"train_bpe": 290}}}, ALL),
        ({"resources": {"workers": 2, "micro_batch": 2, "inference_batch": 3, "checkpoint_steps": 7}}, []),
        ({"resources": {"namespace": "elsewhere", "cpus_per_worker": 3, "max_failures": 0}}, []),
    ],
    ids=str,
)
def test_a_setting_changes_its_own_key_and_those_after_it(finished, tiny_config, tmp_path, overrides, expected):
    assert changed(flow.plan(tiny_config(tmp_path, **overrides)), finished.plan) == expected


def test_data_enters_by_content_and_not_by_place(finished, tiny_config, corpus, tmp_path):
    moved = shutil.copyfile(corpus, tmp_path / "moved.txt")
    assert changed(flow.plan(tiny_config(tmp_path, data={"source": str(moved)})), finished.plan) == []
    moved.write_text(moved.read_text() + "\n\nOne more paragraph.\n")
    assert changed(flow.plan(tiny_config(tmp_path, data={"source": str(moved)})), finished.plan) == ALL


def test_until_stops_after_a_stage_and_the_rest_goes_on_from_there(tiny_config, run_flow, tmp_path):
    config = tiny_config(tmp_path)
    first = run_flow(config, until="tokenize")
    assert first.observer.events == [("started", "tokenize"), ("done", "tokenize")]
    assert list(first.outcome.done) == ["tokenize"]
    second = run_flow(config, until="finetune")
    assert second.outcome.status == {"tokenize": "reused", "finetune": "done"}
    with pytest.raises(ConfigError, match="'nonsense' is not a stage; valid: tokenize, finetune"):
        flow.plan(config, "nonsense")


def test_the_plan_says_why_a_step_would_run(finished, tiny_config, tmp_path):
    fresh = flow.plan(tiny_config(tmp_path))
    assert fresh.step("tokenize").reason == "never run before"
    assert fresh.step("finetune").reason == "follows tokenize"
    store = finished.plan.config.resources
    other = flow.plan(
        tiny_config(tmp_path, quant={"bits": "4-4-8"}, distill={"lr": 1e-3}, resources=store.model_dump())
    )
    assert [step.reason for step in other.steps[:3]] == ["done before"] * 3
    assert other.step("distill").reason == 'distill.lr: 0.002 -> 0.001; quant.bits: "2-2-8" -> "4-4-8"'
    assert other.step("evaluate").reason == "follows distill"
    assert other.step("register").reason == "follows distill, evaluate, pack"


def test_a_lost_registry_is_filled_again_and_only_the_first_version_gets_an_alias(tiny_config, run_flow, cloned):
    config = tiny_config(cloned)
    reason = flow.plan(config).step("register").reason
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
    client = runs.connect(flow.tracking_uri(config.resources))
    client.delete_registered_model_alias("tiny", registry.CHAMPION)
    client.delete_model_version("tiny", "1")
    assert statuses(run_flow(config)) == ["reused"] * 6 + ["done"]
    assert len(versions(config)) == 1


def test_a_student_that_fails_the_gate_is_kept_and_not_registered(tiny_config, run_flow, cloned):
    config = tiny_config(cloned, register={"gate": {"max_perplexity_ratio": 1.0001}})
    package = Path(flow.plan(config).step("pack").place.uri)
    with pytest.raises(RunError, match=r"max_perplexity_ratio \(1\.0001\).* not registered; .* kept at") as error:
        run_flow(config)
    assert str(package) in str(error.value)
    assert load(package / "package").config.model_type == "gpt2"
    assert versions(config) == []
    assert run_flow(tiny_config(cloned)).record("register").version == 1


def test_what_was_scored_must_be_what_was_packed(finished, tiny_config, run_flow, cloned):
    record = cloned / "store" / "evaluate" / finished.record("evaluate").key / "record.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"digest": "0" * 64}))
    with pytest.raises(RunError, match=r"What was scored is not what was packed.*Nothing was registered"):
        run_flow(tiny_config(cloned))
    assert versions(tiny_config(cloned)) == []


@pytest.mark.parametrize(("gib_per_hour", "mode", "other"), [(1e12, "states", 1e-12), (1e-12, "online", 1e12)])
def test_auto_is_resolved_in_the_plan_and_kept_once_begun(tiny_config, run_flow, tmp_path, gib_per_hour, mode, other):
    def auto(price):
        distill = {"steps": 1000}  # more uses of the teacher than rows, so that states save something
        resources = {"cache_gib_per_teacher_hour": price}
        return tiny_config(tmp_path, cache={"mode": "auto"}, distill=distill, resources=resources)

    plan = flow.plan(auto(gib_per_hour))
    assert plan.step("cache").recipe["cache"]["mode"] == mode
    assert plan.cache_reason.startswith(f"{mode}: states save 8000 - ")
    assert (plan.cache_bytes > 0) == (mode == "states")
    explicit = flow.plan(tiny_config(tmp_path, cache={"mode": mode}, distill={"steps": 1000}))
    assert keys(plan) == keys(explicit)
    assert flow.plan(auto(other)).step("cache").place.key != plan.step("cache").place.key

    assert run_flow(auto(gib_per_hour), until="cache").record("cache").mode == mode
    later = flow.plan(auto(other))
    assert keys(later) == keys(plan)
    assert later.step("cache").reason == "done before"


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
    assert keys(flow.plan(tiny_config(tmp_path, model=moved, finetune=None), "evaluate")) == keys(ran.plan)
    further = run_flow(tiny_config(tmp_path, model=model, finetune={"steps": 3}), until="finetune")
    assert further.outcome.status == {"tokenize": "reused", "finetune": "done"}
    assert further.record("finetune").validation_nats < finished.record("finetune").validation_nats
