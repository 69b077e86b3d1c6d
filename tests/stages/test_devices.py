"""Stages compute on the GPU that their workers are to have, and on the CPU where they are to have none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.quant import Quant
from pipeline.config.resources import Resources
from pipeline.config.training import Distill
from pipeline.errors import RunError
from pipeline.execution.engine import Engine
from pipeline.models.build import build, read_config
from pipeline.models.device import device_for
from pipeline.stages import cache, sensitivity
from pipeline.stages.evaluate import SCORED, student_of
from pipeline.stages.kept import Kept, KeptDraws, KeptStates
from pipeline.stages.scorer import Scorer
from pipeline.stages.stage import Step, StepJob
from pipeline.store.records import Evaluation, Shard
from pipeline.store.shards import map_stored, open_shard, to_stored
from tests.conftest import Ran
from tests.second_device import SECOND, host_reads, product_devices
from tests.training.cases import ARCHITECTURE, VOCABULARY, Case


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.make(tmp_path_factory.mktemp("stages"))


def states(job: StepJob, case: Case) -> Any:
    shard = Shard.model_validate_json(cache.CacheShard(job, KeptStates("float32"))(case.train[0]))
    return to_stored(*map_stored(open_shard(job.dir, shard))).values


def draws(job: StepJob, case: Case) -> Any:
    """The share of the draws that each token has, over all positions."""
    shard = Shard.model_validate_json(cache.CacheShard(job, KeptDraws("uint8", 50))(case.train[0]))
    tokens = to_stored(*map_stored(open_shard(job.dir, shard))).wide()
    return tokens.flatten().bincount(minlength=VOCABULARY) / tokens.numel()


def probe(job: StepJob, case: Case) -> Any:
    return cache.probe(job, KeptStates("bfloat16"))[1]


def measured(job: StepJob, case: Case, cached: bool = False) -> Any:
    return torch.tensor([kl_nats[2] for kl_nats in sensitivity._measure(job)[1].values()])


WORK: dict[str, Callable[[StepJob, Case], Any]] = {
    "states": states,
    "draws": draws,
    "probe": probe,
    "sensitivity": measured,
    "sensitivity from the cache": measured,
}
RECIPE = {"quantizer": "lsq", "granularity": "per_channel", "widths": [2], "rows": 4}


@pytest.mark.parametrize("work", WORK)
def test_work_is_done_on_the_gpu_that_is_asked_for_and_comes_to_the_same(
    case: Case, device: torch.device, work: str
) -> None:
    given = {}
    cached = case.cache("float32") if "cache" in work else None
    for gpus in (1, 0):
        job = case.step_job(RECIPE, cache=cached, gpus_per_worker=gpus)
        with product_devices() as used:
            given[gpus] = WORK[work](job, case)
        assert used == {device.type if gpus else "cpu"}
    in_bf16 = {"states": 2e-2, "draws": 1e-3, "probe": 1e-3}  # the teacher's pass, on a GPU
    torch.testing.assert_close(given[1], given[0], rtol=1e-3, atol=in_bf16.get(work, 1e-6))


def test_the_teacher_of_a_cache_is_in_bf16_on_a_gpu_and_its_cost_is_measured(
    tmp_path: Path, device: torch.device
) -> None:
    case = Case.make(tmp_path)
    build(read_config({**ARCHITECTURE, "initializer_range": 0.3}), seed=0).save_pretrained(case.teacher)
    on_gpu, on_cpu = (case.step_job({}, gpus_per_worker=gpus) for gpus in (1, 0))
    bf16, fp32 = states(on_gpu, case), states(on_cpu, case)
    assert 1e-3 < float((bf16 - fp32).abs().max()) < 0.2
    for kept in (KeptStates("float32"), KeptDraws("uint8", 50), None):
        (_, cost, precision), (_, nothing, exact) = (cache.probe(job, kept) for job in (on_gpu, on_cpu))
        assert (precision, exact) == ("bf16", "fp32")
        assert nothing < 1e-6 < 1e-5 < cost < 1e-2


class Bf16Products(TorchDispatchMode):
    """Counts products of matrices in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::mm", "aten::addmm") and args[-1].dtype == torch.bfloat16:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("cached", "products"), [(True, 1), (False, 4 * ARCHITECTURE["n_layer"] + 1)])
def test_a_student_in_fp32_learns_from_a_teacher_in_bf16_on_a_gpu_alone(
    case: Case, device: torch.device, cached: bool, products: int
) -> None:
    """Its head where states are cached, and its layers where it runs in the step: what the probe measures."""
    run = case.run(Distill(steps=2, batch_size=4), "probed", case.cache("float32") if cached else None)
    for where, expected in ((device, products), (torch.device("cpu"), 0)):
        with Bf16Products() as bf16:
            case.loop(run, Quant(bits="32-32-32"), where).backward(0)
        assert bf16.count == expected


def step_of(case: Case, section: dict[str, Any], **resources: Any) -> Step:
    job = case.step_job({"cache": section}, **{"workers": 0, **resources})
    return Step(**vars(job), version=1, engine=Engine(job.resources), advance=lambda done, total, note, points=(): None)


WAYS = {
    "logits": r"in bf16, kept as 50 drawn tokens a position, costs .* Set resources\.gpus_per_worker: 0, or raise",
    "online": r"in bf16, in each step, costs .* Set resources\.gpus_per_worker: 0, or raise",
}


@pytest.mark.parametrize("mode", WAYS)
def test_a_teacher_in_bf16_that_costs_too_much_is_refused(case: Case, device: torch.device, mode: str) -> None:
    with pytest.raises(RunError, match=WAYS[mode]):
        cache.run(step_of(case, {"mode": mode, "max_kl_nats": 0}, gpus_per_worker=1))


def test_what_a_teacher_costs_in_each_step_is_in_the_record(case: Case, device: torch.device) -> None:
    def facts(**resources: Any) -> tuple[str, float | None, str]:
        record = cache.run(step_of(case, {"mode": "online"}, **resources))
        return record.mode, record.kl_nats, record.precision

    mode, cost, precision = facts(gpus_per_worker=1)
    assert (mode, precision) == ("online", "bf16")
    assert cost is not None
    assert 0 < cost < 1e-3
    assert facts() == ("online", 0.0, "fp32")
    assert facts(gpus_per_worker=1, strategy="fsdp", workers=2) == ("online", None, "bf16")


@pytest.mark.parametrize("kept", [KeptStates("float16"), KeptDraws("uint8", 50)], ids=["states", "draws"])
def test_a_gpu_is_waited_for_once_a_shard(case: Case, device: torch.device, kept: Kept) -> None:
    """Of seven passes none waits; what is kept goes to the host while the host goes on."""
    make = cache.CacheShard(case.step_job({}, gpus_per_worker=1, inference_batch=3), kept)
    with host_reads() as reads:
        make(case.train[0])
    assert reads == (["event"] if device == SECOND and not torch.version.cuda else [])


def test_scores_are_taken_on_the_gpu_that_is_asked_for(finished: Ran, device: torch.device) -> None:
    planned, tokens = finished.plan.step(Evaluation), finished.record("tokenize")
    inputs = {name: finished.outcome.steps[name] for name in planned.inputs}
    given = {}
    for gpus in (1, 0):
        job = StepJob(planned.recipe, inputs, planned.dir, Resources(gpus_per_worker=gpus), {})
        with product_devices() as used:
            given[gpus] = Scorer(job, student_of, SCORED).score("test", 0, tokens.splits["test"].shards[0])
        assert used == {device.type if gpus else "cpu"}
    assert given[1].samples == given[0].samples
    for ours, theirs in ((given[1].student, given[0].student), (given[1].teacher, given[0].teacher)):
        assert sum(ours["nats"]) == pytest.approx(sum(theirs["nats"]), rel=1e-3)
        assert ours["kl_nats"] == pytest.approx(theirs["kl_nats"], rel=1e-2, abs=1e-6)


def test_there_may_be_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_for(Resources(gpus_per_worker=1)) == torch.device("cpu")
