"""Summarization and next utterance through all stages, from text to a registered package that generates."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import pipeline
from jobs.evaluate import evaluate
from pipeline.config.laid_over import laid_over
from pipeline.config.resources import Resources
from pipeline.config.run import Config
from pipeline.errors import ConfigError
from pipeline.flow.plan import plan_run, plan_step
from pipeline.flow.run import run_plan
from pipeline.metrics import measure_of
from pipeline.models.build import build, read_config
from pipeline.models.family import family_for
from pipeline.models.student import restore_frozen
from pipeline.package.package import read_package
from pipeline.retrain.gate import gains
from pipeline.stages import contest
from pipeline.stages.contest import document_digests
from pipeline.stages.evaluate import SAMPLES, SCORED, student_of
from pipeline.stages.scorer import SPANS_A_WORKER, TENSOR_RANGE_ROWS, Scorer, spans_of
from pipeline.stages.stage import StepJob
from pipeline.store.records import Contest, Evaluation, Package, Tokens
from pipeline.store.shards import Rows, read_tokens
from pipeline.tasks import task_of
from pipeline.tasks.samples import PROMPTS, samples
from pipeline.tasks.summarization import summaries
from pipeline.tasks.tokenizers import read_tokenizer
from tests.conftest import ARCHITECTURES, Ran, Recorder
from tests.stages.test_evaluate import CutEvaluation

TRAINING = {"steps": 6, "batch_size": 4, "lr": 2e-3, "eval_every": 3}
SECTIONS: dict[str, dict[str, Any]] = {
    "summarization": {
        "model": {"source": ARCHITECTURES["bart"], "tokenizer": {"train_bpe": 300}},
        "task": {"name": "summarization", "block_length": 512, "source_length": 40, "target_length": 12},
        "evaluate": {"beams": 2, "generated_rows": 3},
    },
    "next_utterance": {
        "model": {"source": ARCHITECTURES["gpt2"], "tokenizer": {"train_bpe": 300}},
        "task": {"name": "next_utterance", "block_length": 32, "candidates": 4, "train_candidates": 2},
    },
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each task a jsonl file of some 80 rows."""
    draw, folder = random.Random(1), tmp_path_factory.mktemp("rows")
    words = [f"{a}{b}" for a in ("ba", "du", "ki", "lo") for b in ("na", "ro", "ti")]

    def text(longest: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(2, longest)))

    made = {
        "summarization": [{"text": (t := text(30)), "summary": " ".join(t.split()[:3])} for _ in range(80)],
        "next_utterance": [{"text": [text(5) for _ in range(draw.randint(2, 4))]} for _ in range(80)],
    }
    for name, lines in made.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return {name: folder / f"{name}.jsonl" for name in made}


@pytest.fixture(scope="module")
def fields(rows: dict[str, Path], tiny_fields: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def make(folder: Path, task: str, /, **overrides: Any) -> dict[str, Any]:
        found = tiny_fields(folder, finetune=TRAINING, distill={**TRAINING, "negatives": 4})
        found |= {"name": task, "data": {"source": str(rows[task]), "holdout": 0.1}, **SECTIONS[task]}
        return found | overrides

    return make


@pytest.fixture(scope="module", params=SECTIONS)
def finished_task(
    request: pytest.FixtureRequest,
    fields: Callable[..., dict[str, Any]],
    run_flow: Callable[..., Ran],
    tmp_path_factory: pytest.TempPathFactory,
) -> Ran:
    return run_flow(Config.model_validate(fields(tmp_path_factory.mktemp(request.param), request.param)))


def test_a_run_ends_in_a_registered_model_with_the_metrics_of_its_task(finished_task: Ran) -> None:
    evaluation, name = finished_task.record("evaluate"), finished_task.plan.config.task.name
    own = {"rouge1", "rouge2", "rougeL"} if name == "summarization" else {"accuracy"}
    assert own | {"perplexity", "kl_nats", "top1_agreement"} <= set(evaluation.student)
    assert own | {"perplexity"} <= set(evaluation.teacher)
    assert evaluation.digest == finished_task.record("pack").digest
    assert finished_task.record("register").version == 1
    assert finished_task.record("tokenize").splits["test"].rows > 3
    manifest = json.loads((finished_task.package / "manifest.json").read_text())
    assert manifest["metrics"]["student"] == evaluation.student
    states = finished_task.record("cache")
    rows = finished_task.record("tokenize").splits["train"].rows
    assert states.bytes >= rows * task_of(finished_task.record("tokenize").recipe).states * 32 * 2


def test_rows_are_told_apart_as_they_are_scored(finished_task: Ran) -> None:
    tokens, scored = finished_task.outcome.finished(Tokens), finished_task.outcome.finished(Evaluation)
    digests = [*document_digests(task_of(tokens.record.recipe), tokens, "test")]
    assert len(digests) == len(scored.read_json(Evaluation.DOCUMENTS)["tokens"])


def test_a_champion_meets_a_challenger_in_the_measure_of_the_task(finished_task: Ran) -> None:
    config, run = finished_task.plan.config, finished_task.plan
    quant = {"quant.bits": "8-8-8", "quant.activation_range": "tensor"}  # of a pass, which the batch shows in
    other = run_plan(plan_run(laid_over(config, quant), "pack"), Recorder())
    resources = config.resources.model_copy(update={"inference_batch": 3})
    run = replace(run, config=config.model_copy(update={"resources": resources}))
    champion, measure = other.finished(Package), measure_of(config.task.name)
    stage = contest.against(champion.record.digest, champion.folder_uri, run.step(Tokens).key, TENSOR_RANGE_ROWS)
    beside = plan_step(stage, run.pinned, {step.name: step for step in run.steps})
    planned = [
        replace(step, record=finished_task.record(step.name)) for step in run.steps if step.name in beside.inputs
    ]
    contested = run_plan(replace(run, steps=(*planned, beside)), Recorder()).finished(Contest)
    ours, theirs = finished_task.outcome.finished(Evaluation), other.finished(Evaluation)
    documents, rows = contested.read_json(Contest.DOCUMENTS), contested.read_json(Contest.ROWS)
    for side, evaluation in (("challenger", ours), ("champion", theirs)):  # scored as each was by itself
        assert documents[side] == pytest.approx(evaluation.read_json(Evaluation.DOCUMENTS)["student"])
        assert rows[side] == evaluation.read_json(Evaluation.ROWS)["student"]
    assert documents["champion"] != pytest.approx(documents["challenger"])
    gained = gains(contested, config.task.name, 0.95)
    assert gained["whole"].mean == pytest.approx(ours.record.student[measure] - theirs.record.student[measure])
    assert gained["whole"].documents == len(rows["documents"]) == len(rows["champion"][measure])
    assert gained.keys() == {"whole"}  # nothing is new to a champion of the same rows


def test_the_package_writes_what_the_scored_student_wrote(finished_task: Ran) -> None:
    tokens = finished_task.outcome.finished(Tokens)
    rows = Rows(tokens.dir, tokens.record.splits["validation"].shards)
    model, words = pipeline.load(finished_task.package), read_tokenizer(finished_task.package)
    written = samples(model, words, task_of(tokens.record.recipe), rows)
    assert written == (finished_task.folder("evaluate") / SAMPLES).read_text()
    assert written.count("--- student") == PROMPTS


def test_rows_that_are_generated_are_drawn_from_all_of_a_split(finished_task: Ran, tmp_path: Path) -> None:
    cut, planned = CutEvaluation(finished_task, tmp_path, rows=2), finished_task.plan.step(Evaluation)
    inputs = {name: cut.steps[name] for name in planned.inputs}
    scorer = Scorer(StepJob(planned.recipe, inputs, planned.dir, cut.engine.resources, {}), student_of, SCORED)
    wanted = finished_task.plan.config.evaluate.generated_rows
    shards = inputs["tokenize"].record.splits["test"].shards
    drawn = None if wanted is None else Rows(inputs["tokenize"].dir, shards).drawn(wanted)
    assert drawn != [0, 1, 2]
    assert scorer.generated["test"] == drawn
    if drawn is not None:
        scored = [scorer.score("test", 2 * number, shard).student["of_rows"] for number, shard in enumerate(shards)]
        counted = [len(of_rows.get("rougeL", [])) for of_rows in scored]
        assert counted == [len({2 * number, 2 * number + 1}.intersection(drawn)) for number in range(len(shards))]


def test_shards_of_the_test_split_add_up_to_its_scores(finished_task: Ran, tmp_path: Path) -> None:
    whole = finished_task.record("evaluate")
    cut = CutEvaluation(finished_task, tmp_path, rows=2)
    assert len(cut.shards) >= 4
    evaluation = cut.run()
    assert (evaluation.digest, evaluation.protocol) == (whole.digest, whole.protocol)
    for found, expected in ((evaluation.student, whole.student), (evaluation.teacher, whole.teacher)):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)
    spans = len(spans_of(cut.shards, SPANS_A_WORKER))
    assert cut.advanced[-1] == (spans, spans)


def test_a_second_run_does_nothing_and_scoring_is_keyed_apart(finished_task: Ran, run_flow: Callable[..., Ran]) -> None:
    config = finished_task.plan.config
    again = run_flow(config)
    assert set(again.outcome.status.values()) == {"reused"}
    wider = plan_run(config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"beams": 3})}))
    changed = [step.name for step in wider.steps if step.record is None]
    expected = ["evaluate", "pack", "register"] if config.task.name == "summarization" else []
    assert changed == expected


@pytest.mark.parametrize("finished_task", ["summarization"], indirect=True)
def test_beam_search_runs_from_the_packed_model_as_from_the_frozen_student(finished_task: Ran) -> None:
    folder = finished_task.package
    tokens, quant = finished_task.record("tokenize"), finished_task.plan.config.quant
    task, tokenizer = task_of(tokens.recipe), read_tokenizer(folder)
    frozen, _, quantization = read_package(folder)
    config = read_config(finished_task.folder("finetune") / "model")
    student = restore_frozen(config, quant.spec(), family_for(config.model_type), frozen)
    packed = pipeline.load(folder)
    assert quantization["family"] == "bart"
    text = ["ba na du ro", "ki ti lo na ba du"]
    batch = task.batch(
        *(
            torch.from_numpy(x).long()
            for x in task.encode(iter([(t, "x") for t in text]), tokenizer, "test", None, "document")[:2]
        )
    )
    for beams in (1, 4):
        expected = summaries(student, batch.source_ids, batch.source_mask, 12, beams)
        assert torch.equal(summaries(packed, batch.source_ids, batch.source_mask, 12, beams), expected)
    plain = packed.generate(batch.source_ids, attention_mask=batch.source_mask, num_beams=3, max_new_tokens=8)
    assert (plain[:, 0] == tokenizer.eos_token_id).all()  # the package knows what its decoder reads first
    cached, whole = (
        packed.generate(
            batch.source_ids, attention_mask=batch.source_mask, num_beams=3, max_new_tokens=8, use_cache=use
        )
        for use in (True, False)
    )
    assert torch.equal(cached, whole)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BART with a tokenizer like its own, which puts <s> and </s> around a text; its logits have a bias."""
    folder, special = tmp_path_factory.mktemp("pretrained"), ["<s>", "<pad>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["ba na du ro ki ti lo"] * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>")
    words.save_pretrained(folder)
    decided = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    model = build(read_config(ARCHITECTURES["bart"], vocab_size=len(words), **decided), seed=0)
    with torch.no_grad():
        model.final_logits_bias.copy_(torch.linspace(-1, 1, len(words)))
    model.save_pretrained(folder)
    return folder


def test_a_pretrained_model_keeps_its_special_tokens_and_the_bias_of_its_logits(
    fields: Callable[..., dict[str, Any]], run_flow: Callable[..., Ran], pretrained: Path, tmp_path: Path
) -> None:
    given = fields(tmp_path, "summarization", model={"source": str(pretrained)}, cache={"mode": "online"})
    ran = run_flow(Config.model_validate(given | {"finetune": None}), until="pack")
    tokens = ran.record("tokenize")
    ids, lengths = read_tokens(next(ran.folder("tokenize").glob("rows/test-*.parquet")))
    assert tokens.recipe["decoder_start"] == 2
    assert (ids[:, 0] == 0).all()
    assert (ids[:, 40:42] == [2, 0]).all()
    assert all(row[source - 1] == row[40 + target - 1] == 2 for row, (source, target) in zip(ids, lengths, strict=True))
    bias = pipeline.load(ran.package).final_logits_bias
    assert torch.equal(bias, torch.linspace(-1, 1, tokens.vocabulary).unsqueeze(0))
    assert ran.record("finetune").fp32_bytes == 4 * (ran.record("finetune").parameters + tokens.vocabulary)


def test_a_tokenizer_without_the_tokens_of_the_task_is_refused(
    fields: Callable[..., dict[str, Any]], pretrained: Path, tmp_path: Path
) -> None:
    words = read_tokenizer(pretrained)
    words.pad_token = None
    words.save_pretrained(tmp_path / "words")
    given = fields(tmp_path, "summarization", model={"source": str(pretrained), "tokenizer": str(tmp_path / "words")})
    with pytest.raises(ConfigError, match=r"padding token, and this tokenizer has .* pad_token None"):
        plan_run(Config.model_validate(given))


@pytest.mark.parametrize(
    ("task", "overrides", "message"),
    [
        (
            "summarization",
            {"model": SECTIONS["next_utterance"]["model"]},
            r"summarization, which needs an encoder .*gpt2 model.*bart",
        ),
        (
            "next_utterance",
            {"model": SECTIONS["summarization"]["model"]},
            r"next_utterance, which needs a decoder alone.*bart model",
        ),
        (
            "next_utterance",
            {"model": SECTIONS["summarization"]["model"], "task": {"block_length": 32}},
            r"language_modeling, which needs a decoder alone",
        ),
        (
            "summarization",
            {"task": {"name": "summarization", "source_length": 64, "target_length": 12}},
            r"task\.source_length is 64, and the model has 40 positions",
        ),
        (
            "summarization",
            {"model": {"source": {**ARCHITECTURES["bart"], "pad_token_id": 3}, "tokenizer": {"train_bpe": 300}}},
            r"model\.source\.pad_token_id: the tokenizer decides it",
        ),
        (
            "next_utterance",
            {"task": {"name": "next_utterance", "block_length": 64}},
            r"task\.block_length is 64, and the model has 32 positions",
        ),
        (
            "next_utterance",
            {"task": {"name": "next_utterance", "block_length": 32, "candidates": 500}},
            r"too few for 499 of other conversations\. Lower task\.candidates",
        ),
    ],
)
def test_what_cannot_work_is_said_when_the_plan_is_made(
    fields: Callable[..., dict[str, Any]], tmp_path: Path, task: str, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_run(Config.model_validate(fields(tmp_path, task, **overrides)))


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        (
            "summarization",
            {"summary_column": "abstract"},
            r"no column 'abstract'; valid: text, summary\. Set data\.text_column",
        ),
        ("next_utterance", {"candidates_column": "others"}, r"no column 'others'; valid: text"),
        ("summarization", {"source": "python://pydoc"}, r"no column 'summary'; valid: text"),
    ],
)
def test_data_without_the_columns_is_refused_before_anything_runs(
    fields: Callable[..., dict[str, Any]], tmp_path: Path, task: str, data: dict[str, Any], message: str
) -> None:
    given = fields(tmp_path, task)
    with pytest.raises(ConfigError, match=message):
        plan_run(Config.model_validate(given | {"data": given["data"] | data}))


@pytest.mark.parametrize("finished_task", ["summarization"], indirect=True)
def test_running_text_is_no_measure_of_a_model_with_an_encoder(finished_task: Ran, corpus: Path) -> None:
    from rich.console import Console

    with pytest.raises(ConfigError, match=r"an encoder and a decoder.*bitmill compress"):
        evaluate(str(finished_task.package), str(corpus), None, "document", "text", 4, Resources(), Console(quiet=True))
