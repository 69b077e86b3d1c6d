"""Suites through the line: what they measure is logged, found by lookup, asked by gates, and seen on the page."""

from __future__ import annotations

import json

import pytest

from jobs.report.page import page
from jobs.report.reader import Reader
from pipeline.config.retrain import PromotionGate
from pipeline.config.run import Config
from pipeline.errors import NotRegisteredError
from pipeline.flow.plan import plan_run
from pipeline.flow.run import run_plan
from pipeline.retrain.gate import Evidence, Gain, judge
from pipeline.store.records import Evaluation, Package
from pipeline.tracking.lookup import lookup

SUITES = {"suites": ["generated"]}


def test_a_suite_is_measured_after_all_else_and_found_by(cloned, tiny_config, run_flow):
    fields = {"evaluate": SUITES, "register": {"gate": {"at_most": {"generated_kl_nats": 50}}}}
    ran = run_flow(tiny_config(cloned, **fields))
    statuses = [ran.outcome.status[stage] for stage in ("tokenize", "finetune", "cache", "distill", "evaluate")]
    assert statuses == ["reused"] * 4 + ["done"]
    evaluation = ran.outcome.finished(Evaluation)
    suite = json.loads(evaluation.local(Evaluation.SUITES).read_text())["generated"]
    scores = evaluation.record.validation["student"]
    assert suite["split"] == "validation"
    assert suite["student"].items() <= scores.items()
    assert not suite["student"].keys() & evaluation.record.student.keys(), "of the test split there are none"
    assert scores["perplexity"] > 1
    store, value = ran.plan.config.resources.storage_uri, scores["generated_kl_nats"]
    (model,) = lookup(storage_uri=store, at_most={"generated_kl_nats": value * 1.01}, at_least={"top1_agreement": 0})
    assert model.validation["generated_flips"] == pytest.approx(scores["generated_flips"])
    assert lookup(storage_uri=store, at_most={"generated_kl_nats": value * 0.99}) == []
    assert "generated_kl_nats" in (ran.package / "README.md").read_text()
    shown = page(Reader(store, ran.plan.config.resources.local_cache_dir).content(ran.plan.run_key))
    assert "Beside the protocol" in shown
    assert all(f"<td>{line['band']}</td>" in shown for table in suite["tables"].values() for line in table)
    gate = PromotionGate(at_most={"generated_kl_nats": value}, at_least={"generated_first_agreement": 1.1})
    gained = {"whole": Gain(mean=1.0, low=1.0, documents=9)}
    record = ran.outcome.finished(Package).record
    rulings = judge(gate, "language_modeling", gained, evaluation.record, record, Evidence())
    assert {r.rule: r.passed for r in rulings[1:]} == {
        "at_least: generated_first_agreement": False,
        "at_most: generated_kl_nats": True,
    }
    strict = tiny_config(cloned, evaluate=SUITES, register={"gate": {"at_least": {"generated_first_agreement": 1.1}}})
    with pytest.raises(NotRegisteredError, match=r"register\.gate\.at_least: generated_first_agreement is "):
        run_plan(plan_run(strict), ran.listener)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"register": {"gate": {"at_most": {"generated_kl_nats": 1}}}},
            r"register\.gate\.at_most .*suites \(generated",
        ),
        ({"retrain": {"gate": {"at_least": {"lm_eval_x_acc": 1}}}}, r"retrain\.gate\.at_least names 'lm_eval_x_acc'"),
        ({"register": {"gate": {"at_least": {"rougeL": 1}}}}, "this run measures perplexity"),
        ({"evaluate": {"suites": ["mmlu"]}}, "'mmlu' is no suite; valid: generated, and lm_eval:TASK, where TASK"),
        ({"evaluate": {"suites": ["generated", "generated"]}}, "names one twice"),
        ({"evaluate": {"suites": ["lm_eval:a/t.yaml", "lm_eval:b/t.yaml"]}}, r"of one name, .*\(lm_eval_t_METRIC\)"),
    ],
)
def test_what_no_run_measures_is_refused(tiny_fields, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        Config.model_validate(tiny_fields(tmp_path, **fields))


def test_a_bound_on_what_a_task_of_lm_eval_measures_is_taken(tiny_config, tmp_path):
    gate = {"gate": {"at_least": {"lm_eval_arc_easy_acc_norm": 0.3}}}
    config = tiny_config(tmp_path, evaluate={"suites": ["lm_eval:arc_easy"]}, register=gate)
    assert config.register_.gate.bounds == [("at_least", "lm_eval_arc_easy_acc_norm", 0.3)]
