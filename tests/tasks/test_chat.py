"""Conversations as templates write them, and which tokens are learned: against references that are made by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.config.data import TaskSettings
from pipeline.config.run import Config
from pipeline.errors import ConfigError
from pipeline.models.attention import use_causal_attention
from pipeline.models.hidden_states import WithStates
from pipeline.stages.kept import KeptStates
from pipeline.tasks.chat import Chat, asked, messages_of, rendered
from pipeline.tasks.losses import DISTILLATION, NEXT_TOKEN, distilling_losses, teaching_losses
from pipeline.tasks.samples import LONGEST, _prompt
from pipeline.tasks.scoring import score_tokens
from pipeline.tasks.tokenizers import token_bytes, train_bpe

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{%- generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = "{% if tools %}{{ '<tools>' + (tools | tojson) + '</tools>\n' }}{% endif %}" + CHATML
CHANGING = "{{ messages | length }}" + CHATML
REFUSING = "{{ raise_exception('roles must alternate') }}"
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello, größe?"},
    {"role": "assistant", "content": "Yes, größe."},
    {"role": "user", "content": "Yes, größe."},
    {"role": "assistant", "content": "No\nmore."},
]
SAID = ["Yes, größe.<|im_end|>\n", "No\nmore.<|im_end|>\n"]


def words(template):
    tokenizer = train_bpe(["Hello, größe? Yes, no more. assistant user system Be short." * 3], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_what_a_template_renders_is_what_transformers_renders_and_the_assistant_alone_counts(template):
    tokenizer = words(template)
    ids, mask = rendered(tokenizer, TALK, None, "assistant")
    assert ids == tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TALK)
    assert tokenizer.decode(ids) == text
    runs = "".join(map(str, map(int, mask))).replace("01", "0 1").replace("10", "1 0").split()
    place, said = 0, []
    for run in runs:
        if "1" in run:
            said.append(tokenizer.decode(ids[place : place + len(run)]))
        place += len(run)
    assert said == SAID, "not what the user says in the same words"
    assert rendered(tokenizer, TALK, None, "all") == (ids, [True] * len(ids))


def test_prefixes_find_what_a_template_marks():
    assert rendered(words(CHATML), TALK, None, "assistant") == rendered(words(MARKED), TALK, None, "assistant")


def test_tools_are_written_and_not_learned():
    tokenizer, tools = words(TOOLS), [{"type": "function", "function": {"name": "größe", "parameters": {}}}]
    talk = [*TALK[:2], {"role": "assistant", "content": "größe()"}, {"role": "tool", "content": "7"}, TALK[2]]
    ids, mask = rendered(tokenizer, talk, tools, "assistant")
    assert ids == tokenizer.apply_chat_template(talk, tools=tools, tokenize=True, return_dict=True)["input_ids"]
    said = tokenizer.decode([token for token, counts in zip(ids, mask, strict=True) if counts])
    assert said == "größe()<|im_end|>\nYes, größe.<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [(CHANGING, "writes a conversation in another way when more of it follows"), (REFUSING, "roles must alternate")],
)
def test_a_template_that_cannot_be_followed_is_refused(template, message):
    with pytest.raises(ConfigError, match=message):
        rendered(words(template), TALK, None, "assistant")


def test_a_tokenizer_without_a_template_is_refused():
    for tokenizer in (words(None), words({"tool_use": CHATML, "rag": CHATML})):
        with pytest.raises(ConfigError, match=r"model\.tokenizer: .* has none that is the default"):
            Chat().check_tokenizer(tokenizer)
        with pytest.raises(ConfigError, match="--chat: "):
            asked(tokenizer, "Hello")
    Chat().check_tokenizer(words({"default": CHATML, "tool_use": TOOLS}))
    tokenizer = words(CHATML)
    assert tokenizer.decode(asked(tokenizer, "Hello")) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_share_gpt_is_the_same_conversation():
    named = {"system": "system", "user": "human", "assistant": "gpt"}
    talk = [{"from": named[m["role"]], "value": m["content"]} for m in TALK]
    assert messages_of(talk) == messages_of(json.dumps(TALK)) == TALK
    assert messages_of([{**TALK[0], "tool_calls": None}]) == TALK[:1], "what a table says of other rows"


@pytest.mark.parametrize(
    "field", ["no JSON", "3", '["hello"]', '[{"from": "cat", "value": "x"}]', '[{"content": "x"}]']
)
def test_what_is_no_conversation_is_refused(field):
    with pytest.raises(ConfigError, match=r"data\.messages_column"):
        messages_of(field)


@pytest.fixture(scope="module")
def batch():
    """Conversations as rows, of which the last has no word of the assistant."""
    task = Chat(TaskSettings(name="chat", block_length=80))
    talks = [TALK, TALK[:3], TALK[:2]]
    ids, lengths, size = task.encode(iter([(json.dumps(t),) for t in talks]), words(CHATML), "train", None, "document")
    assert len(ids) == 2, "of what teaches nothing there is no row"
    said = [m["content"] for talk in talks for m in talk if m["role"] == "assistant"]
    assert size == sum(len(f"{text}\n".encode()) for text in said), "what is scored, as bits a byte are of it"
    return task, torch.from_numpy(ids).long(), torch.from_numpy(lengths).long()


def models(vocabulary):
    built = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=vocabulary, n_positions=96))
        built.append(model.eval())
    return built


def test_no_loss_and_no_score_touches_a_token_outside_the_assistants_turns(batch):
    task, ids, lengths = batch
    tokenizer = words(CHATML)
    student, teacher = models(len(tokenizer))
    rows = task.batch(ids, lengths)
    with torch.no_grad():
        ours, theirs = student(rows.ids).logits.requires_grad_(), teacher(rows.ids).logits
    ours = ours.detach().requires_grad_()
    nats, kl, count = 0.0, 0.0, 0
    for row, talk in enumerate((TALK, TALK[:3])):
        whole, mask = rendered(tokenizer, talk, None, "assistant")
        p, q = theirs[row].double().softmax(-1).numpy(), ours[row].detach().double().log_softmax(-1).numpy()
        for place in range(1, len(whole)):
            if mask[place]:
                nats -= q[place - 1, whole[place]]
                kl -= float((p[place - 1] * q[place - 1]).sum())
                count += 1
    counted = task.counts(lengths.numpy())
    assert counted[NEXT_TOKEN] == counted[DISTILLATION] == count > 0
    taught, distilled = teaching_losses(ours, rows), distilling_losses(ours, theirs, rows)
    assert float(taught[NEXT_TOKEN].detach()) == pytest.approx(nats, rel=1e-5)
    (touched,) = torch.autograd.grad(taught[NEXT_TOKEN] + distilled[DISTILLATION], ours)
    places = touched.abs().sum(-1) > 0
    for row, talk in enumerate((TALK, TALK[:3])):
        _, mask = rendered(tokenizer, talk, None, "assistant")
        assert places[row].tolist() == [*mask[1:], *[False] * (81 - len(mask))]
    scores, _ = score_tokens([rows], student, token_bytes(tokenizer), teacher)
    assert scores.metrics()["perplexity"] == pytest.approx(np.exp(nats / count), rel=1e-5)
    assert scores.compared == count
    entropy = float(distilled[DISTILLATION].detach()) - kl
    assert entropy == pytest.approx(0, abs=1e-3 * abs(kl)) or entropy < 0


PACKED = Chat(TaskSettings(name="chat", block_length=96), packed=True)
TALKS = [TALK[:3], TALK, TALK[1:3], TALK[3:], TALK[:3], TALK[1:3]]


def encoded(task, talks=TALKS):
    ids, lengths, size = task.encode(iter([(json.dumps(t),) for t in talks]), words(CHATML), "train", None, "document")
    return torch.from_numpy(ids).long(), torch.from_numpy(lengths).long(), size


def test_short_conversations_share_rows_and_each_is_scored_as_if_alone():
    alone = replace(PACKED, packed=False)
    tokenizer = words(CHATML)
    student, teacher = models(len(tokenizer))
    scored, digests = [], []
    for task in (PACKED, alone):
        ids, lengths, size = encoded(task)
        rows = task.batch(ids, lengths)
        ours, theirs = score_tokens([rows, rows], student, token_bytes(tokenizer), teacher)
        known = [
            d.tolist() for pair in zip(ids.numpy(), lengths.numpy(), strict=True) for d in task.documents_in(*pair)
        ]
        whole = [rendered(tokenizer, talk, None, "assistant")[0] for talk in TALKS]
        assert sorted(known) == sorted(whole)
        assert len(ours.nats) == len(theirs.nats) == 2 * len(TALKS), "a row's end ends a conversation"
        scored.append((size, task.tokens(lengths.numpy()), task.counts(lengths.numpy()), ours, theirs))
        digests.append([known, len(ids)])
    assert digests[0][1] < digests[1][1] == len(TALKS)
    assert scored[0][:3] == scored[1][:3], "bytes, tokens, and what losses are divided by"
    order = [digests[1][0].index(talk) for talk in digests[0][0]]
    for packed, apart in zip(scored[0][3:], scored[1][3:], strict=True):
        assert packed.tokens[: len(TALKS)] == [apart.tokens[place] for place in order]
        np.testing.assert_allclose(packed.nats[: len(TALKS)], [apart.nats[place] for place in order], rtol=1e-5)
        assert packed.metrics() == pytest.approx(apart.metrics(), rel=1e-5)


def test_a_row_is_the_first_of_the_last_few_with_room(monkeypatch):
    ids, lengths, _ = encoded(PACKED)
    sizes = [len(rendered(words(CHATML), talk, None, "assistant")[0]) for talk in TALKS]
    rows = []
    for size in sizes:
        fitting = next((row for row in rows if sum(row) + size <= 96), None)
        rows.append([size]) if fitting is None else fitting.append(size)
    documents = [PACKED.documents_in(*pair) for pair in zip(ids.numpy(), lengths.numpy(), strict=True)]
    assert [[len(document) for document in row] for row in documents] == rows
    assert max(map(len, rows)) > 1
    monkeypatch.setattr("pipeline.tasks.chat.OPEN_ROWS", 1)
    next_fit, _, _ = encoded(PACKED, TALKS * 3)
    assert len(next_fit) >= len(encoded(PACKED)[0])


def test_what_is_cached_of_a_packed_row_is_what_a_teacher_gives_in_a_step():
    ids, lengths, _ = encoded(PACKED)
    batch, (teacher, _) = PACKED.batch(ids, lengths), models(len(words(CHATML)))
    use_causal_attention(teacher)
    with torch.no_grad():
        cached = KeptStates("float32").of(teacher, batch).wide()
        online, _ = WithStates(teacher)(*batch.inputs)
    torch.testing.assert_close(cached, online)


def test_a_prompt_is_of_the_first_conversation_of_a_row():
    ids, lengths, _ = encoded(PACKED, [TALK[1:3]] * 3)
    prompt, more = _prompt(PACKED.batch(ids, lengths), 0)
    assert prompt.shape[1] + more == min(LONGEST, len(rendered(words(CHATML), TALK[1:3], None, "assistant")[0]))


def test_rows_do_not_see_each_other(batch):
    task, ids, lengths = batch
    student, _ = models(len(words(CHATML)))
    rows = task.batch(ids, lengths)
    with torch.no_grad():
        together, alone = student(rows.ids).logits, student(rows.ids[1:]).logits
    assert torch.equal(together[1:], alone)


def test_a_conversation_that_is_too_long_keeps_its_beginning(batch):
    short = Chat(TaskSettings(name="chat", block_length=40))
    ids, lengths, _ = short.encode(iter([(json.dumps(TALK),)]), words(CHATML), "train", None, "document")
    whole, mask = rendered(words(CHATML), TALK, None, "assistant")
    assert ids[0, :40].tolist() == whole[:40]
    assert lengths.tolist() == [[40, sum(mask[:40])]]
    assert short.tokens(lengths) == 40
    assert [document.tolist() for document in short.documents_in(ids[0], lengths[0])] == [whole[:40]]


def test_a_tokenizer_that_is_learned_writes_no_conversations(tiny_fields, tmp_path):
    fields = tiny_fields(tmp_path, task={"name": "chat", "block_length": 64}, distill={"contrast_weight": 0.0})
    with pytest.raises(ValueError, match=r"model\.tokenizer: \{train_bpe\} has no chat template"):
        Config.model_validate(fields)


def test_contrast_of_all_tokens_is_refused_with_losses_on_the_assistants(tiny_fields, tmp_path):
    fields = tiny_fields(
        tmp_path, task={"name": "chat"}, distill={"contrast_weight": 0.1}, model={"tokenizer": "words"}
    )
    with pytest.raises(ValueError, match=r"distill\.contrast_weight is 0\.1.*task\.loss_on: all"):
        Config.model_validate(fields)
