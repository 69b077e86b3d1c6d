"""A journal: entries that are appended one after the other and never changed, and a head that says which is the last.

Whoever appends first claims the head with the fencing token of its lease. From then on an attempt with an older token
cannot append, however long it was stopped: the head is swapped, and an entry that no head leads to does not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import Any

from pipeline.errors import FencedOffError, RunError
from pipeline.store.objects import Objects

HEAD = "head.json"


@dataclass(frozen=True)
class Head:
    """The last entry by its name, None where there is none; the newest token that claimed the journal; and how many
    entries there are, and of how many the world was told. `notes`, of JSON, are of whoever appends, and change."""

    fence: int = 0
    last: str | None = None
    count: int = 0
    told: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Return the bytes of the file."""
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True)
class Journal:
    """The journal of one folder of a store, which ends in a slash. `title` names it in messages."""

    objects: Objects
    folder: str
    title: str

    def head(self) -> Head:
        """Return the head as it is now."""
        try:
            return Head(**json.loads(self.objects.read(self.folder + HEAD)))
        except (FileNotFoundError, NotADirectoryError):
            return Head()

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yield the entries, the last one first."""
        name = self.head().last
        while name is not None:
            entry = _entry(self.objects.read, self.folder + name)
            yield entry["entry"]
            name = entry["before"]

    def written(self) -> float:
        """Return when the head was last written, in seconds of the store's clock. Raises KeyError: it never was."""
        return self.objects.stats(self.folder + HEAD)[self.folder + HEAD].written

    def untold(self) -> list[tuple[int, dict[str, Any]]]:
        """Return the entries that the world was not told of, the first one first, each with its number from 1."""
        head = self.head()
        newest = islice(self.entries(), head.count - head.told)
        return [(head.count - age, entry) for age, entry in enumerate(newest)][::-1]

    def tell(self, number: int, fence: int) -> None:
        """Write down that the world was told of all entries up to a number. Raises FencedOffError as `append` does."""
        head = self._own_head(fence)
        if not self._swap(head, replace(head, told=number)):
            raise self._fenced_off(self.head())

    def note(self, notes: dict[str, Any], fence: int) -> None:
        """Put other notes in the place of those that there are. Raises FencedOffError as `append` does."""
        head = self._own_head(fence)
        if not self._swap(head, replace(head, notes=notes)):
            raise self._fenced_off(self.head())

    def claim(self, fence: int) -> Head:
        """Return the head, which from now on only this token or a newer one moves. Raises FencedOffError: a newer one
        has it; RunError: the head is not as this version writes it."""
        while (head := self.head()).fence != fence:
            if head.fence > fence:
                raise self._fenced_off(head)
            claimed = replace(head, fence=fence)
            if self._swap(head, claimed):
                return claimed
            if self.head() == head:
                raise RunError(f"The head of the {self.title}, {self.folder}{HEAD}, was written by another version.")
        return head

    def append(self, entry: dict[str, Any], fence: int, notes: dict[str, Any] | None = None) -> Head:
        """Append an entry and, unless None, put other notes in the place of those that there are, both at once. Raises
        FencedOffError unless the journal is still this token's."""
        head = self._own_head(fence)
        data = json.dumps({"entry": entry, "before": head.last}).encode()
        name = f"entries/{head.count + 1:06d}-{hashlib.sha256(data).hexdigest()[:12]}.json"
        self.objects.write(self.folder + name, data)
        longer = replace(head, last=name, count=head.count + 1, notes=head.notes if notes is None else notes)
        if not self._swap(head, longer):
            raise self._fenced_off(self.head())
        return longer

    def _own_head(self, fence: int) -> Head:
        head = self.head()
        if head.fence != fence:
            raise self._fenced_off(head)
        return head

    def _swap(self, head: Head, other: Head) -> bool:
        """Put another head in the place of one."""
        name = self.folder + HEAD
        made = head == Head() and self.objects.create(name, other.to_json())
        return made or self.objects.swap(name, head.to_json(), other.to_json())

    def _fenced_off(self, head: Head) -> FencedOffError:
        return FencedOffError(f"The {self.title} is no longer ours: its attempt {head.fence} took it over.")


@lru_cache(maxsize=4096)
def _entry(read: Callable[[str], bytes], name: str) -> dict[str, Any]:
    """Return an entry with the name of the one before; neither ever changes."""
    entry: dict[str, Any] = json.loads(read(name))
    return entry
