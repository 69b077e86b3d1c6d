import copy
import math
import tracemalloc
from collections import Counter
from itertools import starmap

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pipeline.distill.losses import valid_tokens
from pipeline.tasks import language_modeling, scoring
from pipeline.tasks.language_modeling import LanguageModeling, encode, score
from pipeline.tasks.scoring import score_tokens
from pipeline.tasks.tokenizers import train_bpe

VOCABULARY, LENGTH = 37, 9
TEXTS = ["the cat sat", "größe 🙂 on\nthe mat", "x", "the dog and the cat " * 5, "日本語"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS * 3, 290)


def gpt2(seed):
    torch.manual_seed(seed)
    config = GPT2Config(n_layer=2, n_embd=24, n_head=2, vocab_size=VOCABULARY, n_positions=16, bos_token_id=0)
    config.eos_token_id = 0
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def model():
    return gpt2(0)


@pytest.fixture(scope="module")
def teacher():
    return gpt2(1)


@pytest.fixture(scope="module")
def rows():
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (12, LENGTH), generator=draw)
    lengths = torch.randint(1, LENGTH + 1, (12,), generator=draw)
    lengths[0], lengths[1] = 1, LENGTH
    return ids, lengths


BYTES_OF = torch.arange(VOCABULARY) % 5


def log_softmax64(model, ids):
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(ids).logits.numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def reference(model, teacher, ids, lengths):
    """The metrics by their definitions, one token after another, in fp64."""
    ours, theirs = log_softmax64(model, ids), log_softmax64(teacher, ids)
    nats, kl, agreed, size = [], [], [], 0
    for row, length in enumerate(lengths.tolist()):
        for i in range(length):
            p, q = theirs[row, i], ours[row, i]
            kl.append(float((np.exp(p) * (p - q)).sum()))
            agreed.append(p.argmax() == q.argmax())
            if i > 0:
                nats.append(-ours[row, i - 1, ids[row, i]])
                size += int(ids[row, i]) % 5
    return {
        "perplexity": math.exp(np.mean(nats)),
        "nats_per_token": np.mean(nats),
        "bits_per_byte": sum(nats) / math.log(2) / size,
        "kl_nats": np.mean(kl),
        "top1_agreement": np.mean(agreed),
    }


def test_metrics_follow_their_definitions(model, teacher, rows):
    scores, teacher_scores = score([rows], model, BYTES_OF, teacher)
    assert scores.metrics() == pytest.approx(reference(model, teacher, *rows), rel=1e-5)
    expected = reference(teacher, teacher, *rows)
    del expected["kl_nats"], expected["top1_agreement"]
    assert teacher_scores.metrics() == pytest.approx(expected, rel=1e-5)
    assert 0 < scores.metrics()["top1_agreement"] < 1


def test_a_model_is_no_distance_from_itself(model, rows):
    scores, _ = score([rows], model, BYTES_OF, model)
    assert scores.metrics()["kl_nats"] == 0
    assert scores.metrics()["top1_agreement"] == 1


def test_without_a_teacher_nothing_is_compared(model, rows):
    scores, teacher_scores = score([rows], model, BYTES_OF)
    assert teacher_scores is None
    assert set(scores.metrics()) == {"perplexity", "nats_per_token", "bits_per_byte"}


def test_text_of_no_bytes_has_no_bits_per_byte(model, rows):
    scores, _ = score([rows], model, torch.zeros(VOCABULARY, dtype=torch.int64))
    assert "bits_per_byte" not in scores.metrics()


@pytest.mark.parametrize("batch", [1, 5, 7])
def test_the_batch_size_does_not_show(model, teacher, rows, batch):
    ids, lengths = rows
    whole = [found.metrics() for found in score([rows], model, BYTES_OF, teacher)]
    batches = zip(ids.split(batch), lengths.split(batch), strict=True)
    for found, expected in zip(score(batches, model, BYTES_OF, teacher), whole, strict=True):
        assert found.metrics() == pytest.approx(expected, rel=1e-6)


def test_padding_never_counts(model, teacher, rows):
    ids, lengths = rows
    padding = torch.arange(LENGTH) >= lengths.unsqueeze(1)
    assert padding.any()
    before, _ = score([rows], model, BYTES_OF, teacher)
    other = torch.where(padding, (ids + 11) % VOCABULARY, ids)
    wider = torch.cat([other, torch.full((len(ids), 4), 3)], 1)
    for changed in (other, wider):
        after, _ = score([(changed, lengths)], model, BYTES_OF, teacher)
        assert after.metrics() == pytest.approx(before.metrics(), rel=1e-6)
        assert (after.tokens, after.bytes, after.compared) == (before.tokens, before.bytes, before.compared)
    assert sum(before.tokens) == int((lengths - 1).sum())
    assert before.compared == int(lengths.sum())


@pytest.mark.parametrize("batch", [1, 5, 12])
@pytest.mark.parametrize("unit", ["document", "line"])
def test_nats_are_summed_by_document(model, teacher, tokenizer, rows, unit, batch):
    ids, lengths = rows
    end = int(ids[3, int(lengths[3]) - 1])  # so that one document ends with a row, and others within one
    expected, number = {0: [0, 0.0, 0.0]}, 0
    ours, theirs = log_softmax64(model, ids), log_softmax64(teacher, ids)
    for row, length in enumerate(lengths.tolist()):
        for i, token in enumerate(ids[row, :length].tolist()):
            document = expected.setdefault(number, [0, 0.0, 0.0])
            if i > 0:
                document[0] += 1
                document[1] -= ours[row, i - 1, token]
                document[2] -= theirs[row, i - 1, token]
            number += token == end if unit == "document" else i == length - 1
    bare = copy.copy(tokenizer)
    bare.eos_token = bare.convert_ids_to_tokens(end)
    end_of_text = LanguageModeling(unit=unit).document_end(bare)
    batches = starmap(LanguageModeling().batch, zip(ids.split(batch), lengths.split(batch), strict=True))
    found, reference = score_tokens(batches, model, BYTES_OF, teacher, end_of_text)
    assert found.tokens == reference.tokens == [document[0] for document in expected.values()]
    assert found.nats == pytest.approx([document[1] for document in expected.values()], rel=1e-5)
    assert reference.nats == pytest.approx([document[2] for document in expected.values()], rel=1e-5)
    assert len(found.nats) == (12 if unit == "line" else int(((ids == end) & valid_tokens(lengths, LENGTH)).sum()) + 1)
    assert found.goes_on == (unit == "document")


def test_a_tokenizer_without_end_of_text_makes_each_row_a_document(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    assert LanguageModeling().document_end(bare) is None
    assert LanguageModeling().document_end(tokenizer) == tokenizer.eos_token_id


def test_a_diverged_model_has_a_perplexity_all_the_same(model, rows):
    hopeless = copy.deepcopy(model)
    with torch.no_grad():
        hopeless.transformer.ln_f.weight.mul_(1e6)
    perplexity = score([rows], hopeless, BYTES_OF)[0].metrics()["perplexity"]
    assert 1e300 < perplexity < math.inf


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("batch", [1, 2, 512])
def test_documents_are_cut_into_rows_with_end_of_text_between(monkeypatch, tokenizer, block, batch):
    monkeypatch.setattr(language_modeling, "ENCODE_CHARACTERS", batch)
    rows, lengths, text_bytes = encode(iter(TEXTS), tokenizer, block, "document")
    stream = [i for text in TEXTS for i in [*ids_of(tokenizer, text), tokenizer.eos_token_id]]
    assert rows.shape == (-(-len(stream) // block), block)
    assert (rows.dtype, lengths.dtype) == (np.int32, np.int32)
    assert (lengths[:-1] == block).all()
    assert rows.reshape(-1)[: lengths.sum()].tolist() == stream
    assert not rows.reshape(-1)[lengths.sum() :].any()
    assert text_bytes == sum(len(text.encode()) for text in TEXTS)


def test_lines_are_one_running_text(tokenizer):
    lines = ["the cat\n", "sat on\n", "\n", "the mat\n"]
    rows, lengths, text_bytes = encode(iter(lines), tokenizer, 4, "line")
    assert rows.reshape(-1)[: lengths.sum()].tolist() == ids_of(tokenizer, "".join(lines))
    assert tokenizer.eos_token_id not in rows.reshape(-1)[: lengths.sum()]
    assert text_bytes == len("".join(lines))


@pytest.mark.parametrize("unit", ["document", "line"])
def test_no_text_gives_no_rows(tokenizer, unit):
    rows, lengths, text_bytes = encode([], tokenizer, 4, unit)
    assert (rows.shape, lengths.shape, text_bytes) == ((0, 4), (0,), 0)


def test_a_tokenizer_without_end_of_text_puts_none(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    rows, lengths, _ = encode(TEXTS, bare, 8, "document")
    stream = [i for text in TEXTS for i in ids_of(tokenizer, text)]
    assert rows.reshape(-1)[: lengths.sum()].tolist() == stream


def test_a_token_takes_few_bytes_until_it_is_stored(monkeypatch):
    numbers = Tokenizer(models.WordLevel({str(number): number for number in range(50_001)}))
    numbers.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=numbers, eos_token="50000")
    monkeypatch.setattr(language_modeling, "ENCODE_CHARACTERS", 5000)
    words = " ".join(str(10_000 + i) for i in range(99))
    tracemalloc.start()
    ids, lengths, _ = encode((words for _ in range(2000)), tokenizer, 64, "document")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (lengths.sum(), ids[0, 1], ids[-1, lengths[-1] - 1]) == (200_000, 10_001, 50_000)
    assert peak / ids.size < 10


class Distributions(TorchDispatchMode):
    """Counts the values of distributions that are made, and those of the largest."""

    def __init__(self):
        super().__init__()
        self.made, self.largest = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name in ("_log_softmax", "_softmax") and returned.shape[-1] == VOCABULARY:
            self.made[name] += returned.numel()
            self.largest = max(self.largest, returned.numel())
        return returned


def test_each_distribution_is_made_once_and_of_few_tokens_at_a_time(monkeypatch, model, teacher, rows):
    monkeypatch.setattr(scoring, "CACHED_VALUES", 3 * VOCABULARY)
    ids, lengths = rows
    with Distributions() as distributions:
        score([(ids, lengths)], model, BYTES_OF, teacher)
    assert distributions.made == {"_log_softmax": 2 * ids.numel() * VOCABULARY, "_softmax": ids.numel() * VOCABULARY}
    assert distributions.largest == 3 * VOCABULARY


@pytest.mark.parametrize("unit", ["document", "line"])
@pytest.mark.parametrize("limit", [7, 40])
def test_a_very_long_text_is_encoded_in_pieces_that_lose_nothing(tokenizer, monkeypatch, unit, limit):
    texts = ["the cat sat on\nthe mat and the dog " * 4, "größe", "x" * 100 + " 日本語\n" * 9]
    whole = encode(texts, tokenizer, 1000, unit)
    monkeypatch.setattr(language_modeling, "LONG_CHARACTERS", limit)
    longest = []
    encoded = language_modeling.encoded
    monkeypatch.setattr(
        language_modeling, "encoded", lambda words, given: longest.append(max(map(len, given))) or encoded(words, given)
    )
    ids, lengths, text_bytes = encode(texts, tokenizer, 1000, unit)
    assert max(longest) <= limit
    assert text_bytes == whole[2]
    assert tokenizer.decode(ids[0, : lengths[0]]) == tokenizer.decode(whole[0][0, : whole[1][0]])
    assert Counter(ids[0])[tokenizer.eos_token_id] == Counter(whole[0][0])[tokenizer.eos_token_id]
