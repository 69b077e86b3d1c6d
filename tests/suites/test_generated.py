"""What the suite on generated text measures: against texts and distances that are made one token at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from pipeline.config.data import TaskSettings
from pipeline.metrics import METRICS
from pipeline.models.build import build, read_config
from pipeline.suites import generated
from pipeline.suites.generated import TOKENS, commonness, count_tokens, measure, prompts, written
from pipeline.tasks.chat import Chat
from pipeline.tasks.language_modeling import LanguageModeling
from tests.family_models import ENCODER_DECODERS
from tests.tasks import test_chat, test_summarization

WIDTH = 24


def gpt2(seed, words=50, end=None):
    torch.manual_seed(seed)
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=words, n_positions=96, eos_token_id=end)
    config.bos_token_id = end
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


def running_text():
    ids = torch.randint(0, 50, (5, WIDTH), generator=torch.Generator().manual_seed(3))
    return LanguageModeling(TaskSettings(block_length=WIDTH)), ids, torch.tensor([WIDTH, WIDTH, 7, 1, 12])


@torch.no_grad()
def by_hand(model, text, tokens):
    """Greedy continuation of one prompt, no cache, no padding."""
    ids = text.ids.tolist()
    for _ in range(tokens):
        given = {"input_ids": torch.tensor([ids])}
        if text.source is not None:
            given = {"input_ids": text.source[None], "decoder_input_ids": torch.tensor([ids])}
        ids.append(int(model(**given).logits[0, -1].argmax()))
        if ids[-1] == model.config.eos_token_id:
            break
    return ids


def test_half_of_running_text_is_a_prompt_and_all_before_what_is_learned_of_a_conversation():
    task, ids, lengths = running_text()
    begun = prompts(task, task.batch(ids, lengths))
    assert [text.ids.tolist() for text in begun] == [
        ids[row, : max(1, length // 2)].tolist() for row, length in enumerate(lengths.tolist())
    ]
    task = Chat(TaskSettings(name="chat", block_length=96), packed=True)
    ids, lengths, _ = test_chat.encoded(task, [test_chat.TALK[1:3], test_chat.TALK[1:3]])
    (text,) = prompts(task, task.batch(ids, lengths))
    said = test_chat.words(test_chat.CHATML).decode(text.ids)
    assert said == "<|im_start|>user\nHello, größe?<|im_end|>\n<|im_start|>assistant\n"
    narrow = Chat(TaskSettings(name="chat", block_length=40))
    ids, lengths, _ = test_chat.encoded(narrow, [test_chat.TALK[1:3]])
    (cut,) = prompts(narrow, narrow.batch(ids, lengths))
    assert cut.ids.tolist() == text.ids.tolist()[-20:], "the end, where there is no room for all of it"


def test_what_a_decoder_writes_and_how_far_the_student_is_from_it():
    task, ids, lengths = running_text()
    batch = task.batch(ids, lengths)
    teacher, student = gpt2(0, end=7), gpt2(1)
    texts = written(teacher, prompts(task, batch))
    assert [text.ids.tolist() for text in texts] == [by_hand(teacher, text, TOKENS) for text in prompts(task, batch)]
    counts = np.bincount(ids.flatten(), minlength=50)
    told = measure(student, teacher, task, batch, counts)
    kl, same, first = [], [], []
    with torch.no_grad():
        for text in texts:
            p, q = (model(text.ids[None]).logits[0].double().log_softmax(-1) for model in (teacher, student))
            for place in range(text.start, len(text.ids)):
                kl.append(float((p[place - 1].exp() * (p[place - 1] - q[place - 1])).sum()))
                same.append(bool(p[place - 1].argmax() == q[place - 1].argmax()))
                first += [same[-1]] if place == text.start else []
    assert told["student"]["generated_kl_nats"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert told["student"]["generated_flips"] == pytest.approx(1 - np.mean(same))
    assert told["student"]["generated_first_agreement"] == pytest.approx(np.mean(first))
    assert told["student"].keys() == {name for name, metric in METRICS.items() if metric.suite == "generated"}
    assert (told["split"], told["prompts"], told["tokens"]) == ("validation", 5, len(kl))
    for table in told["tables"].values():
        assert sum(line["tokens"] for line in table) == len(kl)
        weighed = sum(line["tokens"] * line["kl_nats"] for line in table) / len(kl)
        assert weighed == pytest.approx(told["student"]["generated_kl_nats"])
    assert told["tables"]["position"][0]["band"] == "1"
    assert told["tables"]["position"][0]["flips"] == pytest.approx(1 - np.mean(first))


def test_a_teachers_own_settings_of_generation_say_where_it_ends_and_nothing_else():
    task, ids, lengths = running_text()
    teacher = gpt2(0)
    begun = prompts(task, task.batch(ids, lengths))
    free = [by_hand(teacher, text, TOKENS) for text in begun]
    end = free[0][-TOKENS + 2]
    settings = GenerationConfig(eos_token_id=[end], repetition_penalty=5.0, num_beams=3)
    teacher.generation_config = settings
    expected = [
        row[: row.index(end, text.start) + 1] if end in row[text.start :] else row
        for row, text in zip(free, begun, strict=True)
    ]
    assert [text.ids.tolist() for text in written(teacher, begun)] == expected
    assert expected != free
    assert teacher.generation_config is settings


def test_t5_writes_with_more_layers_in_its_decoder_than_in_its_encoder():
    special = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": None}
    config = read_config({"architecture": "t5", **ENCODER_DECODERS["t5"], **special}, vocab_size=40)
    teacher = build(config, seed=0).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    teacher.generation_config.update(repetition_penalty=5.0, num_beams=3)
    begun = [generated.Written(torch.tensor([0]), 1, torch.arange(4, end)) for end in (9, 13, 11)]
    texts = written(teacher, begun, at_once=2)
    assert [text.ids.tolist() for text in texts] == [by_hand(teacher, text, TOKENS) for text in begun]


def test_rows_of_a_pass_change_nothing_and_are_as_few_as_are_asked_for(monkeypatch):
    task, ids, lengths = running_text()
    batch, rows = task.batch(ids, lengths), []
    teacher, student = gpt2(0), gpt2(1)
    whole = measure(student, teacher, task, batch, np.ones(50, np.int64))
    for model in (teacher, student):
        model.transformer.register_forward_hook(lambda _, __, out: rows.append(len(out.last_hidden_state)))
    product, positions = generated.head_product, []
    spied = lambda head, states: positions.append(states.shape[:2].numel()) or product(head, states)  # noqa: E731
    monkeypatch.setattr(generated, "head_product", spied)
    told = measure(student, teacher, task, batch, np.ones(50, np.int64), 2)
    assert sum(positions) == 2 * told["tokens"], "logits are made where something was written, and nowhere else"
    assert max(rows) == 2
    assert told["student"] == pytest.approx(whole["student"], abs=1e-5)


def test_the_prompt_of_a_packed_row_is_of_its_first_conversation():
    task = Chat(TaskSettings(name="chat", block_length=160, loss_on="all"), packed=True)
    ids, lengths, _ = test_chat.encoded(task, [test_chat.TALK[1:3]] * 3)
    batch = task.batch(ids, lengths)
    first = batch.first_document(0)
    assert 0 < 2 * first <= int(lengths[0, 0])
    (text, *_) = prompts(task, batch)
    assert text.ids.tolist() == ids[0, : first // 2].tolist()


def test_a_student_that_is_its_teacher_is_nowhere_else():
    task, ids, lengths = running_text()
    told = measure(gpt2(0), gpt2(0), task, task.batch(ids, lengths), np.ones(50, np.int64))
    values = told["student"]["generated_first_agreement"], told["student"]["generated_flips"]
    assert values == (1.0, 0.0)
    assert told["student"]["generated_kl_nats"] == pytest.approx(0, abs=1e-6)


def test_an_encoder_reads_the_prompt(monkeypatch):
    monkeypatch.setattr(generated, "TOKENS", 6)
    tokenizer = test_summarization.train_bpe(
        [text for pair in test_summarization.DOCUMENTS for text in pair],
        300,
        (test_summarization.END_OF_TEXT, test_summarization.PADDING),
    )
    task, batch = test_summarization.TASK, test_summarization.batch_of(tokenizer)
    teacher, student = test_summarization.bart(tokenizer, 0), test_summarization.bart(tokenizer, 1)
    begun = prompts(task, batch)
    assert [text.ids.tolist() for text in written(teacher, begun)] == [by_hand(teacher, text, 6) for text in begun]
    told = measure(student, teacher, task, batch, np.ones(len(tokenizer), np.int64))
    assert told["student"]["generated_kl_nats"] > 0
    assert measure(teacher, teacher, task, batch, np.ones(len(tokenizer), np.int64))["student"]["generated_flips"] == 0


def test_tokens_are_as_common_as_the_share_of_the_text_that_more_common_ones_make_up():
    counts = count_tokens([np.array([0] * 5 + [1] * 3, np.int32), np.array([2, 3], np.int32)], 6)
    assert counts.tolist() == [5, 3, 1, 1, 0, 0]
    assert commonness(counts).tolist() == [0, 1, 2, 3, 4, 4]  # 0, 0.5, 0.8, 0.9 of the text before them
