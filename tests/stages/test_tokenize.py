"""Which documents go to which split, and what is said of those that several hold; rows are tested with the flow."""

import gzip
import hashlib
import io
import json

import pytest
from rich.console import Console

from jobs.compress import compress
from pipeline.config.data import Data, TaskSettings
from pipeline.errors import ConfigError
from pipeline.flow.plan import plan_run
from pipeline.sources import text as sources
from pipeline.sources.content import ContentMemo
from pipeline.sources.files import pin_splits
from pipeline.sources.splits import split_parts
from pipeline.stages import tokenize
from pipeline.stages.tokenize import documents_of
from pipeline.store.records import SPLITS, Tokens
from pipeline.store.shards import Rows
from pipeline.tasks import language_modeling
from pipeline.tasks.tokenizers import read_tokenizer, train_bpe


@pytest.fixture
def divide(tmp_path):
    """The documents of each split of a source."""

    def divide(source, task="language_modeling", **data):
        section = Data(source=str(source), **data)
        files = pin_splits(section, ContentMemo(str(tmp_path / "memo")))
        recipe = {"data": section.model_dump(), "task": TaskSettings(name=task).model_dump()}
        work = split_parts(recipe, {split: [file.model_dump() for file in pinned] for split, pinned in files.items()})
        return {
            split: [d for part in work if part.split == split for d in documents_of(part, recipe)] for split in SPLITS
        }

    return divide


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jsonl")
    texts = [f"document {i}, größe" for i in range(400)]
    turns = [[f"hello {i}", f"turn of {i}"] for i in range(400)]
    for name, rows in (("texts", texts), ("turns", turns)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("source", "data", "expected"),
    [
        ("python://chitchat", {"sample": 0.25}, ["a85c0efa5adc870e", "786a4b4184f992bb", "1a9f5459713c8b86"]),
        ("texts.jsonl", {"holdout": 0.1, "sample": 0.9}, ["1226e73a9bc769ab", "409006ab5c49ce7a", "66976bf3cd1a401a"]),
        (
            "turns.jsonl",
            {"task": "next_utterance", "holdout": 0.1},
            ["e5c1ed7d60c960a6", "430a74488dae691e", "b12c6b8c17a5e7cb"],
        ),
    ],
)
def test_the_split_of_a_document_never_changes(jsonl, divide, source, data, expected):
    """Digests that were taken when the rule was made: published numbers rest on these splits."""
    splits = divide(source if "://" in source else jsonl / source, **data)
    digests = [hashlib.sha256(json.dumps(splits[split]).encode()).hexdigest()[:16] for split in SPLITS]
    assert digests == expected


def test_the_split_of_a_document_is_its_hash_as_a_point_of_the_unit_interval(divide):
    splits = divide("python://pydoc", holdout=0.1)  # whose text comes with Python, and is not always the same
    assert sum(map(len, splits.values())) > 50
    for split, (low, high) in {"validation": (0, 0.1), "test": (0.1, 0.2), "train": (0.2, 1)}.items():
        assert splits[split]
        for text in splits[split]:
            assert low <= int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < high


def test_all_aspects_of_a_paper_are_in_one_split(divide):
    splits = divide("python://aclsum/train", task="summarization", holdout=0.2)
    papers = {split: [text.partition(": ")[2] for text, _ in rows] for split, rows in splits.items()}
    assert sum(map(len, papers.values())) == 300
    assert all(len(rows) == 3 * len(set(rows)) > 0 for rows in papers.values())
    for split in SPLITS:
        others = set().union(*(papers[other] for other in SPLITS if other != split))
        assert not others & set(papers[split])


def test_all_summaries_of_a_text_are_in_one_split(divide, tmp_path):
    rows = [{"text": f"text {i}", "summary": f"summary {j} of {i}"} for j in range(3) for i in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = divide(tmp_path / "rows.jsonl", task="summarization", holdout=0.2)
    texts = {split: [text for text, _ in rows] for split, rows in splits.items()}
    assert all(len(rows) == 3 * len(set(rows)) > 0 for rows in texts.values())
    assert sum(len(set(rows)) for rows in texts.values()) == 100


@pytest.fixture
def sharing(corpus, tiny_config, tmp_path):
    """A run whose test split has 40 documents, so many of them from the training text, which gives validation too."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in paragraphs(corpus)[:300]))

    def sharing(common, **data):
        own = paragraphs(corpus)[300 : 340 - common]
        texts = [*own, *(paragraphs(corpus)[i] for i in range(common))]
        (tmp_path / "test.txt").write_text("\n\n".join(texts))
        files = {"source": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.txt")}
        return tiny_config(tmp_path, data={**files, "holdout": 0.1, **data})

    return sharing


def paragraphs(corpus):
    return corpus.read_text().strip().split("\n\n")


@pytest.mark.parametrize("before", [True, False])
def test_a_test_split_that_is_mostly_training_text_is_refused(sharing, run_flow, monkeypatch, before):
    monkeypatch.setattr(tokenize, "SMALL_TEXT_BYTES", 0)
    monkeypatch.setattr(tokenize, "COMPARED_BEFORE_BYTES", 2**26 if before else 0)
    with pytest.raises(ConfigError, match=r"data\.test: \d\d of its 40 documents are in the train split too"):
        (plan_run if before else run_flow)(sharing(30), "tokenize")


@pytest.mark.parametrize("before", [True, False])
def test_a_text_without_blank_lines_is_said_to_be_one_document(
    tmp_path, tiny_config, corpus, run_flow, monkeypatch, before
):
    monkeypatch.setattr(tokenize, "SMALL_TEXT_BYTES", 2**20 if before else 0)
    (tmp_path / "text.txt").write_text("\n".join(paragraphs(corpus)))
    model = {"source": {"architecture": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2}, "tokenizer": str(tmp_path)}
    train_bpe(paragraphs(corpus), 300).save_pretrained(tmp_path)
    data = {"source": str(tmp_path / "text.txt")}
    with pytest.raises(ConfigError, match=r"train split holds 0 tokens.*blank line.*set data\.unit: line"):
        (plan_run if before else run_flow)(tiny_config(tmp_path, data=data, model=model), "tokenize")
    lines = tiny_config(tmp_path, data={**data, "unit": "line"}, model=model)
    assert plan_run(lines).rows > 0


def test_of_more_text_than_is_compared_before_the_beginning_is(sharing, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "PART_BYTES", 1000)
    monkeypatch.setattr(tokenize, "SMALL_TEXT_BYTES", 0)
    monkeypatch.setattr(tokenize, "COMPARED_BEFORE_BYTES", (tmp_path / "train.jsonl").stat().st_size * 0.9)
    assert plan_run(sharing(10)).overlap is None
    with pytest.raises(ConfigError, match=r"data\.test: \d\d of its 40 documents are in the train split too"):
        plan_run(sharing(30))


def test_a_sweep_compares_its_text_once(sharing, monkeypatch):
    asked, config = [], sharing(10)
    monkeypatch.setattr(tokenize, "documents_of", lambda part, recipe: asked.append(part) or documents_of(part, recipe))
    monkeypatch.setattr(tokenize, "SMALL_TEXT_BYTES", 0)
    first = plan_run(config)
    assert asked
    asked.clear()
    seed = config.distill.model_copy(update={"seed": 7})
    assert plan_run(config.model_copy(update={"distill": seed})).overlap == first.overlap
    assert not asked


def test_what_splits_share_is_recorded_and_said(sharing, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 2000)  # of many parts
    before, said, told = io.StringIO(), io.StringIO(), io.StringIO()
    config = sharing(10)
    planned = compress(config, "run.yaml", Console(file=before, width=200), until="tokenize", only_plan=True, wait=True)
    done = compress(config, "run.yaml", Console(file=said, width=200), until="tokenize", only_plan=False, wait=True)
    splits = plan_run(config).tokens.splits
    assert [sum(split.documents for split in splits.values()), splits["test"].documents] == [340, 40]
    assert splits["validation"].shared == splits["train"].shared == {}
    assert sum(splits["test"].shared.values()) == 10
    line = f"{splits['test'].shared['train']} of 40 documents of the test split are in the train split too"
    assert line in before.getvalue()
    assert line in said.getvalue()
    assert planned["shared"] == done["shared"] == {split: splits[split].shared for split in SPLITS}
    compress(config, "run.yaml", Console(file=told, width=200), until="tokenize", only_plan=True, wait=True)
    assert line in told.getvalue()


def test_where_nothing_is_shared_nothing_is_said(sharing):
    said = io.StringIO()
    compress(sharing(0), "run.yaml", Console(file=said, width=200), until="tokenize", only_plan=False, wait=True)
    assert "split too" not in said.getvalue()


@pytest.mark.parametrize(
    "templates", ["{{ messages }}", {"default": "{{ messages }}", "tool_use": "{{ tools }}"}], ids=["one", "several"]
)
def test_chat_templates_are_pinned_and_go_with_the_tokenizer(corpus, tmp_path, tiny_config, run_flow, templates):
    words = train_bpe([corpus.read_text()], 300)
    words.chat_template = templates
    words.save_pretrained(tmp_path / "words")
    model = {"source": {"architecture": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2}}
    config = tiny_config(tmp_path, model={**model, "tokenizer": str(tmp_path / "words")})
    ran = run_flow(config, until="tokenize")
    folder = ran.outcome.finished(Tokens).folder()
    assert read_tokenizer(folder).chat_template == templates
    again = tiny_config(tmp_path, model={**model, "tokenizer": f"step://{ran.record('tokenize').key}"})
    assert (
        read_tokenizer(run_flow(again, until="tokenize").outcome.finished(Tokens).folder()).chat_template == templates
    )
    name = "chat_template.jinja" if isinstance(templates, str) else "additional_chat_templates/tool_use.jinja"
    (tmp_path / "words" / name).write_text("{{ another }}")
    assert plan_run(config, "tokenize").left


def test_a_part_of_any_size_becomes_rows_piece_by_piece(tmp_path, tiny_config, run_flow, monkeypatch):
    texts = [f"document {i} of a file that one worker reads" for i in range(200)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps({"text": t}) for t in texts).encode()))
    config = tiny_config(tmp_path, data={"source": str(tmp_path / "a.jsonl.gz"), "holdout": 0.1})
    most = []

    def encode(self, documents, *rest):
        held = list(documents)
        most.append(sum(map(len, held)))
        return language_modeling.encode(held, rest[0], self.settings.block_length, "document")

    monkeypatch.setattr(tokenize, "SMALL_TEXT_BYTES", 0)  # what is small is encoded before anything starts, whole
    monkeypatch.setattr(tokenize, "PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(language_modeling.LanguageModeling, "encode", encode)
    tokens = run_flow(config, "tokenize").outcome.finished(Tokens)
    assert 1000 <= max(most) < 1100
    words, decoded = read_tokenizer(tokens.folder()), ""
    for split in SPLITS:
        shards = tokens.record.splits[split].shards
        assert len({shard.name for shard in shards}) == len(shards) >= (5 if split == "train" else 1)
        rows = Rows(tokens.dir, shards)
        ids, lengths, _ = rows.get(range(rows.rows))
        decoded += "".join(words.decode(row[:length]) for row, length in zip(ids, lengths, strict=True))
    assert sorted(decoded.removesuffix("<|endoftext|>").split("<|endoftext|>")) == sorted(texts)
