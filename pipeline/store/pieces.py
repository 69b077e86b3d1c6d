"""Work in pieces: what is known of each is a JSON document, so that an attempt that takes over goes on from there."""

from __future__ import annotations

import json
from typing import Any

from pipeline.store.step_store import StepDir


class Pieces:
    """The documents in a folder of a step, each as the newest attempt wrote it, listed once."""

    def __init__(self, step_dir: StepDir, folder: str) -> None:
        self._dir, self._folder = step_dir, folder
        self._places = step_dir.newest(folder)

    def get(self, name: str) -> Any:
        """Return the document of a name, or None if there is none or it is damaged."""
        place = self._places.get(self._name(name))
        try:
            return None if place is None else json.loads(self._dir.read(place))
        except (FileNotFoundError, ValueError):
            return None

    def put(self, name: str, document: Any) -> None:
        """Store a document under a name."""
        self._dir.write(self._name(name), json.dumps(document).encode())
        self._places[self._name(name)] = self._dir.place(self._name(name))

    def all(self) -> list[Any]:
        """Return the documents that are sound."""
        names = [name.removeprefix(self._folder).removesuffix(".json") for name in self._places]
        return [document for document in map(self.get, names) if document is not None]

    def _name(self, name: str) -> str:
        return f"{self._folder}{name}.json"
