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

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.data import TrainBpe
from pipeline.config.laid_over import check_path, label, laid_over
from pipeline.config.resources import Resources
from pipeline.config.retrain import Retrain
from pipeline.config.run import Config
from pipeline.errors import BusyError, ConfigError, NotRegisteredError, OverBudgetError
from pipeline.execution.engine import Engine
from pipeline.flow.lineage import step_dirs_of, steps_behind
from pipeline.flow.plan import Once, RunPlan, key_of_run, plan_run, plan_step
from pipeline.flow.run import Outcome, run_plan
from pipeline.metrics import measure_of
from pipeline.retrain import gate
from pipeline.retrain.decisions import Deciding, Decision, Decisions, Notifies, now
from pipeline.retrain.gate import Evidence
from pipeline.retrain.hours import Tells, WorkerHours
from pipeline.sources.models import STEP
from pipeline.stages import contest
from pipeline.store.keys import differences, recipe_of, step_key
from pipeline.store.locations import tracking_uri
from pipeline.store.records import SPLITS, Contest, Evaluation, ModelVersion, Package, Tokens
from pipeline.store.step_store import FinishedStep
from pipeline.tasks.tokenizers import read_tokenizer
from pipeline.tracking import registry
from pipeline.tracking.registry import Registered

VERSION = 1  # of what a tick decides by
Proves = Callable[[Config, FinishedStep[Package], ModelVersion], Evidence]


@dataclass(frozen=True)
class Tick:
    """A tick before it starts: the challengers by recipe, the champion that they meet (None: the first), and what a
    tick of this key decided before."""

    config: Config
    retrain: Retrain
    champion: Registered | None
    challengers: tuple[tuple[str, RunPlan], ...]  # label of the recipe, plan
    run_keys: tuple[str, ...]  # of the challengers; where they start from the champion, as if they did not
    last: Decision | None  # of the name
    decided: Decision | None = None

    @property
    def name(self) -> str:
        """Return the registered name."""
        return self.config.register_.name or self.config.name

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
    """What became of a tick: promoted, rejected, unchanged or busy; where the aliases are; and the decision that was
    made, now or, of `unchanged`, before."""

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
    retrain = config.retrain
    if retrain is None:
        raise ConfigError(
            "The configuration has no section retrain; add one, such as retrain: {gate: {min_gain: 0.01}}"
        )
    name = config.register_.name or config.name
    decisions = Decisions.of(name, config.resources)
    decisions.refuse_another_place()
    made, last = decisions.all(), decisions.last()  # the last one first, of which no more are read than it takes
    crowned = None if last is None else last.champion
    champion, once = registry.registered_version(tracking_uri(config.resources), name, crowned), Once()
    if champion is not None and champion.key in {key_of_run(laid, once) for _, laid in _recipes(config)}:
        champion = champion if crowned is not None else None  # of a tick that was killed then, or of `compress`
    elif champion is not None:  # a tokenizer of its own is learned of other text
        config = _with_its_tokenizer(config, champion)
    plans = _challengers(config, once)
    tick = Tick(config, retrain, champion, plans, tuple(plan.run_key for _, plan in plans), last)
    for _, plan in plans:
        _refuse_moving_splits(plan)
    decided = None if force else _decided(tick, made)
    if decided is None and champion is not None:
        for _, plan in plans:
            _refuse_strangers(plan, champion)
    if decided is None and champion is not None and retrain.warm_start:
        start = config.distill.model_copy(update={"start": champion.title, "fade_in": 0.0})  # it is quantized already
        plans = _challengers(config.model_copy(update={"distill": start}), once)
    return replace(tick, challengers=plans, decided=decided)


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


def _decided(tick: Tick, made: Iterable[Decision]) -> Decision | None:
    """Return what was decided on these challengers before: by a tick of this key, by that which made one of them the
    champion, or, since a rollback, against any champion. One that worker-hours ended stands as long as no more are
    allowed."""
    run_keys, key = set(tick.run_keys), tick.key
    version = None if tick.champion is None else tick.champion.version
    most = tick.config.resources.max_worker_hours
    rolled_back = tick.last is not None and tick.last.decision == "rolled back"

    def decides(decision: Decision) -> bool:
        capped = decision.max_worker_hours
        if capped is not None and (most is None or most > capped):
            return False
        crowned = decision.challenger == decision.champion == version is not None
        return decision.key == key or (run_keys.issubset(decision.run_keys) and (crowned or rolled_back))

    return next(filter(decides, made), None)


def _with_its_tokenizer(config: Config, champion: Registered) -> Config:
    """Return the configuration with the champion's tokenizer where it would learn one of its own."""
    if not isinstance(config.model.tokenizer, TrainBpe):
        return config
    tokens = champions_tokens(champion, config.resources)
    if tokens is None:
        raise ConfigError(
            f"The tokens of the champion, {champion.name}/{champion.version}, are not in this store, and with them its "
            "tokenizer. Set resources.storage_uri to the store of its run, or model.tokenizer to a directory."
        )
    # What every machine of the store can open.
    model = config.model.model_copy(update={"tokenizer": f"{STEP}{tokens.record.key}"})
    return config.model_copy(update={"model": model})


def champions_tokens(champion: Registered, resources: Resources) -> FinishedStep[Tokens] | None:
    """Return the rows that the champion was trained on, if they are in this store."""
    return steps_behind(step_dirs_of(resources), champion.lineage).get(Tokens.stage)


def _refuse_moving_splits(plan: RunPlan) -> None:
    """Raise ConfigError for text whose splits depend on more than each document's content."""
    data, text = plan.config.data, plan.pinned.text
    drawn = [split for split in ("validation", "test") if split not in text]
    file = next((file for file in text["train"] if file.format == "txt"), None)
    if drawn and file is not None:
        raise ConfigError(
            f"data.source has {file.uri}, a text whose paragraphs belong together: which of them measure depends on "
            f"all files there are, and changes when more come. For retraining give data.{' and data.'.join(drawn)}, or "
            f"rows of which each is a document: .jsonl or .parquet (now data.source is {data.source!r})."
        )


def _refuse_strangers(plan: RunPlan, champion: Registered) -> None:
    """Raise ConfigError if the champion read other rows, drew its splits by another rule, was trained on a file that
    is to measure, or was measured by one that is to train; or if that cannot be told."""
    tokens = _rows_of(champion, plan.config)
    ours, theirs = plan.pinned.tokens_recipe, tokens.record.recipe
    changed = [
        f"data.{knob} is {value!r} and was {theirs['data'].get(knob)!r}"
        for knob, value in ours["data"].items()
        if knob not in SPLITS and value != theirs["data"].get(knob)
    ]
    drawn = {True: "left out", False: "given"}
    for split in SPLITS[1:]:
        now, before = ours["data"][split] is None, theirs["data"][split] is None
        if now != before:
            changed.append(f"data.{split} is {drawn[now]} and was {drawn[before]}")
    changed += differences(theirs["task"], ours["task"], "task")
    if not changed and not _same_words(plan, tokens):
        changed = [f"model.tokenizer is {plan.config.model.tokenizer!r}, with another vocabulary"]
    if changed:
        raise ConfigError(
            f"The champion, {champion.title}, and a challenger would not meet on the same rows: {'; '.join(changed)}. "
            "Documents that one was trained on could test the other. Keep these values, or register under another name "
            "(register.name)."
        )
    contents = {split: {file["content"] for file in theirs["data"][split] or ()} for split in SPLITS}
    for split, file in ((split, file) for split, files in plan.pinned.text.items() for file in files):
        others = SPLITS[1:] if split == "train" else SPLITS[:1]
        if other := next((other for other in others if file.content in contents[other]), None):
            knob = "source" if split == "train" else split
            raise ConfigError(
                f"data.{knob} has {file.uri}, which is among the {other} files of the champion, {champion.title}: what "
                f"a model was trained on cannot measure it, and what measured one trains no other. Leave it out of "
                f"data.{knob}, or register under another name (register.name)."
            )


def _rows_of(champion: Registered, config: Config) -> FinishedStep[Tokens]:
    """Return the rows of the champion. Raises ConfigError: they are gone, so that nobody can say what trained it."""
    tokens = champions_tokens(champion, config.resources)
    if tokens is None or (config.data.test is not None and not contest.has_rows(tokens, "train")):
        raise ConfigError(
            f"The rows that trained the champion, {champion.title}, are not, or no longer, in this store, so that "
            "nobody can say whether they would test a challenger. Set resources.storage_uri to the store of its run, "
            f"make a version champion whose rows are kept (`bitmill rollback {champion.name} --to VERSION`), or "
            "register under another name (register.name)."
        )
    return tokens


def _same_words(plan: RunPlan, tokens: FinishedStep[Tokens]) -> bool:
    """Tell whether a challenger reads its text with the vocabulary of the champion's rows."""
    ours, theirs = plan.pinned.tokenizer, tokens.record.recipe["tokenizer"]
    if ours is None or plan.pinned.tokens_recipe["tokenizer"] == theirs:
        return True
    own = read_tokenizer(ours.folder, ours.gguf_file)
    return bool(own.get_vocab() == read_tokenizer(tokens.folder()).get_vocab())


def run_tick(
    config: Config, told: Tells, proves: Proves, force: bool = False, notifies: Notifies = lambda decision: True
) -> Verdict:
    """Run a tick; start Ray only if something trains. `told` gives a listener for each run, `proves` what the gate asks
    of a challenger beside its scores; `notifies` is given each decision on the name that it was not given before. With
    `force` what was decided before is decided again.

    Raises:
        BitmillError: the tick failed; the same command goes on where it was.
    """
    tick = plan_tick(config, force)
    decisions = Decisions.of(tick.name, config.resources)
    with ExitStack() as stack:
        try:
            deciding = stack.enter_context(decisions.held())
        except BusyError as error:
            return _verdict("busy", str(error).partition(". ")[0] + ".", None, decisions.last())
        deciding.tell(notifies)
        tick = plan_tick(config, force)  # aliases may have been put right, or moved meanwhile
        decision = tick.decided or _decide(tick, deciding, told, proves)
        if decision is None or decision == tick.decided:
            return _verdict("unchanged", _unchanged(decision), decision, decisions.last())
        deciding.append(decision)
        deciding.put_aliases()
        deciding.tell(notifies)
        return _verdict(decision.decision, decision.reason, decision, decision)


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
    hours = WorkerHours(tick.name, tick.key, deciding.fence, tick.config.resources)
    told, proves = hours.watched(told), hours.counted("the measurements of the gate")(proves)
    engine, version = Engine(tick.config.resources), None
    ran: list[tuple[RunPlan, Outcome]] = []
    refused: list[str] = []
    try:
        for recipe, plan in tick.challengers:
            with told(plan) as listener:
                try:
                    ran.append((plan, run_plan(plan, listener, True, engine)))
                except NotRegisteredError as error:
                    refused.append(f"{recipe}: {error}")
            deciding.check()
        if not ran:
            return _decision(tick, "rejected", None, reason=" ".join(refused), worker_seconds=hours.spent_s)
        champions = None if tick.champion is None else tick.champion.key
        challengers = [(plan, outcome) for plan, outcome in ran if plan.run_key != champions]
        if not challengers:
            return None
        scores = [outcome.finished(Evaluation).record.validation["student"] for _, outcome in challengers]
        plan, outcome = challengers[gate.better_on_validation(tick.config.task.name, scores)]
        version = outcome.finished(ModelVersion).record.version
        if tick.champion is None:
            alone = {"challenger": outcome.finished(Evaluation).record.student}
            facts: dict[str, Any] = {"reason": f"{tick.name} had no other champion", "scores": alone}
            facts["decision"] = "promoted"
        else:
            facts = _contested(tick, tick.champion, plan, outcome, engine, told, proves)
        return _decision(
            tick,
            version=version,
            others=[o.finished(ModelVersion).record.version for p, o in challengers if p.run_key != plan.run_key],
            run_key=plan.run_key,
            packed_bytes=outcome.finished(Package).record.size.packed_bytes,
            worker_seconds=hours.spent_s,
            **facts,
        )
    except OverBudgetError as error:
        facts = {"worker_seconds": hours.spent_s, "max_worker_hours": hours.cap}
        return _decision(tick, "rejected", version, reason=str(error), **facts)
    finally:
        engine.close()


def _contested(
    tick: Tick, champion: Registered, plan: RunPlan, outcome: Outcome, engine: Engine, told: Tells, proves: Proves
) -> dict[str, Any]:
    """Let the challenger meet the champion; return what the decision says of it."""
    stage = contest.against(champion.digest, champion.package_uri, _rows_of(champion, plan.config).record.key)
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
    promoted = all(ruling.passed for ruling in rulings)
    return {
        "decision": "promoted" if promoted else "rejected",
        "reason": gate.deciding(rulings).said,
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
