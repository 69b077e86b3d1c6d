"""Conversations through the line, from every kind of file that brings them, and an answer from what ships."""

import csv
import io
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from jobs.compress import plan_document
from jobs.generate import Request, generate
from pipeline.errors import ConfigError
from pipeline.flow.capacity import estimate
from pipeline.flow.plan import plan_run
from pipeline.store.records import Evaluation, Package, Tokens
from pipeline.store.shards import Rows
from pipeline.tasks.tokenizers import save_tokenizer
from tests.conftest import ARCHITECTURES
from tests.family_models import ANGLES, LLAMA_LIKE
from tests.tasks.test_chat import CHATML, words


def talks(first, last):
    return [
        [
            {"role": "user", "content": f"hello {i}"},
            {"role": "assistant", "content": f"yes, {i}"},
            *([{"role": "user", "content": "no?"}, {"role": "assistant", "content": "more"}] if i % 3 else []),
        ]
        for i in range(first, last)
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    save_tokenizer(words(CHATML), folder)
    return str(folder)


def fields_of(tokenizer, data):
    return {
        "model": {"source": {**ARCHITECTURES["gpt2"], "n_positions": 96}, "tokenizer": tokenizer},
        "task": {"name": "chat", "block_length": 96},
        "distill": {"contrast_weight": 0.0},
        "data": data,
    }


def test_a_model_of_conversations_goes_through_the_line(tokenizer, tmp_path, tiny_config, run_flow):
    rows = [json.dumps({"messages": talk}) for talk in talks(0, 60)]
    (tmp_path / "talks.jsonl").write_text("\n".join(rows))
    data = {"source": str(tmp_path / "talks.jsonl"), "holdout": 0.2}
    ran = run_flow(tiny_config(tmp_path, **fields_of(tokenizer, data)), "pack")
    scores = ran.outcome.finished(Evaluation).record
    assert 1 < scores.teacher["perplexity"] < 100
    assert 1 < scores.student["perplexity"] < 400
    assert math.isfinite(scores.student["kl_nats"])
    tokens = ran.outcome.finished(Tokens).record
    documents = ran.outcome.finished(Evaluation).read_json(Evaluation.DOCUMENTS)
    assert len(documents["tokens"]) == tokens.splits["test"].documents > tokens.splits["test"].rows
    assert tokens.splits["train"].rows < tokens.splits["train"].documents / 2
    document = plan_document(again := plan_run(ran.plan.config, "pack"), estimate(again))
    assert document["fill"] == tokens.splits["train"].tokens / (96 * tokens.splits["train"].rows)
    assert document["fill"] > 0.7
    package = Path(ran.plan.step(Package).dir.uri, "1", Package.FOLDER)
    said = []
    request = Request("hello", 5, 0.0, 0, chat=True)
    document = generate(str(package), request, ran.plan.config.resources, Console(quiet=True), said.append)
    assert document["tokens"] <= 5


def test_conversations_are_the_same_in_every_format(tokenizer, tmp_path, tiny_config, run_flow):
    whole = talks(0, 40)
    named = {"user": "human", "assistant": "gpt"}
    shared = [[{"from": named[m["role"]], "value": m["content"]} for m in talk] for talk in whole]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in whole))
    (tmp_path / "b.json").write_text(json.dumps([{"conversations": talk} for talk in shared]))
    pq.write_table(
        pa.table({"messages": [[{**m, "tool": None} for m in talk] for talk in whole]}), tmp_path / "c.parquet"
    )
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([["messages"], *([json.dumps(talk)] for talk in whole)])
    (tmp_path / "d.csv").write_text(stream.getvalue())

    def made(name, column, split):
        data = {"source": str(tmp_path / name), "holdout": 0.2, "messages_column": column}
        tokens = run_flow(tiny_config(tmp_path, **fields_of(tokenizer, data)), "tokenize").outcome.finished(Tokens)
        rows = Rows(tokens.dir, tokens.record.splits[split].shards)
        return rows.get(range(rows.rows))[0].tolist()

    assert (
        made("a.jsonl", "messages", "test")
        == made("c.parquet", "messages", "test")
        == made("d.csv", "messages", "test")
    )
    assert sum(map(len, made("b.json", "conversations", "train"))) > 0
    with pytest.raises(ConfigError, match=r"no column 'messages'; valid: conversations\. Set data\.text_column"):
        made("b.json", "messages", "test")


def test_a_model_whose_angles_change_with_the_length_of_a_pass_has_a_conversation_a_row(
    tokenizer, tmp_path, tiny_config
):
    (tmp_path / "talks.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in talks(0, 60)))
    fields = fields_of(tokenizer, {"source": str(tmp_path / "talks.jsonl"), "holdout": 0.2})
    length = fields["task"]["block_length"]

    def planned(unchanged):
        angles = {"rope_type": "longrope", **ANGLES["longrope"], "original_max_position_embeddings": unchanged}
        source = {**LLAMA_LIKE, "architecture": "llama", "max_position_embeddings": 2 * length}
        source["rope_parameters"] = {"rope_theta": 1e4, **angles}
        return plan_run(tiny_config(tmp_path, **fields | {"model": {"source": source, "tokenizer": tokenizer}}))

    apart, together = planned(length - 1), planned(length)
    assert (apart.pinned.packed, together.pinned.packed) == (False, True)
    told = f"task.packing: task.block_length is {length}, and a llama model of rope_type longrope"
    assert [any(w.startswith(told) for w in plan.warnings) for plan in (apart, together)] == [True, False]


def test_a_model_of_no_family_has_a_conversation_a_row(tokenizer, tmp_path, tiny_config):
    (tmp_path / "talks.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in talks(0, 60)))
    fields = fields_of(tokenizer, {"source": str(tmp_path / "talks.jsonl"), "holdout": 0.2})

    def planned(architecture, **task):
        source = {**ARCHITECTURES["gpt2"], "n_positions": 96, "architecture": architecture}
        model = {"source": source, "tokenizer": tokenizer}
        return plan_run(tiny_config(tmp_path, **fields | {"model": model, "task": fields["task"] | task}))

    plan = planned("gpt_bigcode")
    assert not plan.pinned.packed
    assert any(w.startswith("task.packing: no family knows a gpt_bigcode model") for w in plan.warnings)
    alone, together = planned("gpt2", packing=False), planned("gpt2")
    assert (alone.pinned.packed, together.pinned.packed) == (False, True)
    assert alone.warnings == together.warnings == []
    assert together.step(Tokens).recipe == {**alone.step(Tokens).recipe, "packed": True}
