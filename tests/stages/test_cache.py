"""What a cache of states is decided on."""

from __future__ import annotations

from pathlib import Path

from pipeline.stages import cache, sensitivity
from tests.training.cases import Case


def test_a_probe_and_a_sensitivity_do_not_show_the_order_of_the_shards(tmp_path: Path) -> None:
    case = Case.make(tmp_path)
    measured = []
    for shards in (case.train, case.train[::-1]):
        job = case.step_job({"quantizer": "quantgpt", "granularity": "per_tensor", "widths": [2], "rows": 8}, shards)
        tokens, kl_nats = sensitivity._measure(job)
        measured.append((cache.probe(job, "bfloat16"), tokens, {name: f"{v[2]:.6g}" for name, v in kl_nats.items()}))
    assert measured[0] == measured[1]
