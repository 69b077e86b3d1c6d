"""Tasks of lm-eval: refused in one sentence where they cannot be asked, and measured where the extra is installed."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.errors import ConfigError, RunError
from pipeline.flow.plan import plan_run
from pipeline.metrics import larger_is_better, named_by_lm_eval
from pipeline.stages import evaluate
from pipeline.stages.stage import StepJob
from pipeline.store.records import Evaluation
from pipeline.suites.lm_eval_tasks import measure, recipe
from pipeline.tasks.tokenizers import read_tokenizer

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {validation: DATA, test: DATA}}
validation_split: validation
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
QUESTIONS = [{"question": f"q{i}", "choices": [" bo", " ka", " ti"], "answer": i % 3} for i in range(9)]


@pytest.fixture
def task(tmp_path):
    """A task of one's own, whose data is a file."""
    pytest.importorskip("lm_eval", reason="pip install 'bitmill[eval]'")
    (tmp_path / "colours.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "colours.yaml").write_text(TASK.replace("DATA", str(tmp_path / "colours.jsonl")))
    return str(tmp_path / "colours.yaml")


def test_without_the_extra_a_plan_is_refused(tmp_path, tiny_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"evaluate\.suites names lm_eval:arc_easy.*pip install 'bitmill\[eval\]'"):
        plan_run(tiny_config(tmp_path, evaluate={"suites": ["lm_eval:arc_easy"]}))


def test_a_model_with_an_encoder_is_not_asked():
    with pytest.raises(ConfigError, match="asks a decoder alone"):
        recipe("arc_easy", encoder_decoder=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arc_esy", "is no task of lm-eval; near: .*arc_easy"),
        ("ai2_arc", "is a group of tasks of lm-eval: name them one by one"),
        ("arc_easy", "cannot be asked here without the network: .*Load its data once"),
        ("nowhere.yaml", "cannot be asked here without the network: "),
    ],
)
def test_what_cannot_be_asked_is_refused_without_the_network(name, message):
    pytest.importorskip("lm_eval", reason="pip install 'bitmill[eval]'")
    with pytest.raises(ConfigError, match=message):
        recipe(name, encoder_decoder=False)


@torch.no_grad()
def test_a_task_with_data_on_this_machine_is_asked_of_both_models(task, finished, checkpoint, tmp_path):
    pinned = recipe(task, encoder_decoder=False)
    assert pinned["split"] == "validation", "the test split chooses nothing"
    assert recipe(task, encoder_decoder=False) == pinned
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    suite, planned = f"lm_eval:{task}", finished.plan.step(Evaluation)
    inputs = {name: finished.outcome.steps[name] for name in planned.inputs}
    job = StepJob({"suites": {suite: pinned}}, inputs, planned.dir, finished.plan.config.resources, {})
    told = evaluate.measured(job, suite)
    assert told["questions"] == len(QUESTIONS)
    words = read_tokenizer(checkpoint)
    right = 0
    for question in QUESTIONS:
        scores = []
        for choice in question["choices"]:
            before, whole = words(question["question"])["input_ids"], words(question["question"] + choice)["input_ids"]
            nats = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(nats[p - 1, whole[p]]) for p in range(len(before), len(whole))))
        right += max(range(3), key=scores.__getitem__) == question["answer"]
    name = named_by_lm_eval(task, "acc")
    assert name == "lm_eval_colours_acc"
    assert larger_is_better(name)
    assert told["teacher"] == {name: pytest.approx(right / len(QUESTIONS))}
    assert told["student"].keys() == {name}
    (tmp_path / "colours.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS[1:])))
    with pytest.raises(RunError, match="asks other questions here"):
        measure(task, pinned, {"student": model}, checkpoint)
    assert recipe(task, encoder_decoder=False) != pinned
    whole = (tmp_path / "colours.yaml").read_text()
    (tmp_path / "colours.yaml").write_text(whole.replace("validation_split: validation\n", ""))
    assert recipe(task, encoder_decoder=False)["split"] == "test"
