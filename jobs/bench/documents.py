"""What a comparison rests on beside its seeds: the documents of the test split."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import numpy as np

from jobs.bench.rows import Key
from pipeline.bootstrap import ratio_interval
from pipeline.config.base import Closed

DIGITS = 4  # of a document's nats, in a file


class Documents(Closed):
    """Sums over each document of the test split: scored tokens, and next-token nats of teacher and student."""

    tokens: list[int]
    teacher: list[float]
    student: list[float]


def averaged(scored: Iterable[tuple[Key, Documents]]) -> dict[Key, Documents]:
    """Return the documents of each row at each width, its students' nats averaged over seeds; rounded, so that a table
    made of a file is that made at once."""
    of_rows: dict[Key, list[Documents]] = {}
    for key, documents in scored:
        of_rows.setdefault(key, []).append(documents)
    return {
        key: Documents(
            tokens=of_seeds[0].tokens,
            teacher=_rounded(of_seeds[0].teacher),
            student=_rounded(np.mean([documents.student for documents in of_seeds], axis=0).tolist()),
        )
        for key, of_seeds in of_rows.items()
    }


def written(documents: Mapping[Key, Documents]) -> str:
    """Return the rows' documents, which have the same text and teacher, as JSON."""
    text = next(iter(documents.values()))
    rows = [{"row": row, "bits": bits, "student": of_row.student} for (row, bits), of_row in documents.items()]
    return json.dumps({"tokens": text.tokens, "teacher": text.teacher, "rows": rows}) + "\n"


def read_documents(text: str) -> dict[Key, Documents]:
    """Return what `written` wrote. Raises ValueError, KeyError or TypeError for anything else."""
    fields = json.loads(text)
    common = {"tokens": fields["tokens"], "teacher": fields["teacher"]}
    return {(row["row"], row["bits"]): Documents(**common, student=row["student"]) for row in fields["rows"]}


def _rounded(nats: Iterable[float]) -> list[float]:
    return [round(value, DIGITS) for value in nats]


def bootstrapped(left: Documents, right: Documents | None = None) -> tuple[float, float] | None:
    """Return the 95 % interval of `left`'s gap less `right`'s (None: less none, the gap itself) in nats a token, by a
    bootstrap over documents that draws both sides alike (Efron's percentiles); None: fewer than two documents, or the
    sides are equal."""
    others = left.teacher if right is None else right.student
    return ratio_interval(np.subtract(left.student, others), left.tokens, 0.95)
