"""The scores of a split are those of its shards added up, whoever makes them and however often it is interrupted."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from pipeline.errors import ConfigError, DamagedError, RunError
from pipeline.execution.engine import Engine
from pipeline.stages import evaluate
from pipeline.stages.evaluate import SCORED
from pipeline.stages.scorer import SPANS_A_WORKER, Piece, Scorer, parts_of, spans_of
from pipeline.stages.stage import Step
from pipeline.store.records import Evaluation, Shard, Split, SplitName, StoredFile, Student, Tokens
from pipeline.store.shards import Rows, open_shard, read_tokens, store_shard, write_tokens
from pipeline.store.step_store import FinishedStep
from pipeline.tasks.scoring import Scores
from tests.conftest import Ran

FILE = StoredFile(bytes=0, sha256="", fence=1)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 12))
def test_spans_hold_every_shard_in_order_behind_the_rows_before_it(sizes: list[int], most: int) -> None:
    shards = [Shard(name=f"s{i}", rows=size, tokens=1, file=FILE) for i, size in enumerate(sizes)]
    spans = spans_of(parts_of("test", shards), most)
    assert [shard for span in spans for _, _, shard in span] == shards
    assert [before for span in spans for _, before, _ in span] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert len(spans) <= most
    assert all(spans)


def test_scores_of_two_texts_are_those_of_both() -> None:
    first = Scores([3.0], [2], bytes=5, kl_nats=0.5, agreed=1, compared=2, of_rows={"accuracy": [1.0, 0.0]})
    second = Scores([1.0], [6], bytes=7, kl_nats=0.1, agreed=5, compared=6, of_rows={"accuracy": [1.0, 1.0]})
    both = (first + second).metrics()
    assert both["nats_per_token"] == 0.5
    assert both["kl_nats"] == pytest.approx(0.075)
    assert (both["top1_agreement"], both["accuracy"]) == (0.75, 0.75)
    assert (Scores() + first).metrics() == first.metrics()
    assert first.of_rows == {"accuracy": [1.0, 0.0]}
    without = first + Scores([1.0], [1])  # no row of the second had anything to average
    assert without.metrics()["accuracy"] == 0.5


class CutEvaluation:
    """The evaluation of a finished run, in a store of its own, with what it scores cut into shards of few rows."""

    def __init__(self, ran: Ran, folder: Path, rows: int) -> None:
        self.planned, self.steps = ran.plan.step(Evaluation), dict(ran.outcome.steps)
        self.storage_uri, self.engine = str(folder / "store"), Engine(ran.plan.config.resources)
        tokens: Tokens = self.steps["tokenize"].record
        shutil.copytree(ran.folder("tokenize").parent, folder / "store" / "tokenize" / tokens.key)
        cut = replace(self.steps["tokenize"].dir, storage_uri=self.storage_uri)
        self.shards: list[Shard] = []
        splits = dict(tokens.splits)
        with cut.hold(True, lambda owner: None) as held:
            for split in SCORED:
                shards = []
                for shard in tokens.splits[split].shards:
                    ids, lengths = read_tokens(open_shard(cut, shard))
                    for start in range(0, len(ids), rows):
                        few, valid = ids[start : start + rows], lengths[start : start + rows]
                        name, write = (
                            f"rows/cut-{split}-{start:05d}.parquet",
                            partial(write_tokens, ids=few, lengths=valid),
                        )
                        shards.append(store_shard(held, name, len(few), 1, write))
                splits[split] = Split(shards=tuple(shards))
                self.shards += shards
        self.steps["tokenize"] = FinishedStep(tokens.model_copy(update={"splits": splits}), cut)
        self.advanced: list[tuple[int, int]] = []

    def run(self) -> Evaluation:
        step_dir = replace(self.planned.dir, storage_uri=self.storage_uri)
        with step_dir.hold(True, lambda owner: None) as held:
            inputs = {name: self.steps[name] for name in self.planned.inputs}
            step = Step(self.planned.recipe, inputs, held, self.engine.resources, {}, 1, self.engine, self._advance)
            return evaluate.run(step)

    def _advance(self, done: int, total: int, note: str, points: Any = ()) -> None:
        self.advanced.append((done, total))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that were scored."""
    found: list[str] = []
    whole = Scorer.score

    def score(self: Scorer, split: SplitName, before: int, shard: Shard) -> Piece:
        found.append(shard.name)
        return whole(self, split, before, shard)

    monkeypatch.setattr(Scorer, "score", score)
    return found


def test_an_interrupted_evaluation_goes_on_where_it_was(
    finished: Ran, tmp_path: Path, scored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = CutEvaluation(finished, tmp_path / "undisturbed", rows=3).run()
    evaluation = CutEvaluation(finished, tmp_path, rows=3)
    scored.clear()
    sound = Scorer.score

    def breaking(self: Scorer, split: SplitName, before: int, shard: Shard) -> Piece:
        if len(scored) == 3:
            raise RunError("lost")
        return sound(self, split, before, shard)

    with monkeypatch.context() as patched:
        patched.setattr(Scorer, "score", breaking)
        with pytest.raises(RunError, match="lost"):
            evaluation.run()
    assert len(scored) == 3 < len(evaluation.shards)
    evaluated = evaluation.run()
    assert scored == [shard.name for shard in evaluation.shards]
    assert (evaluated.student, evaluated.teacher) == (undisturbed.student, undisturbed.teacher)
    assert evaluated.validation == undisturbed.validation
    digests = [{name: file.sha256 for name, file in each.files.items()} for each in (evaluated, undisturbed)]
    assert digests[0] == digests[1]


def test_validation_is_scored_as_the_test_split_is(finished: Ran, tmp_path: Path) -> None:
    evaluation = CutEvaluation(finished, tmp_path, rows=3)
    tokens = evaluation.steps["tokenize"]
    swapped = {"validation": tokens.record.splits["test"], "test": tokens.record.splits["validation"]}
    evaluation.steps["tokenize"] = replace(
        tokens, record=tokens.record.model_copy(update={"splits": tokens.record.splits | swapped})
    )
    other, whole = evaluation.run(), finished.record("evaluate")
    assert other.validation["student"] == pytest.approx(whole.student, rel=1e-5)
    assert other.validation["teacher"] == pytest.approx(whole.teacher, rel=1e-5)
    assert other.student == pytest.approx(whole.validation["student"], rel=1e-5)
    assert other.teacher == pytest.approx(whole.validation["teacher"], rel=1e-5)
    assert whole.validation["student"] != whole.student


def test_documents_end_where_the_text_says_whatever_the_shards(finished: Ran, tmp_path: Path) -> None:
    whole, tokens = finished.outcome.finished(Evaluation), finished.outcome.finished(Tokens)
    ids, _, _ = Rows(tokens.dir, tokens.record.splits["test"].shards).get(range(tokens.record.splits["test"].rows))
    documents, metrics = whole.read_json(Evaluation.DOCUMENTS), whole.record
    stream = ids.flatten().tolist()[: tokens.record.splits["test"].tokens]
    counts = [0]
    for place, token in enumerate(stream):
        counts[-1] += place % ids.shape[1] > 0  # the first of a block is context
        if token == tokens.record.end_of_text and place + 1 < len(stream):
            counts.append(0)
    assert documents["tokens"] == counts
    assert len(counts) > 10 > max(counts) // ids.shape[1]
    for model in ("teacher", "student"):
        mean = getattr(metrics, model)["nats_per_token"]
        assert math.fsum(documents[model]) / sum(counts) == pytest.approx(mean, rel=1e-12)
        assert len(documents[model]) == len(counts)
    cut = CutEvaluation(finished, tmp_path, rows=3)
    assert cut.run().files[Evaluation.DOCUMENTS].bytes > 0
    again = json.loads((tmp_path / "store" / "evaluate" / metrics.key / "1" / Evaluation.DOCUMENTS).read_text())
    assert again["tokens"] == counts
    assert again["student"] == pytest.approx(documents["student"], rel=1e-5)


def test_what_another_student_left_is_not_added(finished: Ran, tmp_path: Path, scored: list[str]) -> None:
    evaluation = CutEvaluation(finished, tmp_path, rows=3)
    evaluation.run()
    made = len(scored)
    evaluation.run()
    assert len(scored) == made  # all of it was there
    student = evaluation.steps["distill"]
    frozen = student.record.files[Student.FROZEN].model_copy(update={"sha256": "0" * 64})
    files = student.record.files | {Student.FROZEN: frozen}
    other = student.record.model_copy(update={"files": files, "digest": "0" * 64})
    evaluation.steps["distill"] = replace(student, record=other)
    with pytest.raises(DamagedError, match="does not match its checksum"):
        evaluation.run()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """How each model was made, and the device of its weights; on meta a model takes no memory."""
    found: list[tuple[str, str]] = []

    def counted(name: str) -> Any:
        make = getattr(AutoModelForCausalLM, name)

        def making(*args: Any, **kwargs: Any) -> Any:
            given = make(*args, **kwargs)
            model = given[0] if isinstance(given, tuple) else given
            found.append((name, next(model.parameters()).device.type))
            return given

        return making

    for name in ("from_config", "from_pretrained"):
        monkeypatch.setattr(AutoModelForCausalLM, name, counted(name))
    return found


def test_no_span_of_an_evaluation_builds_three_models(
    finished: Ran, tmp_path: Path, built: list[tuple[str, str]]
) -> None:
    evaluation = CutEvaluation(finished, tmp_path, rows=3)
    evaluation.run()
    spans = len(spans_of(parts_of("test", evaluation.shards), SPANS_A_WORKER))
    assert len(evaluation.shards) > spans > 1
    assert built == [("from_config", "cpu"), ("from_pretrained", "cpu")] * spans  # the student and its teacher
    built.clear()
    evaluation.run()
    assert built == []  # all scores were there


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, namespace="bitmill", log_to_driver=False, dashboard_host="127.0.0.1")
    yield
    ray.shutdown()


def test_shards_are_scored_by_tasks_of_ray(two_cpus: None, finished: Ran, tmp_path: Path) -> None:
    alone = CutEvaluation(finished, tmp_path / "alone", rows=3).run()
    evaluation = CutEvaluation(finished, tmp_path / "ray", rows=3)
    evaluation.engine = Engine(finished.plan.config.resources.model_copy(update={"workers": 2}))
    evaluated = evaluation.run()
    assert (evaluated.student, evaluated.teacher, evaluated.digest) == (alone.student, alone.teacher, alone.digest)
    assert evaluation.advanced[-1][0] == evaluation.advanced[-1][1] > 1


def timed(folder: Path, number: int, wrong: int | None = None) -> tuple[int, float, float]:
    (folder / str(number)).touch()
    begun = time.monotonic()
    time.sleep(0.2)
    if number == wrong:
        raise RunError(f"number {number} is lost")
    return number, begun, time.monotonic()


def test_tasks_run_as_many_at_once_as_there_are_workers(two_cpus: None, finished: Ran, tmp_path: Path) -> None:
    engine = Engine(finished.plan.config.resources.model_copy(update={"workers": 1}))
    step_dir, advanced = finished.plan.step(Evaluation).dir, []

    def advance(done: int, total: int, note: str, points: Any = ()) -> None:
        advanced.append((done, total))

    (tmp_path / "sound").mkdir()
    found = engine.tasks([partial(timed, tmp_path / "sound", i) for i in range(4)], step_dir, advance, 0)
    assert [number for number, _, _ in found] == [0, 1, 2, 3]
    assert all(end <= begun for (_, _, end), (_, begun, _) in pairwise(found))  # Ray would have run two
    assert advanced == [(1, 4), (2, 4), (3, 4), (4, 4)]
    broken = [partial(timed, tmp_path, i, 1) for i in range(10, 10 + 2)]
    with pytest.raises(RunError, match=r"^number 11 is lost$"):
        engine.tasks([broken[0], partial(timed, tmp_path, 11, 11), *broken], step_dir, advance, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "11", "sound"]
    with pytest.raises(ConfigError, match="GPU"):
        Engine(engine.resources.model_copy(update={"gpus_per_worker": 1.0})).tasks([timed], step_dir, advance, 1.0)
