"""The same line with its store in S3."""

import torch

import pipeline
from pipeline.flow.line import LINE
from tests.store.test_step_store import serve_s3


def test_a_run_in_s3_is_the_run_in_a_directory(tmp_path, tiny_config, run_flow, finished):
    with serve_s3() as bucket:
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
