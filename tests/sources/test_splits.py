"""What is held out of texts, whole files where there are enough, else a block of each; and what splits share."""

import shutil
from itertools import chain

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.config.data import Data
from pipeline.errors import ConfigError
from pipeline.sources import splits as splits_module
from pipeline.sources import text as sources
from pipeline.sources.files import pin_splits
from pipeline.sources.splits import Sketch, point, shared_documents, split_parts
from pipeline.sources.text import documents
from pipeline.store.records import SPLITS

ABOUT = pytest.approx([160, 20, 20], abs=2)  # of 200 paragraphs with `holdout: 0.1`


@pytest.fixture
def divide(memo):
    """The paragraphs of each split, in order, as workers read them."""

    def divide(source, **data):
        section = Data(source=str(source), **data)
        files = pin_splits(section, memo)
        recipe = {"data": {**section.model_dump(), "validation": files.get("validation"), "test": files.get("test")}}
        work = split_parts(recipe, {split: [file.model_dump() for file in pinned] for split, pinned in files.items()})
        assert all(part.index == i for split in SPLITS for i, part in enumerate(p for p in work if p.split == split))
        return {
            split: [text for part in work if part.split == split for text in documents(part, section.unit, "text")]
            for split in SPLITS
        }

    return divide


def book(path, chapters=200):
    paragraphs = [f"{path.stem}, paragraph {i}.\nIt has two lines.\n" for i in range(chapters)]
    path.write_text("\n".join(paragraphs))
    return paragraphs


def share(texts, of):
    return sum(map(len, texts)) / sum(map(len, of))


@pytest.mark.parametrize("part_bytes", [10**9, 1000, 7])
def test_one_text_gives_a_block_to_each_split(tmp_path, divide, monkeypatch, part_bytes):
    paragraphs = book(tmp_path / "book.txt")
    monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
    splits = divide(tmp_path / "book.txt", holdout=0.1)
    assert splits["validation"] + splits["test"] + splits["train"] == paragraphs
    assert [len(splits[split]) for split in SPLITS] == ABOUT
    splits = divide(tmp_path / "book.txt", holdout=0.1, sample=0.5)
    assert splits["validation"] + splits["test"] + splits["train"] == paragraphs[: sum(map(len, splits.values()))]
    assert [len(splits[split]) for split in SPLITS] == pytest.approx([80, 10, 10], abs=2)


@pytest.mark.parametrize("part_bytes", [10**9, 1000, 7])
def test_lines_of_one_text_are_held_out_as_a_block_too(tmp_path, divide, monkeypatch, part_bytes):
    lines = [f"Line {i} of a text without blank lines.\n" for i in range(200)]
    (tmp_path / "lines.txt").write_text("".join(lines))
    monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
    splits = divide(tmp_path / "lines.txt", holdout=0.1, unit="line")
    assert splits["validation"] + splits["test"] + splits["train"] == lines
    assert [len(splits[split]) for split in SPLITS] == ABOUT


def test_lines_of_rows_are_not_held_out(tmp_path, memo):
    for name in ("a.txt", "b.jsonl", "c.txt", "d.txt"):
        (tmp_path / name).write_text(name)
    every, rows, third, fourth = (str(tmp_path / name) for name in ("[ab].*", "*.jsonl", "c.txt", "d.txt"))
    for data in ({"source": every}, {"source": rows, "test": third}):
        message = refused(memo, **data, unit="line")
        assert all(needle in message for needle in ("data.unit: line", "b.jsonl", "set data.validation and data.test"))
    own = {"source": rows, "validation": third, "test": fourth, "unit": "line"}
    assert "leave data.sample" in refused(memo, **own, sample=0.5)
    assert len(pin_splits(Data(**own), memo)) == 3


def test_only_what_has_no_source_of_its_own_is_held_out(tmp_path, divide):
    paragraphs, others = book(tmp_path / "book.txt"), book(tmp_path / "other.txt", 5)
    splits = divide(tmp_path / "book.txt", holdout=0.1, validation=str(tmp_path / "other.txt"))
    assert splits["validation"] == others
    assert splits["test"] + splits["train"] == paragraphs
    assert len(splits["test"]) == pytest.approx(20, abs=2)
    both = {"validation": str(tmp_path / "other.txt"), "test": str(book_at(tmp_path / "third.txt"))}
    assert divide(tmp_path / "book.txt", **both)["train"] == paragraphs
    part = divide(tmp_path / "book.txt", **both, sample=0.25)["train"]
    assert part == paragraphs[: len(part)]
    assert len(part) == pytest.approx(50, abs=2)


def book_at(path):
    book(path, 3)
    return path


def test_of_several_texts_each_goes_whole_to_one_split(tmp_path, divide):
    (tmp_path / "a").mkdir()
    books = [book(tmp_path / "a" / f"{i}.txt", 5 + i % 7) for i in range(60)]
    splits = divide(tmp_path / "a" / "*.txt", holdout=0.1)
    paragraphs = [text for texts in books for text in texts]
    assert sorted(chain(*splits.values())) == sorted(paragraphs)
    homes = [{split for split in SPLITS if set(texts) & set(splits[split])} for texts in books]
    assert all(len(home) == 1 for home in homes)
    for split in ("validation", "test"):
        assert share(splits[split], paragraphs) == pytest.approx(0.1, abs=0.02)
        assert sum(home == {split} for home in homes) > 2
    (tmp_path / "b").mkdir()
    for i in range(60):  # other names, which change the order
        shutil.copy(tmp_path / "a" / f"{i}.txt", tmp_path / "b" / f"{i * 37 % 60:02}.txt")
    moved = divide(tmp_path / "b" / "*.txt", holdout=0.1)
    assert {split: set(texts) for split, texts in moved.items()} == {s: set(texts) for s, texts in splits.items()}


def test_copies_of_a_text_go_the_same_way(tmp_path, divide):
    for i in range(40):
        book(tmp_path / f"{i:02}.txt", 4)
        shutil.copy(tmp_path / f"{i:02}.txt", tmp_path / f"{i:02}-copy.txt")
    splits = divide(tmp_path / "*.txt", holdout=0.1)
    assert all(splits[split] for split in SPLITS)
    assert not (set(splits["train"]) | set(splits["validation"])) & set(splits["test"])
    assert not set(splits["train"]) & set(splits["validation"])


def test_of_texts_too_few_for_every_split_each_gives_a_block(tmp_path, divide):
    books = [book(tmp_path / f"{name}.txt") for name in ("one", "other", "third")]
    splits = divide(tmp_path / "*.txt", holdout=0.1)
    assert sorted(chain(*splits.values())) == sorted(text for texts in books for text in texts)
    for texts in books:
        assert [len(set(texts) & set(splits[split])) for split in SPLITS] == ABOUT


@settings(database=None, deadline=None, max_examples=200)
@given(
    st.lists(st.integers(1000, 10**6) | st.integers(1000, 5000), min_size=1, max_size=60),
    st.sampled_from([0.01, 0.05, 0.1, 0.3]),
    st.sampled_from([0.1, 0.25, 0.6, 0.9, 1.0]),
    st.sampled_from([(), ("test",), ("validation", "test")]),
)
@example([9000], 0.05, 0.6, ("validation", "test"))
@example([3000] * 12 + [60_000] * 4, 0.05, 1.0, ())
def test_every_split_gets_about_its_share_however_uneven_the_texts_are(sizes, holdout, sample, own):
    files = [{"uri": f"{i}.txt", "format": "txt", "content": f"{i} {n}", "bytes": n} for i, n in enumerate(sizes)]
    given = dict.fromkeys(own, "own.txt")
    section = Data(source="*.txt", holdout=holdout, sample=sample, **given).model_dump()
    taken = dict.fromkeys(SPLITS, 0)
    for part in split_parts({"data": section}, {"train": files}):
        taken[part.split] += part.stop - part.start
    shares = {split: sample * holdout for split in ("validation", "test") if split not in own}
    shares["train"] = sample - sum(shares.values())
    taken["left out"], shares["left out"] = sum(sizes) - sum(taken.values()), 1 - sample
    for split, share in shares.items():
        assert 0.5 * share * sum(sizes) - 3 * len(sizes) <= taken[split] <= 2 * share * sum(sizes) + 3 * len(sizes), (
            split
        )


def test_texts_beside_rows_are_split_among_themselves(tmp_path, divide):
    paragraphs = book(tmp_path / "book.txt")
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(300)))
    splits = divide(tmp_path / "*.*", holdout=0.1)
    assert [len(set(paragraphs) & set(splits[split])) for split in SPLITS] == ABOUT


def refused(memo, **data):
    with pytest.raises(ConfigError) as refusal:
        pin_splits(Data(**data), memo)
    return str(refusal.value)


def test_a_file_in_two_splits_is_refused_by_content(tmp_path, memo):
    for name, text in (("a.txt", "one"), ("b.txt", "two"), ("c.txt", "three"), ("copy.txt", "two")):
        (tmp_path / name).write_text(text)
    a, b, c, copy, both = (str(tmp_path / name) for name in ("a.txt", "b.txt", "c.txt", "copy.txt", "[ab].txt"))
    message = refused(memo, source=both, validation=c, test=copy)
    assert all(needle in message for needle in ("data.source and data.test hold the same file", b, copy))
    assert "data.validation and data.test" in refused(memo, source=a, validation=b, test=copy)
    assert "data.source and data.validation" in refused(memo, source=both, validation=a)
    assert "python://aclsum/test" in refused(memo, source="python://aclsum", test="python://aclsum/test")
    assert len(pin_splits(Data(source=both, validation=c), memo)) == 2


def sketch(texts, share=1.0, unit="document"):
    sketched = Sketch(share)
    for text in texts:
        sketched.add(text, unit)
    return sketched


def shared(sketches, explicit=()):
    return shared_documents(sketches, {split: ["pinned"] if split in explicit else None for split in SPLITS})


def test_documents_of_several_splits_are_counted():
    train, validation, test = ([f"{name} {i}" for i in range(100)] for name in SPLITS)
    sketches = {
        "train": sketch(train),
        "validation": sketch([*validation, f"  {train[0]}\n", train[0]]),  # blanks around a text make no other
        "test": sketch([*test, train[1], validation[0], validation[1], validation[1]]),
    }
    assert shared(sketches) == {"train": {}, "validation": {"train": 2}, "test": {"train": 1, "validation": 3}}
    assert sketches["test"].documents == 104
    assert shared({"train": sketches["train"], "test": sketches["test"]})["test"] == {"train": 1}


def test_short_lines_recur_in_any_text():
    heading, line = "Chapter one", "It was the best of times, it was the worst of times,\n"
    sketches = {"train": sketch([heading, line], unit="line"), "test": sketch([heading, line, "\n"], unit="line")}
    assert shared(sketches)["test"] == {"train": 1}
    assert sketches["test"].documents == 1


def test_of_large_splits_a_share_stands_for_all():
    train = [text for text in (f"train {i}" for i in range(25_000)) if point(text) >= 0.2]  # as if some were held out
    sketches = {"train": sketch(train, 0.1), "test": sketch([*(f"test {i}" for i in range(3000)), *train[:2000]], 0.1)}
    assert sketches["test"].documents == 5000
    assert len(sketches["test"].hashes) == pytest.approx(500, abs=60)
    assert len(sketches["train"].hashes) == pytest.approx(2000, abs=150)
    assert shared(sketches)["test"]["train"] == pytest.approx(2000, rel=0.15)


def test_the_share_bounds_what_is_compared_and_is_the_same_for_every_split(tmp_path, memo, monkeypatch):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {i}"}}\n' for i in range(100)))
    section = Data(source=str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"))
    files = pin_splits(section, memo)
    places = {split: [file.model_dump() for file in pinned] for split, pinned in files.items()}
    assert {part.share for part in split_parts({"data": section.model_dump()}, places)} == {1.0}
    total = sum(file.bytes for pinned in files.values() for file in pinned)
    monkeypatch.setattr(splits_module, "COMPARED_BYTES", total // 4)
    (share,) = {part.share for part in split_parts({"data": section.model_dump()}, places)}
    assert share == pytest.approx(0.25, rel=0.01)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_that_is_mostly_another_is_refused_where_it_has_its_own_source(split):
    train = [f"train {i}" for i in range(100)]
    half = [*train[:50], *(f"own {i}" for i in range(50))]
    assert shared({"train": sketch(train), split: sketch(half)}, [split])[split] == {"train": 50}
    more = {"train": sketch(train), split: sketch([*half, train[50]])}
    with pytest.raises(ConfigError, match=rf"data\.{split}: 51 of its 101 documents are in the train split.*50%"):
        shared(more, [split])
    assert shared(more)[split] == {"train": 51}
