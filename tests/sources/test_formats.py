"""One text in every format and compression: the same documents, and what is wrong with a file said in one sentence."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError
from pipeline.sources import rows as row_readers
from pipeline.sources import text as sources
from pipeline.sources.fields import rows
from pipeline.sources.files import pin_text
from pipeline.sources.text import parts

TEXTS = [f'document {i}, "größe"\tNA, 00{i}\nof two lines\r\n' for i in range(60)] + ["NA", "null", "007", "2024-01-01"]
HARD = [*TEXTS, "", None, " "]


def zipped(name, data):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return stream.getvalue()


PACK = {
    "": lambda name, data: data,
    ".gz": lambda name, data: gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :]),
    ".bz2": lambda name, data: bz2.compress(data),
    ".xz": lambda name, data: lzma.compress(data),
    ".zst": lambda name, data: (
        2 * pa.compress(b"", codec="zstd", asbytes=True) + pa.compress(data, codec="zstd", asbytes=True)
    ),
    ".zip": zipped,
}


def jsonl(texts):
    return b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps({"id": 1, "text": text}).encode() for text in texts)


def array(texts):
    return json.dumps([{"text": text, "id": [1]} for text in texts], indent=1, ensure_ascii=False).encode("utf-8-sig")


def table(texts, dialect="excel"):
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, dialect)
    writer.writerows([("text", "id"), *((text, 1) for text in texts)])
    return stream.getvalue().encode("utf-8-sig")


def parquet(texts):
    stream = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), stream, row_group_size=7)
    return stream.getvalue()


def arrow(texts, new=pa.ipc.new_stream):
    stream, held = io.BytesIO(), pa.table({"text": pa.array(texts, pa.large_string()), "id": range(len(texts))})
    with new(stream, held.schema) as writer:
        writer.write_table(held, max_chunksize=9)
    return stream.getvalue()


WRITE = {
    "a.jsonl": jsonl,
    "a.json": array,
    "lines.json": jsonl,
    "a.csv": table,
    "a.tsv": lambda texts: table(texts, "excel-tab"),
    "a.parquet": parquet,
    "a.arrow": arrow,
    "file.arrow": lambda texts: arrow(texts, pa.ipc.new_file),
}


@pytest.mark.parametrize("compression", PACK)
def test_rows_are_the_same_in_every_format(tmp_path, read, compression):
    for name, write in WRITE.items():
        path = tmp_path / (name + compression)
        path.write_bytes(PACK[compression](name, write(HARD)))
        assert read(path) == TEXTS, name
        assert read(path, "line")[-3:] == ["\n", "\n", " \n"], name


@pytest.mark.parametrize("compression", PACK)
def test_lines_of_windows_are_those_of_any_other(tmp_path, read, compression):
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(PACK[compression]("a.txt", "\ufeffone\r\ntwo\r\n\r\n\r\nthree".encode()))
    assert read(path) == ["one\ntwo\n", "three"]
    assert read(path, "line") == ["one\n", "two\n", "\n", "\n", "three\n"]


def test_what_is_in_a_zip_has_a_format_of_its_own(tmp_path, read, memo):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("b/b.txt", "two\n\nthree\n")
        archive.writestr("a.jsonl", '{"text": "one"}')
        archive.writestr("__MACOSX/a.jsonl", "x")
    assert read(tmp_path / "all.zip") == ["one", "two\n", "three\n"]
    files = pin_text(str(tmp_path / "all.zip"), "data.source", memo)
    assert [(file.member, file.format, file.text_bytes) for file in files] == [
        ("a.jsonl", "jsonl", 15),
        ("b/b.txt", "txt", 11),
    ]
    assert len({file.content for file in files}) == 2
    for name, inside in (("other.zip", {"a.docx": "x"}), ("none.zip", {})):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member in inside.items():
                archive.writestr(*member)
        with pytest.raises(ConfigError, match=r"a\.docx in .*other\.zip is of no known|no file in .*none\.zip"):
            read(tmp_path / name)


def test_columns_come_from_every_format(tmp_path, memo):
    turns = [{"turns": ["a", "b"], "name": f"n{i}"} for i in range(20)]
    stream = io.BytesIO()
    held = pa.Table.from_pylist(turns)
    with pa.ipc.new_stream(stream, held.schema) as writer:
        writer.write_table(held)
    (tmp_path / "a.arrow").write_bytes(stream.getvalue())
    (tmp_path / "a.json").write_text(json.dumps(turns))
    for name in ("a.arrow", "a.json"):
        (part,) = (p for file in pin_text(str(tmp_path / name), "data.source", memo) for p in parts(file))
        assert [row for ((row),) in rows(part, ("name", "turns"))] == [(t["name"], t["turns"]) for t in turns]


FLAWS = {
    "cut.jsonl.gz": (PACK[".gz"]("", jsonl(TEXTS * 50))[:-40], "cannot be unpacked"),
    "cut.jsonl.xz": (lzma.compress(jsonl(TEXTS))[:-40], "cannot be unpacked"),
    "cut.jsonl.bz2": (bz2.compress(jsonl(TEXTS))[:-40], "cannot be unpacked"),
    "cut.jsonl.zst": (pa.compress(jsonl(TEXTS), codec="zstd", asbytes=True)[:-40], "cannot be unpacked"),
    "none.jsonl.gz": (b"none", "cannot be unpacked"),
    "none.jsonl.bz2": (b"none" * 9, "cannot be unpacked"),
    "none.jsonl.zst": (b"none" * 9, "cannot be unpacked"),
    "none.zip": (b"none", "cannot be unpacked"),
    "cut.json": (array(TEXTS)[:-40], "a JSON array that cannot be read behind its element 63"),
    "item.json": (b'[{"text": "x"}, "y"]', "is not a JSON object, but a str"),
    "latin.json": ('[{"text": "' + "x" * 10**6 + 'gr\xfcn"}]').encode("latin-1"),
    "long.csv": (b"text,id\na,1\nb,1,2\n", "ends in line 3 .* has 3 fields, and its first line.* 2"),
    "quote.csv": (b'text,id\n"a,1\n', "is no table near line 2"),
    "twice.csv": (b"text,text\na,1\n", "names a column twice"),
    "latin.csv": ("text\ngr\xfcn\n".encode("latin-1"), "latin.csv is not UTF-8"),
    "other.csv": (b"body\na\n", "has no column 'text'; valid: body"),
    "lone.json": (b'[{"text": "\\ud800"}]', "is no text"),
    "list.jsonl": (b'{"text": ["a"]}', "is no text, but a list"),
    "none.arrow": (b"none of it", "is not Arrow"),
    "other.arrow": (arrow(["a"]).replace(b"text", b"body"), "has no column 'text'"),
    "utf16.txt": ("größe".encode("utf-16"), "is not UTF-8 near byte 0"),
    "bytes.parquet": (parquet(["abcd"]).replace(b"abcd", b"\xff\xfecd"), "not UTF-8"),
    "note.docx.gz": (b"x", r"of no known format; valid endings: .*each alone or before \.gz"),
}
FLAWS["latin.json"] = (FLAWS["latin.json"], "is not UTF-8")


@pytest.mark.parametrize("name", FLAWS)
def test_what_is_wrong_with_a_file_is_said(tmp_path, read, name):
    data, message = FLAWS[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message) as refused:
        read(tmp_path / name)
    assert name in str(refused.value)


@pytest.mark.parametrize("name", ["a.txt", "line.txt", "a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_what_is_longer_than_memory_should_hold_is_refused(tmp_path, read, monkeypatch, name):
    for module in (sources, row_readers):
        monkeypatch.setattr(module, "MOST_BYTES", 400_000)
    monkeypatch.setattr(row_readers, "JSON_CHARACTERS", 1000)
    old = csv.field_size_limit(400_000)
    write = {"a.txt": lambda texts: "\n".join(texts).encode(), "line.txt": lambda texts: "".join(texts).encode()}
    write = {**WRITE, **write}[name.removesuffix(".gz")]
    pack = gzip.compress if name.endswith(".gz") else bytes
    try:
        for length, refused in ((150, False), (450, True)):
            texts = ["x" * 999 for _ in range(length)] if name == "a.txt" else ["x" * 999 * length, "short"]
            (tmp_path / name).write_bytes(pack(write(texts)))
            if refused:
                with pytest.raises(ConfigError, match=rf"{name} has a line or a document of more than"):
                    read(tmp_path / name)
            else:
                assert sum(map(len, read(tmp_path / name))) >= 999 * length
    finally:
        csv.field_size_limit(old)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.bz2", "a.csv.zst", "a.arrow.zip", "a.txt.gz", "a.tsv"])
def test_no_file_is_in_memory_whole(tmp_path, memo, monkeypatch, name):
    """Some 12 MB of text, read with a fraction of it in Python's memory and Arrow's."""
    monkeypatch.setattr(row_readers, "JSON_CHARACTERS", 2**14)
    base, _, ending = name.rpartition(".") if name != "a.tsv" else (name, "", "")
    texts = [f"{i} " + "word " * 100 for i in range(24_000)]
    write = {**WRITE, "a.txt": lambda texts: "\n\n".join(texts).encode()}[base]
    (tmp_path / name).write_bytes(PACK[f".{ending}" if ending else ""](base, write(texts)))
    (part,) = (p for file in pin_text(str(tmp_path / name), "data.source", memo) for p in parts(file))
    del texts
    held = pa.total_allocated_bytes()
    tracemalloc.start()
    count = sum(1 for _ in sources.documents(part, "document", "text"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 24_000
    assert peak < 5 * 2**20
    assert pa.total_allocated_bytes() - held < 2**20
