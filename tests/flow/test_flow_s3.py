"""The same line with its store in S3."""

import shutil

import pytest
import torch

import pipeline
from jobs.bench.chaos.proxy import FAULTS, FaultProxy
from pipeline.errors import ConfigError
from pipeline.flow.line import LINE
from pipeline.flow.plan import plan_run
from pipeline.flow.run import run_plan
from pipeline.store import s3
from tests.conftest import ARCHITECTURES, Recorder
from tests.store.test_step_store import serve_s3


def test_a_run_in_an_s3_with_faults_is_the_run_in_a_directory(tmp_path, tiny_config, run_flow, finished, monkeypatch):
    monkeypatch.setattr(s3, "FIRST_WAIT_S", 0.001)
    proxy = FaultProxy(seed=1)
    with serve_s3(faults=proxy) as bucket, proxy.at(0.1) as injected:
        resources = {
            "storage_uri": f"{bucket}/project",
            "tracking_uri": f"sqlite:///{tmp_path / 'mlflow.db'}",
            "local_cache_dir": str(tmp_path / "scratch"),
            "workers": 0,
        }
        config, stages = tiny_config(tmp_path, resources=resources), [stage.name for stage in LINE]
        first = run_flow(config)
        assert [first.outcome.status[stage] for stage in stages] == ["done"] * 7
        assert first.plan.run_key == finished.plan.run_key
        here, there = first.outcome.steps["pack"].record, finished.outcome.steps["pack"].record
        assert here.digest == there.digest
        again = run_flow(config)
        assert [again.outcome.status[stage] for stage in stages] == ["reused"] * 7
        packed = first.outcome.steps["pack"]
        model = pipeline.load(packed.folder_uri)
        ids = torch.arange(8).unsqueeze(0)
        local = pipeline.load(finished.outcome.steps["pack"].folder_uri)
        assert torch.equal(model(ids).logits, local.eval()(ids).logits)
        assert not packed.dir.sizes("attempt/")
        assert injected.total() >= 30
        assert len(injected) >= len(FAULTS) - 2


def test_what_a_run_learned_is_read_by_workers_with_caches_of_their_own(tmp_path, tiny_config, run_flow, monkeypatch):
    def config(tokenizer, holdout):
        resources = {"storage_uri": f"{bucket}/project", "local_cache_dir": "~/cache", "workers": 0}
        model = {"source": ARCHITECTURES["gpt2"], "tokenizer": tokenizer}
        return tiny_config(tmp_path, resources=resources, model=model, data={"holdout": holdout})

    def learned(step):
        return {name: file.sha256 for name, file in step.record.files.items()}

    monkeypatch.setenv("HOME", str(tmp_path / "driver"))
    with serve_s3() as bucket:
        first = run_flow(config({"train_bpe": 300}, 0.05), "tokenize").outcome.steps["tokenize"]
        plan = plan_run(config(f"step://{first.record.key}", 0.1), "tokenize")
        assert plan.left
        shutil.rmtree(tmp_path / "driver")
        monkeypatch.setenv("HOME", str(tmp_path / "worker"))
        second = run_plan(plan, Recorder()).steps["tokenize"]
        assert learned(second) == learned(first)
        assert second.record.recipe["tokenizer"].keys() == {"content"}
        assert {path.name for path in tmp_path.iterdir()} == {"worker"}
        for key in ("0" * 32, f"../{first.record.key}"):
            with pytest.raises(
                ConfigError, match=f"'step://{key}', and the store s3://.* has no step tokenize of that"
            ):
                plan_run(config(f"step://{key}", 0.1), "tokenize")
