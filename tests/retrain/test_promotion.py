"""Whatever happens between scores and aliases, after the next tick there is one champion, the right one, decided
once."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.errors import BusyError, ConfigError, RunError
from pipeline.retrain import decisions
from pipeline.retrain.decisions import Deciding, Decision, now
from pipeline.retrain.gate import Evidence
from pipeline.retrain.rollback import rollback
from pipeline.retrain.tick import plan_tick, run_tick
from pipeline.store.journal import Journal
from pipeline.store.objects import Directory
from pipeline.store.records import Contest, ModelVersion
from pipeline.store.step_store import StepDir
from pipeline.tracking import registry, runs
from tests.retrain.schedule import BETTER, NAME, Schedule

KILLED = 9
AWAY = "http://127.0.0.1:9"
MOVED = {"champion": 2, "previous": 1}
EFFECTS = [
    *((Directory, name) for name in ("write", "create", "swap")),
    *((MlflowClient, name) for name in ("set_registered_model_alias", "delete_registered_model_alias")),
    *((MlflowClient, name) for name in ("set_model_version_tag", "log_text")),
]


def in_a_process_of_its_own(work: Callable[[], None]) -> int:
    """Start it in a copy of this process, which ends with it; return its id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_before(effect: int, work: Callable[[], Any]) -> bool:
    """Run work in a process that is gone just before this effect on store or registry from the decision on; tell
    whether there were so many."""
    seen = iter(range(10_000))

    def counted(whole: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if next(seen) == effect:
                os._exit(KILLED)
            return whole(*arguments, **named)

        return call

    def child() -> None:
        append = Deciding.append

        def deciding(self: Deciding, decision: decisions.Decision) -> None:
            for kind, name in EFFECTS:
                setattr(kind, name, counted(getattr(kind, name)))
            append(self, decision)

        Deciding.append = deciding  # type: ignore[method-assign]
        work()

    status = ended(in_a_process_of_its_own(child))
    assert status in (0, KILLED)
    return status == KILLED


def test_killed_at_every_point_between_score_and_alias(undecided: Schedule, challenged: str) -> None:
    effect, outcomes = 0, set()
    while killed_before(effect, lambda: undecided.tick(BETTER)):
        outcome = undecided.tick(BETTER).outcome
        outcomes.add(outcome)
        assert undecided.aliases == MOVED
        assert [d.challenger for d in undecided.decisions] == [2, 1]
        assert undecided.tick(BETTER).outcome == "unchanged"
        undecided.put_back(challenged)
        effect += 1
    assert effect >= 6  # entry, head, two aliases, the file, two tags
    assert outcomes == {"promoted", "unchanged"}  # before the head was swapped, and after


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("kind", "name", "of"),
    [(MlflowClient, "create_model_version", object), (StepDir, "commit", ModelVersion), (StepDir, "commit", Contest)],
    ids=["version", "its record", "contest"],
)
def test_killed_between_score_and_decision(
    schedule: Schedule, scored: str, kind: type, name: str, of: type, after: bool
) -> None:
    schedule.put_back(scored)
    whole = getattr(kind, name)

    def killed(self: Any, first: Any, *others: Any, **named: Any) -> Any:
        if not isinstance(first, of):
            return whole(self, first, *others, **named)
        if after:
            whole(self, first, *others, **named)
        os._exit(KILLED)

    def child() -> None:
        setattr(kind, name, killed)
        schedule.tick(BETTER)

    assert ended(in_a_process_of_its_own(child)) == KILLED
    assert (schedule.aliases, len(schedule.decisions)) == ({"champion": 1}, 1)
    assert schedule.tick(BETTER).outcome == "promoted"
    assert schedule.trained <= {"register", "contest"}
    assert (schedule.aliases, [d.challenger for d in schedule.decisions]) == (MOVED, [2, 1])
    assert len(runs.client_of(schedule.uri).search_model_versions(f"name = '{NAME}'")) == 2


def test_a_rollback_killed_at_every_point_is_done_or_not(undecided: Schedule, challenged: str) -> None:
    resources = undecided.config().resources
    undecided.tick(BETTER)
    undecided.keep("promoted")
    effect = 0
    while killed_before(effect, lambda: rollback(NAME, None, "worse", resources)):
        assert undecided.tick(BETTER).outcome == "unchanged"
        back = len(undecided.decisions) == 3
        assert undecided.aliases == ({"champion": 1, "previous": 2} if back else MOVED)
        undecided.put_back("promoted")
        effect += 1
    assert effect >= 4


def test_a_rollback_that_is_given_again_goes_no_further(undecided: Schedule, challenged: str) -> None:
    resources = undecided.config().resources
    undecided.tick(BETTER)
    undecided.keep("to take back")
    said = rf"{NAME}/1 is champion since .* by a rollback \(worse\)\. To make another champion, name it: "
    effect, refused = 0, 0
    while killed_before(effect, lambda: rollback(NAME, None, "worse", resources)):
        if len(undecided.decisions) == 3:
            with pytest.raises(ConfigError, match=said):
                rollback(NAME, None, "worse", resources)
            refused += 1
        else:
            rollback(NAME, None, "worse", resources)
        assert undecided.aliases == {"champion": 1, "previous": 2}
        assert len(undecided.decisions) == 3
        undecided.put_back("to take back")
        effect += 1
    assert 0 < refused < effect


@pytest.mark.parametrize("name", ["it's", "../x", ""])
def test_a_rollback_of_what_is_no_name_is_refused(undecided: Schedule, name: str) -> None:
    with pytest.raises(ConfigError, match="is no name; valid: letters"):
        rollback(name, 1, "", undecided.config().resources)


def test_a_rollback_happens_at_once_and_the_tick_under_way_decides_nothing(undecided: Schedule) -> None:
    config, heard = undecided.config(BETTER), list[str]()

    def proves(*asked: Any) -> Evidence:
        assert rollback(NAME, 2, "mine", config.resources).champion == 2
        assert undecided.aliases == {"champion": 2, "previous": 1}
        return Evidence()

    verdict = run_tick(config, undecided.told, proves, notifies=lambda decision: not heard.append(decision.decision))
    assert (verdict.outcome, verdict.champion, verdict.previous) == ("busy", 2, 1)
    assert verdict.reason.startswith("tiny/2 was made champion meanwhile, at ")
    assert verdict.reason.endswith(
        "by a rollback (mine); what was trained is kept, and the next tick meets that champion"
    )
    assert [d.decision for d in undecided.decisions] == ["rolled back", "promoted"]
    assert heard == ["rolled back"]
    assert undecided.aliases == {"champion": 2, "previous": 1}
    with pytest.raises(ConfigError, match="tiny/2 is champion since"):  # a rollback still
        rollback(NAME, None, "worse", config.resources)
    assert undecided.tick(BETTER).outcome == "unchanged"  # it is that champion


def test_a_rollback_that_is_refused_leaves_the_tick_beside_it_alone(undecided: Schedule) -> None:
    resources, refused = undecided.config().resources, list[str]()
    with decisions.Decisions.of(NAME, resources).held() as deciding:
        deciding.append(Decision(decision="rolled back", reason="a test", name=NAME, at=now(), champion=1))

    def proves(*asked: Any) -> Evidence:
        for to, said in ((None, "is champion since"), (1, "the champion already"), (9, "not in the registry")):
            with pytest.raises(ConfigError, match=said):
                rollback(NAME, to, "worse", resources)
            refused.append(said)
        return Evidence()

    verdict = run_tick(undecided.config(BETTER), undecided.told, proves)
    assert (verdict.outcome, verdict.champion, len(refused)) == ("promoted", 2, 3)


def test_a_tick_whose_name_a_rollback_takes_before_it_begins_is_busy(
    undecided: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, resources = Journal.claim, undecided.config().resources

    def late(self: Journal, fence: int) -> Any:
        monkeypatch.setattr(Journal, "claim", claim)
        rollback(NAME, 2, "mine", resources)
        return claim(self, fence)

    monkeypatch.setattr(Journal, "claim", late)
    verdict = undecided.tick(BETTER)
    assert (verdict.outcome, verdict.champion) == ("busy", 2)
    assert verdict.reason.startswith("The history of tiny is no longer ours")
    assert (undecided.aliases, len(undecided.decisions)) == (MOVED, 2)


def test_a_rollback_while_a_tick_tells_of_its_decision_takes_that_back(undecided: Schedule) -> None:
    heard, resources = list[str](), undecided.config().resources

    def notified(decision: decisions.Decision) -> bool:
        heard.append(decision.decision)
        if decision.champion == 2:
            rollback(NAME, None, "at once", resources)
        return True

    verdict = run_tick(undecided.config(BETTER), undecided.told, lambda *asked: Evidence(), notifies=notified)
    assert (verdict.outcome, heard) == ("promoted", ["promoted"])
    assert undecided.aliases == {"champion": 1, "previous": 2}
    with decisions.Decisions.of(NAME, resources).held() as deciding:
        deciding.tell(undecided.notified)
    assert [d.decision for d in undecided.heard] == ["promoted", "rolled back"]  # twice, for it was not written down


def test_a_tick_that_lost_its_name_to_a_rollback_says_so_even_if_another_has_it(
    undecided: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    def proves(*asked: Any) -> Evidence:
        rollback(NAME, 2, "mine", undecided.config().resources)
        monkeypatch.setattr(decisions.Decisions, "held", busy)
        return Evidence()

    def busy(self: decisions.Decisions) -> Any:
        raise BusyError("The retraining of tiny is being run by process 7.")

    assert run_tick(undecided.config(BETTER), undecided.told, proves).outcome == "busy"
    assert [d.decision for d in undecided.decisions] == ["rolled back", "promoted"]


def test_a_server_that_is_away_leaves_nothing_half_done(undecided: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = registry.put_aliases

    def away(client: MlflowClient, name: str, wanted: dict[str, int | None]) -> None:
        if wanted["champion"] == 2:
            raise MlflowException("connection refused")
        sound(client, name, wanted)

    with monkeypatch.context() as patched:
        patched.setattr(registry, "put_aliases", away)
        with pytest.raises(RunError, match="the next command on this name completes it"):
            undecided.tick(BETTER)
    assert undecided.aliases == {"champion": 1}
    assert undecided.tick(BETTER).outcome == "unchanged"
    assert undecided.aliases == MOVED
    assert len(undecided.decisions) == 2


def test_a_server_that_cannot_be_reached_any_more_is_a_fault_and_keeps_the_decision(
    undecided: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Deciding.append

    def last_that_is_heard(self: Deciding, decision: decisions.Decision) -> decisions.Decision:
        kept = append(self, decision)
        self.decisions.uri = AWAY
        return kept

    with monkeypatch.context() as patched:
        patched.setattr(Deciding, "append", last_that_is_heard)
        said = "MLflow at http://127.0.0.1:9 refused .* The decision is kept in the store, and the next command"
        with pytest.raises(RunError, match=said):  # which is status 1
            undecided.tick(BETTER)
    assert undecided.aliases == {"champion": 1}
    assert undecided.tick(BETTER).outcome == "unchanged"
    assert (undecided.aliases, len(undecided.decisions)) == (MOVED, 2)


def test_a_tick_that_died_is_known_by_what_it_goes_on_from(undecided: Schedule) -> None:
    known = decisions.Decisions.of(NAME, undecided.config().resources)
    plan = plan_tick(undecided.config(BETTER)).challengers[0][1]
    assert known.notes().unfinished == tuple((step.name, step.key) for step in plan.steps)
    undecided.tick(BETTER)
    assert known.notes().unfinished == ()


def test_a_decision_that_was_not_told_is_told_by_the_next_tick(
    undecided: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Deciding, "tell", killed_once_decided)
        with pytest.raises(InterruptedError):
            undecided.tick(BETTER)
    assert undecided.heard == []
    undecided.deaf = True
    undecided.tick(BETTER)
    undecided.deaf = False
    rollback(NAME, None, "worse", undecided.config().resources)
    for _ in range(2):
        assert undecided.tick(BETTER).outcome == "unchanged"
        assert [(d.decision, d.champion) for d in undecided.heard] == [("promoted", 2), ("rolled back", 1)]


def killed_once_decided(self: Deciding, tells: Any) -> None:
    last = self.decisions.last()
    if last is not None and last.champion == 2:
        raise InterruptedError


def test_who_is_overtaken_while_it_moves_aliases_is_content(
    undecided: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    undecided.tick(BETTER)
    resources = undecided.config().resources
    sound, late = registry.put_aliases, Deciding(decisions.Decisions.of(NAME, resources), 1)

    def overtaken(client: MlflowClient, name: str, wanted: dict[str, int | None]) -> None:
        monkeypatch.setattr(registry, "put_aliases", sound)
        rollback(NAME, None, "worse", resources)
        raise RunError("The alias champion of tiny is at 1 where 2 belongs")

    monkeypatch.setattr(registry, "put_aliases", overtaken)
    late.put_aliases()
    assert undecided.aliases == {"champion": 1, "previous": 2}


def delete(schedule: Schedule, version: int) -> None:
    """As a hand in MLflow's own pages does."""
    MlflowClient(schedule.uri, schedule.uri).delete_model_version(NAME, str(version))


def test_a_champion_that_was_deleted_is_replaced_by_a_rollback(undecided: Schedule) -> None:
    undecided.tick(BETTER)
    delete(undecided, 2)
    with pytest.raises(
        ConfigError, match=r"tiny has no champion: by its last decision it is version 2, which .* not hold"
    ):
        undecided.tick(BETTER)
    with pytest.raises(ConfigError, match="tiny/2 is not in the registry"):
        rollback(NAME, 2, "", undecided.config().resources)
    back = rollback(NAME, 1, "deleted", undecided.config().resources)
    assert (back.champion, back.previous) == (1, None)
    assert undecided.aliases == {"champion": 1}
    assert undecided.tick(BETTER).champion == 1


def test_a_registry_that_fails_is_no_registry_without_a_champion(
    undecided: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*asked: Any) -> Any:
        raise MlflowException("out of connections")

    monkeypatch.setattr(MlflowClient, "get_model_version", fails)
    with pytest.raises(ConfigError, match="does not say which version of tiny is champion: out of connections"):
        plan_tick(undecided.config(BETTER))


def test_a_previous_champion_that_was_deleted_has_no_alias(undecided: Schedule) -> None:
    undecided.tick(BETTER)
    delete(undecided, 1)
    verdict = undecided.tick(BETTER)
    assert (verdict.outcome, verdict.champion) == ("unchanged", 2)
    assert undecided.aliases == {"champion": 2}
    with pytest.raises(ConfigError, match="tiny/1 is not in the registry"):
        rollback(NAME, None, "", undecided.config().resources)


def test_another_store_decides_nothing_on_the_same_name(undecided: Schedule) -> None:
    config = undecided.config(BETTER)
    elsewhere = config.resources.model_copy(update={"namespace": "other"})
    said = r"the store .*/store decides, .* this is the store .*/store/other"
    with pytest.raises(ConfigError, match=said):
        plan_tick(config.model_copy(update={"resources": elsewhere}))
    with pytest.raises(ConfigError, match=said):
        rollback(NAME, 2, "", elsewhere)
    assert not (undecided.folder / "store" / "other").exists()


def test_a_rollback_of_nothing_leaves_nothing(undecided: Schedule) -> None:
    resources = undecided.config().resources
    for to in (None, 1):
        with pytest.raises(ConfigError, match="nobody"):
            rollback("nobody", to, "", resources)
    assert not (undecided.folder / "store" / "retrain" / "nobody").exists()
    nowhere = resources.model_copy(update={"storage_uri": str(undecided.folder / "nowhere")})
    with pytest.raises(ConfigError, match="'nobody' has no champion"):
        rollback("nobody", None, "", nowhere)
    assert not (undecided.folder / "nowhere").exists()


def test_an_alias_that_somebody_moved_is_put_back(undecided: Schedule) -> None:
    undecided.tick(BETTER)
    client = MlflowClient(undecided.uri, undecided.uri)
    client.set_registered_model_alias(NAME, "champion", "1")
    undecided.tick(BETTER)
    assert undecided.aliases == MOVED


def test_who_was_overtaken_before_the_aliases_puts_them_where_the_last_decision_has_them(undecided: Schedule) -> None:
    undecided.tick(BETTER)
    late = undecided.decisions[1]  # as if its process had been stopped since, just before it moved the alias
    decisions.show(undecided.uri, str(undecided.folder / "store"), late)
    assert undecided.aliases == {"champion": 1}
    Deciding(decisions.Decisions.of(NAME, undecided.config().resources), 1).put_aliases()  # which goes on like this
    assert undecided.aliases == MOVED


def raced(schedule: Schedule, offsets: tuple[float, float]) -> list[int]:
    """Start two ticks with these delays; return how they ended."""

    def tick(delay: float) -> None:
        time.sleep(delay)
        verdict = schedule.tick(BETTER)
        os._exit({"promoted": 10, "unchanged": 11, "busy": 12}.get(verdict.outcome, 13))

    pids = [in_a_process_of_its_own(lambda delay=delay: tick(delay)) for delay in offsets]  # type: ignore[misc]
    return sorted(map(ended, pids))


def races(count: int, seed: int) -> Iterator[tuple[float, float]]:
    draw = random.Random(seed)
    for _ in range(count):
        yield 0.0, draw.uniform(0, 0.6)


def check_races(schedule: Schedule, challenged: str, count: int, seed: int) -> set[tuple[int, ...]]:
    seen = set()
    for offsets in races(count, seed):
        schedule.put_back(challenged)
        ends = raced(schedule, offsets)
        assert ends in ([10, 11], [10, 12]), f"seed {seed}, offsets {offsets}: {ends}"
        assert schedule.aliases == MOVED
        assert [d.challenger for d in schedule.decisions] == [2, 1]
        seen.add(tuple(ends))
    return seen


def test_of_two_ticks_one_promotes(undecided: Schedule, challenged: str) -> None:
    check_races(undecided, challenged, 3, seed=3)


@pytest.mark.soak
def test_of_two_ticks_one_promotes_fifty_times(undecided: Schedule, challenged: str) -> None:
    seed = random.SystemRandom().getrandbits(32)  # other offsets in each soak
    print(f"seed of the offsets: {seed}")  # shown by what fails
    assert (10, 12) in check_races(undecided, challenged, 50, seed), f"seed {seed}"
