"""A sweep in one process: what is shared, what is kept, what a repeat and a resumed sweep do."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import ray
from pydantic import ValidationError
from rich.console import Console

import jobs.sweep
from jobs.report.reader import Reader
from pipeline.config.laid_over import laid_over
from pipeline.config.sweep import Sweep
from pipeline.errors import ConfigError, FencedOffError, LostError, NotRegisteredError, RunError
from pipeline.flow.plan import plan_run
from pipeline.stages.scorer import Scorer
from pipeline.store.lease import Lease, Owner
from pipeline.store.locations import tracking_uri
from pipeline.store.objects import open_objects
from pipeline.store.records import Student
from pipeline.sweep import bit_budget, queue
from pipeline.sweep import run as sweeping
from pipeline.sweep.cost import estimate
from pipeline.sweep.queue import TrialQueue, plan_trial, run_trial, worker_plan
from pipeline.sweep.run import plan_sweep, run_sweep
from pipeline.sweep.sampler import sample_values
from pipeline.tracking import runs
from pipeline.tracking.lookup import matches
from pipeline.tracking.query import Query
from tests.conftest import Recorder

BITS = ["2-2-8", "4-4-8", "8-8-8"]


def run(config):
    listener = Recorder()
    return run_sweep(plan_sweep(config), listener), listener


def grid(tiny_config, folder, **overrides):
    return tiny_config(folder, **{"sweep": {"space": {"quant.bits": BITS}}, **overrides})


def steps_in(folder, stage):
    return sorted(path.parent.name for path in Path(folder).glob(f"store/{stage}/*/record.json"))


def runs_of(config):
    client = runs.connect(tracking_uri(config.resources))
    return client, client.search_runs([client.get_experiment_by_name("tiny").experiment_id])


@pytest.fixture(scope="module")
def swept(tiny_config, tmp_path_factory):
    """A finished grid of three widths; tests read it and leave it as it is."""
    folder = tmp_path_factory.mktemp("swept")
    config = grid(tiny_config, folder)
    found, listener = run(config)
    return folder, config, found, listener


def test_shared_steps_are_made_once_and_the_rest_for_each_trial(swept):
    folder, _, found, listener = swept
    assert [trial.status for trial in found.trials] == ["done"] * 3
    for stage in ("tokenize", "finetune", "cache"):
        assert len(steps_in(folder, stage)) == 1
        assert listener.events.count(("done", stage)) == 1
    for stage in ("distill", "evaluate", "pack", "register"):
        assert len(steps_in(folder, stage)) == 3


def test_the_queue_is_told_as_it_empties(swept):
    points = [point for stage, point in swept[3].points if stage == "trials"]
    queue = [(point["step"], point["trials_running"], point["trials_waiting"]) for point in points]
    assert (queue[0], queue[-1]) == ((0, 1, 2), (3, 0, 0))
    assert all(sum(counts) == 3 for counts in queue)


def test_a_trial_has_the_keys_and_results_that_compress_gives(swept, run_flow, tiny_config):
    folder, config, found, _ = swept
    compressed = run_flow(tiny_config(folder, quant={"bits": "4-4-8"}))
    assert set(compressed.outcome.status.values()) == {"reused"}
    trial = next(trial for trial in found.trials if trial.bits == "4-4-8")
    assert trial.key == compressed.plan.run_key
    assert trial.student == compressed.record("evaluate").student
    assert trial.validation == compressed.record("evaluate").validation
    assert trial.size == compressed.record("pack").size
    assert plan_trial(config, trial.values).packed_bytes == trial.size.packed_bytes
    assert trial.step_keys == {step.name: step.key for step in compressed.plan.steps}


def test_a_trial_whose_ternary_codes_lie_five_a_byte_is_of_the_size_that_it_has(cloned, run_flow, tiny_config):
    config = tiny_config(cloned, pack={"encoding": "base3"})
    packed = run_flow(config, "pack")
    assert packed.outcome.status["distill"] == "reused"
    assert plan_trial(config, {}).packed_bytes == packed.record("pack").size.packed_bytes


def test_runs_are_nested_with_curves_and_the_sweep_has_its_tables(swept):
    _, config, found, _ = swept
    client, logged = runs_of(config)
    by_key = {run.data.tags[runs.KEY_TAG]: run for run in logged}
    parent = by_key.pop(plan_sweep(config).key)
    assert set(by_key) == {trial.key for trial in found.trials}
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["trials"] == 3
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"trials.json", "recipe.json"}
    for run in by_key.values():
        assert run.data.tags[runs.PARENT_TAG] == parent.info.run_id
        assert [m.step for m in client.get_metric_history(run.info.run_id, "distill/validation_nats")] == [0, 5, 10, 12]
        assert [m.step for m in client.get_metric_history(run.info.run_id, "distill/loss")] == list(range(1, 13))


def test_a_finished_sweep_has_a_page_beside_its_record_and_in_its_run(swept):
    _, config, _, _ = swept
    planned = plan_sweep(config)
    page = Path(jobs.sweep.show(planned))
    made = page.stat().st_mtime_ns
    assert page.is_relative_to(planned.step_dir.uri)
    assert all(text in page.read_text() for text in (planned.key, *BITS))
    assert all(page.with_suffix(suffix).stat().st_size > 100 for suffix in (".png", ".csv"))
    client, logged = runs_of(config)
    parent = next(run for run in logged if run.data.tags[runs.KEY_TAG] == planned.key)
    assert page.name in {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert jobs.sweep.show(planned) == str(page)
    assert page.stat().st_mtime_ns == made


def test_a_repeat_runs_nothing(swept):
    folder, config, found, _ = swept
    before = {path: path.stat().st_mtime_ns for path in folder.glob("store/*/*/record.json")}
    again, listener = run(config)
    assert (again.trials, again.front) == (found.trials, found.front)
    assert listener.events == []
    assert {path: path.stat().st_mtime_ns for path in folder.glob("store/*/*/record.json")} == before
    wider = config.model_copy(update={"sweep": config.sweep.model_copy(update={"max_concurrent": 7})})
    assert plan_sweep(wider).record is not None


def test_another_sweep_over_the_same_values_trains_nothing(swept, tiny_config):
    folder, _, found, _ = swept
    other = grid(tiny_config, folder, sweep={"space": {"quant.bits": BITS[:2]}, "objectives": ["kl_nats"]})
    planned = plan_sweep(other)
    assert planned.record is None
    assert estimate(planned).shared_steps == 0
    both, listener = run(other)
    assert listener.events == []
    assert [trial.student for trial in both.trials] == [trial.student for trial in found.trials[:2]]
    assert len(both.front) == 1


class InterruptedHereError(KeyboardInterrupt):
    """As an interrupt: no handler of errors sees it."""


class Interrupting(Recorder):
    def advanced(self, stage, done, total, note):
        if stage == "trials" and "4-4-8" in note:
            raise InterruptedHereError


def test_a_sweep_goes_on_where_it_was(tiny_config, cloned):
    config = grid(tiny_config, cloned)
    with pytest.raises(InterruptedHereError):
        run_sweep(plan_sweep(config), Interrupting())
    planned = plan_sweep(config)
    assert [trial.status for trial in planned.trials.values()] == ["done", "running"]
    guess = estimate(planned)
    assert (guess.trials, guess.left) == (3, 2)
    trials = list(cloned.glob("store/sweep/*/*/trials/*.json"))
    (first,) = [path.stat().st_mtime_ns for path in trials if json.loads(path.read_text())["trial"]["status"] == "done"]
    found = run_sweep(planned, Recorder())
    assert [trial.status for trial in found.trials] == ["done"] * 3
    assert first in {path.stat().st_mtime_ns for path in cloned.glob("store/sweep/*/*/trials/*.json")}
    _, logged = runs_of(config)
    assert len(logged) == 4


def test_the_cap_of_worker_hours_stops_starting_and_keeps_the_best_so_far(tiny_config, cloned):
    config = grid(tiny_config, cloned, resources={"max_worker_hours": 1e-9})
    found, _ = run(config)
    assert not found.complete
    assert [trial.values["quant.bits"] for trial in found.trials] == BITS[:2]  # the first had its package already
    assert found.spent_hours >= 1e-9
    planned = plan_sweep(config)
    assert planned.record is None
    text = io.StringIO()
    jobs.sweep.print_result(planned, found, Console(file=text, width=200))
    assert f"bitmill report {planned.key}" in text.getvalue()
    more, _ = run(grid(tiny_config, cloned, resources={"max_worker_hours": 10.0}))
    assert more.complete
    assert len(more.trials) == 3
    assert more.spent_hours > found.spent_hours


def test_shared_steps_are_paid_for_once(swept, tiny_config, cloned):
    folder, config, found, _ = swept
    trained = sum(trial.worker_seconds for trial in found.trials)
    shared = sum(float(taken(folder, stage)) for stage in ("tokenize", "finetune", "cache"))
    assert found.spent_hours * 3600 == pytest.approx(trained + shared, abs=0.1)
    again, _ = run(config)  # from the record
    assert again.spent_hours == pytest.approx(found.spent_hours, abs=1e-3)


def taken(folder, stage):
    (record,) = Path(folder).glob(f"store/{stage}/*/record.json")
    return json.loads(record.read_text())["provenance"]["seconds"]


def test_what_the_cap_left_undone_is_said_with_its_reason(tiny_config, cloned, monkeypatch):
    config = grid(tiny_config, cloned, resources={"max_worker_hours": 1e-9})

    def away(*arguments, **named):
        raise runs.MlflowException("gone")

    monkeypatch.setattr(runs, "log_run", away)
    planned = plan_sweep(config)
    found = run_sweep(planned, Recorder())
    assert [name for name, _ in found.unfinished] == ["bits=2-2-8", "bits=4-4-8"]
    text = io.StringIO()
    jobs.sweep.print_result(planned, found, Console(file=text, width=200))
    assert "bits=2-2-8: not finished." in text.getvalue()


def test_a_plan_counts_each_shared_step_of_what_is_left(tiny_config, tmp_path):
    one = estimate(plan_sweep(grid(tiny_config, tmp_path)))
    assert (one.trials, one.left, one.shared_steps) == (3, 3, 3)
    space = {"quant.bits": BITS, "finetune.lr": [1e-3, 5e-3]}
    two = estimate(plan_sweep(tiny_config(tmp_path, sweep={"space": space})))
    assert (two.trials, two.shared_steps) == (6, 5)  # the tokens are the same, teacher and cache are not
    assert two.hours_basis.startswith("estimated: ")
    assert two.bytes > one.bytes


def test_a_search_of_few_values_ends_when_all_are_tried(tiny_config, cloned):
    space = {"distill.seed": [0, 1]}
    settings = {"space": space, "search": "optuna", "samples": 50}
    config = tiny_config(cloned, distill={"steps": 2}, sweep=settings)
    planned = plan_sweep(config)
    assert planned.at_most == 2
    found = run_sweep(planned, Recorder())
    assert sorted(trial.values["distill.seed"] for trial in found.trials) == [0, 1]
    assert found.complete


@pytest.fixture
def contrary(monkeypatch):
    """Scores by which seed 0 is the best on validation and the worst on the test split, by large factors."""
    whole = Scorer.score

    def score(self, split, before, shard):
        seed = self.seed_of_student
        piece = whole(self, split, before, shard)
        worse = 1 + 0.2 * (2 - seed if split == "test" else seed)
        return piece.model_copy(
            update={"student": {**piece.student, "nats": [worse * n for n in piece.student["nats"]]}}
        )

    built = Scorer.__init__

    def build(self, job, *how):
        built(self, job, *how)
        self.seed_of_student = job.input(Student).record.recipe["distill"]["seed"]

    monkeypatch.setattr(Scorer, "__init__", build)
    monkeypatch.setattr(Scorer, "score", score)


def test_validation_chooses_where_the_splits_disagree(tiny_config, cloned, run_flow, contrary, monkeypatch):
    told, sample = [], sample_values

    def sampling(sweep, index, tried):
        told.append([(values["distill.seed"], scores) for values, scores in tried])
        return sample(sweep, index, tried)

    monkeypatch.setattr(queue, "sample_values", sampling)
    settings = {"space": {"distill.seed": [0, 1, 2]}, "search": "optuna", "samples": 3, "objectives": ["gap", "bytes"]}
    config = tiny_config(cloned, distill={"steps": 2}, sweep=settings)
    found, _ = run(config)
    trials = {trial.values["distill.seed"]: trial for trial in found.trials}

    def gap(of):
        return math.log(of["student"]["perplexity"] / of["teacher"]["perplexity"])

    validation = {seed: gap(trial.validation) for seed, trial in trials.items()}
    test = {seed: gap({"teacher": trial.teacher, "student": trial.student}) for seed, trial in trials.items()}
    assert sorted(trials, key=validation.get) == sorted(trials, key=test.get, reverse=True) == [0, 1, 2]
    assert len(told[-1]) == 2
    for seed, scores in told[-1]:
        assert scores == (pytest.approx(validation[seed]), trials[seed].size.packed_bytes)
    assert found.front == (trials[0].key,)
    assert [one.key for one in Reader(str(cloned / "store"), str(cloned)).content(plan_sweep(config).key).best] == [
        trials[0].key
    ]
    client = runs.connect(tracking_uri(config.resources))
    registered = [trials[seed].version["version"] for seed in (0, 1, 2)]
    assert [one.version for one in matches(client, Query(), None, None)] == registered
    between = (trials[0].validation["student"]["perplexity"] + trials[1].validation["student"]["perplexity"]) / 2
    assert [one.version for one in matches(client, Query(max_perplexity=between), None, None)] == registered[:1]
    gate = {"gate": {"max_perplexity_ratio": math.exp((validation[0] + validation[1]) / 2)}}

    def gated(seed):
        return tiny_config(cloned, distill={"steps": 2, "seed": seed}, register={"name": "gated", **gate})

    assert run_flow(gated(0)).record("register").version == 1
    with pytest.raises(NotRegisteredError, match=f"On validation .* {math.exp(validation[1]):.3f} times the teacher's"):
        run_flow(gated(1))


GRANULARITIES = {"quant.granularity": ["per_tensor", "per_channel"]}


def bytes_at(config, granularity, bits):
    """Of the weights file with every module at one width."""
    shape = bit_budget.layout_of(laid_over(config, {"quant.granularity": granularity}))
    return shape.packed_bytes(dict.fromkeys(shape.modules, bits))


def test_under_a_budget_each_combination_gets_widths_that_fit_it(tiny_config, cloned):
    base = tiny_config(cloned, distill={"steps": 2, "contrast_weight": 0})
    limit = (bytes_at(base, "per_channel", 2) + bytes_at(base, "per_channel", 8)) // 2
    settings = Sweep(space=GRANULARITIES, budget_mib=limit / 2**20, proposals=2)
    config = base.model_copy(update={"sweep": settings})
    planned = plan_sweep(config)
    assert estimate(planned).trials == 4
    found = run_sweep(planned, Recorder())
    assert [trial.status for trial in found.trials] == ["done"] * len(found.trials)
    widths = {}
    for kind in GRANULARITIES["quant.granularity"]:
        trials = [trial for trial in found.trials if trial.values["quant.granularity"] == kind]
        assert 1 <= len(trials) <= 2
        assert 0.95 * limit < max(trial.size.packed_bytes for trial in trials) <= limit
        widths[kind] = [(trial.values["quant.bits"], trial.values["quant.overrides"]) for trial in trials]
    assert widths["per_tensor"] != widths["per_channel"]  # scales a row leave less for codes
    assert plan_sweep(config).record is not None


def test_a_budget_that_one_combination_cannot_meet_is_refused_before_anything_runs(tiny_config, tmp_path):
    base = tiny_config(tmp_path)
    least = bytes_at(base, "per_channel", 2)
    fields = {"space": GRANULARITIES, "budget_mib": (least - 1) / 2**20}
    plan_sweep(tiny_config(tmp_path, sweep={**fields, "space": {}}))
    with pytest.raises(ConfigError, match=f"the smallest possible model is {least:,} bytes"):
        plan_sweep(tiny_config(tmp_path, sweep=fields))
    with pytest.raises(ValidationError, match=r"budget_mib chooses quant\.bits"):
        tiny_config(tmp_path, sweep={"space": {"quant.bits": ["2-2-8"]}, "budget_mib": 1})


def test_optuna_samples_and_a_trial_that_cannot_work_is_a_failed_one(tiny_config, cloned):
    config = tiny_config(
        cloned,
        distill={"steps": 2},
        sweep={
            "space": {"quant.quantizer": ["twn", "lsq"], "quant.bits": ["2-2-8", "4-4-8"]},
            "search": "optuna",
            "samples": 4,
            "seed": 3,
        },
    )
    found, _ = run(config)
    assert len(found.trials) == 4
    for trial in found.trials:
        impossible = trial.values == {"quant.quantizer": "twn", "quant.bits": "4-4-8"}
        assert (trial.status, bool(trial.failure)) == (("failed", True) if impossible else ("done", False))
        assert not (impossible and trial.key in found.front)
    assert run(config)[0].trials == found.trials


def test_a_trial_that_diverges_is_failed_and_the_others_are_done(tiny_config, cloned):
    config = tiny_config(cloned, sweep={"space": {"distill.lr": [2e-3, 1e30]}})
    found, _ = run(config)
    assert [trial.status for trial in found.trials] == ["done", "failed"]
    assert "Lower the learning rate" in found.trials[1].failure
    assert found.front == (found.trials[0].key,)
    _, logged = runs_of(config)
    status = {run.data.tags[runs.KEY_TAG]: run.info.status for run in logged}
    assert status[found.trials[1].key] == "FAILED"


def test_a_failed_trial_runs_again_when_asked(tiny_config, cloned, monkeypatch):
    config = tiny_config(cloned, distill={"steps": 2}, sweep={"space": {"quant.bits": ["4-4-8", "8-8-8"]}})

    def full(plan, report):
        if plan.config.quant.bits == "8-8-8":
            raise RunError("The disk is full.")
        run_trial(plan, report)

    monkeypatch.setattr(sweeping, "run_trial", full)
    found, _ = run(config)
    assert [(trial.status, trial.failure) for trial in found.trials] == [("done", ""), ("failed", "The disk is full.")]
    monkeypatch.undo()
    assert plan_sweep(config).record is not None
    planned = plan_sweep(config, retry_failed=True)
    assert estimate(planned).left == 1

    def interrupted(plan, report):
        raise InterruptedHereError

    monkeypatch.setattr(sweeping, "run_trial", interrupted)
    with pytest.raises(InterruptedHereError):
        run_sweep(planned, Recorder())
    monkeypatch.undo()
    planned = plan_sweep(config)  # goes on, as any sweep that was interrupted
    assert planned.record is None
    again = run_sweep(planned, Recorder())
    assert [(trial.status, trial.failure) for trial in again.trials] == [("done", ""), ("done", "")]
    assert again.trials[0] == found.trials[0]
    assert plan_sweep(config, retry_failed=True).record.trials == again.trials


class TakenOver(Recorder):
    """A listener during whose first trial another process takes the sweep over."""

    def __init__(self, planned):
        super().__init__()
        self._planned = planned

    def advanced(self, stage, done, total, note):
        super().advanced(stage, done, total, note)
        if stage == "trials":
            step_dir = self._planned.step_dir
            theirs = Lease(Owner("elsewhere", 1, 0), 99).to_json()
            open_objects(step_dir.storage_uri).write(f"sweep/{step_dir.key}/lease.json", theirs)


def test_a_sweep_that_was_taken_over_ends_its_trial_at_the_next_validation(tiny_config, cloned):
    config = tiny_config(cloned, sweep={"space": {"quant.bits": ["4-4-8", "8-8-8"]}})
    planned, before = plan_sweep(config), steps_in(cloned, "distill")
    with pytest.raises(FencedOffError, match="no longer ours: it is held by process 1 on elsewhere"):
        run_sweep(planned, TakenOver(planned))
    assert steps_in(cloned, "distill") == before


def test_a_trial_with_a_range_for_each_batch_is_registered_by_its_own_keys(tiny_config, cloned):
    config = tiny_config(
        cloned,
        quant={"activation_range": "tensor"},
        distill={"steps": 2},
        resources={"workers": 1},
        sweep={"space": {"quant.bits": ["4-4-8"]}},
    )
    (one,) = plan_sweep(config).known
    run_trial(worker_plan(one.plan), lambda result: None)
    before = steps_in(cloned, "distill")
    found = run_sweep(plan_sweep(config), Recorder())
    assert [trial.key for trial in found.trials] == [one.key]
    assert found.trials[0].version is not None
    assert steps_in(cloned, "distill") == before
    assert not ray.is_initialized()  # nor for what is all done: a repeat
    assert run_sweep(plan_sweep(config), Recorder()).trials == found.trials
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (TypeError("no such head"), "failed", "The trial failed: TypeError: no such head. "),
        (LostError("A worker died."), "running", r"A worker died\."),
        (OSError("The disk is full"), "running", r"The trial failed: OSError: The disk is full\."),
    ],
)
def test_what_a_trial_dies_of_costs_that_trial_alone(tiny_config, cloned, monkeypatch, error, status, said):
    config = tiny_config(cloned, distill={"steps": 2}, sweep={"space": {"quant.bits": ["4-4-8", "8-8-8"]}})

    def dying(plan, report):
        if plan.config.quant.bits == "4-4-8":
            raise error
        run_trial(plan, report)

    monkeypatch.setattr(sweeping, "run_trial", dying)
    if status == "failed":
        found = run_sweep(plan_sweep(config), Recorder())
        assert [trial.status for trial in found.trials] == ["failed", "done"]
        assert found.trials[0].failure.startswith(said)
        assert found.complete
        return
    with pytest.raises(RunError, match=rf"1 of 2 trials are not finished, first bits=4-4-8: {said}"):
        run_sweep(plan_sweep(config), Recorder())
    assert [trial.status for trial in plan_sweep(config).trials.values()] == ["running", "done"]
    monkeypatch.undo()
    assert [trial.status for trial in run(config)[0].trials] == ["done", "done"]


def test_a_cap_that_the_last_trial_reaches_leaves_nothing(tiny_config, cloned, monkeypatch):
    config = grid(tiny_config, cloned, distill={"steps": 2})
    monkeypatch.setattr(TrialQueue, "over", lambda queue: queue.ended_count == queue.total)
    found, _ = run(config)
    assert found.complete
    assert plan_sweep(config).record is not None


def test_the_cap_stops_shared_steps_too(tiny_config, cloned):
    space = {"finetune.lr": [1e-3, 2e-3, 4e-3]}
    config = tiny_config(cloned, sweep={"space": space}, resources={"max_worker_hours": 1e-9})
    before = len(steps_in(cloned, "finetune"))
    planned = plan_sweep(config)
    found = run_sweep(planned, Recorder())
    assert (found.complete, found.trials) == (False, ())
    assert len(steps_in(cloned, "finetune")) == before + 1
    assert found.spent_hours > 1e-9
    text = io.StringIO()
    jobs.sweep.print_result(planned, found, Console(file=text, width=200))
    assert "Raise it and give the same command" in text.getvalue()
    assert "bitmill report" not in text.getvalue()  # there is nothing to show


def test_a_teacher_that_cannot_be_made_fails_its_trials_though_the_others_are_done(tiny_config, cloned):
    rate = tiny_config(cloned).finetune.lr
    config = tiny_config(cloned, sweep={"space": {"finetune.lr": [rate, 1e30]}})
    found, listener = run(config)  # the first was made before, by another command
    assert [trial.status for trial in found.trials] == ["done", "failed"]
    assert ("done", "distill") not in listener.events
    assert found.complete


def test_a_sweep_of_failures_ends_without_a_page(tiny_config, tmp_path):
    config = tiny_config(tmp_path, sweep={"space": {"finetune.lr": [1e30, 2e30]}})
    text = io.StringIO()
    for _ in range(2):
        document = jobs.sweep.sweep(config, Console(file=text, width=200), only_plan=False, wait=True)
        assert [trial["status"] for trial in document["trials"]] == ["failed", "failed"]
        assert (document["front"], document["report_uri"], document["complete"]) == ([], None, True)
    assert "--retry-failed" in text.getvalue()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_one_impossible_draw_does_not_refuse_a_search(tiny_config, tmp_path, seed):
    space = {"quant.quantizer": ["twn", "lsq"], "quant.bits": ["2-2-8", "4-4-8"]}
    settings = {"space": space, "search": "optuna", "samples": 4, "seed": seed}
    assert plan_sweep(tiny_config(tmp_path, sweep=settings)).at_most == 4
    never = {**settings, "space": {"quant.quantizer": ["twn"], "quant.bits": ["4-4-8"]}}
    with pytest.raises(ConfigError, match="ternary weights only"):
        plan_sweep(tiny_config(tmp_path, sweep=never))


@pytest.mark.parametrize("bits", ["2-2-8", "4-4-8"])
def test_a_trial_of_a_preset_is_what_compress_runs(tiny_config, tmp_path, bits):
    values = {"preset": "best", "distill": {"contrast_weight": 0.0, "lr": 1e-3}}
    trials = plan_sweep(tiny_config(tmp_path, sweep={"space": {"quant.bits": ["2-2-8", "4-4-8"]}}, **values)).known
    (trial,) = (one for one in trials if one.values["quant.bits"] == bits)
    alone = tiny_config(tmp_path, quant={"bits": bits}, **values)
    assert trial.key == plan_run(alone).run_key
    assert trial.plan.config.distill == alone.distill


def test_a_plan_is_printed_and_starts_nothing(tiny_config, tmp_path):
    text = io.StringIO()
    config = grid(tiny_config, tmp_path, resources={"max_worker_hours": 2})
    document = jobs.sweep.sweep(config, Console(file=text, width=200), only_plan=True, wait=True)
    assert [trial["status"] for trial in document["trials"]] == ["to run"] * 3
    assert [trial["params"] for trial in document["trials"]] == [{"quant.bits": bits} for bits in BITS]
    assert document["worker_hours"] > 0
    for said in ("3 trials, 3 of them to run, 3 shared steps", "worker-hours: about", "no trial starts once 2 worker"):
        assert said in text.getvalue()
    assert not list(tmp_path.glob("store/*/*/record.json"))


def test_where_a_teacher_cannot_be_made_its_trials_are_failed_and_the_others_are_done(tiny_config, cloned):
    config = tiny_config(cloned, sweep={"space": {"finetune.lr": [1e30, 5e-3], "quant.bits": ["2-2-8", "8-8-8"]}})
    found, _ = run(config)
    status = {(trial.values["finetune.lr"], trial.values["quant.bits"]): trial.status for trial in found.trials}
    assert status == {
        (1e30, "2-2-8"): "failed",
        (1e30, "8-8-8"): "failed",
        (5e-3, "2-2-8"): "done",
        (5e-3, "8-8-8"): "done",
    }
    assert all("learning rate" in trial.failure for trial in found.trials if trial.status == "failed")
    assert found.complete
    alone = tiny_config(cloned, finetune={"lr": 1e30}, sweep={"space": {"quant.bits": ["2-2-8", "8-8-8"]}})
    with pytest.raises(RunError, match="learning rate"):  # all share it: the sweep cannot go on
        run(alone)


def test_a_lost_registry_is_filled_without_training(swept, tiny_config, tmp_path):
    folder, _, found, _ = swept
    moved = grid(tiny_config, folder, resources={"tracking_uri": f"sqlite:///{tmp_path}/other.db"})
    again, listener = run(moved)
    assert listener.events == []
    assert [trial.student for trial in again.trials] == [trial.student for trial in found.trials]
    client = runs.connect(f"sqlite:///{tmp_path}/other.db")
    assert len(client.search_model_versions("name = 'tiny'")) == 3


def test_what_cannot_work_is_said_before_anything_starts(tiny_config, tmp_path):
    wide = {"space": {"task.block_length": [32, 64]}}
    with pytest.raises(ConfigError, match=r"The trial block_length=64 cannot run: .*the model has 32 positions"):
        plan_sweep(tiny_config(tmp_path, sweep=wide))
    away = {"tracking_uri": "http://127.0.0.1:9"}
    with pytest.raises(ConfigError, match="cannot be reached"):
        run(grid(tiny_config, tmp_path, resources=away))
    assert not list(tmp_path.glob("store/*/*/record.json"))


def test_a_registry_that_goes_away_leaves_the_trials_kept(tiny_config, cloned, monkeypatch):
    config = grid(tiny_config, cloned, sweep={"space": {"quant.bits": ["2-2-8"]}})

    def away(*arguments, **named):
        raise runs.MlflowException("gone")

    monkeypatch.setattr(runs, "log_run", away)
    with pytest.raises(RunError, match=r"1 of 1 trials are not finished.*the same command goes on"):
        run(config)
    monkeypatch.undo()
    found, listener = run(config)
    assert [trial.status for trial in found.trials] == ["done"]
    assert listener.events == []


def test_records_say_how_long_a_step_took_and_the_plan_rests_on_it(swept, tiny_config):
    folder, _, _, _ = swept
    record = json.loads(next(folder.glob("store/distill/*/record.json")).read_text())
    assert float(record["provenance"]["seconds"]) > 0
    guess = estimate(plan_sweep(grid(tiny_config, folder, sweep={"space": {"distill.seed": [5, 6]}})))
    assert guess.hours_basis.startswith("measured: ")
    assert guess.worker_hours > 0
    assert plan_run(grid(tiny_config, folder)).run_key == plan_run(tiny_config(folder)).run_key
