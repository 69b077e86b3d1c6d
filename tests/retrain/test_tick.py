"""A tick trains on new data alone, and moves `champion` only for what is better; each decision is made once."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.artifacts import load_text
from rich.console import Console

from jobs.schedule.lineage import lineage
from pipeline.config.run import Config
from pipeline.errors import BusyError, ConfigError, FencedOffError, RunError
from pipeline.execution.engine import Engine
from pipeline.flow.lineage import step_dirs_of, steps_behind
from pipeline.flow.plan import plan_run, target_of
from pipeline.flow.run import run_plan
from pipeline.retrain.decisions import Deciding, Decision, Decisions, now
from pipeline.retrain.gate import Evidence
from pipeline.retrain.rollback import rollback
from pipeline.retrain.rows import refuse_what_measured
from pipeline.retrain.tick import plan_tick, run_tick
from pipeline.store.journal import _entry
from pipeline.store.objects import Directory
from pipeline.store.records import ModelVersion, Student, Tokens
from pipeline.tasks.tokenizers import END_OF_TEXT, train_bpe
from pipeline.tracking import runs
from pipeline.tracking.registry import registered_version
from tests.conftest import Recorder
from tests.retrain.schedule import BETTER, NAME, SPOILT, Schedule

LINE = {"tokenize", "finetune", "cache", "distill", "evaluate", "pack", "register"}


def test_the_first_tick_crowns(begun: tuple[Schedule, dict[str, Any]]) -> None:
    _, first = begun
    assert (first["verdict"].outcome, first["verdict"].decision.champion) == ("promoted", 1)
    assert first["verdict"].reason == "tiny had no other champion"
    assert first["trained"] == LINE
    assert first["aliases"] == {"champion": 1}


def test_without_new_data_nothing_runs_and_nothing_is_decided(schedule: Schedule) -> None:
    verdict = schedule.tick()
    assert verdict.outcome == "unchanged"
    assert "nothing is new since" in verdict.reason
    assert schedule.listeners == []
    assert len(schedule.decisions) == 1


def test_better_is_promoted_worse_is_rejected_and_a_rollback_stands(schedule: Schedule) -> None:
    schedule.grow(2)
    better = schedule.tick(BETTER)
    assert better.outcome == "promoted", better.reason
    assert schedule.trained == LINE | {"contest"}
    assert schedule.aliases == {"champion": 2, "previous": 1}
    assert better.decision is not None
    assert better.decision.decided_by == "min_gain"
    whole, fresh = better.decision.gains["whole"], better.decision.gains["fresh"]
    assert whole.low is not None
    assert 0.01 < whole.low < whole.mean
    assert 0 < fresh.documents < whole.documents
    assert schedule.tick(BETTER).outcome == "unchanged"

    schedule.grow(3)
    spoilt = schedule.tick({**BETTER, **SPOILT})
    assert spoilt.outcome == "rejected"
    assert "wanted more than 0.01" in spoilt.reason
    assert schedule.aliases == {"champion": 2, "previous": 1}
    assert schedule.tick({**BETTER, **SPOILT}).outcome == "unchanged"

    back = rollback(NAME, None, "it speaks worse", schedule.config().resources)
    assert (back.champion, back.previous, back.reason) == (1, 2, "it speaks worse")
    assert schedule.aliases == {"champion": 1, "previous": 2}
    client = runs.client_of(schedule.uri)
    for version, became in (("1", "rolled back to"), ("2", "rolled back")):
        told = client.get_model_version(NAME, version)
        assert (told.tags["bitmill.decision"], told.tags["bitmill.decision_reason"]) == (became, "it speaks worse")
        run = client.get_run(told.run_id)
        assert load_text(f"{run.info.artifact_uri}/rollback.json") == back.told()
    stands = schedule.tick({**BETTER, **SPOILT})  # decided on before, if against another champion
    assert (stands.outcome, stands.champion, stands.previous) == ("unchanged", 1, 2)
    again = rollback(NAME, 3, "try", schedule.config().resources)
    assert (again.champion, again.previous) == (3, 1)
    assert [d.decision for d in schedule.decisions] == [
        "rolled back",
        "rolled back",
        "rejected",
        "promoted",
        "promoted",
    ]
    kept = schedule.tick({**BETTER, **SPOILT})
    assert (kept.outcome, kept.champion, kept.previous) == ("unchanged", 3, 1)
    assert schedule.aliases == {"champion": 3, "previous": 1}
    with pytest.raises(ConfigError, match="is the champion already"):
        rollback(NAME, 3, "again", schedule.config().resources)
    with pytest.raises(ConfigError, match="tiny/9 is not in the registry"):
        rollback(NAME, 9, "none", schedule.config().resources)
    with pytest.raises(ConfigError, match="'nobody' has no champion"):
        rollback("nobody", None, "none", schedule.config().resources)


def test_a_version_says_what_was_decided_of_it(schedule: Schedule) -> None:

    schedule.grow(2)
    verdict = schedule.tick(SPOILT)
    client = runs.client_of(schedule.uri)
    version = client.get_model_version(NAME, "2")
    assert version.tags["bitmill.decision"] == "rejected" == verdict.outcome
    assert version.tags["bitmill.decision_reason"] == verdict.reason
    run = client.get_run(version.run_id)
    assert verdict.decision is not None
    assert load_text(f"{run.info.artifact_uri}/decision.json") == verdict.decision.told()
    assert version.aliases == []
    assert plan_tick(schedule.config(SPOILT)).decided is not None
    assert plan_tick(schedule.config(SPOILT, warm_start=True)).decided is None  # another student, on the same data


def test_the_tokenizer_stays_the_champions(schedule: Schedule) -> None:
    first = plan_tick(schedule.config()).challengers[0][1].step(Tokens)
    schedule.grow(3)
    planned = plan_tick(schedule.config()).challengers[0][1].step(Tokens)
    assert planned.record is None
    assert planned.key != first.key
    schedule.tick(SPOILT)
    now = plan_tick(schedule.config()).challengers[0][1].step(Tokens).record
    assert now is not None
    assert first.record is not None
    names = [name for name in first.record.files if name.startswith("tokenizer/")]
    assert names
    assert [now.files[name].sha256 for name in names] == [first.record.files[name].sha256 for name in names]


def test_of_several_recipes_validation_chooses_the_challenger(schedule: Schedule) -> None:
    schedule.grow(2)
    verdict = schedule.tick(recipes=[SPOILT, BETTER])
    assert verdict.outcome == "promoted"
    assert verdict.decision is not None
    assert verdict.decision.challenger == 3  # the second of the two
    assert len(verdict.decision.run_keys) == 2
    other = runs.client_of(schedule.uri).get_model_version(NAME, "2")
    assert other.tags["bitmill.decision"] == "rejected"
    assert other.tags["bitmill.decision_reason"] == "version 3, of another recipe, is better on validation"


def test_each_rule_can_decide(schedule: Schedule) -> None:
    rules: list[tuple[dict[str, Any], Evidence, str, str]] = [
        ({"max_size_mib": 0.001}, Evidence(), "max_size_mib", "at most 0.001"),
        ({"max_perplexity_ratio": 1.0001}, Evidence(), "max_perplexity_ratio", "of its teacher on validation"),
        ({"max_latency_ms": 2}, Evidence(latency_ms=2.5), "max_latency_ms", "2.5 ms a token; at most 2"),
        ({"max_latency_ms": 2}, Evidence(), "max_latency_ms", "no latency"),
        ({"exports": ["onnx"]}, Evidence(exports={"onnx": "it differs"}), "exports: onnx", "it differs"),
        ({"exports": ["gguf"]}, Evidence(), "exports: gguf", "it was not exported"),
    ]
    schedule.grow(2)
    for number, (gate, schedule.evidence, rule, said) in enumerate(rules):
        verdict = schedule.tick(BETTER, force=True, gate={"min_gain": 0.0, **gate})
        assert verdict.outcome == "rejected"
        assert said in verdict.reason
        assert verdict.decision is not None
        passed = {ruling.rule: ruling.passed for ruling in verdict.decision.rulings}
        assert passed == {"min_gain": True, rule: False}
        assert verdict.decision.decided_by == rule
        assert schedule.trained == (LINE | {"contest"} if number == 0 else set())  # the same challenger
    asked: list[Any] = []
    config = schedule.config(BETTER, gate={"max_latency_ms": 1, "exports": ["onnx"]})

    def proves(*given: Any) -> Evidence:
        asked.append(given[0].retrain)
        return Evidence(latency_ms=2.5)

    run_tick(config, schedule.told, proves, force=True)
    assert asked == [config.retrain]  # which a recipe that is laid over does not have
    schedule.evidence = Evidence(latency_ms=2.0, exports={"onnx": ""})
    assert schedule.tick(BETTER, gate={"max_latency_ms": 2, "exports": ["onnx"]}).outcome == "promoted"


def test_a_student_that_registration_refuses_is_rejected(schedule: Schedule) -> None:
    schedule.grow(2)
    config = schedule.config(SPOILT).model_dump(mode="json", by_alias=True)
    config["register"]["gate"]["max_perplexity_ratio"] = 1.0001

    verdict = run_tick(Config.model_validate(config), schedule.told, lambda *asked: Evidence())
    assert verdict.outcome == "rejected"
    assert "register.gate.max_perplexity_ratio" in verdict.reason


def test_a_recipe_that_registration_refuses_leaves_the_others(schedule: Schedule) -> None:
    schedule.grow(2)
    refused = {**SPOILT, "register.gate.max_perplexity_ratio": 1.0001}
    verdict = schedule.tick(recipes=[refused, BETTER])
    assert verdict.outcome == "promoted"
    assert verdict.decision is not None
    assert verdict.decision.challenger == 2


def test_a_recipe_more_meets_the_champion_of_the_same_data(schedule: Schedule) -> None:
    verdict = schedule.tick(recipes=[{}, SPOILT])
    assert verdict.outcome == "rejected"
    assert verdict.decision is not None
    assert (verdict.decision.champion, verdict.decision.challenger) == (1, 2)
    assert schedule.tick(recipes=[{}, SPOILT]).outcome == "unchanged"


def test_a_second_tick_meanwhile_is_busy(schedule: Schedule) -> None:
    with Decisions.of(NAME, schedule.config().resources).held():
        verdict = schedule.tick()
        assert verdict.outcome == "busy"
        assert verdict.reason.startswith("The retraining of tiny is being run by process ")
        assert schedule.listeners == []


def test_a_step_that_another_command_runs_is_no_busy_tick(schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*given: Any) -> Any:
        raise BusyError("The distill step 1f0c is being run by process 7.")

    monkeypatch.setattr("pipeline.retrain.tick.run_plan", busy)
    schedule.grow(2)
    with pytest.raises(BusyError, match="The distill step"):
        schedule.tick(BETTER)


def test_a_tick_that_lost_its_lease_moves_nothing(schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule.grow(2)
    check, resources = Deciding.check, schedule.config().resources

    def overtaken(self: Deciding) -> None:
        monkeypatch.setattr(Deciding, "check", check)
        self.decisions._journal.claim(self.fence + 1)  # as whoever takes the lease over does first
        check(self)

    monkeypatch.setattr(Deciding, "check", overtaken)
    with pytest.raises(FencedOffError, match="no longer ours"):
        schedule.tick(BETTER)
    assert schedule.aliases == {"champion": 1}
    assert [d.decision for d in Decisions.of(NAME, resources).all()] == ["promoted"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"holdout": 0.2}}, "data.holdout is 0.2 and was 0.1"),
        ({"task": {"block_length": 16}}, "task.block_length: 32 -> 16"),
    ],
)
def test_splits_drawn_by_another_rule_are_refused(schedule: Schedule, change: dict[str, Any], said: str) -> None:
    schedule.grow(2)
    fields = schedule.config().model_dump(mode="json", by_alias=True)
    for section, values in change.items():
        fields[section] |= values

    with pytest.raises(ConfigError, match="would not meet on the same rows") as refused:
        plan_tick(Config.model_validate(fields))
    assert said in str(refused.value)


def test_splits_that_are_given_where_they_were_drawn_are_refused(schedule: Schedule) -> None:
    schedule.grow(2)
    schedule.splits["test"] = schedule.write("test.jsonl", schedule.documents[300:340])
    with pytest.raises(ConfigError, match=r"on the same rows: data.test is given and was left out"):
        plan_tick(schedule.config())


@pytest.mark.parametrize("other", ["vocabulary", "order of merges"])
def test_a_tokenizer_that_cuts_otherwise_is_refused(schedule: Schedule, tmp_path: Path, other: str) -> None:
    schedule.grow(2)
    tokens = plan_tick(schedule.config()).challengers[0][1].pinned.tokenizer
    assert tokens is not None
    shutil.copytree(tokens.folder, tmp_path, dirs_exist_ok=True)
    fields = schedule.config().model_dump(mode="json", by_alias=True)
    fields["model"]["tokenizer"] = str(tmp_path)
    plan_tick(Config.model_validate(fields))  # the same in another place
    if other == "vocabulary":
        train_bpe(schedule.documents[:50], 280, (END_OF_TEXT,)).save_pretrained(tmp_path)
    else:
        path = tmp_path / "tokenizer.json"
        content = json.loads(path.read_text())
        content["model"]["merges"][-2:] = content["model"]["merges"][:-3:-1]
        path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"model.tokenizer is .*, which cuts text in another way"):
        plan_tick(Config.model_validate(fields))


def test_rows_that_do_not_show_documents_are_refused(schedule: Schedule, tmp_path: Path) -> None:
    fields = schedule.config().model_dump(mode="json", by_alias=True)
    fields["name"] = "other"  # of which there is no champion
    words = train_bpe(schedule.documents[:50], 300, (END_OF_TEXT,))
    words.eos_token = None
    words.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.tokenizer: .* has no end-of-text token, so that rows do not show"):
        plan_tick(Config.model_validate({**fields, "model": {**fields["model"], "tokenizer": str(tmp_path)}}))
    text = tmp_path / "running.txt"
    text.write_text("\n".join(schedule.documents))
    data = {"source": str(text), "unit": "line"}
    with pytest.raises(ConfigError, match=r"data\.unit is 'line', running text that has no documents"):
        plan_tick(Config.model_validate({**fields, "data": data}))


def test_a_champion_whose_rows_are_gone_is_not_challenged(schedule: Schedule, tmp_path: Path) -> None:
    train_bpe(schedule.documents[:50], 300, (END_OF_TEXT,)).save_pretrained(tmp_path)
    shutil.rmtree(schedule.folder / "store" / Tokens.stage)
    schedule.grow(2)
    fields = schedule.config().model_dump(mode="json", by_alias=True)
    fields["model"]["tokenizer"] = str(tmp_path)
    with pytest.raises(ConfigError, match="The rows that trained the champion, tiny/1, are not, or no longer, in this"):
        plan_tick(Config.model_validate(fields))


@pytest.fixture(scope="module")
def with_splits(
    tiny_config: Callable[..., Config], begun: tuple[Schedule, Any], tmp_path_factory: pytest.TempPathFactory
) -> Schedule:
    """A schedule of given splits after its first tick."""
    schedule = Schedule(tmp_path_factory.mktemp("splits"), tiny_config, begun[0].documents)
    schedule.grow(1)
    schedule.splits["validation"] = schedule.write("validation.jsonl", schedule.documents[300:320])
    schedule.splits["test"] = schedule.write("test.jsonl", schedule.documents[320:340])
    assert schedule.tick(SPOILT).outcome == "promoted"
    schedule.keep("begun")
    return schedule


@pytest.fixture
def splits(with_splits: Schedule) -> Iterator[Schedule]:
    given = dict(with_splits.splits)
    yield with_splits
    with_splits.splits = given
    with_splits.put_back("begun")


def test_documents_that_trained_either_do_not_measure(splits: Schedule) -> None:
    ours, theirs, new = splits.documents[130:133], splits.documents[:4], splits.documents[320:350]
    chose = splits.documents[300:302]
    splits.write("text/0.jsonl", [*splits.documents[4:130]])  # without what the champion alone was trained on
    splits.write("text/1.jsonl", splits.documents[130:150])
    splits.splits["test"] = splits.write("test-2.jsonl", [*theirs, *ours, *chose, *new])
    verdict = splits.tick({"distill.steps": 1})
    assert verdict.decision is not None
    whole, fresh = verdict.decision.gains["whole"], verdict.decision.gains["fresh"]
    assert (whole.left_out, whole.documents, fresh.documents) == (9, 30, 10)
    assert "; 9 that trained one of the two, or chose its checkpoint, were left out" in verdict.decision.rulings[0].said


def test_what_was_changed_is_said_to_be_new(splits: Schedule) -> None:
    given = splits.documents[320:340]
    changed = [f"{text} indeed" for text in given[:3]]
    splits.splits["test"] = splits.write("test-2.jsonl", [*changed, *reversed(given[3:])])
    verdict = splits.tick({"distill.steps": 1})
    assert verdict.decision is not None
    whole, fresh = verdict.decision.gains["whole"], verdict.decision.gains["fresh"]
    assert (whole.documents, fresh.documents, whole.gone) == (20, 3, 3)
    said = "on the 3 new ones; 3 that measured the champion are there no more (one that was changed is a new one)"
    assert said in verdict.decision.rulings[0].said


def test_a_test_of_nothing_but_what_trained_the_champion_decides_nothing(splits: Schedule) -> None:
    splits.write("text/0.jsonl", splits.documents[130:200])
    splits.splits["test"] = splits.write("test-2.jsonl", splits.documents[:20])
    with pytest.raises(RunError, match=r"All 20 documents of data\.test trained the champion or the challenger"):
        splits.tick({"finetune.steps": 1, "distill.steps": 1})
    assert len(splits.decisions) == 1


@pytest.mark.parametrize(
    ("split", "taken", "said"),
    [
        ("test", "text/0.jsonl", "data.test has .* is among the train files of the champion, tiny/1"),
        ("validation", "text/0.jsonl", "data.validation has .* is among the train files"),
        ("train", "test.jsonl", "data.source has .* is among the test files"),
        ("train", "validation.jsonl", "data.source has .* is among the validation files"),
    ],
)
def test_a_file_that_crosses_splits_is_refused(splits: Schedule, split: str, taken: str, said: str) -> None:
    content = (splits.folder / taken).read_bytes()
    splits.write("text/0.jsonl", splits.documents[130:200])
    for given in ("test", "validation"):
        splits.splits[given] = splits.write(
            f"{given}-2.jsonl", splits.documents[340 : 380 : 2 if given == "test" else 3]
        )
    moved = "text/9.jsonl" if split == "train" else f"{split}-2.jsonl"
    (splits.folder / moved).write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        plan_tick(splits.config())


def test_documents_that_measured_the_champion_train_no_challenger_in_another_file(splits: Schedule) -> None:
    measured, new = splits.documents[320:340], splits.documents[130:150]
    splits.splits["test"] = splits.write("test-2.jsonl", splits.documents[340:360])
    splits.write("text/1.jsonl", [*reversed(measured), *new])
    with pytest.raises(ConfigError, match=r"data\.source has 20 of the 20 documents of the test split of the champion"):
        splits.tick(SPOILT)
    assert splits.trained == {"tokenize"}
    splits.write("text/1.jsonl", [*measured[10:], *new])  # no more than may be in two splits of one configuration
    tick = plan_tick(splits.config(SPOILT))
    assert tick.champion is not None
    ((_, plan),) = tick.challengers
    refuse_what_measured(plan, tick.champion, Recorder(), Engine(plan.config.resources))
    splits.splits["validation"] = splits.write("validation-2.jsonl", splits.documents[360:380])
    splits.write("text/1.jsonl", [*splits.documents[300:311], *new])
    with pytest.raises(ConfigError, match=r"has 11 of the 20 documents of the validation split"):
        splits.tick(SPOILT)


def test_running_text_is_refused_where_its_splits_would_move(schedule: Schedule, corpus: Any) -> None:
    fields = schedule.config().model_dump(mode="json", by_alias=True)
    fields["name"], fields["data"]["source"] = "other", str(corpus)

    with pytest.raises(ConfigError, match="changes when more come"):
        plan_tick(Config.model_validate(fields))


def test_a_configuration_without_the_section_is_refused(schedule: Schedule) -> None:
    with pytest.raises(ConfigError, match="has no section retrain"):
        plan_tick(schedule.config().model_copy(update={"retrain": None}))


def test_a_recipe_of_no_path_is_refused(schedule: Schedule) -> None:
    with pytest.raises(ConfigError, match=r"retrain.recipes: 'distil.lr' is no path"):
        plan_tick(schedule.config({"distil.lr": 1}))


@pytest.mark.parametrize("recipe", [{"register.name": "mine"}, {"register": {"name": "mine"}}])
def test_a_recipe_for_another_name_is_refused(schedule: Schedule, recipe: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"recipes sets register\.name to 'mine', and one name has one champion"):
        schedule.config(recipe)
    schedule.config({"register": {"gate": {"max_perplexity_ratio": 2}}})


def test_a_warm_tick_starts_from_the_champion_and_knows_what_was_decided(schedule: Schedule) -> None:
    schedule.grow(2)
    gate = {"min_gain": 0.0}
    warm = schedule.tick(BETTER, gate=gate, warm_start=True)
    assert warm.outcome == "promoted"

    version = registered_version(schedule.uri, NAME, 2)
    assert version is not None
    resources = schedule.config().resources
    student = steps_behind(step_dirs_of(resources), version.lineage)[Student.stage].record
    assert "start" in str(student.recipe)
    assert schedule.tick(BETTER, gate=gate, warm_start=True).outcome == "unchanged"
    assert schedule.tick(BETTER, gate=gate).outcome == "unchanged"  # it is the same data and recipe
    schedule.grow(3)
    assert schedule.tick({**BETTER, **SPOILT}, warm_start=True).outcome == "rejected"
    assert schedule.tick({**BETTER, **SPOILT}, warm_start=True).outcome == "unchanged"

    console = Console(file=io.StringIO(), width=200)
    first, third = (lineage(f"{NAME}/{number}", resources, console) for number in (1, 3))
    assert (third["ancestors"], third["descendants"]) == (["tiny/2", "tiny/1"], [])
    assert (first["ancestors"], {*first["descendants"]}) == ([], {"tiny/2", "tiny/3"})
    text = str(schedule.folder / "text" / "2.jsonl")
    (of_text,) = lineage(text, resources, console).values()
    assert (of_text["versions"], of_text["trained_on_from_these"]) == ({"train": ["tiny/3"]}, [])
    (of_text,) = lineage(text.replace("2.jsonl", "0.jsonl"), resources, console).values()
    assert {*of_text["trained_on_from_these"]} == {"tiny/2", "tiny/3"}
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "trained on from tiny/2, which was from tiny/1" in told
    assert "trained on from this: tiny/" in told


def test_text_that_comes_while_a_tick_trains_is_for_the_next_one(
    schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule.grow(2)

    class Growing(Recorder):
        def finished(self, stage: str, status: str, seconds: float) -> None:
            super().finished(stage, status, seconds)
            if stage == "distill":
                schedule.grow(3)

    monkeypatch.setattr("tests.retrain.schedule.Recorder", Growing)
    verdict = schedule.tick(BETTER)
    assert verdict.decision is not None
    assert verdict.decision.challenger == verdict.champion == 2
    client = runs.client_of(schedule.uri)
    assert len(client.search_model_versions(f"name = '{NAME}'")) == 2
    assert plan_tick(schedule.config(BETTER)).decided is None


def test_a_first_tick_that_is_rejected_leaves_the_name_free(
    tiny_config: Callable[..., Config], schedule: Schedule, tmp_path: Path
) -> None:
    first = Schedule(tmp_path, tiny_config, schedule.documents)
    first.grow(1)
    refused = {**SPOILT, "register.gate.max_perplexity_ratio": 1.0001}
    ((_, plan),) = plan_tick(first.config(refused)).challengers
    begun = runs.find_run(target_of(plan, "tiny", None))  # as the command does, which has its curves there
    verdict = first.tick(refused)
    assert (verdict.outcome, verdict.champion) == ("rejected", None)
    assert verdict.decision is not None
    assert verdict.decision.decided_by == "register.gate"
    run = runs.client_of(first.uri).get_run(begun.info.run_id)
    assert run.data.tags["bitmill.decision"] == "rejected"
    assert run.data.tags["bitmill.decision_reason"] in verdict.reason
    assert load_text(f"{run.info.artifact_uri}/decision.json") == verdict.decision.told()
    assert first.tick(refused).outcome == "unchanged"
    compressed = run_plan(plan_run(first.config().model_copy(update={"retrain": None})), Recorder(), True)
    assert compressed.finished(ModelVersion).record.aliases == ("champion",)
    stands = first.tick(refused)
    assert (stands.outcome, first.aliases) == ("rejected", {"champion": 1})  # what was registered since stays
    met = first.tick({"distill.seed": 1}, gate={"min_gain": 0.5})
    assert (met.outcome, met.champion) == ("rejected", 1)


def test_of_several_first_recipes_one_that_is_refused_stops_no_other(
    tiny_config: Callable[..., Config], schedule: Schedule, tmp_path: Path
) -> None:
    first = Schedule(tmp_path, tiny_config, schedule.documents)
    first.grow(1)
    refused = {**SPOILT, "register.gate.max_perplexity_ratio": 1.0001}
    half = first.tick(recipes=[{"distill.seed": 1}, refused], gate={"min_gain": 0.5})
    assert (half.outcome, half.champion) == ("promoted", 1)
    assert first.aliases == {"champion": 1}


def test_a_tick_reads_no_more_decisions_than_it_takes_and_each_once(
    schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    read = Directory.read

    def counted(self: Directory, name: str) -> bytes:
        seen.extend([name] if "/entries/" in name else [])
        return read(self, name)

    monkeypatch.setattr(Directory, "read", counted)
    _entry.cache_clear()  # as in a process of its own
    assert schedule.tick().outcome == "unchanged"
    assert len(seen) == 1  # the last one decided on it
    with Decisions.of(NAME, schedule.config().resources).held() as deciding:
        for _ in range(3):
            deciding.append(Decision(decision="rejected", reason="a test", name=NAME, at=now(), champion=1))
    seen.clear()
    _entry.cache_clear()
    assert schedule.tick().outcome == "unchanged"
    assert len(seen) == len(set(seen)) == 4


def test_what_was_taken_back_is_not_promoted_again_whatever_was_decided_since(undecided: Schedule) -> None:
    config = undecided.config(recipes=[BETTER, SPOILT])
    better, spoilt = plan_tick(config).run_keys

    def decide(decision: str, champion: int, *run_keys: str, **facts: Any) -> None:
        fields = {"name": NAME, "reason": "a test", "at": now(), "key": "of another champion", **facts}
        with Decisions.of(NAME, config.resources).held() as deciding:
            deciding.append(Decision(decision=decision, champion=champion, run_keys=run_keys, **fields))
            deciding.put_aliases()

    decide("promoted", 2, better, challenger=2, previous=1)
    decide("rolled back", 1, previous=2, key="")
    decide("rejected", 1, "another recipe")
    again = undecided.tick(BETTER)
    assert (again.outcome, again.champion, undecided.listeners) == ("unchanged", 1, [])
    tick = plan_tick(config)
    assert (tick.decided, [plan.run_key for _, plan in tick.challengers]) == (None, [spoilt])
    decide("rejected", 1, spoilt)
    assert plan_tick(config).decided is None  # it met this champion, not as one of the two
    decide("rolled back", 1, key="")
    assert plan_tick(config).decided is not None
    forced = undecided.tick(BETTER, force=True)
    assert (forced.outcome, forced.champion) == ("promoted", 2)
    undecided.grow(3)
    assert plan_tick(undecided.config(BETTER)).decided is None  # new data
