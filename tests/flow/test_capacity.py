"""The arithmetic of a plan's estimate, against numbers worked out by hand; and on what it rests."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

import jobs.compress
import jobs.sweep
from pipeline.config.resources import Prices, Resources
from pipeline.flow import capacity
from pipeline.flow.capacity import CPU, H200, Model, Rates, caching, money, rates_of
from pipeline.flow.plan import plan_run
from pipeline.flow.requests import Requests

ROOT = Path(__file__).resolve().parents[2]
RATES = Rates(
    flops_per_s=1e12,
    finetuning=0.5,
    distilling=0.25,
    contrasting=0.2,
    passing=0.8,
    stored_bytes_per_s=1e6,
    pass_tokens=100,
    pass_s=0.01,
    taught_pass_s=0.005,
)
MODEL = Model(parameters=10**9, layers=2)


def test_seconds_are_operations_by_what_the_device_reaches() -> None:
    assert RATES.finetune_s(MODEL, 100) == pytest.approx(6e9 * 100 / 0.5e12)  # 1.2 s
    assert RATES.distill_s(MODEL, 100, contrast=False) == pytest.approx(2.4)
    assert RATES.distill_s(MODEL, 100, contrast=True) == pytest.approx(3.0)
    assert RATES.teach_s(MODEL, 100) == pytest.approx(0.25)
    assert RATES.teach_s(MODEL, 100, pass_tokens=4) == pytest.approx(0.25 + 25 * 2 * 0.005)
    assert RATES.cache_s(MODEL, 100, token_bytes=2_000) == pytest.approx(0.25 + 0.2)


def test_passes_smaller_than_those_measured_cost_each_their_launches() -> None:
    whole = RATES.finetune_s(MODEL, 1000, pass_tokens=100)
    assert whole == RATES.finetune_s(MODEL, 1000, pass_tokens=1000) == RATES.finetune_s(MODEL, 1000)
    assert RATES.finetune_s(MODEL, 1000, pass_tokens=25) == pytest.approx(whole + 30 * 2 * 0.01)  # 40 passes for 10


def test_rates_give_back_what_was_measured() -> None:
    rates, model = Rates.of(H200), H200.model
    assert 1 / rates.finetune_s(model, 1) == pytest.approx(H200.finetune)
    assert 1 / rates.distill_s(model, 1, contrast=False) == pytest.approx(H200.best)
    assert 1 / rates.distill_s(model, 1, True, H200.pass_tokens) == pytest.approx(H200.paper)
    assert 1 / rates.distill_s(model, 1, True, H200.pass_tokens / 4) == pytest.approx(H200.paper_in_four)
    online = rates.distill_s(model, 1, contrast=False) + rates.teach_s(model, 1, H200.pass_tokens)
    assert 1 / online == pytest.approx(H200.best_online)
    assert 1 / rates.cache_s(model, 1, H200.token_bytes) == pytest.approx(H200.cache)
    assert rates.finetuning == pytest.approx(0.3408, abs=1e-4)  # of the peak, as the benchmark says it


def test_what_was_measured_is_what_the_benchmark_keeps() -> None:
    kept = json.loads((ROOT / "jobs/bench/results/train-h200.json").read_text())
    shape, rows = kept["shape"], kept["rows"]
    told = {
        "flops_per_s": round(kept["peak_tflops"], 1) * 1e12,
        "token_bytes": 2 * shape["width"],
        "pass_tokens": shape["micro_batch"] * shape["length"],
        "finetune": round(rows["finetune"]["tokens_per_s"]),
        "best": round(rows["best, cached"]["tokens_per_s"]),
        "paper": round(rows["paper, cached"]["tokens_per_s"]),
        "paper_in_four": round(rows["paper, micro_batch a quarter"]["tokens_per_s"]),
        "best_online": round(rows["best, online"]["tokens_per_s"]),
        "cache": round(kept["teacher"]["cache_tokens_per_s"]),
        "forward": round(kept["teacher"]["forward_tokens_per_s"]),
    }
    assert Model(kept["parameters"], shape["layers"]) == H200.model
    assert told == {name: getattr(H200, name) for name in told}
    assert H200.device.endswith(kept["device"])


def test_a_cache_pays_once_the_teacher_has_cost_more() -> None:
    reads = caching(MODEL, RATES, Prices(), token_bytes=2_000, reads=1.0)
    assert reads.pays_from == pytest.approx((0.0025 + 0.002) / 0.0025)  # 1.8
    assert (reads.once, reads.each) == pytest.approx((1e6 * 0.0045 / 3600, 1e6 * 0.0025 / 3600))
    assert reads.told == (
        "by worker-hours, a cache of states costs 1.25 for a million tokens, once, and the teacher in each step 0.694 "
        "more than reads of it, so that the cache pays from 1.8 reads of each row on; here are 1.0: online is cheaper"
    )
    small = caching(MODEL, RATES, Prices(), token_bytes=2_000, reads=1.0, pass_tokens=2)
    assert small.pays_from == pytest.approx((0.0025 + 0.002) / (0.0025 + 0.005))
    assert "here are 1.0: the cache is cheaper" in small.told
    dear = Prices(worker_hour=3.6, gib_month=2.0**30, cache_months=0.5, thousand_writes=2**23, thousand_reads=2**21)
    priced = caching(MODEL, RATES, dear, token_bytes=2, reads=1.0)
    once = 3.6 / 3600 * (0.0025 + 2e-6) + 1.0 + 2 / 2**23 * 2**23 / 1000  # computed, kept, written
    each = 3.6 / 3600 * 0.0025 - 2 / 2**23 * 2**21 / 1000  # less than its reads cost
    assert each < 0
    assert (priced.once, priced.each) == pytest.approx((1e6 * once, 1e6 * each))
    assert priced.pays_from is None
    assert "online is always cheaper" in priced.told
    cheaper = caching(MODEL, RATES, dear.model_copy(update={"thousand_reads": 0.0}), token_bytes=2, reads=1.0)
    assert cheaper.pays_from == pytest.approx(once / (3.6 / 3600 * 0.0025))
    assert cheaper.told.startswith("by prices,")
    assert "here are 1.0: online is cheaper" in cheaper.told


def test_money_is_hours_bytes_and_requests_by_their_prices() -> None:
    prices = Prices(worker_hour=4.0, gib_month=0.02, cache_months=3, thousand_writes=0.005, thousand_reads=0.0004)
    assert money(prices, 10, 100 * 2**30, Requests(writes=2e6, reads=1e7)) == pytest.approx(40 + 6 + 10 + 4)
    assert money(Prices(gib_month=0.02), 10, 2**30, Requests()) is None


def test_rates_of_a_gpu_are_those_measured_and_of_a_cpu_asked_of_this_machine(monkeypatch) -> None:
    monkeypatch.setattr(capacity, "this_device", lambda: CPU)
    there = rates_of(Resources(gpus_per_worker=1))
    assert there == Rates.of(H200)
    assert "measured on one NVIDIA H200" in there.basis
    half = rates_of(Resources(gpus_per_worker=1, worker_tflops=379.4))
    assert half.finetune_s(MODEL, 1) == pytest.approx(2 * there.finetune_s(MODEL, 1))
    assert half.basis.endswith("scaled by parameters and to 379 of its 759 TFLOP/s")
    monkeypatch.setattr(capacity, "flops_per_s", lambda device: 1e11)
    here = rates_of(Resources())
    assert here.finetune_s(MODEL, 1) == pytest.approx(6e9 / 0.3e11)
    assert here.distill_s(MODEL, 1, contrast=True, pass_tokens=1) == pytest.approx(8e9 / 0.3e11)
    assert "no rate of a CPU was measured" in here.basis
    monkeypatch.setattr(capacity, "this_device", lambda: torch.device("cuda", 0))
    assert rates_of(Resources(gpus_per_worker=1)).flops_per_s == 1e11
    assert rates_of(Resources(gpus_per_worker=1, ray_address="auto")).flops_per_s == H200.flops_per_s


def test_a_plan_says_what_each_step_takes(tiny_config, tmp_path) -> None:
    prices = {"worker_hour": 3600.0}
    config = tiny_config(
        tmp_path, distill={"steps": None, "epochs": 2}, resources={"worker_tflops": 1e-6, "prices": prices}
    )
    text = io.StringIO()
    document = jobs.compress.compress(
        config, "tiny.yaml", Console(file=text, width=200), until="register", only_plan=True, wait=True
    )
    told, plan = document["estimate"], plan_run(config)
    batches = math.ceil(2 * plan.rows / 8)
    assert told["steps"]["finetune"]["tokens"] == 20 * 8 * 32
    assert told["steps"]["cache"]["tokens"] == plan.rows * 32
    assert (told["steps"]["distill"]["steps"], told["steps"]["distill"]["tokens"]) == (batches, batches * 8 * 32)
    seconds = told["steps"]["finetune"]["worker_seconds"]
    assert seconds == pytest.approx(6 * plan.parameters * 20 * 8 * 32 / 0.3e6)
    assert told["cache_bytes"] == plan.cache_bytes
    assert told["requests"] == {"writes": 0, "reads": 0}
    assert told["cost"] == pytest.approx(told["worker_hours"] * 3600)
    assert document["free_bytes"] > plan.cache_bytes
    assert told["caching"]["reads"] == pytest.approx(batches * 8 / plan.rows)
    for said in (
        "worker-hours: about",
        "estimated: parameters and tokens at 0.0 GFLOP/s",
        "cost: about",
        "by prices, a cache",
        "GiB are free",
    ):
        assert said in text.getvalue()


def test_online_adds_the_teacher_and_a_step_that_is_done_costs_nothing(tiny_config, tmp_path, cloned) -> None:
    given = {"worker_tflops": 1e-6}
    stored = capacity.estimate(plan_run(tiny_config(tmp_path / "new", resources=given)))
    online = capacity.estimate(plan_run(tiny_config(tmp_path / "new", cache={"mode": "online"}, resources=given)))
    more = online.steps["distill"].worker_seconds - stored.steps["distill"].worker_seconds
    assert more == pytest.approx(stored.steps["distill"].worker_seconds / 4)  # 2 operations beside 8
    assert online.cache_bytes == online.steps["cache"].worker_seconds == 0
    assert online.caching == stored.caching
    done = capacity.estimate(plan_run(tiny_config(cloned, resources=given), "evaluate"))
    assert (done.steps, done.worker_hours, done.caching) == ({}, 0, None)
    again = capacity.estimate(plan_run(tiny_config(cloned, distill={"seed": 3}, resources=given)))
    assert again.basis == "measured: 1 students of this teacher in the store"
    assert again.cache_bytes == 0
    assert again.steps["distill"].worker_seconds < stored.steps["distill"].worker_seconds
    other = tiny_config(tmp_path, distill={"contrast_layer": -2}, cache={"mode": "online"}, resources=given)
    assert capacity.estimate(plan_run(other)).caching is None


def test_trials_of_a_sweep_read_one_cache(tiny_config, tmp_path) -> None:
    space = {"distill.seed": [0, 1, 2], "finetune.lr": [1e-3, 5e-3]}
    config = tiny_config(tmp_path, sweep={"space": space}, resources={"worker_tflops": 1e-6})
    text = io.StringIO()
    document = jobs.sweep.sweep(config, Console(file=text, width=200), only_plan=True, wait=True)
    alone = capacity.estimate(plan_run(config))
    shared = sum(alone.steps[stage].worker_seconds for stage in ("finetune", "cache"))
    trials = 6 * alone.steps["distill"].worker_seconds + 2 * shared
    assert document["worker_hours"] == pytest.approx(trials / 3600)
    assert document["caching"]["reads"] == pytest.approx(3 * alone.caching.reads)
    assert document["cost"] is None
    assert "worker-hours, a cache of states costs " in text.getvalue()
