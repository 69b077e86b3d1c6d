"""Text that a teacher generates, for a comparison on a model whose training text is not at hand."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import ConfigError
from pipeline.models.build import load_model
from pipeline.models.device import this_device
from pipeline.store.step_store import checksum
from pipeline.tasks.tokenizers import read_tokenizer

BATCH = 64


def generated_text(
    teacher: Path, documents: int, length: int, seed: int, folder: Path, advance: Callable[[int, int], None]
) -> Path:
    """Return a jsonl file of samples at temperature 1 from the beginning of text, made once for each teacher and size.
    Raises ConfigError if the teacher has no token to begin with."""
    contents = {path.name: checksum(path).sha256 for path in sorted(teacher.glob("*")) if path.is_file()}
    identity = json.dumps([contents, documents, length, seed], sort_keys=True)
    path = folder / f"generated-{hashlib.sha256(identity.encode()).hexdigest()[:32]}.jsonl"
    if path.exists():
        return path
    model, tokenizer = load_model(teacher).to(this_device()).eval(), read_tokenizer(teacher)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ConfigError(f"--teacher {teacher}: its tokenizer has no token to begin a text with; give --data.")
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="generating-") as unfinished:
        with open(Path(unfinished, path.name), "w", encoding="utf-8") as file:
            for start in range(0, documents, BATCH):
                for text in _sample(model, tokenizer, first, min(BATCH, documents - start), length):
                    file.write(json.dumps({"text": text}) + "\n")
                advance(min(start + BATCH, documents), documents)
        os.replace(file.name, path)
    return path


@torch.no_grad()
def _sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, first: int, count: int, length: int
) -> list[str]:
    start = torch.full((count, 1), first, device=model.device)
    ids = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_length=length,
        pad_token_id=first if tokenizer.eos_token_id is None else tokenizer.eos_token_id,
    )
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text for text in texts if text.strip()]
