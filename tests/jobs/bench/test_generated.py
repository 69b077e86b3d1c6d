"""Text that a teacher generates: the same for the same teacher, made once, and never half of it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.bench import generated
from jobs.bench.generated import generated_text
from pipeline.errors import ConfigError


@pytest.fixture(autouse=True)
def _few_at_a_time(monkeypatch):
    monkeypatch.setattr(generated, "BATCH", 4)


def make(teacher, folder, documents=10, seed=0, advance=lambda done, total: None):
    return generated_text(teacher, documents, 12, seed, folder, advance)


def test_text_depends_on_teacher_size_and_seed_alone(checkpoint, tmp_path):
    torch.manual_seed(1)
    first = make(checkpoint, tmp_path / "a")
    torch.manual_seed(2)
    again = make(shutil.copytree(checkpoint, tmp_path / "elsewhere"), tmp_path / "b" / "c")
    assert first.name == again.name
    assert first.read_bytes() == again.read_bytes()
    rows = [json.loads(line) for line in first.read_text().splitlines()]
    assert 5 < len(rows) <= 10
    assert all(row.keys() == {"text"} and row["text"].strip() for row in rows)
    assert len({row["text"] for row in rows}) > 5
    names = {first.name, make(checkpoint, tmp_path / "a", seed=1).name, make(checkpoint, tmp_path / "a", 11).name}
    assert len(names) == 3


def test_another_teacher_gives_other_text(checkpoint, tmp_path):
    other = shutil.copytree(checkpoint, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 0.5 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    first, second = make(checkpoint, tmp_path / "text"), make(other, tmp_path / "text")
    assert first.name != second.name
    assert first.read_text() != second.read_text()


def test_it_is_made_once(checkpoint, tmp_path):
    told = []
    path = make(checkpoint, tmp_path, advance=lambda done, total: told.append((done, total)))
    assert told == [(4, 10), (8, 10), (10, 10)]
    before = path.stat().st_mtime_ns
    assert make(checkpoint, tmp_path, advance=lambda done, total: told.append((done, total))) == path
    assert path.stat().st_mtime_ns == before
    assert len(told) == 3
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_an_interruption_leaves_no_half_file_and_the_next_run_the_whole(checkpoint, tmp_path):
    def interrupt(done, total):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(checkpoint, tmp_path / "a", advance=interrupt)
    assert not list((tmp_path / "a").glob("*.jsonl"))
    path = make(checkpoint, tmp_path / "a")
    assert path.read_bytes() == make(checkpoint, tmp_path / "b").read_bytes()
    assert [file.name for file in (tmp_path / "a").iterdir()] == [path.name]


def test_a_tokenizer_without_a_first_token_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "bare")
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    settings = folder / "tokenizer_config.json"
    fields = json.loads(settings.read_text())
    settings.write_text(json.dumps({k: v for k, v in fields.items() if not k.endswith("_token")}))
    with pytest.raises(ConfigError, match=r"no token to begin a text with; give --data"):
        make(folder, tmp_path / "text")
    assert not list(tmp_path.glob("text/*"))
