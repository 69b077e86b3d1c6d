"""What a student writes: rows of the validation split, continued or summarized, as text for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pipeline.models.build import decoding
from pipeline.store.shards import Rows
from pipeline.tasks.batch import Batch
from pipeline.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS, LONGEST = 3, 64  # rows; tokens of a prompt and what follows


@torch.no_grad()
def samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, rows: Rows) -> str:
    """Return prompt and greedy continuation of the first few rows."""
    from transformers import GenerationConfig

    ids, lengths, _ = rows.get(list(range(min(PROMPTS, rows.rows))))
    batch = task.batch(ids, lengths).references().to(model.device)
    end = model.config.eos_token_id
    settings = GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=end)
    parts = []
    for row in range(len(batch.ids)):
        prompt, more = _prompt(batch, row)
        settings.update(max_new_tokens=more)
        start = {} if batch.source_ids is None else {"decoder_input_ids": batch.ids[row : row + 1, :1]}
        given = {**start, **decoding(model), "generation_config": settings}
        written = model.generate(prompt, **given)[0, 1 if start else prompt.shape[1] :]
        texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (prompt[0], written)]
        parts.append(f"--- prompt\n{texts[0]}\n--- student\n{texts[1]}\n")
    return "\n".join(parts)


def _prompt(batch: Batch, row: int) -> tuple[torch.Tensor, int]:
    """Return the ids (1, length) of a prompt and how many tokens may follow: a row's own length is never exceeded."""
    if batch.source_ids is not None and batch.source_mask is not None:
        return batch.source_ids[row : row + 1, : int(batch.source_mask[row].sum())], batch.ids.shape[1] - 1
    length = min(LONGEST, batch.first_document(row))
    return batch.ids[row : row + 1, : max(1, length // 2)], max(1, length - length // 2)
