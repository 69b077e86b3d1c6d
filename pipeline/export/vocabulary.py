"""A tokenizer as GGUF keeps it: tokens, their kinds, and merges or scores. llama.cpp then splits text as it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from pipeline.errors import ConfigError
from pipeline.tasks.tokenizers import read_tokenizer

GPT2 = {"type": "ByteLevel", "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
WORDS = (  # with how many digits are together, as Llama 3 and Qwen 2 write it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DECIDES = ("type", "use_regex", "individual_digits", "pattern", "behavior", "invert")
BYTES = {"type": "ByteLevel", "use_regex": False}


def _cut_by(digits: str) -> list[dict[str, Any]]:
    pattern = {"Regex": WORDS.replace("DIGITS", digits)}
    return [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}, BYTES]


# llama.cpp's name, what cuts the text, whether a word that is a token is taken before any merge, normalizers.
PRE_TOKENIZERS: tuple[tuple[str, list[dict[str, Any]], bool, tuple[Any, ...]], ...] = (
    ("gpt-2", [GPT2], False, (None,)),
    ("smollm", [DIGITS, GPT2], False, (None,)),
    ("llama-bpe", _cut_by("{1,3}"), True, (None,)),
    ("dbrx", _cut_by("{1,3}"), False, (None,)),
    ("qwen2", _cut_by(""), False, (None, {"type": "NFC"})),  # llama.cpp takes text as composed as it comes
)


def write_vocabulary(writer: GGUFWriter, folder: Path, size: int) -> None:
    """Write a folder's tokenizer, filled to `size` rows. Raises ConfigError for one without an equal in llama.cpp."""
    tokenizer = read_tokenizer(folder)
    described: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    if described["model"]["type"] != "BPE":
        raise _unknown(f"its model is {described['model']['type']}")
    pieces = bool(described["model"]["byte_fallback"])
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    if pieces:
        writer.add_add_space_prefix(_space_is_prefixed(described))
    else:
        writer.add_tokenizer_pre(_pre_tokenizer(described))
    names = {token: name for name, token in tokenizer.get_vocab().items()}
    writer.add_token_list([names.get(token, f"[unused{token}]") for token in range(size)])
    writer.add_token_types([_kind(token, names, described) for token in range(size)])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
    if pieces:
        writer.add_token_scores(_scores(merges, names, size))
    else:
        writer.add_token_merges(merges)
    _special(writer, tokenizer)


def _pre_tokenizer(described: dict[str, Any]) -> str:
    """Return llama.cpp's name of the way a text is cut before merging."""
    cut = described["pre_tokenizer"] or {}
    parts = [_essential(part) for part in cut.get("pretokenizers", [cut])]
    whole_words = bool(described["model"].get("ignore_merges"))
    for name, wanted, takes_words, normalizers in PRE_TOKENIZERS:
        if parts == wanted and whole_words == takes_words and described["normalizer"] in normalizers:
            return name
    raise _unknown(f"it cuts text by {json.dumps(cut)[:200]} after the normalizer {described['normalizer']}")


def _essential(part: dict[str, Any]) -> dict[str, Any]:
    """Return what of a pre-tokenizer decides where text is cut; all of it for one that also adds a space."""
    if part.get("add_prefix_space"):
        return part
    return {name: part[name] for name in DECIDES if name in part}


def _space_is_prefixed(described: dict[str, Any]) -> bool:
    """Tell whether text is read as if after a space. Raises ConfigError for what SentencePiece does not do."""
    normalizer, cut = described["normalizer"] or {}, described["pre_tokenizer"] or {}
    kinds = [part["type"] for part in normalizer.get("normalizers", [normalizer] if normalizer else [])]
    if cut.get("type") == "Metaspace" and not kinds and not cut.get("split", True):
        return bool(cut["prepend_scheme"] != "never")
    if cut or kinds not in (["Prepend", "Replace"], ["Replace"]):
        raise _unknown(f"it prepares text by {json.dumps(normalizer)[:200]} and {json.dumps(cut)[:200]}")
    return "Prepend" in kinds


def _kind(token: int, names: dict[int, str], described: dict[str, Any]) -> TokenType:
    added = {entry["id"]: entry for entry in described["added_tokens"]}
    name = names.get(token)
    if name is None:
        return TokenType.UNUSED
    if token in added:
        if name == described["model"]["unk_token"]:
            return TokenType.UNKNOWN
        return TokenType.CONTROL if added[token]["special"] else TokenType.USER_DEFINED
    if described["model"]["byte_fallback"] and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return TokenType.BYTE
    return TokenType.NORMAL


def _scores(merges: list[str], names: dict[int, str], size: int) -> list[float]:
    """Return scores: the earlier two pieces are merged, the higher their whole scores; what no merge makes scores 0."""
    rank: dict[str, int] = {}
    for place, merge in enumerate(merges, start=1):
        rank.setdefault(merge.replace(" ", ""), place)
    return [-float(rank.get(names.get(token, ""), 0)) for token in range(size)]


def _special(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    adds = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "unk": writer.add_unk_token_id}
    for name, add in adds.items():
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            add(token)
    probe = list(tokenizer("a").input_ids)
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and probe[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and probe[-1:] == [tokenizer.eos_token_id])


def _unknown(reason: str) -> ConfigError:
    return ConfigError(
        f"The tokenizer cannot be exported to GGUF: {reason}, and no equal of that in llama.cpp is known. Valid: "
        "byte-level BPE cut as GPT-2, SmolLM, Llama 3 or Qwen 2 do, and SentencePiece BPE with byte fallback. Formats "
        "onnx and transformers take any tokenizer."
    )
