"""Samples of what a packed student writes, for each kind of model."""

from __future__ import annotations

from pipeline.stages.samples import PROMPTS, samples
from pipeline.store.locations import tracking_uri
from pipeline.tracking import runs


def test_a_registered_run_has_samples_that_anyone_can_make_again(finished):
    client = runs.connect(tracking_uri(finished.plan.config.resources))
    run_id = finished.record("register").run_id
    assert "samples.txt" in {file.path for file in client.list_artifacts(run_id)}
    place = finished.plan.step("tokenize").place
    text = samples(finished.package, place, finished.record("tokenize"))
    assert text.count("--- prompt") == text.count("--- student") == PROMPTS
    assert text == samples(finished.package, place, finished.record("tokenize"))
