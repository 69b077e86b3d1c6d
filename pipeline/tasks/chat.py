"""Chat: conversations as the tokenizer's own template writes them, learned and scored on what the assistant says.

A row packs conversations, whole, the next one into the first row of the last few that has room: positions begin anew
with each, and no token attends to another's. Beside its tokens a row says of each whether it is learned, as the
assistant's are, or begins a further conversation, whose first token nobody tells.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.data import TaskSettings
from pipeline.distill.losses import valid_tokens
from pipeline.errors import ConfigError
from pipeline.tasks.batch import Batch
from pipeline.tasks.losses import CONTRAST, DISTILLATION, NEXT_TOKEN
from pipeline.tasks.task import Encoded, Task

if TYPE_CHECKING:  # which takes long to import
    from transformers import PreTrainedTokenizerBase

PROTOCOL = "each conversation by itself, as the chat template writes it; scored where the assistant speaks"
LEARNED, BEGINS = 1, 2  # beside a token
OPEN_ROWS = 64  # the last ones, into which a conversation may still go
GENERATION = "{% generation"  # in a template, where what the assistant says begins
ASSISTANT = "assistant"
SHARE_GPT = {"human": "user", "user": "user", "gpt": ASSISTANT, "assistant": ASSISTANT, "system": "system"}
SHARE_GPT |= {"tool": "tool", "observation": "tool", "function_response": "tool"}


@dataclass(frozen=True)
class Chat(Task):
    """A row holds conversations of at most `block_length` tokens together, of a longer one its beginning; unless they
    are `packed`, one."""

    packed: bool = False
    document: ClassVar[str] = "conversation with a word of the assistant"
    objects: ClassVar[bool] = True
    templated: ClassVar[bool] = True

    @classmethod
    def of(cls, recipe: dict[str, Any]) -> Chat:
        return cls(TaskSettings.model_validate(recipe["task"]), recipe.get("packed", False))

    @property
    def protocol(self) -> str:
        return PROTOCOL if self.settings.loss_on == ASSISTANT else f"{PROTOCOL}, and everybody else"

    def columns(self, data: dict[str, Any]) -> tuple[str, ...] | None:
        names = data["messages_column"], data.get("tools_column")
        return tuple(name for name in names if name is not None)

    def compared(self, document: Any) -> Any:
        """Return the conversation in one spelling, whatever the format of its file."""
        return [json.dumps(_parsed(field), sort_keys=True) for field in document]

    def strings(self, document: Any) -> Iterable[str]:
        return (str(message.get("content") or "") for message in messages_of(document[0]))

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        template_of(tokenizer, "model.tokenizer")

    def encode(
        self, documents: Iterator[Any], tokenizer: PreTrainedTokenizerBase, split: str, collected: Any, unit: str
    ) -> Encoded:
        width, text_bytes = self.settings.block_length, 0
        rows: list[NDArray[np.int32]] = []
        lengths: list[list[int]] = []
        for document in documents:
            tools = _parsed(document[1]) if len(document) > 1 else None
            ids, mask = rendered(tokenizer, messages_of(document[0]), tools or None, self.settings.loss_on)
            ids, mask = ids[:width], mask[:width]
            learned = [token for token, counts in zip(ids[1:], mask[1:], strict=True) if counts]  # none tells the first
            if learned:
                text_bytes += len(tokenizer.decode(learned, skip_special_tokens=True).encode())
                place = self._place(lengths, len(ids))
                if place == len(rows):
                    rows.append(np.zeros(2 * width, np.int32))
                    lengths.append([0, 0])
                start = lengths[place][0]
                rows[place][start : start + len(ids)] = ids
                rows[place][width + start : width + start + len(mask)] = [BEGINS if start else mask[0], *mask[1:]]
                lengths[place][0] += len(ids)
                lengths[place][1] += len(learned)
        stored = np.array(rows, np.int32).reshape(-1, 2 * width)
        return stored, np.array(lengths, np.int32).reshape(-1, 2), text_bytes

    def _place(self, lengths: list[list[int]], needed: int) -> int:
        """Return the row that a conversation goes into: the first of the last few with so much room, else a new one."""
        first = max(0, len(lengths) - OPEN_ROWS) if self.packed else len(lengths)
        room = (row for row in range(first, len(lengths)) if lengths[row][0] + needed <= self.settings.block_length)
        return next(room, len(lengths))

    def tokens(self, lengths: NDArray[np.int32]) -> int:
        return int(lengths[:, 0].sum())

    def documents_in(self, row: NDArray[np.int32], lengths: NDArray[np.int32]) -> list[NDArray[np.int32]]:
        return np.split(row[: int(lengths[0])], np.flatnonzero(row[self.settings.block_length :] == BEGINS))

    def batch(self, ids: Tensor, lengths: Tensor) -> Batch:
        width = self.settings.block_length
        valid, supervised = valid_tokens(lengths[:, 0], width), ids[:, width + 1 :] == LEARNED
        distilled = valid.new_zeros(valid.shape)
        distilled[:, :-1] = supervised  # a teacher's distribution is that of the token that follows
        positions = positions_of(ids[:, width:] == BEGINS, valid) if self.packed else None
        return Batch(ids[:, :width], lengths[:, 0], ids[:, 1:width], supervised, distilled, positions=positions)

    def counts(self, lengths: NDArray[Any]) -> dict[str, int]:
        learned = int(lengths[:, 1].sum())
        return {NEXT_TOKEN: learned, DISTILLATION: learned, CONTRAST: int(lengths[:, 0].sum())}


def positions_of(begins: Tensor, valid: Tensor) -> Tensor:
    """Return the position of each token in its document, int64, from where further ones begin in rows (rows, length);
    that of padding is 0."""
    places = torch.arange(begins.shape[1], device=begins.device).expand(begins.shape)
    return (places - (places * begins).cummax(1).values) * valid


def template_of(tokenizer: PreTrainedTokenizerBase, knob: str, tools: list[Any] | None = None) -> str:
    """Return the chat template. Raises ConfigError: there is none, or several of which none is the default."""
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError as error:
        raise ConfigError(
            f"{knob}: a conversation is written by the tokenizer's chat template, and this one has none that is the "
            "default. Use the tokenizer of a chat model: its tokenizer_config.json has chat_template, or "
            "chat_template.jinja lies beside it."
        ) from error


def asked(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the tokens of a conversation in which a user says the prompt and the assistant is to answer. Raises
    ConfigError: there is no template for it."""
    template_of(tokenizer, "--chat")
    messages = [{"role": "user", "content": prompt}]
    both = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return [*both["input_ids"]]


def messages_of(field: Any) -> list[dict[str, Any]]:
    """Return the messages of a conversation, {role, content, ...}, ShareGPT's {from, value} among them. Raises
    ConfigError for anything else."""
    messages = _parsed(field)
    try:
        return [_message(message) for message in messages]
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"data.messages_column: a conversation is a list of messages, each {{role, content}} or ShareGPT's {{from, "
            f"value}} with from one of {', '.join(SHARE_GPT)}; {json.dumps(messages)[:80]} is none ({error!r})."
        ) from error


def _message(message: dict[str, Any]) -> dict[str, Any]:
    if "from" in message:
        return {"role": SHARE_GPT[message["from"]], "content": message["value"]}
    return {**message, "role": message["role"]}


def _parsed(field: Any) -> Any:
    """Return a field as JSON has it, without what a table's columns say of other rows."""
    try:
        return _without_nothing(json.loads(field) if isinstance(field, str) else field)
    except ValueError as error:
        raise ConfigError(f"data.messages_column: {str(field)[:80]!r} is no list of messages ({error}).") from error


def _without_nothing(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nothing(item) for key, item in value.items() if item is not None}
    return [_without_nothing(item) for item in value] if isinstance(value, list) else value


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: list[Any] | None, loss_on: str
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation as its template writes it, and which of them count. Of the assistant they are
    what a template marks as generated, else each of its turns behind its header, up to and with the turn's end.

    Raises:
        ConfigError: a template that refuses the conversation, or that writes it in another way when more follows.
    """
    try:
        if loss_on == ASSISTANT and GENERATION in template_of(tokenizer, "model.tokenizer", tools).replace("{%-", "{%"):
            both = tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return [*both["input_ids"]], [bool(said) for said in both["assistant_masks"]]
        text = _text(tokenizer, messages, tools)
        spans = [(0, len(text))]
        if loss_on == ASSISTANT:
            spans = [_span(tokenizer, messages, place, tools, text) for place in _turns(messages)]
    except ConfigError:
        raise
    except Exception as error:  # whatever a template may raise
        raise ConfigError(
            f"data.messages_column: the tokenizer's chat template refuses a conversation: {error!r}; it begins "
            f"{json.dumps(messages)[:160]}"
        ) from error
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [any(start <= first < stop for start, stop in spans) for first, _ in encoded["offset_mapping"]]
    return [*encoded["input_ids"]], mask


def _turns(messages: list[dict[str, Any]]) -> list[int]:
    return [place for place, message in enumerate(messages) if message["role"] == ASSISTANT]


def _text(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool = False
) -> str:
    return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt))


def _span(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], place: int, tools: list[Any] | None, text: str
) -> tuple[int, int]:
    """Return where in the text a turn of the assistant is, by what the template writes before it and with it."""
    before, with_it = _text(tokenizer, messages[:place], tools, True), _text(tokenizer, messages[: place + 1], tools)
    if not (text.startswith(with_it) and with_it.startswith(before)):
        raise ConfigError(
            "model.tokenizer: its chat template writes a conversation in another way when more of it follows, so that "
            "nobody can tell which tokens are the assistant's. Mark them in the template by {% generation %} and "
            "{% endgeneration %}, or set task.loss_on: all."
        )
    return len(before), len(with_it)
