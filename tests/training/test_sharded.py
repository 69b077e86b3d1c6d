"""Workers of which none holds the model whole learn what one worker learns, and hold less."""

from __future__ import annotations

import copy
import ctypes
import json
import resource
import subprocess
import sys
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pipeline.config.quant import Quant
from pipeline.config.training import Distill, Finetune
from pipeline.models.build import load_model
from pipeline.models.sharded import filled, hollow, is_part, own, whole
from pipeline.sources.models import ModelSource
from pipeline.stages import distill, finetune
from pipeline.store.keys import recipe_of
from pipeline.training.trainer import Trainer, TrainingJob
from tests.conftest import ROOT
from tests.training.cases import ARCHITECTURE, CPU, Case, gradients, mean_loss, run_until, with_workers
from tests.training.test_task_training import ROWS
from tests.training.test_trainer import DISTILL, FULL, LOW, relative, weights_after

LSQ = Quant(bits="4-4-8", quantizer="lsq", granularity="per_channel")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.make(tmp_path_factory.mktemp("sharded"))


def kept(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize(
    ("quant", "resources"),
    [(LOW, {"micro_batch": 4, "activation_checkpointing": True}), (LSQ, {"micro_batch": 3})],
    ids=["paper", "lsq"],
)
def test_the_first_step_is_that_of_one_worker(case: Case, quant: Quant, resources: dict[str, Any]) -> None:
    loss, grads = gradients(case.loop(case.run(Distill(**DISTILL), "alone", micro_batch=12), quant))
    run = case.run(Distill(**DISTILL), "shared", strategy="fsdp", **resources)

    def work(rank: int) -> float:
        other, parts = gradients(case.loop(run, quant))
        kept({name: whole(part) for name, part in parts.items()}, case.root / f"gradients-{rank}")
        return other

    for rank, other in enumerate(with_workers(2, case.root, work)):
        assert other == pytest.approx(loss, rel=1e-6)
        assert relative(load_file(case.root / f"gradients-{rank}"), grads) < 1e-4


def test_weights_and_the_memory_bank_move_as_those_of_one_worker(case: Case) -> None:
    """By all of four steps: later a code turns now and then with the order of sums, and the runs part a little. A bank
    that a layer's second pass updated again would be far off."""
    recipe = Distill(**DISTILL, optimizer="muon")

    def moved(run: TrainingJob) -> dict[str, Tensor]:
        loop = case.loop(run, LOW)
        start = [whole(parameter.detach()).clone() for parameter in loop.model.parameters()]
        for step in range(4):
            loop.train_step(step)
        ended = zip(start, loop.model.parameters(), strict=True)
        assert loop.distillation is not None
        return {
            "weights": torch.cat([(whole(after.detach()) - before).flatten() for before, after in ended]),
            "bank": loop.distillation.bank.states,
        }

    run = case.run(recipe, "moved", strategy="fsdp", micro_batch=3, activation_checkpointing=True)
    with_workers(2, case.root, lambda rank: kept(moved(run), case.root / f"moved-{rank}"))
    reference = moved(case.run(recipe, "moved-alone", micro_batch=12))
    ranks = [load_file(case.root / f"moved-{rank}") for rank in range(2)]
    for name, tensor in reference.items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        assert float((ranks[0][name] - tensor).norm() / tensor.norm()) < 3e-3


def test_what_two_workers_began_one_goes_on_with_and_three_end(case: Case) -> None:
    recipe = Distill(**{**DISTILL, "steps": 12, "eval_every": 5}, optimizer="muon")
    undisturbed = weights_after(case, case.run(recipe, "undisturbed"), FULL)
    # Validation has 20 rows, of which three workers make 3, 3 and 2 passes.
    run = case.run(recipe, "passed-on", strategy="fsdp", checkpoint_minutes=4, inference_batch=3)
    with_workers(2, case.root, lambda rank: run_until(case.loop(run, FULL), 6))
    alone = case.loop(run, FULL)
    run_until(alone, 9)
    assert [entry["step"] for entry in alone.progress.history if "loss" in entry] == list(range(1, 10))

    def ending(rank: int) -> list[str]:
        loop = case.loop(run, FULL)
        loop._resume()
        assert loop.progress.step == 8
        progress = loop.run()
        assert (progress is None) == (rank > 0)
        if progress is not None:
            losses = [entry["loss"] for entry in progress.history if "loss" in entry]
            ended = {**dict(loop.model.named_parameters()), "losses": torch.tensor(losses, dtype=torch.float64)}
            kept(ended, case.root / "ended")
        return [type(module).__name__ for module in loop.model.model.modules()]

    names, *_ = with_workers(3, case.root, ending)
    assert names == [type(module).__name__ for module in alone.model.model.modules()]  # and none of FSDP's
    ended = load_file(case.root / "ended")
    assert ended.pop("losses").tolist() == pytest.approx(undisturbed.pop("losses").tolist(), rel=1e-4)
    assert apart(ended, undisturbed) < 0.01


def test_a_worker_holds_its_share_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights, gradients and the optimizer's state. What a step takes beside that is a layer at a time: not all that
    is gathered, nor the levels of all layers until they are needed again. The least of three steps counts: what is
    gathered ahead comes when the other worker sends it."""
    monkeypatch.setitem(ARCHITECTURE, "n_embd", 128)
    monkeypatch.setitem(ARCHITECTURE, "n_layer", 6)
    case = Case.make(tmp_path)

    def peak(loop: Trainer, number: int) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            loop.train_step(number)
        recorded: Any = profiled.profiler
        changes = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
        return max(accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())))

    def work(rank: int, run: TrainingJob) -> tuple[int, int]:
        loop = case.loop(run, Quant(bits="2-2-8", gamma_init="one"))
        loop.train_step(0)
        most = min(peak(loop, number) for number in (1, 2, 3))
        held = [*loop.model.parameters(), *loop.optimizers.tensors().values()]
        held += [p.grad for p in loop.model.parameters() if p.grad is not None]
        return sum(own(tensor).nbytes for tensor in held), most

    def workers(strategy: str) -> list[tuple[int, int]]:
        run = case.run(Distill(**{**DISTILL, "batch_size": 2}), strategy, strategy=strategy)
        return with_workers(2, tmp_path, partial(work, run=run))

    for (held, most), (held_whole, most_whole) in zip(workers("fsdp"), workers("ddp"), strict=True):
        assert held < 0.51 * held_whole
        assert most < 0.3 * most_whole


GIVES_BACK = ((-3, 2**20), (-1, 2**20), (-8, 1))  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_ARENA_MAX of glibc


def capped(mib: int) -> None:
    """Bound what this process may allocate from now on, by the kernel; what is freed goes back to it at once."""
    for knob, value in GIVES_BACK:
        ctypes.CDLL(None).mallopt(knob, value)
    lines = Path("/proc/self/status").read_text().splitlines()
    (held,) = (int(line.split()[1]) for line in lines if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * held + mib * 2**20,) * 2)


def ends_within(mib: int, root: Path) -> None:
    """Print what a step of two workers ends with, by strategy: its loss, or an error's words."""
    ARCHITECTURE.update(n_embd=512, n_layer=8)
    case = Case.make(root)

    def work(rank: int, run: TrainingJob) -> float | str:
        capped(mib)
        loop = case.loop(run, Quant(bits="2-2-8", gamma_init="one"))  # both models, of which there is room for two
        try:
            return mean_loss(loop, loop.train_step(0))
        except (MemoryError, RuntimeError) as error:
            return str(error)

    def workers(strategy: str) -> list[float | str]:
        run = case.run(Distill(**{**DISTILL, "batch_size": 2}), strategy, strategy=strategy)
        return with_workers(2, root, partial(work, run=run))

    print(json.dumps({strategy: workers(strategy) for strategy in ("fsdp", "ddp")}))


def test_workers_that_share_a_model_out_end_a_step_in_memory_that_is_too_small_for_the_whole(tmp_path: Path) -> None:
    """25M parameters, 96 MiB in fp32: two workers that share out student, teacher, gradients and Adam's state take less
    than 350 MiB each, and one that holds all of them more than 600. In a process that had no other tests, which leave
    memory of theirs to be used again."""
    code = f"from tests.training.test_sharded import ends_within, Path; ends_within(450, Path({str(tmp_path)!r}))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    of = json.loads(ended.stdout.splitlines()[-1])
    assert isinstance(of["fsdp"][0], float), of
    assert of["fsdp"][0] == of["fsdp"][1] < 10
    assert [isinstance(failed, str) for failed in of["ddp"]] == [True, True], of


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    flat, other = (torch.cat([tensors[name].flatten() for name in expected]) for tensors in (found, expected))
    return float((flat - other).norm() / other.norm())


@pytest.mark.parametrize("stage", [distill, finetune], ids=["distill", "finetune"])
def test_a_stage_stores_what_one_worker_stores(case: Case, stage: Any) -> None:
    common: dict[str, Any] = {"steps": 2, "batch_size": 12, "lr": 2e-3, "eval_every": 2}
    recipe = {
        "distill": recipe_of(Distill(**common, gamma_lr=common["lr"])),  # the rate of scales, which are not shared out
        "quant": recipe_of(LOW),
        "finetune": recipe_of(Finetune(**common, dropout=0.0)),
        "model": {"content": {}, "family": "gpt2"},
    }
    locations = {"model": ModelSource(case.teacher, {}).location()}
    shared, alone = (case.step_job(recipe, locations=locations, strategy=strategy) for strategy in ("fsdp", "ddp"))
    with_workers(2, case.root, lambda rank: stage._train(shared, CPU, lambda *_, points=(): None))
    stage._train(alone, CPU, lambda *_, points=(): None)
    folders = [Path(job.dir.uri) / "1" for job in (shared, alone)]
    facts = [json.loads((folder / "attempt/result.json").read_text()) for folder in folders]
    assert facts[0]["validation_nats"] == pytest.approx(facts[1]["validation_nats"], rel=1e-3)
    assert facts[0]["files"].keys() == facts[1]["files"].keys()
    names = [name for name in facts[1]["files"] if name.endswith("safetensors") and "frozen" not in name]
    assert names
    for name in names:
        assert apart(*(load_file(folder / name) for folder in folders)) < 0.01
    for name in (name for name in facts[1]["files"] if name.endswith("config.json")):
        assert json.loads((folders[0] / name).read_text()) == json.loads((folders[1] / name).read_text())


@pytest.mark.parametrize("kind", ["distill", "finetune"])
def test_a_tied_table_is_one_and_its_padding_row_stays(tmp_path: Path, kind: str) -> None:
    """BART's, which look up and give logits in four places."""
    case = Case.of(tmp_path, *ROWS["summarization"]())
    recipes: dict[str, Distill | Finetune] = {
        "distill": Distill(**DISTILL),
        "finetune": Finetune(steps=20, batch_size=12, dropout=0.0),
    }
    run = case.run(recipes[kind], "shared", strategy="fsdp", micro_batch=3)

    def steps(loop: Trainer) -> list[float]:
        return [mean_loss(loop, loop.train_step(step)) for step in range(3)]

    def work(rank: int) -> tuple[list[float], list[int]]:
        loop = case.loop(run, FULL)
        table: Any = loop.model.model.get_input_embeddings().weight
        assert is_part(table)
        start = whole(table).clone()
        losses = steps(loop)
        return losses, (whole(table) == start).all(1).nonzero()[:, 0].tolist()

    reference = steps(case.loop(case.run(recipes[kind], "alone", micro_batch=12), FULL))
    for losses, unmoved in with_workers(2, tmp_path, work):
        assert losses == pytest.approx(reference, rel=1e-4)
        assert unmoved == [1]


def test_a_hollow_model_is_filled_as_it_was(case: Case) -> None:
    model = load_model(case.teacher)
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    empty = hollow(model)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert not any(parameter.is_meta for parameter in model.parameters())
    again = filled(empty, tensors)
    ids = torch.arange(10)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert copy.deepcopy(model).state_dict().keys() == again.state_dict().keys()
