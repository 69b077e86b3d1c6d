import json

import pytest
from pydantic import ValidationError

from pipeline.errors import RunError
from pipeline.store.records import (
    SCHEMA_VERSION,
    Evaluation,
    ModelVersion,
    Package,
    Shard,
    Size,
    Split,
    StoredFile,
    Student,
    Teacher,
    TeacherCache,
    Tokens,
    read_record,
)

FILE = StoredFile(bytes=3, sha256="ab", fence=2)
SHARDS = tuple(
    Shard(name=name, rows=rows, tokens=n, file=FILE) for name, rows, n in (("rows/a", 3, 20), ("rows/b", 2, 9))
)
COMMON = {
    "key": "0" * 32,
    "stage_version": 1,
    "recipe": {"lr": 1e-3, "nested": {"list": [1, None, "é"]}},
    "inputs": {"cache": "1" * 32},
    "provenance": {"torch": "2"},
    "files": {"weights.safetensors": FILE},
}
TRAINED = {"parameters": 10, "steps": 4, "best_step": 2, "validation_nats": 1.25, "family": "gpt2"}
RECORDS = [
    Tokens(**COMMON, vocabulary=9, end_of_text=0, splits={"train": Split(shards=SHARDS)}),
    Teacher(**COMMON, **TRAINED, fp32_bytes=40, hidden=8),
    Student(**COMMON, **TRAINED, digest="d"),
    TeacherCache(**COMMON, mode="states", dtype="float16", hidden=8, shards=SHARDS, bytes=5, kl_nats=1e-8),
    Evaluation(
        **COMMON,
        protocol="p",
        digest="d",
        teacher={"perplexity": 2.0},
        student={"perplexity": 1e300},
        validation={"teacher": {"perplexity": 2.5}, "student": {"perplexity": 3.0}},
    ),
    Package(**COMMON, digest="d", size=Size(teacher_bytes=9, packed_bytes=3, ratio=3, paper_bytes=2, paper_ratio=4.5)),
    ModelVersion(**COMMON, name="n", version=2, aliases=("champion",), run_id="r", model_id="m"),
]


def changed(record, **fields):
    return json.dumps({**json.loads(record.to_json()), **fields}).encode()


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.stage)
def test_a_record_survives_its_json(record):
    assert read_record(record.to_json(), type(record), "place") == record
    assert json.loads(record.to_json())["schema_version"] == SCHEMA_VERSION


def test_records_are_frozen_and_closed():
    with pytest.raises(ValidationError, match="frozen"):
        RECORDS[0].key = "other"
    with pytest.raises(ValidationError, match="surprise"):
        Student(**COMMON, **TRAINED, digest="d", surprise=1)


def test_a_split_adds_up_its_shards():
    split = Split(shards=SHARDS, text_bytes=100)
    assert (split.rows, split.tokens) == (5, 29)
    assert (Split().rows, Split().tokens) == (0, 0)


def test_a_newer_schema_is_refused_with_advice():
    data = changed(RECORDS[0], schema_version=SCHEMA_VERSION + 1, field_of_the_future=1)
    with pytest.raises(RunError) as raised:
        read_record(data, Tokens, "s3://bucket/record.json")
    message = str(raised.value)
    assert "s3://bucket/record.json" in message
    assert f"schema_version {SCHEMA_VERSION + 1}" in message
    assert f"up to {SCHEMA_VERSION}" in message
    assert "Upgrade" in message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"3",
        b"null",
        b'"text"',
        b"{}",
        b'{"schema_version": 1}',
        RECORDS[0].to_json()[:-20],
        changed(RECORDS[0], schema_version="1"),
        changed(RECORDS[0], surprise=1),
        changed(RECORDS[0], vocabulary="wide"),
    ],
)
def test_a_damaged_record_is_named(data):
    with pytest.raises(RunError, match=r"The record here/record\.json"):
        read_record(data, Tokens, "here/record.json")


def test_a_record_of_another_stage_is_refused():
    with pytest.raises(RunError, match=r"'cache'.*'distill'"):
        read_record(RECORDS[3].to_json(), Student, "place")
