"""The same schedule with its store in S3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.config.run import Config
from pipeline.retrain.decisions import Decisions
from pipeline.retrain.rollback import rollback
from pipeline.retrain.ticks import TickLog
from tests.retrain.schedule import NAME, Schedule
from tests.store.test_step_store import serve_s3


def test_a_schedule_in_s3(tmp_path: Path, tiny_config: Callable[..., Config], corpus: Path) -> None:
    documents = corpus.read_text(encoding="utf-8").strip().split("\n\n")
    with serve_s3() as bucket:
        schedule = Schedule(tmp_path, tiny_config, documents)
        schedule.sections["resources"] = {"storage_uri": f"{bucket}/project", "tracking_uri": schedule.uri}
        schedule.grow(1)
        assert schedule.tick({"finetune.steps": 1, "distill.steps": 1}).outcome == "promoted"
        schedule.grow(2)
        better = {"finetune.steps": 8, "distill.steps": 4}
        verdict = schedule.tick(better)
        assert (verdict.outcome, verdict.champion, verdict.previous) == ("promoted", 2, 1)
        rollback(NAME, None, "worse", schedule.config().resources)
        stands = schedule.tick(better)
        assert (stands.outcome, stands.champion) == ("unchanged", 1)
        assert schedule.tick(better).outcome == "unchanged"
        assert [
            (line.outcome, line.count) for line in TickLog(Decisions.of(NAME, schedule.config().resources)).all()
        ] == [("unchanged", 2)]
        assert schedule.aliases == {"champion": 1, "previous": 2}
        assert [decision.decision for decision in schedule.heard] == ["promoted", "promoted", "rolled back"]
