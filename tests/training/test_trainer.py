"""The one loop: the same numbers whatever the workers, the micro-batch, the cache mode and the interruptions."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import signal
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.quant import Quant
from pipeline.config.training import Distill, Finetune
from pipeline.errors import RunError
from pipeline.quant.modules import quantizers
from pipeline.quant.quantizers import base
from pipeline.training.checkpoints import Progress, latest_checkpoint, under
from pipeline.training.trainer import Trainer, TrainingJob
from tests.training.cases import VOCABULARY, Case, gradients, run_until, steps_of, with_workers

FULL = Quant(bits="32-32-32")
LOW = Quant(bits="2-2-8")
DISTILL: dict[str, Any] = {"steps": 50, "batch_size": 12, "lr": 2e-3, "negatives": 8, "eval_every": 20}
FINETUNE = Finetune(steps=50, batch_size=12, lr=2e-3, dropout=0.0, eval_every=20)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.make(tmp_path_factory.mktemp("training"))


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of a gradient, relative to that gradient's norm."""
    assert set(a) == set(b)
    return max(float((a[name] - b[name]).norm() / b[name].norm().clamp(min=1e-12)) for name in a)


@pytest.mark.parametrize("world", [2, 3])
def test_the_rows_of_each_batch_do_not_depend_on_the_workers(case: Case, world: int) -> None:
    run = case.run(Distill(**DISTILL), f"rows{world}")
    alone = steps_of(case.loop(run, LOW), 14)["rows"]
    shared = with_workers(world, case.root, lambda rank: steps_of(case.loop(run, LOW), 14)["rows"])
    assert [list(chain(*(shared[rank][step] for rank in range(world)))) for step in range(14)] == alone
    assert sorted(list(chain(*alone))[:100]) == list(range(100))  # the first epoch reads every row once


@pytest.mark.parametrize("recipe", [Distill(**DISTILL), FINETUNE], ids=["distill", "finetune"])
@pytest.mark.parametrize(("world", "micro"), [(1, 5), (2, 8), (2, 5)])
def test_full_precision_curves_do_not_depend_on_workers_or_micro_batch(
    case: Case, recipe: Distill | Finetune, world: int, micro: int
) -> None:
    name = f"curve{type(recipe).__name__}{world}{micro}"
    reference = steps_of(case.loop(case.run(recipe, name + "r", micro_batch=12), FULL), 50)["losses"]
    run = case.run(recipe, name, micro_batch=micro)
    found = with_workers(world, case.root, lambda rank: steps_of(case.loop(run, FULL), 50)["losses"])
    for losses in found:
        assert losses == pytest.approx(reference, rel=1e-4)
    assert reference[-1] < reference[0]


@pytest.mark.parametrize(("world", "micro"), [(1, 5), (2, 12), (2, 3)])
def test_first_quantized_step_does_not_depend_on_workers_or_micro_batch(case: Case, world: int, micro: int) -> None:
    loss, grads = gradients(case.loop(case.run(Distill(**DISTILL), "first", micro_batch=12), LOW))
    run = case.run(Distill(**DISTILL), f"first{world}{micro}", micro_batch=micro)

    def work(rank: int) -> Any:
        other_loss, other = gradients(case.loop(run, LOW))
        torch.save(other, case.root / f"grads-{rank}.pt")
        return other_loss

    for rank, other_loss in enumerate(with_workers(world, case.root, work)):
        other = torch.load(case.root / f"grads-{rank}.pt", weights_only=True)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert relative(other, grads) < 1e-4


@pytest.mark.parametrize("micro", [3, 12])
def test_each_weight_is_quantized_once_a_step(case: Case, micro: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = case.loop(case.run(Distill(**DISTILL), "once", micro_batch=micro), LOW)
    quantize, shapes = base.fake_quantize, []

    def counted(weight: torch.Tensor, *others: Any) -> torch.Tensor:
        shapes.append(weight.shape)
        return quantize(weight, *others)

    monkeypatch.setattr(base, "fake_quantize", counted)
    loop.train_step(0)
    assert sum(shape.numel() for shape in shapes) == sum(weight.numel() for _, weight, _ in quantizers(loop.model))
    assert len(shapes) < len([*quantizers(loop.model)])  # matrices that are alike are quantized as one stack


def test_the_memory_bank_is_identical_on_every_worker(case: Case) -> None:
    run = case.run(Distill(**DISTILL), "bank", micro_batch=3)
    first, second = with_workers(2, case.root, lambda rank: steps_of(case.loop(run, LOW), 10))
    assert first["bank"] == second["bank"]
    assert first["seen"] == second["seen"]


@pytest.mark.parametrize(("world", "micro"), [(1, 5), (2, 8)])
def test_quantized_weights_move_alike_whatever_the_workers_and_micro_batch(case: Case, world: int, micro: int) -> None:
    """By all of ten steps, the bank and its updates included. Another order of sums moves them otherwise by a hundredth
    (and turns a code now and then, after which the runs part), a gradient that is not summed over the workers by a
    tenth, a rank that reads another's rows by as much as they move."""
    recipe, steps = Distill(**DISTILL), 10

    def moved(run: TrainingJob) -> torch.Tensor:
        loop = case.loop(run, LOW)
        start = [parameter.detach().clone() for parameter in loop.model.parameters()]
        steps_of(loop, steps)
        ended = zip(start, loop.model.parameters(), strict=True)
        return torch.cat([(after.detach() - before).flatten() for before, after in ended])

    def work(rank: int) -> None:
        save_file({"moved": moved(run)}, case.root / f"moved-{rank}.safetensors")

    reference = moved(case.run(recipe, f"alone{world}", micro_batch=12))
    run = case.run(recipe, f"shared{world}", micro_batch=micro)
    with_workers(world, case.root, work)
    ranks = [load_file(case.root / f"moved-{rank}.safetensors")["moved"] for rank in range(world)]
    assert all(torch.equal(each, ranks[0]) for each in ranks)
    assert float((ranks[0] - reference).norm() / reference.norm()) < 0.03


def test_online_and_cached_fp32_states_give_the_same_first_step(case: Case) -> None:
    online = gradients(case.loop(case.run(Distill(**DISTILL), "online"), LOW))
    states = gradients(case.loop(case.run(Distill(**DISTILL), "states", case.cache("float32")), LOW))
    assert states[0] == pytest.approx(online[0], rel=1e-6)
    assert relative(states[1], online[1]) < 1e-4


def test_draws_give_the_first_step_of_the_whole_distribution_on_average(case: Case) -> None:
    """Its gradient comes the nearer the more tokens are drawn, and the teacher's head is not asked for."""
    recipe = Distill(**DISTILL, contrast_weight=0.0)
    loss, grads = gradients(case.loop(case.run(recipe, "whole"), LOW))
    apart = []
    for count in (5, 50, 5000):
        loop = case.loop(case.run(recipe, f"drawn{count}", case.draws(count)), LOW)
        assert loop.distillation is not None
        assert loop.distillation.head is None
        drawn_loss, drawn = gradients(loop)
        assert drawn_loss == pytest.approx(loss, rel=0.03 / count**0.5)
        flat, whole = (torch.cat([g[name].flatten() for name in grads]) for g in (drawn, grads))
        apart.append(float((flat - whole).norm() / whole.norm()))
    assert apart[2] < 0.05
    assert apart[2] < apart[1] / 20 < apart[0] / 40


@pytest.mark.parametrize(("world", "micro"), [(1, 5), (2, 3)])
def test_steps_by_draws_do_not_depend_on_workers_or_micro_batch(case: Case, world: int, micro: int) -> None:
    recipe, draws = Distill(**DISTILL, contrast_weight=0.0), case.draws()
    reference = steps_of(case.loop(case.run(recipe, f"draws{world}", draws, micro_batch=12), FULL), 12)["losses"]
    run = case.run(recipe, f"shared-draws{world}", draws, micro_batch=micro)
    for losses in with_workers(world, case.root, lambda rank: steps_of(case.loop(run, FULL), 12)["losses"]):
        assert losses == pytest.approx(reference, rel=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrower_states_stay_close(case: Case, dtype: str) -> None:
    online, _ = gradients(case.loop(case.run(Distill(**DISTILL), f"online{dtype}"), LOW))
    states, _ = gradients(case.loop(case.run(Distill(**DISTILL), f"states{dtype}", case.cache(dtype)), LOW))
    assert states == pytest.approx(online, rel=1e-3)


@pytest.mark.parametrize("quant", [FULL, LOW], ids=["full", "low"])
def test_activation_checkpointing_changes_no_gradient(case: Case, quant: Quant) -> None:
    plain = gradients(case.loop(case.run(Distill(**DISTILL), "plain"), quant))
    saved = gradients(case.loop(case.run(Distill(**DISTILL), "saved", activation_checkpointing=True), quant))
    assert saved[0] == plain[0]
    assert relative(saved[1], plain[1]) < 1e-6


def test_bf16_trains_close_to_fp32(case: Case) -> None:
    recipe = Distill(**DISTILL)
    exact = case.loop(case.run(recipe, "fp32"), LOW)
    rounded = case.loop(case.run(recipe.model_copy(update={"precision": "bf16"}), "bf16"), LOW)
    assert all(p.dtype == torch.float32 for p in rounded.model.parameters())
    fp32, bf16 = steps_of(exact, 30)["losses"], steps_of(rounded, 30)["losses"]
    assert bf16 != fp32
    assert bf16 == pytest.approx(fp32, rel=0.02)


def weights_after(case: Case, run: TrainingJob, quant: Quant, stop_at: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """The best weights, and the losses of all steps, of a training that is stopped after each step of `stop_at` and
    started again with nothing but the store."""
    for step in stop_at:
        run_until(case.loop(run, quant), step)
    loop = case.loop(run, quant)
    loop.run()
    losses = torch.tensor([entry["loss"] for entry in loop.progress.history if "loss" in entry], dtype=torch.float64)
    return {name: p.detach().clone() for name, p in loop.model.named_parameters()} | {"losses": losses}


@pytest.mark.parametrize("recipe", [Distill(**DISTILL), FINETUNE], ids=["distill", "finetune"])
@pytest.mark.parametrize("stop_at", [(7,), (20,), (33, 41), (50,)])
def test_an_interrupted_run_ends_bit_for_bit_as_an_undisturbed_one(
    case: Case, recipe: Distill | Finetune, stop_at: tuple[int, ...]
) -> None:
    name = f"{type(recipe).__name__}{stop_at[0]}"
    undisturbed = weights_after(case, case.run(recipe, f"u{name}", checkpoint_minutes=15), LOW)
    disturbed = weights_after(case, case.run(recipe, f"d{name}", checkpoint_minutes=15), LOW, stop_at)
    assert all(torch.equal(disturbed[key], undisturbed[key]) for key in undisturbed)


def test_a_run_by_draws_that_is_interrupted_ends_bit_for_bit_as_an_undisturbed_one(case: Case) -> None:
    recipe, draws = Distill(**{**DISTILL, "steps": 15}, contrast_weight=0.0), case.draws()
    undisturbed, disturbed = (
        weights_after(case, case.run(recipe, name, draws, checkpoint_minutes=5), LOW, stop_at)
        for name, stop_at in (("u-draws", ()), ("d-draws", (7,)))
    )
    assert all(torch.equal(disturbed[key], undisturbed[key]) for key in undisturbed)


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_what_workers_that_become_more_or_fewer_train_is_within_the_spread_of_seeds(
    case: Case, first: int, then: int
) -> None:
    """Quantized: a rounding that falls otherwise grows, and the validation ends as far apart as by another seed."""
    recipe = DISTILL | {"eval_every": 50}

    def nats(rank: int = 0, seed: int = 0, until: int | None = None, run: TrainingJob | None = None) -> Any:
        loop = case.loop(run or case.run(Distill(**recipe, seed=seed), f"seed{seed}"), LOW)
        if until is not None:
            return run_until(loop, until)
        loop.run()
        changed = [point["workers"] for point in loop.progress.history if "workers" in point]
        return [loop.progress.history[-1]["validation_nats"], *changed]

    seeds = [nats(seed=seed)[0] for seed in range(3)]
    run = case.run(Distill(**recipe), f"elastic{first}{then}", checkpoint_minutes=1, workers=first, min_workers=1)
    for world, until in ((first, 25), (then, None)):
        ended = with_workers(world, case.root, partial(nats, until=until, run=run))
    assert ended[0][1:] == [then]  # the record says so
    assert abs(ended[0][0] - seeds[0]) <= max(seeds) - min(seeds)


def test_resuming_neither_replays_nor_skips_rows(case: Case) -> None:
    recipe = Distill(**DISTILL)
    whole = steps_of(case.loop(case.run(recipe, "whole"), LOW), 30)["rows"]
    run = case.run(recipe, "parts", checkpoint_minutes=10)
    run_until(case.loop(run, LOW), 17)
    loop = case.loop(run, LOW)
    loop._resume()
    assert loop.progress.step == 10
    assert steps_of(loop, 20)["rows"] == whole[10:30]


def test_a_damaged_checkpoint_is_not_read(case: Case) -> None:
    run = case.run(Distill(**DISTILL), "damaged", checkpoint_minutes=10)
    run_until(case.loop(run, LOW), 17)
    (state,) = Path(run.dir.uri).glob("1/attempt/state-*.safetensors")
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    loop = case.loop(run, LOW)
    loop._resume()
    assert loop.progress.step == 0


def test_the_best_weights_on_validation_ship(case: Case) -> None:
    run = case.run(Distill(**{**DISTILL, "lr": 0.3, "warmup_steps": 45, "eval_every": 5, "clip_norm": None}), "best")
    loop = case.loop(run, LOW)
    progress = Trainer(loop.model, run, loop.distillation, torch.device("cpu"), lambda *_: None).run()
    assert progress is not None
    validated = {int(e["step"]): e["validation_nats"] for e in progress.history if "validation_nats" in e}
    assert progress.best_step == min(validated, key=lambda step: validated[step])
    assert progress.best_step < run.steps  # with such a rate the last step is not the best
    ended = case.loop(run, LOW)
    ended.model.load_state_dict(loop.model.state_dict())
    assert ended.validate()[0] == validated[progress.best_step]


def test_the_checkpoint_is_chosen_on_rows_drawn_by_their_content_the_same_each_time(case: Case) -> None:
    def validated(seed: int, world: int = 1, turned: bool = False) -> list[list[list[int]]]:
        """The contents of the rows of two validations."""
        run = case.run(Distill(**DISTILL, seed=seed, eval_rows=6), f"drawn{seed}{world}{turned}", inference_batch=4)
        shards = (case.validation[0], case.train[0])
        run = dataclasses.replace(run, validation=shards[::-1] if turned else shards)

        def work(rank: int) -> list[list[list[int]]]:
            loop = case.loop(run, LOW)
            get, read = loop.validation.get, []

            def recording(row_ids: Any) -> Any:
                rows = get(row_ids)
                read[-1].extend(rows[0].tolist())
                return rows

            loop.validation.get = recording
            for step in range(2):
                read.append([])
                loop.train_step(step)
                loop.validate()
            return read

        ranks = [work(0)] if world == 1 else with_workers(world, case.root, work)
        return [sorted(chain(*(rank[time] for rank in ranks))) for time in range(2)]

    first, second = validated(seed=0)
    assert first == second
    assert len(first) == 6
    assert validated(seed=1) == validated(seed=0, world=2) == validated(seed=0, turned=True) == [first, first]


def test_a_diverged_loss_stops_the_run(case: Case) -> None:
    run = case.run(Finetune(steps=50, batch_size=12, lr=1e9, clip_norm=None, eval_every=1), "diverged")
    loop = case.loop(run, FULL)
    with pytest.raises(RunError, match=r"Lower the learning rate.*There was no checkpoint yet\."):
        loop.run()


def test_a_loss_that_explodes_and_stays_a_number_stops_the_run_with_the_checkpoint_before(case: Case) -> None:
    """A step moves the weights far away, and validations of 10 to 12 are the ones that are as bad."""
    run = case.run(Distill(**DISTILL | {"steps": 50, "eval_every": 1}), "exploded", checkpoint_minutes=1)
    loop = case.loop(run, LOW)
    step = loop.optimizers.step

    def stepping(number: int, steps: int) -> None:
        step(number, steps)
        if number == 9:
            with torch.no_grad():
                for parameter in loop.model.parameters():
                    parameter.mul_(-900)

    loop.optimizers.step = stepping  # type: ignore[method-assign]
    with pytest.raises(
        RunError, match=r"at step 12, 3 times in a row worse .* The last checkpoint, of step 9, is kept"
    ):
        loop.run()
    fields = latest_checkpoint(run.dir)
    assert fields is not None
    assert fields["progress"]["step"] == 9


def test_an_explosion_that_ends_is_gone_through(case: Case) -> None:
    chance, nats = math.log(VOCABULARY), [3.0, 99.0, 99.0, 3.0, 99.0]
    progress = Progress(history=[{"step": step, "validation_nats": value} for step, value in enumerate(nats)])
    assert progress.exploded(VOCABULARY) == 1
    progress.history.insert(0, {"step": 0, "validation_nats": 98.5})  # a student that starts as bad
    assert progress.exploded(VOCABULARY) == 0
    for nats, counted in (([3.0, chance + 0.9], 0), ([3.0, chance + 1.1], 1), ([99.0, 90.0, 80.0], 0)):
        fell = [{"step": step + 1, "validation_nats": value} for step, value in enumerate(nats)]
        assert Progress(history=fell).exploded(VOCABULARY) == counted
    assert Progress().exploded(VOCABULARY) == 0


def test_a_row_is_read_from_the_cache_of_its_own_shard(case: Case) -> None:
    run = case.run(Distill(**DISTILL), "aligned", case.cache("float32"))
    loop = case.loop(run, LOW)
    teacher = copy.deepcopy(loop.distillation)
    ids, _, states = loop.rows.get([0, 21, 39, 99])
    online = case.loop(case.run(Distill(**DISTILL), "aligned2"), LOW).distillation
    assert teacher is not None
    assert online is not None
    assert online.teacher is not None
    assert states is not None
    assert int(ids.max()) < VOCABULARY
    torch.testing.assert_close(states.to(ids.device).wide(), online.teacher(ids)[0], rtol=1e-5, atol=1e-5)


def test_a_checkpoint_holds_the_best_weights_whole(case: Case) -> None:
    run = case.run(Distill(**DISTILL), "whole-best", checkpoint_minutes=22)
    loop = case.loop(run, LOW)
    run_until(loop, 25)
    (state,) = Path(run.dir.uri).glob("1/attempt/state-000000022.safetensors")
    best, names = under("best.", load_file(state)), dict(case.loop(run, LOW).model.model.named_parameters())
    assert best.keys() == names.keys()
    assert all(torch.equal(best[name], weight) for name, weight in loop.best.items())
    assert any(not torch.equal(best[name], weight) for name, weight in loop.model.model.named_parameters())


def test_rows_after_a_kill_neither_repeat_nor_skip(case: Case) -> None:
    recipe = Distill(**DISTILL)
    whole = steps_of(case.loop(case.run(recipe, "unkilled"), LOW), 30)["rows"]
    run = case.run(recipe, "killed", checkpoint_minutes=10)
    log = case.root / "killed-rows"
    log.touch()

    def train(kill_at: int) -> None:
        loop = case.loop(run, LOW)
        get, step = loop.rows.get, loop.train_step

        def reading(row_ids: Any, then: Any = ()) -> Any:
            with open(log, "a") as file:
                file.write(json.dumps([loop.progress.step, [int(row) for row in row_ids]]) + "\n")
            return get(row_ids, then)

        def stepping(number: int) -> dict[str, torch.Tensor]:
            if number == kill_at:
                loop.writer.wait()
                os.kill(os.getpid(), signal.SIGKILL)
            return step(number)

        loop.rows.get, loop.train_step = reading, stepping
        loop.run()

    for kill_at in (17, 30):
        before = len(log.read_text().splitlines())
        child = get_context("fork").Process(target=train, args=(kill_at,), daemon=True)
        child.start()
        child.join(300)
        assert child.exitcode == -signal.SIGKILL
        entries = [json.loads(line) for line in log.read_text().splitlines()[before:]]
        first = 0 if kill_at == 17 else 10  # the checkpoint before the kill
        read = [list(chain(*(rows for at, rows in entries if at == step))) for step in range(first, kill_at)]
        assert read == whole[first:kill_at]
