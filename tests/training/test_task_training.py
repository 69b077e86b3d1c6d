"""Both tasks with several lengths a row: neither workers, micro-batch, padding nor the cache change what is learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.data import TaskSettings
from pipeline.config.quant import Quant
from pipeline.config.training import Distill, Finetune
from pipeline.store.shards import map_stored, open_shard
from pipeline.tasks.next_utterance import NextUtterance
from pipeline.tasks.summarization import Summarization
from tests.conftest import ARCHITECTURES
from tests.training.cases import ARCHITECTURE, VOCABULARY, Case, gradients, steps_of, with_workers

FULL, LOW = Quant(bits="32-32-32"), Quant(bits="2-2-8")
DISTILL: dict[str, Any] = {"steps": 20, "batch_size": 12, "lr": 2e-3, "negatives": 6, "eval_every": 20}
RECIPES = {
    "distill": Distill(**DISTILL),
    "finetune": Finetune(steps=20, batch_size=12, lr=2e-3, dropout=0.0, eval_every=20),
}
SOURCE, TARGET, WIDTH, CANDIDATES = 14, 10, 16, 3
BART = {
    **ARCHITECTURES["bart"],
    "vocab_size": VOCABULARY,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def summaries() -> tuple[Any, ...]:
    random = np.random.default_rng(1)
    ids = random.integers(3, VOCABULARY, (80, SOURCE + TARGET)).astype(np.int32)
    lengths = np.stack([random.integers(3, SOURCE + 1, 80), random.integers(3, TARGET + 1, 80)], 1).astype(np.int32)
    for row, (source, target) in zip(ids, lengths, strict=True):
        row[source:SOURCE], row[SOURCE + target :] = 1, 1
    task = Summarization(TaskSettings(name="summarization", source_length=SOURCE, target_length=TARGET))
    return task, BART, ids, lengths


def conversations() -> tuple[Any, ...]:
    random = np.random.default_rng(2)
    ids = random.integers(1, VOCABULARY, (80, CANDIDATES, WIDTH)).astype(np.int32)
    starts = np.repeat(random.integers(1, 8, (80, 1)), CANDIDATES, 1)
    lengths = starts + random.integers(1, 9, (80, CANDIDATES))
    ids[:, :, :8] = ids[:, :1, :8]
    ids[np.arange(WIDTH) >= lengths[:, :, None]] = 0
    task = NextUtterance(TaskSettings(name="next_utterance", block_length=WIDTH, train_candidates=CANDIDATES))
    return task, ARCHITECTURE, ids.reshape(80, -1), np.concatenate([lengths, starts], 1).astype(np.int32)


ROWS = {"summarization": summaries, "next_utterance": conversations}


@pytest.fixture(scope="module", params=ROWS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.of(tmp_path_factory.mktemp(request.param), *ROWS[request.param]())


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of a gradient against its norm. What is zero but for rounding is left out: a bias of
    keys shifts all scores of a query alike."""
    assert set(a) == set(b)
    largest = max(float(tensor.norm()) for tensor in b.values())
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-4 * largest)) for n in a)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize(("world", "micro"), [(1, 5), (2, 3)])
def test_curves_do_not_depend_on_workers_or_micro_batch(
    case: Case, recipe: Distill | Finetune, world: int, micro: int
) -> None:
    name = f"{type(recipe).__name__}{world}{micro}"
    reference = steps_of(case.loop(case.run(recipe, name + "r", micro_batch=12), FULL), 20)
    run = case.run(recipe, name, micro_batch=micro)
    for found in with_workers(world, case.root, lambda rank: steps_of(case.loop(run, FULL), 20)):
        assert found["losses"] == pytest.approx(reference["losses"], rel=1e-4)
        assert found["seen"] == reference["seen"]
    assert reference["losses"][-1] < reference["losses"][0]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_padding_does_not_show(case: Case, recipe: Distill | Finetune, tmp_path: Path) -> None:
    loss, grads = gradients(case.loop(case.run(recipe, "first"), LOW))
    summarizing = isinstance(case.task, Summarization)
    task, model, ids, lengths = ROWS["summarization" if summarizing else "next_utterance"]()
    padding = ids == (1 if summarizing else 0)  # no other token is that
    changed = np.where(padding, 9, ids)
    other = Case.of(tmp_path, task, model, changed, lengths)
    assert padding.any()
    other_loss, other_grads = gradients(other.loop(other.run(recipe, "padded"), LOW))
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert relative(other_grads, grads) < 1e-4


def test_states_of_the_cache_are_those_of_the_teacher(case: Case) -> None:
    cache = case.cache("float32")
    states = gradients(case.loop(case.run(RECIPES["distill"], "states", cache), LOW))
    online = gradients(case.loop(case.run(RECIPES["distill"], "online"), LOW))
    assert states[0] == pytest.approx(online[0], rel=1e-6)
    assert relative(states[1], online[1]) < 1e-4
    (stored,) = map_stored(open_shard(cache.dir, cache.record.shards[0])).arrays
    assert stored.shape[0] == 20
    assert np.prod(stored.shape[1:-1]) == case.task.states


def test_a_summary_is_learned_from_draws_too(tmp_path: Path) -> None:
    case = Case.of(tmp_path, *ROWS["summarization"]())
    recipe = RECIPES["distill"].model_copy(update={"contrast_weight": 0.0})
    online, _ = gradients(case.loop(case.run(recipe, "online"), LOW))
    draws, _ = gradients(case.loop(case.run(recipe, "draws", case.draws()), LOW))
    assert draws == pytest.approx(online, rel=5e-3)


def test_losses_are_means_over_their_own_counts(case: Case) -> None:
    loop = case.loop(case.run(RECIPES["distill"], "losses", micro_batch=5), LOW)
    rows = loop.order.batch(0, 12).tolist()
    counts = case.task.counts(loop.rows.lengths(rows).numpy())
    losses = loop._backward(0, rows, (), dict.fromkeys(counts, torch.tensor(1.0)))
    means = {name: float(total.detach()) / counts[name] for name, total in losses.items()}
    found = loop.backward(0)
    assert {name: found[name] for name in means} == pytest.approx(means, rel=1e-5)
    weighted = {**means, "contrastive_nats": 0.1 * means["contrastive_nats"]}
    assert found["loss"] == pytest.approx(sum(weighted.values()), rel=1e-5)
    assert ("candidates_nats" in means) == isinstance(case.task, NextUtterance)


def test_validation_is_the_nats_of_the_reference_alone(case: Case) -> None:
    loop = case.loop(case.run(RECIPES["finetune"], "validation", inference_batch=7), FULL)
    ids, lengths, _ = loop.validation.get(range(loop.validation.rows))
    batch, total, count = case.task.batch(ids, lengths), 0.0, 0
    for sequence in range(0, len(batch.ids), batch.group):
        where = batch.supervised[sequence]
        with torch.no_grad():
            one = slice(sequence, sequence + 1)
            last, _ = loop.model(*(None if part is None else part[one] for part in batch.inputs))
            logits = loop.head(last)[0, : len(where)]
        nats = -logits.double().log_softmax(-1)[torch.arange(len(where)), batch.targets[sequence]]
        total, count = total + float(nats[where].sum()), count + int(where.sum())
    assert loop.validate()[0] == pytest.approx(total / count, rel=1e-5)


def test_activation_checkpointing_changes_no_gradient(case: Case) -> None:
    plain = gradients(case.loop(case.run(RECIPES["distill"], "plain"), LOW))
    saved = gradients(case.loop(case.run(RECIPES["distill"], "saved", activation_checkpointing=True), LOW))
    assert saved[0] == plain[0]
    assert relative(saved[1], plain[1]) < 1e-6
