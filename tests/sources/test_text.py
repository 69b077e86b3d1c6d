import contextlib
import itertools
import json
import os
import random
import re
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.sources import text as sources
from pipeline.sources.content import ContentMemo
from pipeline.sources.files import SourceFile, pin_text
from pipeline.sources.models import TOKENIZER_FILES, pin_model
from pipeline.sources.text import documents, parts
from tests.store.test_step_store import at_once

PIECES = ["a", "bc", "ü", "日本", "\n", "\n\n", " \n", "\t\n", "\u00a0\n", "\r\n", "\u2028", "\x1c\n", "."]
each_example = settings(
    database=None, deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def lines_of(text):
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def paragraphs_of(text):
    groups = itertools.groupby(lines_of(text), key=lambda line: bool(line.strip()))
    return ["".join(lines) for filled, lines in groups if filled]


def in_parts(path, format_, part_bytes, unit):
    """What workers read, each its own part, when a part is `part_bytes` long."""
    size = path.stat().st_size
    file = SourceFile(uri=str(path), format=format_, content="c", bytes=size, mtime_ns=path.stat().st_mtime_ns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PART_BYTES", part_bytes)
        pieces = parts(file)
        assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
        assert pieces[-1].stop == size
        return [text for piece in pieces for text in documents(piece, unit, "text")]


@each_example
@given(st.lists(st.sampled_from(PIECES), min_size=1).map("".join), st.integers(1, 40))
def test_the_parts_of_a_text_hold_each_paragraph_and_line_once(tmp_path, text, part_bytes):
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    text = text.replace("\r\n", "\n")  # wherever a text was written, its lines end alike
    assert in_parts(path, "txt", part_bytes, "document") == paragraphs_of(text)
    lines = [line if line.endswith("\n") else line + "\n" for line in lines_of(text)]
    assert in_parts(path, "txt", part_bytes, "line") == lines


@each_example
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1), st.integers(1, 60))
def test_the_parts_of_jsonl_hold_each_row_once(tmp_path, texts, part_bytes):
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in texts))
    assert in_parts(path, "jsonl", part_bytes, "document") == [text for text in texts if text.strip()]
    lines = [text if text.endswith("\n") else text + "\n" for text in texts]
    assert in_parts(path, "jsonl", part_bytes, "line") == lines


@pytest.mark.parametrize("part_bytes", [1, 300, 10**6])
@pytest.mark.parametrize("group", [1, 3, 7, 22])
@pytest.mark.parametrize("batch", [2, 1024])
def test_the_parts_of_parquet_hold_each_row_once(tmp_path, monkeypatch, read, part_bytes, group, batch):
    texts = [f"row {i} " + "ü" * i for i in range(20)]
    table = pa.table({"body": pa.array([*texts, None, " "], pa.large_string()), "id": range(22)})
    pq.write_table(table, tmp_path / "text.parquet", row_group_size=group)
    monkeypatch.setattr(sources, "BATCH_ROWS", batch)
    monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
    assert read(tmp_path / "text.parquet", column="body") == texts
    assert read(tmp_path / "text.parquet", "line", "body") == [*(f"{text}\n" for text in texts), "\n", " \n"]


def test_a_row_group_is_cut_too_and_read_from_its_beginning_few_times(tmp_path, monkeypatch, memo):
    texts = [f"{i} " + random.Random(i).randbytes(900).hex() for i in range(2000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "one.parquet")  # of one group, unless it is said otherwise
    (file,) = pin_text(str(tmp_path / "one.parquet"), "data.source", memo)
    for pieces in (3, 10):
        monkeypatch.setattr(sources, "PART_BYTES", file.bytes // pieces)
        cut = parts(file)
        assert len(cut) == pieces
        read = [list(documents(part, "document", "text")) for part in cut]
        assert [text for part in read for text in part] == texts
        assert max(map(len, read)) <= 2000 / pieces + 1
    monkeypatch.setattr(sources, "PART_BYTES", 1000)
    assert len(parts(file)) == sources.GROUP_PARTS


def test_a_glob_reads_files_of_all_formats_in_order(tmp_path, read):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.txt").write_text("three\n\nfour\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    pq.write_table(pa.table({"text": ["five"]}), tmp_path / "c.parquet")
    assert read(tmp_path / "**" / "*.*") == ["one", "two", "three\n", "four\n", "five"]


def test_a_missing_text_is_nobodys_document(tmp_path, read):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "one"}\n')
    try:
        texts = read(tmp_path / "a.jsonl")
    except ConfigError:
        return
    assert texts == ["one"]


@pytest.mark.parametrize(("name", "pieces"), [("pydoc", 3), ("chitchat", 1)])
def test_packaged_text_gives_documents(monkeypatch, memo, name, pieces):
    (file,) = pin_text(f"python://{name}", "data.source", memo)
    monkeypatch.setattr(sources, "PART_BYTES", file.bytes // pieces)
    found = parts(file)
    assert len(found) >= pieces
    texts = [text for part in found for text in documents(part, "document", "text")]
    assert len(texts) == found[-1].stop > 50
    assert all(text.strip() for text in texts)
    assert file.bytes == sum(len(text.encode()) for text in texts)


FILES = {
    "empty.txt": b"",
    "note.docx": b"x",
    "latin.txt": "gr\xfcn".encode("latin-1"),
    "other.jsonl": b'{"body": "x"}\n',
    "cut.jsonl": b'{"text": "x"}\n{"text": \n',
    "list.jsonl": b'["text"]\n',
    "lone.jsonl": b'{"text": "\\ud800"}\n',
    "cut.parquet": b"PAR1 and no more PAR1",
}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none*.txt", r"data\.source is .*none\*\.txt.*no file matches"),
        ("empty.txt", r"data\.source: .*empty\.txt is empty"),
        ("note.docx", r"note\.docx is of no known format; valid endings: \.txt"),
        ("latin.txt", r"latin\.txt is not UTF-8 near byte 0"),
        ("other.jsonl", r"other\.jsonl has no column 'text'; valid: body"),
        ("cut.jsonl", r"cut\.jsonl"),
        ("list.jsonl", r"list\.jsonl"),
        ("lone.jsonl", r"lone\.jsonl"),
        ("cut.parquet", r"cut\.parquet"),
    ],
)
def test_text_that_cannot_be_read_is_named(tmp_path, read, name, message):
    for file, data in FILES.items():
        (tmp_path / file).write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / name)


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path, read):
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"has no column 'text'; valid: body, id"):
        read(tmp_path / "a.parquet")


def test_content_is_told_by_bytes_and_not_by_path(tmp_path, memo):
    for name, text in (("a.txt", "same"), ("b.txt", "same"), ("c.txt", "else")):
        (tmp_path / name).write_text(text)
    a, b, c = pin_text(str(tmp_path / "?.txt"), "data.source", memo)
    assert a.content == b.content != c.content


def test_a_file_of_the_same_size_and_time_is_not_taken_for_the_old_one(tmp_path, memo):
    path = tmp_path / "a.txt"
    path.write_text("before")
    old, status = memo.sha256(path), path.stat()
    (tmp_path / "new").write_text("behind")
    os.utime(tmp_path / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    (tmp_path / "new").replace(path)  # another inode
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    replaced = ContentMemo(str(tmp_path / "memo")).sha256(path)
    path.write_text("beyond")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert len({old, replaced, ContentMemo(str(tmp_path / "memo")).sha256(path)}) == 3


def test_what_is_remembered_is_not_read_again(tmp_path, memo):
    path = tmp_path / "a.txt"
    path.write_text("before")
    digest, status = memo.sha256(path), path.stat()
    with open(path, "r+") as file:  # what no status shows is the one change that is not seen
        file.write("behind")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert ContentMemo(str(tmp_path / "memo")).sha256(path) == digest
    (stored,) = (tmp_path / "memo").iterdir()
    for torn in (b"{ torn", stored.read_bytes()[:100] + b"torn" * 5000):
        stored.write_bytes(torn)
        again = ContentMemo(str(tmp_path / "memo")).sha256(path)
        assert again != digest
        assert ContentMemo(str(tmp_path / "memo")).remembered(path, "", lambda: "asked again") == again


def test_a_memo_that_cannot_be_written_remembers_nothing(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    (tmp_path / "folder" / "content.db").mkdir(parents=True)
    (tmp_path / "file").touch()
    for folder in ("folder", "file", "file/memo"):
        memo = ContentMemo(str(tmp_path / folder))
        assert [memo.remembered(path, "", iter([answer]).__next__) for answer in ("first", "second")] == [
            "first",
            "second",
        ]


def test_a_memo_of_another_form_is_thrown_away(tmp_path, memo):
    path = tmp_path / "a.txt"
    path.write_text("text")
    (tmp_path / "memo").mkdir()
    with contextlib.closing(sqlite3.connect(tmp_path / "memo" / "content.db")) as other:
        other.execute("CREATE TABLE facts (name TEXT PRIMARY KEY, fact TEXT, since TEXT)")
        other.commit()
    digest = memo.sha256(path)
    assert ContentMemo(str(tmp_path / "memo")).remembered(path, "", lambda: "asked again") == digest


def test_threads_share_a_memo(tmp_path, memo):
    paths = [tmp_path / f"{i}.txt" for i in range(20)]
    for path in paths:
        path.write_text(path.name)
    before = [memo.sha256(path) for path in paths[:10]]
    inode = (tmp_path / "memo" / "content.db").stat().st_ino
    with ThreadPoolExecutor(4) as pool:
        digests = [*pool.map(memo.sha256, paths * 3)]
    assert digests == digests[:20] * 3
    assert digests[:10] == before
    assert [memo.remembered(path, "", lambda: "asked") for path in paths] == digests[:20]
    assert (tmp_path / "memo" / "content.db").stat().st_ino == inode


def test_many_may_remember_at_once_and_nothing_is_lost(tmp_path):
    paths = [tmp_path / f"{i}.txt" for i in range(40)]
    for path in paths:
        path.write_text(path.name)

    def remember(number):
        own = paths[number:] + paths[:number]
        return {path: ContentMemo(str(tmp_path / "memo")).sha256(path) for path in own}

    found = at_once(remember)
    assert all(digests == found[0] for digests in found)
    assert len(set(found[0].values())) == 40
    after = ContentMemo(str(tmp_path / "memo"))
    assert {path: after.remembered(path, "", lambda: "asked") for path in paths} == found[0]


def test_remembering_a_file_costs_the_same_however_many_are_remembered(tmp_path, memo):
    def written():
        counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(counters["wchar"])

    paths = [tmp_path / f"{i}.txt" for i in range(600)]
    for path in paths:
        path.touch()
    before = written()
    for path in paths[:300]:
        memo.sha256(path)
    half = written()
    for path in paths[300:]:
        memo.sha256(path)
    assert written() - half < 1.5 * (half - before)


@pytest.mark.parametrize("source", ["python://none", "hf://org"])
def test_a_source_of_another_form_is_refused(memo, source):
    with pytest.raises(ConfigError, match=r"data\.source is"):
        pin_text(source, "data.source", memo)


def test_a_model_is_told_by_the_content_of_its_files(tmp_path, memo):
    for folder, weights in (("a", b"w"), ("b", b"w"), ("c", b"W")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        (tmp_path / folder / "model.safetensors").write_bytes(weights)
        (tmp_path / folder / "README.md").write_text(folder)
    a, b, c = (pin_model(str(tmp_path / folder), "model.source", memo) for folder in "abc")
    assert (a.folder, set(a.content)) == (tmp_path / "a", {"config.json", "model.safetensors"})
    assert a.content == b.content != c.content


def test_pickled_weights_and_missing_models_are_refused(tmp_path, memo):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"no \*\.safetensors. It holds pickled weights \(pytorch_model\.bin\)"):
        pin_model(str(tmp_path), "model.source", memo)
    with pytest.raises(ConfigError, match=r"model\.tokenizer: .* holds none of tokenizer\*"):
        pin_model(str(tmp_path), "model.tokenizer", memo, TOKENIZER_FILES)
    for source in (str(tmp_path / "none"), "./none", "~/none-at-all", "a/b/c"):
        with pytest.raises(ConfigError, match=r"model\.source is .*no such directory"):
            pin_model(source, "model.source", memo)
    with pytest.raises(ConfigError, match=r"valid packaged models: python://smollm2-135m"):
        pin_model("python://gpt5", "model.source", memo)
