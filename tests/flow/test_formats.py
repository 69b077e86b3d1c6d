"""The same text in every format a set may have: the same documents in the same splits, and the same rows."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.store.records import SPLITS, Tokens
from pipeline.store.shards import Rows
from pipeline.tasks.tokenizers import save_tokenizer, train_bpe
from tests.conftest import ARCHITECTURES
from tests.sources.test_formats import array, table


@pytest.fixture(scope="module")
def texts():
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdeäö", k=draw.randint(2, 6))) for _ in range(200)]
    return [" ".join(draw.choices(words, k=12)) + "\n" for _ in range(120)]


def write_everywhere(texts, folder):
    """Return how a configuration names the text in each format, by a name for people."""
    from datasets import Dataset

    (folder / "hub" / "data").mkdir(parents=True)
    rows = [json.dumps({"text": text}).encode() for text in texts]
    (folder / "a.txt").write_text("\n".join(texts))
    (folder / "a.txt.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b"\n".join(rows)))
    (folder / "a.json").write_bytes(array(texts))
    (folder / "a.csv").write_bytes(table(texts))
    pq.write_table(pa.table({"text": texts}), folder / "a.parquet", row_group_size=50)
    Dataset.from_dict({"text": texts}).save_to_disk(folder / "saved", num_shards=2)
    for number, half in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
        (folder / "hub" / "data" / f"train-{number}.jsonl").write_bytes(b"\n".join(half))
    (folder / "hub" / "README.md").write_text(
        "---\nconfigs:\n- config_name: only\n  data_files: [{split: train, path: data/train-*}]\n---\n"
    )
    named = ("a.txt", "a.txt.gz", "a.jsonl.gz", "a.json", "a.csv", "a.parquet", "saved")
    return {name: str(folder / name) for name in named} | {
        "hub": {"path": str(folder / "hub"), "config": "only", "split": "train"}
    }


def test_one_text_gives_the_same_rows_in_every_format(texts, tmp_path, tiny_config, run_flow):
    save_tokenizer(train_bpe(texts, 300), tmp_path / "words")
    model = {"source": ARCHITECTURES["gpt2"], "tokenizer": str(tmp_path / "words")}
    places = {}
    for split, held in {"train": texts[:80], "validation": texts[80:100], "test": texts[100:]}.items():
        places[split] = write_everywhere(held, tmp_path / split)

    def made(data):
        tokens = run_flow(tiny_config(tmp_path, data=data, model=model), "tokenize").outcome.finished(Tokens)
        documents = {}
        for split in SPLITS:
            rows = Rows(tokens.dir, tokens.record.splits[split].shards)
            ids, lengths, _ = rows.get(range(rows.rows))
            flat = [t for row, length in zip(ids.tolist(), lengths.tolist(), strict=True) for t in row[:length]]
            documents[split] = flat
        return documents

    expected = None
    for name in places["train"]:
        given = {
            "source": places["train"][name],
            "validation": places["validation"][name],
            "test": places["test"][name],
        }
        documents = made(given)
        expected = expected or documents
        assert documents == expected, name
    drawn = None
    for name in ("a.jsonl.gz", "a.json", "a.csv", "a.parquet", "saved", "hub"):
        documents = made({"source": places["train"][name], "holdout": 0.2})
        drawn = drawn or documents
        assert documents == drawn, name
        assert all(documents.values())
    assert made({"source": places["train"]["a.txt"], "holdout": 0.2}) == made(
        {"source": places["train"]["a.txt.gz"], "holdout": 0.2}
    )
