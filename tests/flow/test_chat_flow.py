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

from jobs.generate import Request, generate
from pipeline.errors import ConfigError
from pipeline.store.records import Evaluation, Package, Tokens
from pipeline.store.shards import Rows
from pipeline.tasks.tokenizers import save_tokenizer
from tests.conftest import ARCHITECTURES
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
    assert len(made("b.json", "conversations", "train")) > 20
    with pytest.raises(ConfigError, match=r"no column 'messages'; valid: conversations\. Set data\.text_column"):
        made("b.json", "messages", "test")
