"""What shipping a trained student in fewer bytes does to its scores."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline.flow.plan import plan_run
from pipeline.store.records import Evaluation, Package, Student
from tests.conftest import Ran

SHORT = {"scale_dtype": "float16", "rest_dtype": "float16"}


@pytest.mark.parametrize(
    ("family", "encoding", "ships"),
    [
        ("gpt2", "base3", {**SHORT, "positions": "int8"}),
        ("llama", "dense", SHORT),  # four levels, which base3 does not hold, and no positions
        ("bart", "base3", {**SHORT, "positions": "int8"}),
    ],
)
def test_the_smallest_encoding_scores_as_the_dense_one(
    trained_run: Callable[[str], Ran], run_flow: Callable[..., Ran], family: str, encoding: str, ships: dict[str, str]
) -> None:
    dense = trained_run(family)
    config = dense.plan.config
    quant = config.quant.model_copy(update=ships)
    pack = config.pack.model_copy(update={"encoding": encoding})
    small = run_flow(config.model_copy(update={"quant": quant, "pack": pack}), until="pack")
    assert (small.outcome.status["cache"], small.outcome.status["distill"]) == ("reused", "done")
    assert plan_run(config.model_copy(update={"pack": pack})).step(Student).record is not None
    sizes = [run.record(Package.stage).size.packed_bytes for run in (dense, small)]
    assert sizes[1] < (0.75 if encoding == "base3" else 0.97) * sizes[0]
    before, after = (run.record(Evaluation.stage).student["perplexity"] for run in (dense, small))
    assert abs(after / before - 1) < 0.001
