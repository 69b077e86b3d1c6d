"""A run whose process is killed in each stage in turn ends as one that nothing befalls."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config.run import Config
from pipeline.flow.line import LINE
from pipeline.store.locations import tracking_uri
from pipeline.store.records import Package
from pipeline.store.step_store import StepDir
from pipeline.tracking import runs
from tests.conftest import Ran


def killed_at(stage: str, work: Callable[[], Any]) -> int:
    """The exit code of a process that does work and is killed as a stage is about to commit its record."""
    pid = os.fork()
    if pid == 0:
        commit = StepDir.commit

        def dying(self: StepDir, record: Any, **given: Any) -> Any:
            if self.stage == stage:
                os.kill(os.getpid(), signal.SIGKILL)
            return commit(self, record, **given)

        StepDir.commit = dying  # type: ignore[assignment, method-assign]
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_run_that_is_killed_in_every_stage_is_the_undisturbed_one(
    finished: Ran, tiny_config: Callable[..., Config], run_flow: Callable[..., Ran], tmp_path: Path
) -> None:
    config = tiny_config(tmp_path)
    for stage in LINE:
        assert killed_at(stage.name, lambda: run_flow(config)) == -signal.SIGKILL
    ran = run_flow(config)
    assert [what for what, _ in ran.listener.events] == ["reused"] * (len(LINE) - 1) + ["started", "done"]
    assert ran.record(Package.stage).digest == finished.record(Package.stage).digest
    assert len(runs.connect(tracking_uri(config.resources)).search_model_versions("name = 'tiny'")) == 1
