import copy
import math
import random

import numpy as np
import pytest
import torch
from transformers.models.bart.modeling_bart import shift_tokens_right

from pipeline.config.data import Evaluate, TaskSettings
from pipeline.errors import ConfigError
from pipeline.models.build import build, read_config
from pipeline.tasks import task_of
from pipeline.tasks.summarization import Summarization, ended, rouge, summaries
from pipeline.tasks.tokenizers import END_OF_TEXT, PADDING, read_tokenizer, train_bpe
from tests.conftest import ARCHITECTURES

WORDS = ["alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa", "zeta"]
DRAW = random.Random(3)
DOCUMENTS = [
    (" ".join(DRAW.choices(WORDS, k=DRAW.randint(3, 40))), " ".join(DRAW.choices(WORDS, k=DRAW.randint(1, 20))))
    for _ in range(9)
]
SOURCE, TARGET = 24, 10
TASK = Summarization(TaskSettings(name="summarization", source_length=SOURCE, target_length=TARGET))


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([text for pair in DOCUMENTS for text in pair], 300, (END_OF_TEXT, PADDING))


def encoded(tokenizer, documents=DOCUMENTS):
    ids, lengths, _ = TASK.encode(iter(documents), tokenizer, "train", None, "document")
    return ids, lengths


def batch_of(tokenizer, documents=DOCUMENTS):
    ids, lengths = encoded(tokenizer, documents)
    return TASK.batch(torch.from_numpy(ids).long(), torch.from_numpy(lengths).long())


def bart(tokenizer, seed):
    settings = TASK.model_settings(tokenizer.eos_token_id, tokenizer.pad_token_id)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, **settings}
    model = build(read_config(ARCHITECTURES["bart"], vocab_size=len(tokenizer), **special), seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
    return model


@pytest.fixture(scope="module")
def models(tokenizer):
    return bart(tokenizer, 0), bart(tokenizer, 1)


def test_a_row_is_a_source_and_a_target_each_ended_and_padded(tokenizer):
    ids, lengths = encoded(tokenizer)
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert ids.shape == (len(DOCUMENTS), SOURCE + TARGET)
    for row, (source_length, target_length), (source, summary) in zip(ids, lengths, DOCUMENTS, strict=True):
        source_ids = tokenizer(source)["input_ids"][: SOURCE - 1]
        assert row[:SOURCE].tolist() == [*source_ids, end, *[padding] * (SOURCE - 1 - len(source_ids))]
        summary_ids = tokenizer(summary)["input_ids"][: TARGET - 2]
        assert row[SOURCE:].tolist() == [end, *summary_ids, end, *[padding] * (TARGET - 2 - len(summary_ids))]
        assert (source_length, target_length) == (len(source_ids) + 1, len(summary_ids) + 2)
    assert lengths.max(0).tolist() == [SOURCE, TARGET]  # some of each are cut
    assert lengths.min() < TARGET


def test_shifts_are_those_of_the_reference_library(tokenizer):
    batch = batch_of(tokenizer)
    padding = tokenizer.pad_token_id
    labels = batch.targets.where(batch.supervised, padding)
    shifted = shift_tokens_right(labels, padding, tokenizer.eos_token_id)
    assert torch.equal(shifted[batch.distilled], batch.ids[batch.distilled])
    assert torch.equal(batch.supervised, batch.distilled)
    assert (labels == tokenizer.eos_token_id).sum(1).tolist() == [1] * len(DOCUMENTS)
    assert torch.equal(batch.source_mask.bool(), batch.source_ids != padding)


def test_counts_are_those_of_the_batch(tokenizer):
    batch = batch_of(tokenizer)
    counts = TASK.counts(encoded(tokenizer)[1])
    assert set(counts.values()) == {int(batch.supervised.sum())} == {int(batch.lengths.sum())}


def test_what_the_decoder_reads_first_can_be_another_token(tokenizer):
    recipe = {"task": {"name": "summarization", "source_length": SOURCE, "target_length": TARGET}, "decoder_start": 7}
    ids, _, _ = task_of(recipe).encode(iter(DOCUMENTS), tokenizer, "train", None, "document")
    assert (ids[:, SOURCE] == 7).all()
    assert (encoded(tokenizer)[0][:, SOURCE] == tokenizer.eos_token_id).all()


def test_special_tokens_of_the_tokenizer_are_kept_and_the_end_stands_once():
    assert ended([0, 5, 6, 2], 2, 9) == [0, 5, 6, 2]
    assert ended([0, 5, 6, 7, 2], 2, 4) == [0, 5, 6, 2]
    assert ended([], 2, 4) == [2]


def test_documents_without_text_or_summary_are_left_out(tokenizer):
    ids, _ = encoded(tokenizer, [("", "x"), ("text", " "), (["two", "parts"], "sum")])
    assert len(ids) == 1
    assert tokenizer.decode(ids[0, :SOURCE], skip_special_tokens=True) == "two parts"
    assert len(encoded(tokenizer, [])[0]) == 0
    assert "holds no document with a summary" in TASK.shortage("test", 0, 0)


def test_a_tokenizer_without_padding_is_refused(tokenizer, tmp_path):
    train_bpe(["text"], 300).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"needs an end-of-text and a padding token.*pad_token None"):
        TASK.check_tokenizer(read_tokenizer(tmp_path))
    TASK.check_tokenizer(tokenizer)


def log_softmax64(model, batch, row):
    """One sequence alone, without any padding, in fp64."""
    source, length = batch.source_mask[row].bool(), int(batch.lengths[row])
    with torch.no_grad():
        logits = (
            copy.deepcopy(model)
            .double()(
                batch.source_ids[row][source].unsqueeze(0), decoder_input_ids=batch.ids[row, :length].unsqueeze(0)
            )
            .logits[0]
        )
    logits = logits.numpy()
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def test_metrics_follow_their_definitions(tokenizer, models):
    model, teacher = models
    batch = batch_of(tokenizer)
    ids, lengths = (torch.from_numpy(x).long() for x in encoded(tokenizer))
    nats, kl, agreed = [], [], []
    for row in range(len(ids)):
        ours, theirs = log_softmax64(model, batch, row), log_softmax64(teacher, batch, row)
        for i in range(int(batch.lengths[row])):
            nats.append(-ours[i, batch.targets[row, i]])
            kl.append(float((np.exp(theirs[i]) * (theirs[i] - ours[i])).sum()))
            agreed.append(ours[i].argmax() == theirs[i].argmax())
    for size in (9, 2):
        rows = zip(ids.split(size), lengths.split(size), strict=True)
        scores = TASK.score(rows, model, teacher, tokenizer, Evaluate(beams=2), {1, 2, 7})
        assert {len(values) for model in scores for values in model.of_rows.values()} == {3}
        found, reference = (one.metrics() for one in scores)
        assert found["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
        assert found["kl_nats"] == pytest.approx(np.mean(kl), rel=1e-3)
        assert found["top1_agreement"] == pytest.approx(np.mean(agreed))
        assert {"rouge1", "rouge2", "rougeL"} < set(found)
        assert "kl_nats" not in reference


@pytest.mark.parametrize("size", [9, 4, 1])
def test_summaries_are_written_of_the_rows_that_are_named(tokenizer, models, size):
    ids, lengths = (torch.from_numpy(x).long() for x in encoded(tokenizer))
    batches = [TASK.batch(*pair) for pair in zip(ids.split(size), lengths.split(size), strict=True)]
    _, all_expected = TASK._write(batches, models[0], tokenizer, 1, None)
    assert all(text.startswith(cut) for cut, (_, text) in zip(all_expected, DOCUMENTS, strict=True))
    assert len(set(all_expected)) == len(DOCUMENTS)
    written, expected = TASK._write(batches, models[0], tokenizer, 1, {-1, 1, 4, 8, 12})
    assert expected == [all_expected[row] for row in (1, 4, 8)]
    assert len(written) == 3
    assert TASK._write(batches, models[0], tokenizer, 1, set()) == ([], [])


def test_beam_search_does_not_depend_on_the_batch_and_leaves_the_model_as_it_was(tokenizer, models):
    batch, model = batch_of(tokenizer), models[0]
    own = model.generation_config
    whole = summaries(model, batch.source_ids, batch.source_mask, TARGET, 3)
    assert model.generation_config is own
    assert whole.shape[1] <= TARGET
    for row in range(len(whole)):
        alone = summaries(model, batch.source_ids[row : row + 1], batch.source_mask[row : row + 1], TARGET, 3)[0]
        assert tokenizer.decode(alone) == tokenizer.decode(whole[row, : len(alone)])
        assert (whole[row, len(alone) :] == tokenizer.pad_token_id).all()


def f_measure(hits, written, expected):
    return 0.0 if not hits else 100 * 2 * hits / (written + expected)


def reference_rouge(written, expected, n):
    grams = [[tuple(text.split()[i : i + n]) for i in range(len(text.split()) - n + 1)] for text in (written, expected)]
    hits = sum(min(grams[0].count(gram), grams[1].count(gram)) for gram in set(grams[0]))
    return f_measure(hits, *map(len, grams))


def longest_common(a, b):
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest_common(a[1:], b[1:])
    return max(longest_common(a[1:], b), longest_common(a, b[1:]))


def test_rouge_follows_its_definition():
    pairs = [("alpha beta beta omega", "beta alpha beta"), ("zeta", "zeta"), ("kappa", "sigma zeta"), ("", "zeta")]
    found = rouge(*zip(*pairs, strict=True))
    for name, n in (("rouge1", 1), ("rouge2", 2)):
        assert found[name] == pytest.approx([reference_rouge(*pair, n) for pair in pairs], rel=1e-5)
    common = [(longest_common(a.split(), b.split()), len(a.split()), len(b.split())) for a, b in pairs]
    assert found["rougeL"] == pytest.approx([f_measure(*c) for c in common], rel=1e-5)
    assert rouge(["Cats running!"], ["the cat runs"])["rouge1"] == [pytest.approx(80)]  # stemmed, without punctuation
    assert rouge([], []) == {}
