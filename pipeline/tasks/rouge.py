"""ROUGE by torchmetrics: maintained, and without downloads at run time (ROUGE-Lsum, which needs one, is not used)."""

from __future__ import annotations

from collections.abc import Sequence

NAMES = ("rouge1", "rouge2", "rougeL")


def rouge(written: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Mean F-measure, 0-100, of each text against its one reference; words are stemmed (Porter)."""
    if not written:
        return {}
    from torchmetrics.functional.text import rouge_score  # on use: its import takes seconds

    found = rouge_score(list(written), [[text] for text in expected], rouge_keys=NAMES, use_stemmer=True)
    return {name: 100 * float(found[f"{name}_fmeasure"]) for name in NAMES}
