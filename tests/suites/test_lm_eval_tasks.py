"""Tasks of lm-eval: refused in one sentence where they cannot be asked, and measured where the extra is installed."""

from __future__ import annotations

import json
import math
import socket
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.errors import ConfigError, RunError
from pipeline.flow.plan import Once, _plan_steps, plan_run
from pipeline.metrics import larger_is_better, named_by_lm_eval
from pipeline.models.build import read_config
from pipeline.sources.content import ContentMemo
from pipeline.stages import evaluate
from pipeline.stages.stage import StepJob
from pipeline.store.records import Evaluation
from pipeline.suites.lm_eval_tasks import _load, measure, offline, recipe
from pipeline.tasks.tokenizers import read_tokenizer, save_tokenizer
from tests.conftest import ARCHITECTURES
from tests.tasks.test_chat import CHATML, TOOLS, words

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


@pytest.fixture
def recipe_of(tmp_path):
    """What the numbers of a task depend on, for a decoder alone."""
    return lambda task, words=None: recipe(task, False, ContentMemo(str(tmp_path / "memo")), words)


def test_without_the_extra_a_plan_is_refused(tmp_path, tiny_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"evaluate\.suites names lm_eval:arc_easy.*pip install 'bitmill\[eval\]'"):
        plan_run(tiny_config(tmp_path, evaluate={"suites": ["lm_eval:arc_easy"]}))


def test_a_model_with_an_encoder_is_not_asked(tmp_path):
    with pytest.raises(ConfigError, match="asks a decoder alone"):
        recipe("arc_easy", True, ContentMemo(str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arc_esy", "is no task of lm-eval; near: .*arc_easy"),
        ("ai2_arc", "is a group of tasks of lm-eval: name them one by one"),
        ("arc_easy", "cannot be asked here without the network: .*Load its data once"),
        (
            "ifeval",
            "lm_eval:ifeval needs 'langdetect', which .* does not bring: install it beside, or leave",
        ),
        ("nowhere.yaml", "cannot be asked here without the network: "),
    ],
)
def test_what_cannot_be_asked_is_refused_without_the_network(name, message, recipe_of, monkeypatch):
    pytest.importorskip("lm_eval", reason="pip install 'bitmill[eval]'")
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(ConfigError, match=message):
        recipe_of(name)


METRICS = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"


@pytest.mark.parametrize(
    ("line", "own", "message"),
    [
        (METRICS, "metric_list: [{metric: no_such}]", "measures no_such, no metric of lm-eval's own"),
        (METRICS, "metric_list: [{metric: acc, hf_evaluate: true}]", "has hf_evaluate: it fetches the code .* acc"),
        (METRICS, METRICS + "\nunsafe_code: true", "has unsafe_code: it runs what a model writes"),
        ("doc_to_target: answer", "doc_to_target: !function code.answer", "names code, !function code.answer"),
        ("task: colours", "include: shared.yaml\ntask: colours", "names code, !function code.shared"),
        ("task: colours", "group: colours\ntask: [arc_easy]", "has group: it is several tasks"),
    ],
)
def test_what_runs_or_fetches_code_is_refused_before_it_does(task, line, own, message, recipe_of, monkeypatch):
    path, asked = Path(task), []
    path.write_text(path.read_text().replace(line, own))
    (path.parent / "shared.yaml").write_text("process_docs: !function code.shared\n")
    (path.parent / "code.py").write_text(f"open({str(path.parent / 'ran')!r}, 'w')\nanswer = shared = None\n")
    monkeypatch.setattr(socket.socket, "connect", lambda own, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host))
    with pytest.raises(ConfigError, match=f"{message}.*; leave it out") as refused:
        recipe_of(task)
    assert str(refused.value).count("\n") == 0
    assert (asked, (path.parent / "ran").exists()) == ([], False)


def test_nothing_beyond_this_machine_is_asked_while_offline():
    pytest.importorskip("lm_eval", reason="pip install 'bitmill[eval]'")
    before, told = (socket.getaddrinfo, socket.socket.connect), []
    enter, leave = threading.Event(), threading.Event()

    def resolves() -> None:
        enter.wait()
        told.append(socket.getaddrinfo("192.0.2.1", 9))
        leave.set()

    there = threading.Thread(target=resolves)
    there.start()
    with socket.create_server(("127.0.0.1", 0)) as server, offline():
        socket.create_connection(server.getsockname()).close()
        for call in (socket.create_connection, socket.socket().connect, socket.socket().connect_ex):
            with pytest.raises(ConnectionError, match=r"it asks the network for .*192"):
                call(("192.0.2.1", 9))
        with pytest.raises(ConnectionError, match="it asks the network for example"):
            socket.create_connection(("example.invalid", 9))
        enter.set()
        leave.wait(30)
    there.join()
    assert told, "a thread that was there before goes on"
    assert (socket.getaddrinfo, socket.socket.connect) == before


@pytest.mark.parametrize(
    ("line", "own"),
    [
        ("doc_to_target: answer", 'doc_to_target: "{{(answer + 1) % 3}}"'),
        (METRICS, METRICS + "\nfilter_list: [{name: first, filter: [{function: take_first}]}]"),
        (METRICS, METRICS.replace("mean", "mean, few: 2")),
    ],
)
def test_what_counts_as_right_is_keyed(task, line, own, recipe_of):
    before = recipe_of(task)
    text = Path(task).read_text()
    Path(task).write_text(text.replace(line, own))
    assert recipe_of(task) != before
    elsewhere = Path(task).parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "colours.yaml").write_text(text)
    assert recipe_of(str(elsewhere / "colours.yaml")) == before, "wherever it lies"


def test_a_bound_that_no_validation_split_has_is_refused_by_the_plan(task, tmp_path, tiny_config):
    def planned(metric):
        gate = {"gate": {"at_least": {metric: 0.1}}} if metric else {}
        return plan_run(tiny_config(tmp_path, evaluate={"suites": [f"lm_eval:{task}"]}, register=gate))

    assert planned("lm_eval_colours_acc").warnings == planned("").warnings
    with pytest.raises(
        ConfigError, match=r"register\.gate\.at_least names 'lm_eval_colours_f1'.*: lm_eval_colours_acc\."
    ):
        planned("lm_eval_colours_f1")
    Path(task).write_text(Path(task).read_text().replace("validation_split: validation\n", ""))
    with pytest.raises(ConfigError, match=r"'lm_eval_colours_acc' of the test split of lm_eval:.* here: nothing\."):
        planned("lm_eval_colours_acc")
    assert any("shown only: lookup and gates cannot use it" in told for told in planned("").warnings)


def test_no_shot_shows_the_question_that_is_asked(task):
    path = Path(task)
    path.write_text(path.read_text() + "num_fewshot: 5\n")
    loaded, _ = _load(task)
    loaded.build_all_requests()
    for request in loaded.instances:
        assert request.args[0].count("q") == 6
        assert request.args[0].count(request.doc["question"]) == 1


@torch.no_grad()
def test_a_task_with_data_on_this_machine_is_asked_of_both_models(task, finished, checkpoint, recipe_of, tmp_path):
    pinned = recipe_of(task)
    assert pinned["split"] == "validation", "the test split chooses nothing"
    assert recipe_of(task) == pinned
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
    assert recipe_of(task) != pinned
    whole = (tmp_path / "colours.yaml").read_text()
    (tmp_path / "colours.yaml").write_text(whole.replace("validation_split: validation\n", ""))
    assert recipe_of(task)["split"] == "test"


SPOKEN = """
task: answers
dataset_path: json
dataset_kwargs: {data_files: {validation: DATA}}
validation_split: validation
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
num_fewshot: 1
fewshot_config: {sampler: first_n, samples: [{question: q, choices: [ti], answer: 0}]}
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
"""


@torch.no_grad()
def test_a_model_of_conversations_is_asked_by_its_template(task, recipe_of, tmp_path):
    Path(task).write_text(SPOKEN.replace("DATA", str(tmp_path / "colours.jsonl")))
    tokenizer = words(CHATML)
    save_tokenizer(tokenizer, tmp_path / "words")
    torch.manual_seed(1)
    shape = {**ARCHITECTURES["gpt2"], "n_positions": 128, "initializer_range": 0.5}
    model = AutoModelForCausalLM.from_config(read_config(shape, vocab_size=len(tokenizer))).eval()
    pinned = recipe_of(task, tokenizer)
    assert pinned["chat_template"]
    assert pinned != recipe_of(task) != recipe_of(task, words(TOOLS.replace("user", "human"))), "a template is keyed"
    told = measure(task, pinned, {"student": model}, tmp_path / "words")
    nats = []
    for question in QUESTIONS:
        said = question["choices"][question["answer"]]
        talk = [("user", "q"), ("assistant", "ti"), ("user", question["question"])]
        messages = [{"role": role, "content": content} for role, content in talk]
        before = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids, start = tokenizer(before + said)["input_ids"], len(tokenizer(before.rstrip())["input_ids"])
        # lm-eval counts the white space that a context ends with as the answer's.
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        nats.append(sum(float(log_p[p - 1, ids[p]]) for p in range(start, len(ids))))
    assert told["student"]["lm_eval_colours_perplexity"] == pytest.approx(math.exp(-sum(nats) / len(nats)), rel=1e-4)


def test_what_a_plan_asks_is_rendered_once(task, tmp_path, tiny_config, monkeypatch):
    talks = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}] for i in range(60)]
    (tmp_path / "talks.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    save_tokenizer(words(CHATML), tmp_path / "words")
    from lm_eval.api.task import Task

    rendered, build = [], Task.build_all_requests
    monkeypatch.setattr(Task, "build_all_requests", lambda own, **given: (rendered.append(own), build(own, **given))[1])

    def planned(name, length):
        of = {"name": name, "block_length": length}
        model = {"source": ARCHITECTURES["gpt2"], "tokenizer": str(tmp_path / "words")}
        data = {"source": str(tmp_path / "talks.jsonl"), "holdout": 0.2, "text_column": "messages"}
        settings = {"task": of, "data": data, "model": model, "distill": {"contrast_weight": 0.0}}
        config = tiny_config(tmp_path, evaluate={"suites": [f"lm_eval:{task}"]}, **settings)
        steps = _plan_steps(config, Evaluation.stage, Once(many=False))[2]
        return steps[Evaluation.stage].recipe["suites"][f"lm_eval:{task}"]

    first = planned("chat", 32)
    assert first["chat_template"]
    assert planned("chat", 24) == first
    assert len(rendered) == 1, "nothing of a second plan"
    assert "chat_template" not in planned("language_modeling", 32)
    assert len(rendered) == 2
    (tmp_path / "colours.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS[1:])))
    assert planned("chat", 32) != first
    assert len(rendered) == 3
