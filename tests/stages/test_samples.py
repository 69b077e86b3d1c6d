"""Samples of what a student writes, for each kind of model."""

from __future__ import annotations

from pipeline.package.package import load
from pipeline.stages.evaluate import SAMPLES
from pipeline.store.locations import tracking_uri
from pipeline.store.records import Tokens
from pipeline.store.shards import Rows
from pipeline.tasks import task_of
from pipeline.tasks.samples import PROMPTS, samples
from pipeline.tasks.tokenizers import read_tokenizer
from pipeline.tracking import runs


def test_a_registered_run_has_samples_that_anyone_can_make_again(finished):
    client = runs.connect(tracking_uri(finished.plan.config.resources))
    run_id = finished.record("register").run_id
    assert SAMPLES in {file.path for file in client.list_artifacts(run_id)}
    tokens = finished.outcome.finished(Tokens)
    rows = Rows(tokens.dir, tokens.record.splits["validation"].shards)
    task, tokenizer = task_of(tokens.record.recipe), read_tokenizer(finished.package)
    text = samples(load(finished.package).eval(), tokenizer, task, rows)
    assert text.count("--- prompt") == text.count("--- student") == PROMPTS
    assert text == samples(load(finished.package).eval(), tokenizer, task, rows)
    assert text == (finished.folder("evaluate") / SAMPLES).read_text()
