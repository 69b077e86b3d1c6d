"""Reaching and starting Ray: whose fault it is when that fails."""

from __future__ import annotations

import pytest
import ray

from pipeline.engine import Engine
from pipeline.errors import ConfigError, LostError
from pipeline.resources import Resources

LATE = "The current node timed out during startup."


@pytest.mark.parametrize(
    ("raised", "found", "needle"),
    [
        (ConnectionError("nobody listens"), ConfigError, r"at 127\.0\.0\.1:6379: nobody listens.*RAY_ADDRESS"),
        (Exception(LATE), LostError, f"did not start in time: {LATE}.*run the same command again"),
        (TypeError("a mistake of ours"), TypeError, "a mistake of ours"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_keeps_ray_from_starting_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, found: type[Exception], needle: str
) -> None:
    def init(**settings: object) -> None:
        raise raised

    monkeypatch.setattr(ray, "init", init)
    engine = Engine(Resources(ray_address="127.0.0.1:6379"))
    with pytest.raises(found, match=needle) as caught:
        engine.start()
    assert caught.type is found
    engine.close()
