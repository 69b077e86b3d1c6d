"""Tokenizers: read from a folder, or learned from the training split; and how many bytes each token stands for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.models.gguf_file import DAMAGED, alone

if TYPE_CHECKING:  # which takes long to import
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"


def read_tokenizer(folder: Path, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder, or of a GGUF file in it. Raises ConfigError if there is none."""
    from transformers import AutoTokenizer

    try:
        with alone(folder, gguf_file) as (source, kind):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                source, trust_remote_code=False, local_files_only=True, **kind
            )
    except (*DAMAGED, ImportError) as error:
        raise ConfigError(
            f"model.tokenizer: {folder / (gguf_file or '')} holds no tokenizer that transformers can read: {error}"
        ) from error
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer to a folder that has no folders in it: of several chat templates, which transformers would give
    one of their own, tokenizer_config.json holds all."""
    tokenizer.save_pretrained(folder, save_jinja_files=not isinstance(tokenizer.chat_template, dict))


def encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str], special_tokens: bool = False) -> list[list[int]]:
    """Return the ids of each text as `tokenizer(texts)` has them, without the masks and places that cost a quarter more
    to make beside them."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=special_tokens)]


def train_bpe(
    texts: Iterable[str], size: int, special_tokens: tuple[str, ...] = (END_OF_TEXT,)
) -> PreTrainedTokenizerBase:
    """Learn a byte-level BPE of at most `size` tokens, special ones included; every text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*special_tokens], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    padding = {"pad_token": PADDING} if PADDING in special_tokens else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, **padding)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Count the UTF-8 bytes that each token id stands for, int64 (vocabulary,); special tokens stand for none."""
    special, added = set(tokenizer.all_special_ids), set(tokenizer.get_added_vocab())
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    byte_level = '"ByteLevel"' in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])

    def length(token: int, name: str | None) -> int:
        if token in special or name is None:
            return 0
        return len(name.encode()) if name in added else _bytes_of(name, byte_level)

    return torch.tensor([length(token, name) for token, name in enumerate(names)])


def _bytes_of(name: str, byte_level: bool) -> int:
    if byte_level:  # each character of a byte-level token is one byte
        return len(name)
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return 1
    return len(name.replace("▁", " ").encode())
