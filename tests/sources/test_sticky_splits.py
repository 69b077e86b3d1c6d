"""A document's split is its own, for ever: wherever it lies, whatever comes beside it, however often it is there."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config.data import Data
from pipeline.sources.content import ContentMemo
from pipeline.sources.files import pin_splits
from pipeline.sources.splits import split_parts
from pipeline.stages.tokenize import documents_of
from pipeline.store.keys import recipe_of
from pipeline.store.records import SPLITS

TEXTS = st.lists(st.text("abcdefgh ", min_size=1, max_size=12).map(str.strip).filter(bool), min_size=1, max_size=40)


def splits_of(folder: Path, files: dict[str, list[str]]) -> dict[str, set[str]]:
    """The splits that each text goes to, of files of rows with these names."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, texts in files.items():
        folder.joinpath(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = Data(source=str(folder / "*.jsonl"), holdout=0.2)
    pinned = pin_splits(data, ContentMemo(str(folder.parent / "memo")))
    recipe = {"data": {**recipe_of(data), "train": [], "validation": None, "test": None}, "task": {}}
    recipe["task"] = {"name": "language_modeling", "block_length": 8}
    places = {split: [file.model_dump() for file in found] for split, found in pinned.items()}
    found: dict[str, set[str]] = {}
    for part in split_parts(recipe, places):
        for text in documents_of(part, recipe):
            found.setdefault(text, set()).add(part.split)
    return found


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS, TEXTS, st.randoms(use_true_random=False))
def test_a_document_never_crosses_splits(tmp_path: Path, texts: list[str], more: list[str], draw) -> None:
    before = splits_of(tmp_path / "text", {"a.jsonl": texts})
    assert all(len(splits) == 1 for splits in before.values())
    moved = [*texts, *draw.sample(texts, len(texts) // 2), *more]  # some twice, some new
    draw.shuffle(moved)
    cut = draw.randint(0, len(moved))
    files = {"z.jsonl": moved[:cut], "renamed.jsonl": moved[cut:]}
    after = splits_of(tmp_path / "text", {name: lines for name, lines in files.items() if lines})
    assert {text: after[text] for text in before} == before
    assert all(len(splits) == 1 for splits in after.values())


def test_a_changed_line_is_new_content(tmp_path: Path) -> None:
    texts = [f"document {number} of many" for number in range(300)]
    before = splits_of(tmp_path / "text", {"a.jsonl": texts})
    after = splits_of(tmp_path / "text", {"a.jsonl": [f"{text}." for text in texts]})
    assert not before.keys() & after.keys()
    crossed = [text for text in before if before[text] != after[f"{text}."]]
    assert crossed  # it is drawn anew
    assert {split for splits in before.values() for split in splits} == set(SPLITS)
