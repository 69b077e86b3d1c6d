"""One tick of a schedule: is there new data, and is what it makes better than the champion?

    plan     the challenger's steps are keyed by what the data holds now; a tick whose key was decided is `unchanged`
    train    the flow that `compress` runs, once for each recipe; the best on validation is the challenger
    contest  the champion is scored on the challenger's test rows
    gate     rules, each with its numbers
    decide   one entry of the journal, then the aliases

A document's split is drawn from its content, so that one that was ever evaluated never trains a challenger, and the
test split grows with the data. A learned tokenizer is the champion's from then on, so that both read the same rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.data import TrainBpe
from pipeline.config.laid_over import check_path, label, laid_over
from pipeline.config.retrain import Retrain
from pipeline.config.run import Config
from pipeline.errors import BitmillError, BusyError, ConfigError, FencedOffError, NotRegisteredError, OverBudgetError
from pipeline.execution.engine import Engine
from pipeline.flow.plan import Once, RunPlan, key_of_run, plan_run, plan_step
from pipeline.flow.run import Outcome, run_plan
from pipeline.metrics import measure_of
from pipeline.retrain import gate, rows
from pipeline.retrain.decisions import Deciding, Decision, Decisions, Notifies, now
from pipeline.retrain.gate import Evidence
from pipeline.retrain.hours import Tells, WorkerHours
from pipeline.retrain.ticks import TickLog, told_of, under_way
from pipeline.sources.models import STEP
from pipeline.stages import contest
from pipeline.store.keys import recipe_of, step_key
from pipeline.store.locations import tracking_uri
from pipeline.store.records import Contest, Evaluation, ModelVersion, Package
from pipeline.store.step_store import FinishedStep
from pipeline.tracking import registry
from pipeline.tracking.registry import Registered

VERSION = 1  # of what a tick decides by
Proves = Callable[[Config, FinishedStep[Package], ModelVersion], Evidence]


@dataclass(frozen=True)
class Tick:
    """A tick before it starts: the challengers by recipe, the champion that they meet (None: the first), and what a
    tick of this key decided before. Challengers that a rollback took back are not among them."""

    config: Config
    retrain: Retrain
    champion: Registered | None
    challengers: tuple[tuple[str, RunPlan], ...]  # label of the recipe, plan
    run_keys: tuple[str, ...]  # of all recipes; where they start from the champion, as if they did not
    last: Decision | None  # of the name
    decided: Decision | None = None
    again: bool = False  # whatever was decided on it

    @property
    def name(self) -> str:
        """Return the registered name."""
        return _name(self.config)

    @property
    def key(self) -> str:
        """Return what names the tick: its challengers, whom they meet, and the gate."""
        recipe = {
            "name": self.name,
            "gate": recipe_of(self.retrain.gate),
            "warm_start": self.retrain.warm_start,
            "champion": None if self.champion is None else self.champion.key,
        }
        inputs = {f"challenger {index}": key for index, key in enumerate(self.run_keys)}
        return step_key("retrain", VERSION, recipe, inputs)


@dataclass(frozen=True)
class Verdict:
    """What became of a tick: promoted, rejected, unchanged or, where another has the name, busy; where the aliases are;
    and the decision that was made, now or, of `unchanged`, before."""

    outcome: str
    reason: str
    champion: int | None
    previous: int | None
    decision: Decision | None = None


def plan_tick(config: Config, force: bool = False) -> Tick:
    """Resolve a configuration into a tick, without starting Ray; with `force`, as if nothing had been decided.

    Raises:
        ConfigError: no section `retrain`, text whose splits are not a document's own, a champion that challengers
            cannot meet, or what `plan_run` refuses.
    """
    retrain, name = _section(config), _name(config)
    decisions = Decisions.of(name, config.resources)
    decisions.refuse_another_place()
    made, last = decisions.all(), decisions.last()  # the last one first, of which no more are read than it takes
    crowned = None if last is None else last.champion
    champion, once = registry.registered_version(tracking_uri(config.resources), name, crowned), Once(many=False)
    if champion is not None and champion.key in {key_of_run(laid, once) for _, laid in _recipes(config)}:
        champion = champion if crowned is not None else None  # of a tick that was killed then, or of `compress`
    elif champion is not None:  # a tokenizer of its own is learned of other text
        config = _with_its_tokenizer(config, champion)
    plans = _challengers(config, once)
    tick = Tick(config, retrain, champion, plans, tuple(plan.run_key for _, plan in plans), last, again=force)
    for _, plan in plans:
        rows.refuse_moving_splits(plan)
    decided, taken_back = (None, frozenset[str]()) if force else _decided(tick, made)
    for _, plan in plans if decided is None else ():
        rows.refuse_endless_documents(plan)
        if champion is not None:
            rows.refuse_strangers(plan, champion)
    if decided is None and champion is not None and retrain.warm_start:
        start = config.distill.model_copy(update={"start": champion.title, "fade_in": 0.0})  # it is quantized already
        plans = _challengers(config.model_copy(update={"distill": start}), once)
    if decided is None:
        plans = tuple(plan for plan, key in zip(plans, tick.run_keys, strict=True) if key not in taken_back)
    return replace(tick, challengers=plans, decided=decided)


def _section(config: Config) -> Retrain:
    """Return the section `retrain`. Raises ConfigError: there is none."""
    if config.retrain is None:
        raise ConfigError(
            "The configuration has no section retrain; add one, such as retrain: {gate: {min_gain: 0.01}}"
        )
    return config.retrain


def _name(config: Config) -> str:
    """Return the name that a configuration registers under."""
    return config.register_.name or config.name


def _challengers(config: Config, once: Once) -> tuple[tuple[str, RunPlan], ...]:
    """Return the plan of each recipe, with a label."""
    return tuple((recipe, plan_run(challenger, once=once)) for recipe, challenger in _recipes(config))


def _recipes(config: Config) -> list[tuple[str, Config]]:
    """Return the configuration with each recipe laid over it, with a label."""
    retrain = config.retrain or Retrain()
    for path in {path for values in retrain.recipes for path in values}:
        check_path(path, "retrain.recipes")
    base = config.model_copy(update={"sweep": None})
    return [(label(values), laid_over(base, values) if values else base) for values in retrain.recipes]


def _decided(tick: Tick, made: Iterable[Decision]) -> tuple[Decision | None, frozenset[str]]:
    """Return what was decided on all these challengers before, by a tick of this key or by that which made one of them
    the champion, and which of them are not asked for again.

    These are what any decision before a rollback was about, whichever champion it had met: who takes a promotion back
    is not to find the same model promoted by the next tick but one. A decision that worker-hours ended stands as long
    as no more are allowed.
    """
    run_keys, key = frozenset(tick.run_keys), tick.key
    version = None if tick.champion is None else tick.champion.version
    most = tick.config.resources.max_worker_hours
    rolled_back, taken_back, newest = False, frozenset[str](), None
    for decision in made:
        capped = decision.max_worker_hours
        if capped is not None and (most is None or most > capped):
            continue
        crowned = decision.challenger == decision.champion == version is not None
        if decision.key == key or (crowned and run_keys.issubset(decision.run_keys)):
            return decision, taken_back
        if rolled_back and (more := run_keys.intersection(decision.run_keys) - taken_back):
            taken_back, newest = taken_back | more, newest or decision
            if taken_back == run_keys:
                return newest, taken_back
        rolled_back = rolled_back or decision.decision == "rolled back"
    return None, taken_back


def _with_its_tokenizer(config: Config, champion: Registered) -> Config:
    """Return the configuration with the champion's tokenizer where it would learn one of its own."""
    if not isinstance(config.model.tokenizer, TrainBpe):
        return config
    tokens = rows.tokens_of(champion, config.resources)
    if tokens is None:
        raise ConfigError(
            f"The tokens of the champion, {champion.name}/{champion.version}, are not in this store, and with them its "
            "tokenizer. Set resources.storage_uri to the store of its run, or model.tokenizer to a directory."
        )
    # What every machine of the store can open.
    model = config.model.model_copy(update={"tokenizer": f"{STEP}{tokens.record.key}"})
    return config.model_copy(update={"model": model})


def run_tick(
    config: Config, told: Tells, proves: Proves, force: bool = False, notifies: Notifies = lambda decision: True
) -> Verdict:
    """Run a tick; start Ray only if something trains. `told` gives a listener for each run, `proves` what the gate asks
    of a challenger beside its scores; `notifies` is given each decision on the name that it was not given before. With
    `force` what was decided before is decided again.

    Raises:
        BitmillError: the tick failed; the same command goes on where it was.
    """
    _section(config)
    decisions = Decisions.of(_name(config), config.resources)
    log = TickLog(decisions)
    try:
        verdict = _held_tick(config, decisions, told, proves, force, notifies)
    except BaseException as error:  # an interruption too
        with contextlib.suppress(BitmillError, OSError):  # that the store is away must not replace it
            if not (isinstance(error, FencedOffError) and decisions.notes().running):  # else the next one says so
                log.add("failed", told_of(error))
        raise
    if verdict.outcome in ("unchanged", "busy"):
        log.add(verdict.outcome, verdict.reason)
    return verdict


def _held_tick(
    config: Config, decisions: Decisions, told: Tells, proves: Proves, force: bool, notifies: Notifies
) -> Verdict:
    """Run a tick as `run_tick` does, once the name is held."""
    tick = plan_tick(config, force)
    with contextlib.ExitStack() as stack:
        try:
            deciding = stack.enter_context(decisions.held())
        except (BusyError, FencedOffError) as error:  # or a rollback took it before anything was begun
            return _verdict("busy", str(error).partition(". ")[0] + ".", None, decisions.last())
        deciding.tell(notifies)
        try:
            with under_way(deciding):
                tick = plan_tick(config, force)  # aliases may have been put right, or moved meanwhile
                decision = _unless_decided(tick, deciding, told, proves)
                if decision is None or decision == tick.decided:
                    return _verdict("unchanged", _unchanged(decision), decision, decisions.last())
                deciding.append(decision)
        except FencedOffError:
            rollback = decisions.last_rollback()
            if not deciding.overtaken() or rollback is None or decisions.last() == tick.last:
                raise
            return _taken_back(tick, decisions, rollback, notifies)
        deciding.put_aliases()
        deciding.tell(notifies)
        return _verdict(decision.decision, decision.reason, decision, decision)


def _unless_decided(tick: Tick, deciding: Deciding, told: Tells, proves: Proves) -> Decision | None:
    """Return what was decided on a tick before, or is now, as `_decide` does; and note what it is about, so that
    nothing which it goes on from is cleared away."""
    deciding.note(keep=tick.retrain.keep)
    decision = tick.decided
    if decision is None:
        steps = {(step.name, step.key): None for _, plan in tick.challengers for step in plan.steps}
        deciding.note(unfinished=tuple(steps))
        decision = _decide(tick, deciding, told, proves)
        if decision is not None:
            return decision
        deciding.note(unfinished=())
    return decision


def _taken_back(tick: Tick, decisions: Decisions, rollback: Decision, notifies: Notifies) -> Verdict:
    """Return what became of a tick from which a rollback took the name: it decides nothing."""
    with contextlib.suppress(BusyError, FencedOffError), decisions.held() as deciding:
        deciding.note(running="")
        deciding.tell(notifies)
    reason = (
        f"{tick.name}/{rollback.champion} was made champion meanwhile, at {rollback.at}, by a rollback "
        f"({rollback.reason}); what was trained is kept, and the next tick meets that champion"
    )
    return _verdict("busy", reason, None, decisions.last())


def _verdict(outcome: str, reason: str, decision: Decision | None, last: Decision | None) -> Verdict:
    """Return what became of a tick; `last` is the name's last decision, where the aliases are."""
    champion, previous = (None, None) if last is None else (last.champion, last.previous)
    return Verdict(outcome, reason, champion, previous, decision)


def _unchanged(decided: Decision | None) -> str:
    if decided is None:
        return "the only challenger is the champion itself"
    return f"nothing is new since {decided.at}, when the challenger was {decided.decision}: {decided.reason}"


def _decide(tick: Tick, deciding: Deciding, told: Tells, proves: Proves) -> Decision | None:
    """Train the challengers, and decide on the best of them; nothing is written but their own steps. None: the champion
    alone was to be trained."""
    hours = WorkerHours(tick.name, tick.key, deciding.fence, tick.config.resources, tick.again)
    told, proves = hours.watched(told), hours.counted("the measurements of the gate")(proves)
    engine, version = Engine(tick.config.resources), None
    ran: list[tuple[RunPlan, Outcome]] = []
    refused: dict[str, str] = {}
    try:
        for recipe, plan in tick.challengers:
            with told(plan) as listener:
                if tick.champion is not None:
                    rows.refuse_what_measured(plan, tick.champion, listener, engine)
                try:
                    ran.append((plan, run_plan(plan, listener, True, engine)))
                except NotRegisteredError as error:
                    refused[plan.run_key] = f"{recipe}: {error}"
            deciding.check()
        if not ran:
            facts: dict[str, Any] = {"reason": " ".join(refused.values()), "decided_by": "register.gate"}
            return _decision(tick, "rejected", None, unjudged=refused, worker_seconds=hours.spent_s, **facts)
        champions = None if tick.champion is None else tick.champion.key
        challengers = [(plan, outcome) for plan, outcome in ran if plan.run_key != champions]
        if not challengers:
            return None
        scores = [outcome.finished(Evaluation).record.validation["student"] for _, outcome in challengers]
        plan, outcome = challengers[gate.better_on_validation(tick.config.task.name, scores)]
        version = outcome.finished(ModelVersion).record.version
        if tick.champion is None:
            alone = {"challenger": outcome.finished(Evaluation).record.student}
            facts = {"reason": f"{tick.name} had no other champion", "scores": alone}
            facts["decision"] = "promoted"
        else:
            facts = _contested(tick, tick.champion, plan, outcome, engine, told, proves)
        return _decision(
            tick,
            version=version,
            others=[o.finished(ModelVersion).record.version for p, o in challengers if p.run_key != plan.run_key],
            unjudged=refused,
            run_key=plan.run_key,
            packed_bytes=outcome.finished(Package).record.size.packed_bytes,
            worker_seconds=hours.spent_s,
            **facts,
        )
    except OverBudgetError as error:
        keys = {plan.run_key for _, plan in tick.challengers} - {tick.champion and tick.champion.key}
        unjudged = {key: str(error) for key in sorted(keys)} | refused
        facts = {"reason": str(error), "decided_by": "max_worker_hours", "max_worker_hours": hours.cap}
        return _decision(tick, "rejected", version, unjudged=unjudged, worker_seconds=hours.spent_s, **facts)
    finally:
        engine.close()


def _contested(
    tick: Tick, champion: Registered, plan: RunPlan, outcome: Outcome, engine: Engine, told: Tells, proves: Proves
) -> dict[str, Any]:
    """Let the challenger meet the champion; return what the decision says of it."""
    resources = plan.config.resources
    tokens, batch = rows.champions_rows(champion, resources), rows.scored_batch(champion, resources)
    stage = contest.against(champion.digest, champion.package_uri, tokens.record.key, batch)
    beside = plan_step(stage, plan.pinned, {step.name: step for step in plan.steps})
    # The very steps that were run: text may have come meanwhile, which is for the next tick.
    met = replace(plan, steps=(*(step for step in plan.steps if step.name in beside.inputs), beside))
    with told(met) as listener:
        contested = run_plan(met, listener, True, engine).finished(Contest)
    package, evaluation = outcome.finished(Package), outcome.finished(Evaluation).record
    rules, task = tick.retrain.gate, tick.config.task.name
    gained = gate.gains(contested, task, rules.confidence)
    evidence = proves(tick.config, package, outcome.finished(ModelVersion).record)
    rulings = gate.judge(rules, task, gained, evaluation, package.record, evidence)
    deciding = gate.deciding(rulings)
    return {
        "decision": "promoted" if deciding.passed else "rejected",
        "reason": deciding.said,
        "decided_by": deciding.rule,
        "rulings": rulings,
        "gains": gained,
        "scores": {"champion": contested.record.champion, "challenger": contested.record.challenger},
    }


def _decision(tick: Tick, decision: str, version: int | None, **facts: Any) -> Decision:
    """Return a decision on a challenger, registered as a version or not, and where it leaves the aliases."""
    standing = tick.champion
    if standing is None and decision != "promoted":  # another recipe may have been registered, the first of the name
        standing = registry.registered_version(tracking_uri(tick.config.resources), tick.name, None)
    champion = None if standing is None else standing.version
    previous = None if tick.last is None else tick.last.previous
    if decision == "promoted" and version != champion:
        champion, previous = version, champion
    return Decision.model_validate(
        {
            "decision": decision,
            "name": tick.name,
            "at": now(),
            "key": tick.key,
            "run_keys": tick.run_keys,
            "measure": measure_of(tick.config.task.name),
            "champion": champion,
            "previous": previous,
            "challenger": version,
            **facts,
        }
    )
