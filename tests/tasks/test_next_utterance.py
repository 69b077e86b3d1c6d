import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.config.data import Evaluate, TaskSettings
from pipeline.config.run import Config
from pipeline.errors import ConfigError
from pipeline.flow.plan import plan_run
from pipeline.sources.splits import split_parts
from pipeline.stages.tokenize import documents_of
from pipeline.tasks import next_utterance
from pipeline.tasks.next_utterance import NextUtterance, draw_others, identity, turns_of
from pipeline.tasks.scoring import chosen
from pipeline.tasks.tokenizers import train_bpe

WORDS = ["yes", "no", "maybe", "well", "hello", "why", "because", "indeed"]
DRAW = random.Random(5)
CONVERSATIONS = [
    ([" ".join(DRAW.choices(WORDS, k=DRAW.randint(1, 6))) + str(n) for _ in range(DRAW.randint(2, 5))],)
    for n in range(14)
]
WIDTH, CANDIDATES, TRAIN = 24, 5, 3
TASK = NextUtterance(
    TaskSettings(name="next_utterance", block_length=WIDTH, candidates=CANDIDATES, train_candidates=TRAIN),
)
POOL = TASK.collect(CONVERSATIONS, "test")
EXAMPLES = [(turns[:i], turns[i]) for (turns,) in CONVERSATIONS for i in range(1, len(turns))]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([turn for (turns,) in CONVERSATIONS for turn in turns], 300)


def encoded(tokenizer, split="test", documents=CONVERSATIONS, pool=POOL, task=TASK):
    ids, lengths, _ = task.encode(iter(documents), tokenizer, split, pool, "document")
    return ids, lengths


def batch_of(tokenizer, split="test"):
    return TASK.batch(*(torch.from_numpy(x).long() for x in encoded(tokenizer, split)))


def tokens_of(tokenizer, text):
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize(("split", "count"), [("train", TRAIN), ("validation", CANDIDATES), ("test", CANDIDATES)])
def test_a_row_is_a_context_with_each_candidate_the_true_one_first(tokenizer, split, count):
    ids, lengths = encoded(tokenizer, split)
    assert ids.shape == (len(EXAMPLES), count * WIDTH)
    assert lengths.shape == (len(EXAMPLES), 2 * count)
    replies = {reply: conversation for conversation, reply in POOL}
    for row, sizes, (context, true) in zip(ids, lengths, EXAMPLES, strict=True):
        seen = []
        starts = set(sizes[count:])
        assert len(starts) == 1  # all candidates are told the same
        start = starts.pop()
        whole = [token for turn in context for token in tokens_of(tokenizer, turn)]
        for sequence, length in zip(row.reshape(count, WIDTH), sizes[:count], strict=True):
            assert sequence[:start].tolist() == whole[len(whole) - start :]
            assert sequence[length - 1] == tokenizer.eos_token_id
            assert not sequence[length:].any()
            seen.append(tokenizer.decode(sequence[start : length - 1]))
        assert seen[0] == true[: len(seen[0])]
        assert len(set(seen)) == count
        own = identity(next(c for c in CONVERSATIONS if c[0][: len(context)] == context))
        assert all(replies[other] != own for other in seen[1:] if other in replies)


def test_long_replies_and_contexts_are_cut(tokenizer):
    document = (["hello " * 40, "why " * 40],)
    pool = [["elsewhere", text] for text in ("yes", "no", "maybe no")]
    ids, lengths = encoded(tokenizer, "train", [document], pool)
    reply = [*tokens_of(tokenizer, document[0][1])[: WIDTH // 2 - 1], tokenizer.eos_token_id]
    context = tokens_of(tokenizer, document[0][0])[-(WIDTH - len(reply)) :]
    assert ids[0, :WIDTH].tolist() == context + reply
    assert lengths[0, 0] == WIDTH
    assert lengths[0, TRAIN] == WIDTH // 2


def test_candidates_depend_on_the_example_alone(tokenizer):
    whole = encoded(tokenizer)
    backwards = encoded(tokenizer, documents=CONVERSATIONS[::-1], pool=TASK.collect(CONVERSATIONS[::-1], "test"))
    assert sorted(map(bytes, whole[0])) == sorted(map(bytes, backwards[0]))
    parts = [encoded(tokenizer, documents=CONVERSATIONS[i : i + 5]) for i in range(0, 14, 5)]
    assert np.array_equal(np.concatenate([ids for ids, _ in parts]), whole[0])
    drawn = draw_others(POOL, "a", 1, "x", 4, "test")
    assert drawn == draw_others(POOL, "a", 1, "x", 4, "test")
    assert drawn != draw_others(POOL, "a", 2, "x", 4, "test")
    assert drawn[:3] == draw_others(POOL, "a", 1, "x", 3, "test")


def test_the_pool_is_a_sample_by_hash_whatever_the_order(monkeypatch):
    assert len(POOL) == len({reply for (turns,) in CONVERSATIONS for reply in turns[1:]})
    monkeypatch.setattr(next_utterance, "POOL", 7)
    some = TASK.collect(CONVERSATIONS + CONVERSATIONS[:3], "train")
    assert some == TASK.collect(CONVERSATIONS[::-1], "test") == POOL[:7]
    shared = [(["a", "same"],), (["b", "same"],)]
    pools = [TASK.collect(CONVERSATIONS[:6] + some, "train") for some in (shared, shared[::-1])]
    assert pools[0] == pools[1]
    monkeypatch.setattr(next_utterance, "POOL", 1000)
    assert [min(map(identity, shared)), "same"] in TASK.collect(CONVERSATIONS[:6] + shared, "train")


def test_candidates_that_the_data_brings_are_taken(tokenizer):
    task = NextUtterance(TASK.settings, given=True)
    assert task.collects is False
    data = {"text_column": "history", "persona_column": "personality", "candidates_column": "candidates"}
    assert task.columns(data) == ("history", "personality", "candidates")
    row = (["hello", "why"], ["i am well"], ["no", "maybe", "well", "indeed", "because"])
    ids, lengths = encoded(tokenizer, "test", [row], None, task)
    start = lengths[0, CANDIDATES]
    texts = [
        tokenizer.decode(s[start : n - 1]) for s, n in zip(ids.reshape(CANDIDATES, WIDTH), lengths[0], strict=False)
    ]
    assert texts == ["because", "no", "maybe", "well", "indeed"]
    told = [token for turn in ("i am well", "hello", "why") for token in tokens_of(tokenizer, turn)]
    assert ids[0, :start].tolist() == told
    assert encoded(tokenizer, "train", [row], None, task)[0].shape == (1, TRAIN * WIDTH)
    with pytest.raises(ConfigError, match=r"has 2 candidates, fewer than task\.candidates \(5\); lower it"):
        encoded(tokenizer, "test", [(["a"], ["b"], ["c", "d"])], None, task)
    with pytest.raises(ConfigError, match=r"the last candidate of a row, the true reply, is empty"):
        encoded(tokenizer, "test", [(["a"], ["b"], ["c", "d", "e", "f", "g", "  "])], None, task)


def test_examples_of_one_conversation_are_held_out_together(tmp_path):
    others = ["no", "yes", "maybe", "why"]
    rows = [
        {"h": [f"{talk} {turn}" for turn in range(turns)], "p": [f"i am {talk}"], "c": [*others, f"{talk} {turns}"]}
        for talk in range(60)
        for turns in (1, 3, 5)
    ]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"source": str(path), "text_column": "h", "persona_column": "p", "candidates_column": "c", "holdout": 0.2}
    config = Config.model_validate(
        {
            "name": "talks",
            "model": {"source": {"architecture": "gpt2", "n_layer": 1}, "tokenizer": {"train_bpe": 300}},
            "task": {"name": "next_utterance", "block_length": WIDTH, "candidates": 5, "train_candidates": 2},
            "data": fields,
            "finetune": {"steps": 1},
            "distill": {"steps": 1},
            "resources": {"storage_uri": str(tmp_path / "store"), "workers": 0},
        }
    )
    step = plan_run(config, "tokenize").steps[0]
    splits = {}
    for part in split_parts(step.recipe, step.locations):
        for history, persona, _ in documents_of(part, step.recipe):
            splits.setdefault(persona[0], []).append((part.split, len(history)))
    assert all(len({split for split, _ in found}) == 1 for found in splits.values())
    assert all(sorted(turns for _, turns in found) == [1, 3, 5] for found in splits.values())
    assert len(splits) == 60
    assert {found[0][0] for found in splits.values()} == {"train", "validation", "test"}


def test_a_reply_without_a_context_follows_end_of_text(tokenizer):
    task = NextUtterance(TASK.settings, given=True)
    ids, lengths = encoded(tokenizer, "train", [([], [], ["no", "yes"][:TRAIN] + ["maybe"] * (TRAIN - 2))], None, task)
    batch = task.batch(torch.tensor(ids), torch.tensor(lengths))
    counted = task.counts(lengths)
    assert int(batch.distilled.sum()) == counted["distillation_nats"]
    assert int(batch.references().supervised.sum()) == counted["next_token_nats"]
    assert (ids.reshape(-1, WIDTH)[:, 0] == tokenizer.eos_token_id).all()


def test_too_few_replies_are_refused_by_the_knob(tokenizer):
    with pytest.raises(
        ConfigError, match=r"test split has 1 different replies, too few for 4 .*Lower task\.candidates"
    ):
        encoded(tokenizer, documents=CONVERSATIONS, pool=[["other", "only"]])
    with pytest.raises(ConfigError, match=r"Lower task\.train_candidates"):
        encoded(tokenizer, "train", pool=[])
    for conversations in ([], CONVERSATIONS[:1], [(["a", "b", "c", "d", "e", "f"],), (["a", "g", "h"],)]):
        with pytest.raises(ConfigError, match=r"too few for 4 of other conversations\. Lower task\.candidates"):
            TASK.collect(conversations, "test")
    assert "no conversation of two turns" in TASK.shortage("train", 0, 0)
    assert len(encoded(tokenizer, documents=[(["alone"],)])[0]) == 0


def test_turns_are_a_list_or_lines():
    assert turns_of(["a", " ", "b"]) == turns_of("a\n\nb\n") == ["a", "b"]


def test_only_replies_are_predicted(tokenizer):
    batch = batch_of(tokenizer)
    lengths = torch.from_numpy(encoded(tokenizer)[1]).long()
    counts = TASK.counts(lengths.numpy())
    assert batch.group == CANDIDATES
    for i, (length, start) in enumerate(zip(batch.lengths, lengths[:, CANDIDATES:].reshape(-1), strict=True)):
        assert torch.equal(batch.distilled[i].nonzero().flatten(), torch.arange(start - 1, length - 1))
        assert torch.equal(batch.targets[i][batch.supervised[i]], batch.ids[i, start:length])
    assert counts == {
        "next_token_nats": int(batch.references().supervised.sum()),
        "candidates_nats": len(EXAMPLES),
        "distillation_nats": int(batch.distilled.sum()),
        "contrastive_nats": int(batch.lengths.sum()),
    }


def gpt2(tokenizer, seed):
    torch.manual_seed(seed)
    config = GPT2Config(n_layer=2, n_embd=24, n_head=2, vocab_size=len(tokenizer), n_positions=WIDTH)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def scored(model, tokenizer):
    """Candidates one by one without padding, in fp64: mean log-probabilities, and the true reply's nats."""
    ids, lengths = encoded(tokenizer)
    model, rows, nats = copy.deepcopy(model).double(), [], []
    for row, sizes in zip(ids.reshape(len(ids), CANDIDATES, WIDTH), lengths, strict=True):
        scores = []
        for place, sequence in enumerate(row):
            length, start = sizes[place], sizes[CANDIDATES + place]
            tokens = torch.from_numpy(sequence[:length]).long()
            with torch.no_grad():
                log = model(tokens.unsqueeze(0)).logits[0].log_softmax(-1)
            found = [float(log[i - 1, tokens[i]]) for i in range(start, length)]
            scores.append(np.mean(found))
            nats += [-x for x in found] if place == 0 else []
        rows.append(scores)
    return np.array(rows), nats


def test_metrics_follow_their_definitions(tokenizer):
    model, teacher = gpt2(tokenizer, 0), gpt2(tokenizer, 1)
    ids, lengths = (torch.from_numpy(x).long() for x in encoded(tokenizer))
    (ours, nats), (theirs, _) = scored(model, tokenizer), scored(teacher, tokenizer)
    for size in (4, 17):
        rows = zip(ids.split(size), lengths.split(size), strict=True)
        found, reference = (one.metrics() for one in TASK.score(rows, model, teacher, tokenizer, Evaluate()))
        assert found["accuracy"] == pytest.approx((ours.argmax(1) == 0).mean())
        assert reference["accuracy"] == pytest.approx((theirs.argmax(1) == 0).mean())
        assert found["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
        assert found["kl_nats"] > 0
        assert "kl_nats" not in reference


def test_a_tie_is_a_miss():
    assert chosen(torch.tensor([[1.0, 0.5], [1.0, 1.0], [0.0, 2.0]])) == [1, 0, 0]
