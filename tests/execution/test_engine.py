"""Reaching and starting Ray: whose fault it is when that fails."""

from __future__ import annotations

import pytest
import ray

from pipeline.config.resources import Resources
from pipeline.errors import ConfigError, LostError
from pipeline.execution.engine import Engine

ELSEWHERE = "127.0.0.1:6379"
LATE = "The current node timed out during startup."
LOST = f"did not start: {LATE}.*run the same command again"


@pytest.mark.parametrize(
    ("address", "raised", "found", "needle"),
    [
        (
            ELSEWHERE,
            ConnectionError("nobody listens"),
            ConfigError,
            r"at 127\.0\.0\.1:6379: nobody listens.*RAY_ADDRESS",
        ),
        (ELSEWHERE, TimeoutError("nobody answers"), ConfigError, r"at 127\.0\.0\.1:6379: nobody answers"),
        (ELSEWHERE, Exception(LATE), LostError, LOST),
        (None, Exception(LATE), LostError, LOST),
        (None, RuntimeError(LATE), LostError, LOST),
        (None, TimeoutError(LATE), LostError, LOST),
        (None, PermissionError("/tmp/ray"), ConfigError, "at this machine: /tmp/ray"),
        (ELSEWHERE, TypeError("a mistake of ours"), TypeError, "a mistake of ours"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_keeps_ray_from_starting_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, address: str | None, raised: Exception, found: type[Exception], needle: str
) -> None:
    def init(**settings: object) -> None:
        raise raised

    monkeypatch.setattr(ray, "init", init)
    engine = Engine(Resources(ray_address=address))
    with pytest.raises(found, match=needle) as caught:
        engine.start()
    assert caught.type is found
    engine.close()
