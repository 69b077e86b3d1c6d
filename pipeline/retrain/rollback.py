"""Take a promotion back: the alias champion goes to the version before, or to another that is named."""

from __future__ import annotations

from pipeline.config.resources import Resources
from pipeline.errors import ConfigError
from pipeline.retrain.decisions import Decision, Decisions, now
from pipeline.store.locations import tracking_uri
from pipeline.tracking import registry, runs


def rollback(name: str, to: int | None, reason: str, resources: Resources) -> Decision:
    """Return the decision that made another version champion. It stands until new data, or another recipe, makes a
    challenger that was not decided on before.

    Raises:
        ConfigError: the name has no champion or no previous one, the version is not there, or is the champion.
        BusyError: a tick of this name is under way.
    """
    uri = tracking_uri(resources)
    with Decisions.of(name, resources).held() as deciding:
        last = deciding.decisions.last()
        champion = registry.registered_version(uri, name, None if last is None else last.champion)
        if champion is None:
            raise ConfigError(f"{name!r} has no champion in the registry at {uri!r}; see `bitmill lookup`.")
        previous = None if last is None else last.previous
        target = previous if to is None else to
        if target is None:
            raise ConfigError(
                f"{name} has no previous champion; name a version: `bitmill rollback {name} --to VERSION`."
            )
        if target == champion.version:
            raise ConfigError(f"--to is {target}, and {name}/{target} is the champion already.")
        registry.resolve(runs.connect(uri), f"{name}/{target}")
        decision = Decision(
            decision="rolled back",
            reason=reason,
            name=name,
            at=now(),
            champion=target,
            previous=champion.version,
        )
        deciding.append(decision)
        deciding.put_aliases()
        return decision
