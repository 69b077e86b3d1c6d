"""Work in pieces: what is known of each is a JSON document, so that an attempt that takes over goes on from there."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pipeline.store.records import attempt_of
from pipeline.store.step_store import StepDir

SETTLED = "settled"
Parse = Callable[[Any], Any]


def _as_it_is(document: Any) -> Any:
    return document


class Pieces:
    """The documents in a folder of a step, each as the newest attempt wrote it, listed once. A parser may raise
    ValueError, KeyError, TypeError or AttributeError: the document is damaged.

    Where an attempt settled what there was before it, that stands, whatever an attempt before it still writes.
    """

    def __init__(self, step_dir: StepDir, folder: str) -> None:
        self._dir, self._folder = step_dir, folder
        self._places = step_dir.newest(folder)
        self._settled: dict[str, Any] = {}
        settled = self._places.pop(folder + SETTLED, None)
        if settled is not None and isinstance(known := self._read(settled), dict):
            newer = attempt_of(settled)
            self._settled, places = known, self._places.items()
            self._places = {name: place for name, place in places if attempt_of(place) >= newer}

    def get(self, name: str, parse: Parse = _as_it_is) -> Any:
        """Return the document of a name as `parse` returns it, or None if there is none or it is damaged."""
        place = self._places.get(self._name(name))
        document = self._settled.get(name) if place is None else self._read(place)
        try:
            return None if document is None else parse(document)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def put(self, name: str, document: Any) -> None:
        """Store a document under a name."""
        self._dir.write(self._name(name), json.dumps(document).encode())
        self._places[self._name(name)] = self._dir.place(self._name(name))

    def all(self, parse: Parse = _as_it_is) -> list[Any]:
        """Return the documents that are sound."""
        return [document for name in self._names() if (document := self.get(name, parse)) is not None]

    def settle(self) -> None:
        """Write down, for this attempt, what documents there are."""
        known = {name: document for name in self._names() if (document := self.get(name)) is not None}
        self._dir.write(self._folder + SETTLED, json.dumps(known).encode())
        self._settled, self._places = known, {}

    def _read(self, place: str) -> Any:
        try:
            return json.loads(self._dir.read(place))
        except (FileNotFoundError, ValueError):
            return None

    def _names(self) -> list[str]:
        stored = (name.removeprefix(self._folder).removesuffix(".json") for name in self._places)
        return list(dict.fromkeys([*self._settled, *stored]))

    def _name(self, name: str) -> str:
        return f"{self._folder}{name}.json"
