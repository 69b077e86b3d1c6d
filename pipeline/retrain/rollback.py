"""Take a promotion back: the alias champion goes to the version before, or to another that is named."""

from __future__ import annotations

import contextlib

from pipeline.config.base import checked_name
from pipeline.config.resources import Resources
from pipeline.errors import BusyError, ConfigError, FencedOffError
from pipeline.retrain.decisions import Decision, Decisions, now
from pipeline.retrain.rows import rows_of
from pipeline.store.locations import storage_uri
from pipeline.store.records import Tokens
from pipeline.tracking import registry
from pipeline.tracking.registry import Registered


def rollback(name: str, to: int | None, reason: str, resources: Resources) -> Decision:
    """Return the decision that made another version champion. It stands until new data, or another recipe, makes a
    challenger that was not decided on before. A tick that is under way decides nothing, and what it trained is kept for
    the next one.

    Raises:
        ConfigError: the name is none, has no champion or no previous one, was rolled back already and `to` names no
            version, the version is not there, or is the champion, or its rows are gone, or another store decides on
            the name.
    """
    try:
        checked_name(name)
    except ValueError as error:
        raise ConfigError(f"NAME: {error}") from error
    decisions = Decisions.of(name, resources)
    try:
        _sides(decisions, to, resources)  # before the name is taken from a tick that is under way
    except ConfigError:
        if decisions.last() is not None:  # what a killed rollback left undone is done, though nothing more is
            with contextlib.suppress(BusyError, FencedOffError), decisions.held():
                pass
        raise
    with decisions.held(seize=True) as deciding:
        target, champion = _sides(decisions, to, resources)
        there = champion is not None and registry.holds(decisions.uri, name, champion)
        decision = Decision(
            decision="rolled back",
            reason=reason,
            name=name,
            at=now(),
            champion=target,
            previous=champion if there else None,
        )
        deciding.append(decision)
        deciding.put_aliases()
        return decision


def _sides(decisions: Decisions, to: int | None, resources: Resources) -> tuple[int, int | None]:
    """Return the version that is to be champion, and the one that is, which may have been deleted. Raises ConfigError
    as `rollback` does."""
    decisions.refuse_another_place()
    name, uri, last, before = decisions.name, decisions.uri, decisions.last(), decisions.last_rollback()
    if to is None and before is not None:
        raise ConfigError(
            f"{name}/{before.champion} is champion since {before.at} by a rollback ({before.reason}). To make another "
            f"champion, name it: `bitmill rollback {name} --to VERSION`."
        )
    if last is None or last.champion is None:
        bearer = registry.registered_version(uri, name, None)
        champion, previous = None if bearer is None else bearer.version, None if last is None else last.previous
    else:
        champion, previous = last.champion, last.previous
    target = previous if to is None else to
    if target is None:
        lacks = "no champion" if champion is None else "no previous champion"
        raise ConfigError(
            f"{name!r} has {lacks} in the registry at {uri!r}; name a version: `bitmill rollback {name} --to VERSION`. "
            "`bitmill lookup` lists what is registered."
        )
    if not registry.holds(uri, name, target):
        raise ConfigError(
            f"{name}/{target} is not in the registry at {uri!r}, so that it cannot become champion; name another: "
            f"`bitmill rollback {name} --to VERSION`. `bitmill lookup` lists what is registered."
        )
    if target == champion:
        raise ConfigError(f"--to is {target}, and {name}/{target} is the champion already.")
    _refuse_without_rows(registry.registered_version(uri, name, target), resources)
    return target, champion


def _refuse_without_rows(version: Registered | None, resources: Resources) -> None:
    """Raise ConfigError for a version that no challenger could meet, were it champion."""
    if version is not None and rows_of(version, resources) is None:
        raise ConfigError(
            f"{version.title} cannot become champion: the rows that trained it (step {Tokens.stage} "
            f"{version.lineage.get(Tokens.stage, '?')}) are not, or no longer, in the store {storage_uri(resources)}, "
            "so that no challenger could be compared with it, and every tick would be refused. `bitmill gc` deletes "
            "those of older versions; `bitmill compress`, with the configuration and the text that made it, makes them "
            "again. Else set resources.storage_uri (--storage-uri) to the store of its run, or name another version: "
            f"`bitmill rollback {version.name} --to VERSION`."
        )
