"""What was decided of a name: a journal in the store, which is the truth, and the aliases in MLflow, which show it.

MLflow sets an alias without asking what it was. So an alias is never moved first: the decision is appended under a
fencing token, and then the aliases are put where the journal says. Who does that looks at the journal again afterwards,
so that one that was stopped in between, and overtaken, puts them right itself; and every command that moves aliases
begins with it, so that what a killed one, or a server that was away, left undone is done by the next.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from pipeline.config.base import Closed
from pipeline.config.resources import Resources
from pipeline.errors import ConfigError, FencedOffError, RunError
from pipeline.retrain.gate import Gain, Ruling
from pipeline.store.journal import Journal
from pipeline.store.lease import LeaseFile, Owner
from pipeline.store.locations import storage_uri, tracking_uri
from pipeline.store.objects import open_objects
from pipeline.store.step_store import check_store
from pipeline.tracking import registry, runs
from pipeline.tracking.registry import CHAMPION, PLACE_TAG, PREVIOUS

Outcome = Literal["promoted", "rejected", "rolled back"]
DECISION_FILE, ROLLBACK_FILE, FOLDER = "decision.json", "rollback.json", "retrain/"
C = TypeVar("C", bound=Closed)
Notifies = Callable[["Decision"], bool]  # tells the world, and whether it arrived


class Notes(Closed):
    """What is known of a schedule beside its decisions: `retrain.keep` of the last tick; stage and key of the steps of
    a tick that was begun and not decided, or ended by worker-hours; when the tick began that is under way."""

    keep: int | None = None
    unfinished: tuple[tuple[str, str], ...] = ()
    running: str = ""  # UTC


class Decision(Closed):
    """What a command decided of a name, and why. `champion` and `previous` are the versions that bear these aliases
    from then on; `key` is that of the tick, of which one decision is made ("": of no tick), or another once it may use
    more than `max_worker_hours`, which ended it."""

    decision: Outcome
    reason: str
    name: str
    at: str  # UTC
    key: str = ""
    champion: int | None = None
    previous: int | None = None
    challenger: int | None = None  # the version that was registered, if one was
    others: tuple[int, ...] = ()  # versions of the other recipes, which validation found worse
    unjudged: dict[str, str] = {}  # why, by run key of challengers that the gate was not asked of
    run_key: str = ""  # of the challenger
    run_keys: tuple[str, ...] = ()  # of all that were to be trained
    rulings: tuple[Ruling, ...] = ()
    decided_by: str = ""  # the ruling whose reason this is
    gains: dict[str, Gain] = {}
    measure: str = ""  # what the task is measured by
    scores: dict[
        str, dict[str, float]
    ] = {}  # of challenger and, if it met one, champion, on the challenger's test rows
    packed_bytes: int | None = None  # of the challenger
    worker_seconds: float = 0.0  # of all attempts of the tick
    max_worker_hours: float | None = None  # None: it was not ended by them

    def told(self) -> str:
        """Return it as JSON, for people and commands."""
        return json.dumps(self.model_dump(mode="json"), indent=1)


def now() -> str:
    """Return the time of a decision."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Decisions:
    """The decisions of one registered name in a store. To decide, enter `held`."""

    def __init__(self, name: str, store: str, tracking: str) -> None:
        self.name, self.store, self.uri = name, store, tracking
        objects, self.folder = open_objects(store), f"{FOLDER}{name}/"
        self._journal = Journal(objects, self.folder, f"history of {name}")
        self._lease = LeaseFile(objects, self.folder, f"retraining of {name}")

    @classmethod
    def of(cls, name: str, resources: Resources) -> Decisions:
        """Return the decisions of a name in the store and registry of these resources."""
        return cls(name, storage_uri(resources), tracking_uri(resources))

    def all(self) -> Iterator[Decision]:
        """Yield the decisions, the last one first. Raises RunError for an entry that a newer bitmill wrote."""
        return map(self._read, self._journal.entries())

    def _read(self, entry: dict[str, Any]) -> Decision:
        return self.parsed(Decision, entry)

    def parsed(self, kind: type[C], fields: dict[str, Any]) -> C:
        """Return what was kept of this name from its fields. Raises RunError if a newer bitmill wrote it."""
        try:
            return kind.model_validate(fields)
        except ValidationError as error:
            raise RunError(
                f"What is kept of {self.name} was written by another version of bitmill, and cannot be read: "
                f"{error.errors()[0]['loc']}. Upgrade bitmill."
            ) from error

    def last(self) -> Decision | None:
        """Return the last decision: where the aliases are."""
        return next(self.all(), None)

    def last_rollback(self) -> Decision | None:
        """Return the last decision if it is a rollback."""
        last = self.last()
        return last if last is not None and last.decision == "rolled back" else None

    def notes(self) -> Notes:
        """Return what is known beside the decisions. Raises RunError if a newer bitmill wrote it."""
        return self.parsed(Notes, self._journal.head().notes)

    def ticked(self) -> float:
        """Return when a command last took the name, in seconds of the store's own clock. Raises KeyError: none did."""
        return self._journal.written()

    def count(self) -> int | None:
        """Count the decisions; None: no command ever took the name."""
        head = self._journal.head()
        return head.count if head.fence > 0 else None

    def refuse_another_place(self) -> None:
        """Raise ConfigError if the journal of another store decides on this name of the registry."""
        place = registry.place_of(self.uri, self.name)
        if place not in (None, self.store):
            raise ConfigError(
                f"On {self.name}, in the registry at {self.uri!r}, the store {place} decides, whose journal moves its "
                f"aliases; this is the store {self.store}. Set resources.storage_uri and resources.namespace "
                "(--storage-uri, --namespace) to that one, or register under another name (register.name). If it is "
                f"the same store, which was moved, delete the tag {PLACE_TAG} of the registered model in MLflow."
            )

    @contextlib.contextmanager
    def held(self, seize: bool = False) -> Iterator[Deciding]:
        """Hold the name's lease while inside; aliases are where the journal says before anything is decided. With
        `seize` it is taken from a process that lives, which decides nothing any more.

        Raises:
            BusyError: another process holds it, and lives.
            ConfigError: another store decides on this name, or two processes could both hold it in this one.
        """
        check_store(self.store)
        self.refuse_another_place()
        with self._lease.hold(False, _never_told, sure=True, seize=seize) as fence:
            self._journal.claim(fence)
            deciding = Deciding(self, fence)
            deciding.put_aliases()
            yield deciding


class Deciding:
    """The decisions of a name in the hands of whoever holds its lease."""

    def __init__(self, decisions: Decisions, fence: int) -> None:
        self.decisions, self.fence = decisions, fence

    def check(self) -> None:
        """Raise FencedOffError if another process took over."""
        self.decisions._lease.check(self.fence)

    def overtaken(self) -> bool:
        """Tell whether another process took over."""
        lease = self.decisions._lease.read()
        return lease is None or lease.fence != self.fence

    def note(self, **changed: Any) -> None:
        """Change fields of the notes. Raises FencedOffError if another process took over."""
        before = self.decisions.notes()
        notes = before.model_copy(update=changed)
        if notes != before:
            self.decisions._journal.note(notes.model_dump(mode="json"), self.fence)

    def append(self, decision: Decision) -> None:
        """Write a decision down, once and for all. Raises FencedOffError if another process took over."""
        self.check()
        notes = self.decisions.notes()
        ended = decision.decision in ("promoted", "rejected") and decision.max_worker_hours is None
        running = notes.running if decision.decision == "rolled back" else ""  # no tick's own word
        since = notes.model_copy(update={"running": running, "unfinished": () if ended else notes.unfinished})
        self.decisions._journal.append(decision.model_dump(mode="json"), self.fence, since.model_dump(mode="json"))

    def put_aliases(self) -> None:
        """Put the aliases where the last decision has them, read them back, and tell version and run of it. Raises
        RunError if MLflow refuses or is away."""
        shown: Decision | None = None
        while (decision := self.decisions.last()) is not None and decision != shown:
            try:
                show(self.decisions.uri, self.decisions.store, decision)
            except RunError:  # whoever overtook us moved them meanwhile
                if self.decisions.last() == decision:
                    raise
            shown = decision

    def tell(self, tells: Notifies) -> None:
        """Tell of the decisions that were not told of, the first one first, as far as it arrives. Whoever takes over
        meanwhile tells the rest."""
        with contextlib.suppress(FencedOffError):
            for number, entry in self.decisions._journal.untold():
                if not tells(self.decisions._read(entry)):
                    return
                self.decisions._journal.tell(number, self.fence)


def schedules(resources: Resources) -> list[Decisions]:
    """Return the decisions of each name that a command ever took in the store of these resources."""
    return [Decisions.of(name, resources) for name in open_objects(storage_uri(resources)).folders(FOLDER)]


def show(uri: str, place: str, decision: Decision) -> None:
    """Show one decision of a place in MLflow: aliases, and the reasons as tags of the versions, or of the
    run of what the gate was not asked of, and a file of the run."""
    aliases = {CHAMPION: decision.champion, PREVIOUS: decision.previous}
    if decision.champion is None:  # what was registered since, by `compress`, is the first of the name, and crowned
        del aliases[CHAMPION]
    advice = "The decision is kept in the store, and the next command on this name completes it."
    with runs.refusal(f"MLflow at {uri} refused the aliases of {decision.name}", advice):
        client = runs.client_of(uri)
        registry.put_place(client, decision.name, place)
        registry.put_aliases(client, decision.name, aliases)
        if decision.challenger is not None:
            tags = _tags(decision.decision, decision.reason)
            registry.tell(client, decision.name, decision.challenger, tags, {DECISION_FILE: decision.told()})
        for version in decision.others:
            tags = _tags("rejected", f"version {decision.challenger}, of another recipe, is better on validation")
            registry.tell(client, decision.name, version, tags, {})
        for key, reason in decision.unjudged.items():
            runs.tell(client, key, _tags("rejected", reason), {DECISION_FILE: decision.told()})
        if decision.decision == "rolled back":
            for bearer, became in ((decision.previous, "rolled back"), (decision.champion, "rolled back to")):
                if bearer is not None:
                    tags = _tags(became, decision.reason)
                    registry.tell(client, decision.name, bearer, tags, {ROLLBACK_FILE: decision.told()})


def _tags(decision: str, reason: str) -> dict[str, str]:
    return {"bitmill.decision": decision, "bitmill.decision_reason": reason[:500]}


def _never_told(owner: Owner) -> None:
    """Say nothing: a tick does not wait."""
