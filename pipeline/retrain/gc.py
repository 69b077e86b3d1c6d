"""Garbage collection: the steps of a store that nothing needs any more, and how they go.

    never     decisions, sweeps' records; packages, scores and registrations of all that was registered from the store
    kept      all that made the newest versions of each name, and each that bears an alias, or that the last decision
              names as champion or previous; and the steps of the tick that a schedule which still ticks began and did
              not decide, or that worker-hours ended
    not yet   what was written within the grace period or is run by a live process, what it is made of, and what the
              command that runs it will need
    goes      the rest: trials and challengers given up, unfinished steps; rows, teachers, caches and latent weights of
              versions that are older; what records say of these is remembered, for `bitmill lineage`

A step goes whole, in the hands of its own lease, after all of that was looked up again. The command that needs it makes
it again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.resources import Resources
from pipeline.config.retrain import Retrain
from pipeline.errors import BusyError, ConfigError, FencedOffError
from pipeline.flow.line import STAGES
from pipeline.retrain.decisions import Decisions, schedules
from pipeline.store import scratch
from pipeline.store.lease import DEAD_AFTER_S, Owner
from pipeline.store.locations import scratch_dir, storage_uri, tracking_uri
from pipeline.store.pieces import Pieces
from pipeline.store.records import Contest, Evaluation, ModelVersion, Package, Record, Sensitivity, SweepRecord
from pipeline.store.step_store import StepDir, StoredStep, check_store, delete_probes, now_of, stored_steps
from pipeline.tracking import registry
from pipeline.tracking.lookup import reach
from pipeline.tracking.registry import Registered

Name = tuple[str, str]  # stage and key of a step
KINDS: dict[str, type[Record]] = {  # what is made before what it is made of
    SweepRecord.stage: SweepRecord,
    Contest.stage: Contest,
    **{name: STAGES[name].record for name in reversed(STAGES)},
}
SMALL = (Evaluation.stage, Package.stage, ModelVersion.stage)
BESIDE = (Contest.stage, Sensitivity.stage)  # of use as long as something that they were made of is there
TRIALS = "trials/"  # of a sweep
SCRATCH = "scratch"
LIVE_S = 100 * 86400.0  # since a schedule last ticked: longer than a quarter
LOOKS, AT_ONCE = 16, 32  # at all that is needed, while so many steps or more are deleted: each reads the whole store


@dataclass(frozen=True)
class Garbage:
    """What may go: a step by stage and key, or a path of the stage `scratch`. `of_version`: a registered version was
    made of it."""

    stage: str
    place: str
    bytes: int
    why: str
    of_version: bool = False


class Collector:
    """Finds and deletes the garbage of a store. The newest `keep` versions of each name keep all that made them (None:
    as many as `retrain.keep` of its schedule says), and what was written in the last `grace_s` seconds stays. Raises
    ConfigError: registry or store cannot be reached."""

    def __init__(self, resources: Resources, keep: int | None, grace_s: float) -> None:
        self.resources, self.keep, self.grace_s = resources, keep, grace_s
        self._root, self._scratch = storage_uri(resources), Path(scratch_dir(resources)).expanduser()
        reach(tracking_uri(resources))  # before anything is made where no store is
        try:
            self._now = now_of(self._root)  # what is written from here on is younger still
        except OSError as error:
            raise ConfigError(
                f"The store {self._root!r} cannot be written to: {error}. Set --storage-uri to a directory, or to "
                "s3://bucket/prefix with credentials that allow it."
            ) from error
        self._inputs: dict[Name, dict[str, str]] = {}  # those of a key never change

    def kept_by_schedules(self) -> dict[str, int]:
        """Return how many versions of a name keep all that made them, by each name whose schedule says it."""
        if self.keep is not None:
            return {}
        said = {schedule.name: schedule.notes().keep for schedule in schedules(self.resources)}
        return {name: keep for name, keep in said.items() if keep is not None}

    def find(self) -> list[Garbage]:
        """Return all that may go; deletes nothing.

        Raises:
            ConfigError: the registry cannot be reached, or is not that of this store.
            RunError: a record that says what is needed is damaged, or was written by a newer bitmill.
        """
        why = "left by commands, and nobody uses it"
        left = scratch.unused(self._scratch, self.grace_s)
        return [*self._unneeded(), *(Garbage(SCRATCH, str(path), size, why) for path, size in sorted(left.items()))]

    def delete(self, garbage: Sequence[Garbage]) -> list[Garbage]:
        """Delete what is neither held nor needed by now; return what went.

        Raises:
            ConfigError: as `find` does, or two processes could both hold a step of this store.
            RunError: as `find` does.
        """
        check_store(self._root)
        delete_probes(self._root, self._now - max(self.grace_s, DEAD_AFTER_S))  # a live command's are younger
        steps = [item for item in garbage if item.stage != SCRATCH]
        at_once, gone = max(AT_ONCE, math.ceil(len(steps) / LOOKS)), list[Garbage]()
        for first in range(0, len(steps), at_once):
            gone += self._delete_steps(steps[first : first + at_once])
        left = [item for item in garbage if item.stage == SCRATCH]
        unused = scratch.unused(self._scratch, self.grace_s) if left else {}
        for item in left:
            if Path(item.place) in unused:
                scratch.remove(Path(item.place))
                gone.append(item)
        return gone

    def _delete_steps(self, garbage: Sequence[Garbage]) -> list[Garbage]:
        """Delete those of some steps that nothing needs once all of them are held, in their order."""
        gone, held = list[Garbage](), dict[Name, StepDir]()
        with contextlib.ExitStack() as leases:
            for item in garbage:
                name = item.stage, item.place
                with contextlib.suppress(BusyError):
                    held[name] = leases.enter_context(self._dir(name).hold(False, _never_told, sure=True))
            for item in self._unneeded(ours=held) if held else ():
                with contextlib.suppress(FencedOffError):
                    if (item.stage, item.place) in held:
                        held[item.stage, item.place].clear(remember=item.of_version)
                        gone.append(item)
        return gone

    def _dir(self, name: Name) -> StepDir:
        return StepDir(self._root, *name, str(self._scratch))

    def _unneeded(self, ours: Collection[Name] = ()) -> list[Garbage]:
        """Return the steps that nothing needs. `ours` are those whose leases we hold ourselves."""
        stored = {(stage, key): step for stage in KINDS for key, step in stored_steps(self._root, stage).items()}
        versions = self._versions(stored)
        newest = self._newest(versions)
        kept = self._made_of([*self._roots_of(newest), *self._alive(stored, ours), *self._unfinished()])
        kept |= {name for name in self._registrations(versions, stored) if name[0] in SMALL}
        kept |= {name for name in stored if name[0] in BESIDE and not kept.isdisjoint(self._inputs_of(name).items())}
        older, unneeded = self._made_of(self._roots_of(versions)), list[Garbage]()
        for name, step in stored.items():
            if name in kept or name[0] == SweepRecord.stage or not step.bytes:
                continue
            why = "no registered version was made of it" if step.done else "unfinished, and nobody runs it"
            if name in older:
                number = "" if self.keep is None else f" {self.keep}"
                why = f"only versions before the newest{number} of their name were made of it"
            unneeded.append(Garbage(*name, step.bytes, why, of_version=name in older))
        return unneeded

    def _versions(self, stored: Mapping[Name, StoredStep]) -> list[Registered]:
        """Return all versions there are. Raises ConfigError unless the registry is that of the store."""
        uri = tracking_uri(self.resources)
        versions = registry.registered_versions(reach(uri))
        keys = {key for (stage, key), step in stored.items() if stage == ModelVersion.stage and step.done}
        if keys and keys.isdisjoint(version.key for version in versions):
            raise ConfigError(
                f"The registry at {uri!r} holds none of the {len(keys)} versions that were registered from the store "
                f"{self._root}, so it cannot say what is needed; nothing was deleted. Set --tracking-uri to theirs."
            )
        return versions

    def _newest(self, versions: Sequence[Registered]) -> list[Registered]:
        """Return the newest versions of each name, and those that it shows or decided to show."""
        aliased, newest = registry.aliased(reach(tracking_uri(self.resources))), list[Registered]()
        kept, default = self.kept_by_schedules(), Retrain().keep if self.keep is None else self.keep
        for name in {version.name for version in versions}:
            last = Decisions.of(name, self.resources).last()
            shown = aliased.get(name, set()) | (set() if last is None else {last.champion, last.previous})
            of_name = sorted((v for v in versions if v.name == name), key=lambda version: -version.version)
            newest += [v for age, v in enumerate(of_name) if age < kept.get(name, default) or v.version in shown]
        return newest

    def _roots_of(self, versions: Iterable[Registered]) -> Iterator[Name]:
        """Yield the steps that a registry names for versions; records tell of those before."""
        for version in versions:
            yield ModelVersion.stage, version.key
            yield from ((stage, key) for stage, key in version.lineage.items() if stage in KINDS)

    def _registrations(self, versions: Sequence[Registered], stored: Mapping[Name, StoredStep]) -> Iterator[Name]:
        """Yield the registrations that registry or store know, and what was registered."""
        yield from self._roots_of(versions)
        for name in stored:
            if name[0] == ModelVersion.stage:
                yield name
                yield from self._inputs_of(name).items()

    def _alive(self, stored: Mapping[Name, StoredStep], ours: Collection[Name]) -> Iterator[Name]:
        """Yield what is young, what a process runs that may live, and what that will need."""
        for name, step in stored.items():
            if self._now - step.written < self.grace_s:
                yield name
            if name in ours or self._now - step.leased > max(self.grace_s, DEAD_AFTER_S):  # hearts beat more often
                continue
            needed = self._dir(name).needed()
            if needed is not None:
                yield name
                yield from needed
                if name[0] == SweepRecord.stage:
                    for kept in Pieces(self._dir(name), TRIALS).all():
                        yield from kept["trial"]["step_keys"].items()

    def _unfinished(self) -> Iterator[Name]:
        """Yield the steps that the next tick of a schedule goes on from, unless that has not ticked for long."""
        for schedule in schedules(self.resources):
            with contextlib.suppress(KeyError):
                if self._now - schedule.ticked() < LIVE_S:
                    yield from schedule.notes().unfinished

    def _made_of(self, names: Iterable[Name]) -> set[Name]:
        """Return the steps, and all that they were made of."""
        reached: set[Name] = set()
        waiting = [*names]
        while waiting:
            name = waiting.pop()
            if name not in reached:
                reached.add(name)
                waiting += self._inputs_of(name).items()
        return reached

    def _inputs_of(self, name: Name) -> dict[str, str]:
        """Return the keys of what a step is, or was, made of, by stage; none of one that was never done."""
        if name not in self._inputs:
            if (kind := KINDS.get(name[0])) is None:
                return {}
            record = self._dir(name).record(kind) or self._dir(name).former(kind)
            if record is None:
                return {}
            self._inputs[name] = record.inputs
        return self._inputs[name]


def _never_told(owner: Owner) -> None:
    """Say nothing: a collection does not wait."""
