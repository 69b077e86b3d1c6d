"""What a packed student writes: rows of the validation split, continued or summarized, as text for people."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig

from pipeline.package.package import load
from pipeline.store.records import Tokens
from pipeline.store.shards import Rows
from pipeline.store.step_store import StepDir
from pipeline.tasks import task_of
from pipeline.tasks.task import Batch
from pipeline.tasks.tokenizers import read_tokenizer

PROMPTS, LONGEST = 3, 64  # rows; tokens of a prompt and what follows


@torch.no_grad()
def samples(folder: Path, tokens: StepDir, record: Tokens) -> str:
    """Prompt and greedy continuation of a few validation rows, by the packed model in `folder`."""
    model, tokenizer = load(str(folder)), read_tokenizer(folder)
    rows = Rows(tokens, record.splits["validation"].shards)
    ids, lengths, _ = rows.get(list(range(min(PROMPTS, rows.rows))))
    batch = task_of(record.recipe).batch(ids, lengths).references()
    end = model.config.eos_token_id
    how = GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=end)
    parts = []
    for row in range(len(batch.ids)):
        prompt, more = _prompt(batch, row)
        if batch.source_ids is not None:
            start = batch.ids[row : row + 1, :1]
            how.update(max_new_tokens=more)
            written = model.generate(prompt, decoder_input_ids=start, generation_config=how)[0, 1:]
        else:
            how.update(max_new_tokens=more)
            written = model.generate(prompt, generation_config=how)[0, prompt.shape[1] :]
        texts = [tokenizer.decode(some, skip_special_tokens=True) for some in (prompt[0], written)]
        parts.append(f"--- prompt\n{texts[0]}\n--- student\n{texts[1]}\n")
    return "\n".join(parts)


def _prompt(batch: Batch, row: int) -> tuple[torch.Tensor, int]:
    """The ids (1, length) of a prompt and how many tokens may follow: a row's own length is never exceeded."""
    if batch.source_ids is not None and batch.source_mask is not None:
        return batch.source_ids[row : row + 1, : int(batch.source_mask[row].sum())], batch.ids.shape[1] - 1
    length = min(LONGEST, int(batch.lengths[row]))
    return batch.ids[row : row + 1, : max(1, length // 2)], max(1, length - length // 2)
