import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import sources
from pipeline.errors import ConfigError
from pipeline.sources.content import ContentMemo
from pipeline.sources.fields import rows
from pipeline.sources.files import pin_text
from pipeline.sources.text import documents, parts

ROWS = [{"a": f"text {i} größe", "b": [f"turn {j} of {i}" for j in range(i % 4)], "c": i} for i in range(50)]


@pytest.fixture
def read(tmp_path):
    memo = ContentMemo(str(tmp_path / "memo"))

    def read(source, *columns):
        files = pin_text(str(source), "data.source", memo)
        return [row for file in files for part in parts(file) for document in rows(part, columns) for row in document]

    return read


@pytest.mark.parametrize("part_bytes", [10**9, 700, 60])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_come_once_and_in_order_however_they_are_cut(monkeypatch, tmp_path, read, kind, part_bytes):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    monkeypatch.setattr(sources.text, "PART_BYTES", part_bytes)
    assert read(path, "b", "a") == [(row["b"], row["a"]) for row in ROWS]
    assert read(path, "a") == [(row["a"],) for row in ROWS]


def test_paragraphs_are_rows_of_one_column(tmp_path, read):
    (tmp_path / "talk.txt").write_text("one\ntwo\n\nthree\nfour\n")
    assert read(tmp_path / "talk.txt", "text") == [("one\ntwo\n",), ("three\nfour\n",)]
    with pytest.raises(ConfigError, match="plain text, which has no columns text, summary"):
        read(tmp_path / "talk.txt", "text", "summary")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": 1}', "the column 'a' of a row of .* is neither a text nor a list of texts"),
        ('{"a": ["x", 2]}', "neither a text nor a list"),
        ('{"a": "\\ud800"}', "neither a text nor a list"),
        ('{"b": "x"}', r"no column 'a'; valid: b\. Set data\.text_column, summary_column"),
        ('"a"', "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('{"a": ', "not a JSON object"),
    ],
)
def test_a_row_that_is_something_else_is_refused(tmp_path, read, line, message):
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / "rows.jsonl", "a")


def test_nothing_is_an_empty_text(tmp_path, read):
    (tmp_path / "rows.jsonl").write_text('{"a": null}\n')
    assert read(tmp_path / "rows.jsonl", "a") == [("",)]


def test_papers_give_a_row_for_each_aspect_in_the_splits_of_the_package(read, tmp_path):
    found = {split: read(f"python://aclsum/{split}", "text", "summary") for split in ("train", "validation", "test")}
    assert [len(rows) for rows in found.values()] == [300, 150, 300]
    assert read("python://aclsum", "text", "summary") == [row for rows in found.values() for row in rows]
    aspects = {text.partition(":")[0] for text, _ in found["test"]}
    assert aspects == {"approach", "challenge", "outcome"}
    assert all(text.strip() and summary.strip() for text, summary in found["test"])
    (file,) = pin_text("python://aclsum/test", "data.source", ContentMemo(str(tmp_path)))
    texts = [text for part in parts(file) for text in documents(part, "document", "text")]
    assert len(texts) == 100
    assert file.bytes == sum(len(text.encode()) for text in texts)


def test_conversations_are_lists_of_turns(read):
    found = read("python://chitchat", "text")
    assert len(found) > 7000
    assert all(isinstance(turns, list) for (turns,) in found)
    with pytest.raises(ConfigError, match="no column 'turns'; valid: text"):
        read("python://chitchat", "turns")


def test_a_split_that_a_package_does_not_have_is_refused(read):
    for source in ("python://aclsum/dev", "python://chitchat/train", "python://acl"):
        with pytest.raises(ConfigError, match=r"valid packages of text: .*python://aclsum"):
            read(source, "text")
