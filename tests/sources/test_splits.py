"""Texts that are held out: whole files where there are enough, else a block of each."""

import shutil
from itertools import chain

import pytest

from pipeline.config.data import Data
from pipeline.sources import text as sources
from pipeline.sources.files import pin_splits
from pipeline.sources.splits import split_parts
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
            split: [text for part in work if part.split == split for text in documents(part, "document", "text")]
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


def test_texts_beside_rows_are_split_among_themselves(tmp_path, divide):
    paragraphs = book(tmp_path / "book.txt")
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(300)))
    splits = divide(tmp_path / "*.*", holdout=0.1)
    assert [len(set(paragraphs) & set(splits[split])) for split in SPLITS] == ABOUT
