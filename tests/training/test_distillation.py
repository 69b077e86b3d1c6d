"""The contrastive term for every source of negatives, against a double loop; and the layer that it compares."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.config.quant import Quant
from pipeline.config.run import Config
from pipeline.config.training import Distill
from pipeline.distill.memory_bank import MemoryBank
from pipeline.distill.negatives import draw_ids, draw_offsets, draw_partner, draw_positions
from pipeline.errors import ConfigError, RunError
from pipeline.flow.plan import plan_run
from pipeline.models.build import build, load_model, read_config
from pipeline.models.hidden_states import WithStates, head_of, layer_states
from pipeline.store.records import TeacherCache
from pipeline.store.shards import StoredStates
from pipeline.tasks.batch import Batch
from pipeline.training.distillation import Distillation
from pipeline.training.trainer import Trainer
from tests.conftest import ARCHITECTURES
from tests.training.cases import VOCABULARY, Case, gradients, steps_of, with_workers

FROM = ("teacher", "student", "vocabulary", "batch")
every_source = pytest.mark.parametrize("source", FROM)
LOW = Quant(bits="2-2-8")
RECIPE: dict[str, Any] = {"steps": 30, "batch_size": 12, "lr": 2e-3, "negatives": 5, "eval_every": 30}
SEED, STEP, TAU, IDS, HIDDEN, WIDTH = 3, 4, 0.1, 11, 6, 7
ROWS = {20: (7, 4), 5: (1, 2), 31: (3, 7), 8: (6, 5)}  # the lengths of the sequences of each row


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.make(tmp_path_factory.mktemp("distillation"))


class Example:
    """A global batch of rows of `group` sequences with their cached states, the student's, and a bank half seen."""

    def __init__(self, group: int, source: str, momentum: float = 0.5, negatives: int = 3) -> None:
        generator = torch.Generator().manual_seed(group)
        self.group, self.rows = group, list(ROWS)
        self.recipe = Distill(
            steps=1, seed=SEED, temperature=TAU, negatives=negatives, negatives_from=source, momentum=momentum
        )
        self.lengths = {row: torch.tensor(lengths[:group]) for row, lengths in ROWS.items()}
        self.ids = {row: torch.randint(0, IDS, (group, WIDTH), generator=generator) for row in ROWS}
        self.states = {row: torch.randn(1, group, WIDTH, HIDDEN, generator=generator) for row in ROWS}
        self.student = {row: torch.randn(group, WIDTH, HIDDEN, generator=generator) for row in ROWS}
        self.bank = MemoryBank(IDS, HIDDEN, momentum)
        self.bank.states.copy_(torch.randn(IDS, HIDDEN, generator=generator))
        seen = torch.zeros(IDS, dtype=torch.bool)
        seen[::2] = True
        self.bank.load_state_dict({"states": self.bank.states, "seen": seen})
        self.read: list[int] = []
        self.head = nn.Linear(HIDDEN, IDS, bias=False)

    def batch(self, rows: list[int]) -> Batch:
        ids, lengths = torch.cat([self.ids[r] for r in rows]), torch.cat([self.lengths[r] for r in rows])
        every = torch.ones_like(ids, dtype=torch.bool)
        return Batch(ids, lengths, ids[:, 1:], every[:, 1:], every, group=self.group)

    def loss(self, rows: list[int], student: Tensor, of: list[int] | None = None) -> Tensor:
        def read(row: int) -> tuple[Batch, StoredStates]:
            self.read.append(row)
            return self.batch([row]), StoredStates(self.states[row])

        distillation = Distillation(self.recipe, self.head, None, self.bank)
        cached = StoredStates(torch.cat([self.states[row] for row in rows]))
        everything = torch.tensor(self.rows if of is None else of)
        batch = self.batch(rows)
        _, teacher = distillation.taught(batch, cached)
        return distillation.contrast(STEP, everything, rows, batch, teacher, student, read)

    def reference(self, rows: list[int], student: Tensor) -> Tensor:
        """The same by its definition, token by token, in float64."""
        recipe, total = self.recipe, torch.zeros((), dtype=torch.float64)
        bank = self.bank.states.double()
        for place, (row, member) in enumerate((row, member) for row in rows for member in range(self.group)):
            sequence, length = row * self.group + member, int(self.lengths[row][member])
            teacher = self.states[row][0, member].double()
            for i in range(length):
                word = int(self.ids[row][member, i])
                query = student[place, i]
                if self.bank.seen[word]:
                    query = recipe.momentum * bank[word] + (1 - recipe.momentum) * query
                if recipe.negatives_from in ("teacher", "student"):
                    pool = teacher if recipe.negatives_from == "teacher" else student[place]
                    offsets = draw_offsets(SEED, STEP, sequence, length, recipe.negatives).tolist()
                    negatives = [pool[(i + offset) % length] for offset in offsets]
                elif recipe.negatives_from == "vocabulary":
                    seen = [other for other in range(IDS) if self.bank.seen[other]]
                    drawn = [seen[k] for k in draw_ids(SEED, STEP, sequence, len(seen), recipe.negatives + 1).tolist()]
                    others = [other for other in drawn if other != word]
                    negatives = [bank[other] for other in others[: len(drawn) - 1]]
                else:
                    partner = draw_partner(SEED, STEP, row, torch.tensor(self.rows))
                    assert partner is not None
                    valid = int(self.lengths[partner][member])
                    where = draw_positions(SEED, STEP, sequence, valid, recipe.negatives).tolist()
                    negatives = [self.states[partner][0, member, j].double() for j in where]
                scores = torch.stack([cosine(query, other) for other in (teacher[i], *negatives)]) / TAU
                total = total - (scores[0] - torch.log(torch.exp(scores).sum()))
        return total


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / torch.sqrt((a * a).sum() * (b * b).sum())


@every_source
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(("momentum", "negatives"), [(0.5, 3), (0.0, 1), (0.9, 64)])
def test_the_contrast_and_its_gradient_match_the_definition(
    source: str, group: int, momentum: float, negatives: int
) -> None:
    example = Example(group, source, momentum, negatives)
    given = torch.cat([example.student[row] for row in example.rows])
    student, exact = given.clone().requires_grad_(), given.double().requires_grad_()
    loss, expected = example.loss(example.rows, student), example.reference(example.rows, exact)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert expected.item() > 0
    assert student.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_the_gradient_reaches_the_students_valid_tokens_alone() -> None:
    """Neither the teacher, its head nor the bank is moved; padding of the student never is."""
    for source in FROM:
        example = Example(1, source, negatives=IDS)
        for tensor in (*example.states.values(), example.head.weight):
            tensor.requires_grad_()
        student = example.student[20].clone().requires_grad_()
        example.loss([20], student).backward()
        assert all(tensor.grad is None for tensor in (*example.states.values(), example.head.weight))
        assert not example.bank.states.requires_grad
        assert student.grad is not None
        assert (student.grad[0, : ROWS[20][0]].norm(dim=-1) > 0).all()
        # Of row 5 only token 0 is valid: no loss reaches padding, whatever the source.
        student = example.student[5].clone().requires_grad_()
        example.loss([5], student).backward()
        assert student.grad is not None
        assert student.grad[0, 1:].norm() == 0


@every_source
def test_rows_cut_into_micro_batches_add_up(source: str) -> None:
    whole = Example(1, source)
    total = whole.loss(whole.rows, torch.cat([whole.student[row] for row in whole.rows]))
    parts = Example(1, source)
    cut = sum(
        parts.loss(rows, torch.cat([parts.student[row] for row in rows])) for rows in ([31], [8, 20], [5])
    )  # another order, too
    assert float(cut) == pytest.approx(float(total), rel=1e-6)
    assert (len(whole.read) > 0) == (source == "batch")


def test_a_partner_may_lie_in_a_micro_batch_of_another_worker() -> None:
    example = Example(1, "batch")
    for row in example.rows:
        example.loss([row], example.student[row])
    assert len(example.read) == 4
    assert all(partner != row for row, partner in zip(example.rows, example.read, strict=True))


@pytest.mark.parametrize("batch", [[8], [8, 8]])
def test_a_batch_of_one_row_has_no_negatives_and_costs_nothing(batch: list[int]) -> None:
    example = Example(1, "batch")
    student = example.student[8].clone().requires_grad_()
    loss = example.loss([8], student, of=batch)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert student.grad.norm() == 0
    assert example.read == []


def test_a_bank_that_has_seen_nothing_gives_no_negatives() -> None:
    example = Example(1, "vocabulary")
    nothing = torch.zeros(IDS, dtype=torch.bool)
    example.bank.load_state_dict({"states": example.bank.states, "seen": nothing})
    assert example.loss([20], example.student[20]).item() == 0


def test_neither_states_nor_a_teacher_is_an_error_of_ours() -> None:
    example = Example(1, "teacher")
    distillation = Distillation(example.recipe, example.head, None, example.bank)
    with pytest.raises(RunError, match="neither a cache nor a teacher"):
        distillation.taught(example.batch([20]), None)


def primed(loop: Trainer) -> Trainer:
    """With a bank that has seen half of the vocabulary, as in the middle of a run."""
    assert loop.distillation is not None
    bank = loop.distillation.bank
    states = torch.randn(bank.states.shape, generator=torch.Generator().manual_seed(5))
    bank.load_state_dict({"states": states, "seen": torch.arange(len(states)) % 2 == 0})
    return loop


def relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert set(a) == set(b)
    largest = max(float(tensor.norm()) for tensor in b.values())
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-4 * largest)) for n in a)


@every_source
@pytest.mark.parametrize("cached", [True, False], ids=["states", "online"])
def test_the_first_step_depends_neither_on_micro_batch_nor_on_workers(case: Case, source: str, cached: bool) -> None:
    recipe = Distill(**RECIPE, negatives_from=source, contrast_weight=1.0)
    cache = case.cache("float32") if cached else None
    first = primed(case.loop(case.run(recipe, "one", cache, micro_batch=12), LOW))
    loss, grads = gradients(first)
    other_loss, found = gradients(primed(case.loop(case.run(recipe, "micro", cache, micro_batch=5), LOW)))
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert relative(found, grads) < 1e-4
    run = case.run(recipe, "workers", cache, micro_batch=3)

    def work(rank: int) -> Any:
        other_loss, found = gradients(primed(case.loop(run, LOW)))
        torch.save(found, case.root / f"{source}-{rank}.pt")
        return other_loss

    for rank, other_loss in enumerate(with_workers(2, case.root, work)):
        found = torch.load(case.root / f"{source}-{rank}.pt", weights_only=True)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert relative(found, grads) < 1e-4


@every_source
def test_cached_states_and_the_teacher_give_the_same_first_step(case: Case, source: str) -> None:
    recipe = Distill(**RECIPE, negatives_from=source, contrast_weight=1.0)
    states = gradients(primed(case.loop(case.run(recipe, "states", case.cache("float32")), LOW)))
    online = gradients(primed(case.loop(case.run(recipe, "online"), LOW)))
    assert states[0] == pytest.approx(online[0], rel=1e-6)
    assert relative(states[1], online[1]) < 1e-4


def test_the_sources_differ(case: Case) -> None:
    cache = case.cache("float32")
    runs = [case.run(Distill(**RECIPE, negatives_from=source), source, cache) for source in FROM]
    assert len({float(primed(case.loop(run, LOW)).backward(0)["contrastive_nats"]) for run in runs}) == 4


@every_source
def test_training_by_every_source_goes_on_and_contrast_falls(case: Case, source: str) -> None:
    recipe = Distill(**RECIPE, negatives_from=source, momentum=0.0)
    loop = case.loop(case.run(recipe, source, case.cache("float32")), LOW)
    contrasts = [float(loop.train_step(step)["contrastive_nats"]) for step in range(8)]
    assert all(np.isfinite(contrasts))
    if source != "vocabulary":  # whose pool is empty at first
        assert contrasts[-1] < contrasts[0]
    else:
        assert contrasts[0] == 0
        assert contrasts[-1] > 0


def test_a_weight_of_zero_leaves_bank_and_contrast_alone(case: Case) -> None:
    loop = case.loop(case.run(Distill(**RECIPE, contrast_weight=0.0), "none"), LOW)
    assert loop.train_step(0)["contrastive_nats"] == 0
    assert loop.distillation is not None
    assert not loop.distillation.bank.seen.any()


@pytest.fixture(scope="module", params=["gpt2", "llama", "bart"])
def model(request: pytest.FixtureRequest) -> Any:
    fields = {**ARCHITECTURES[request.param], "vocab_size": VOCABULARY}
    if request.param == "bart":
        fields |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    return build(read_config(fields), seed=1).eval()


@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_a_layer_is_the_one_that_transformers_counts(model: Any, layer: int) -> None:
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    source, mask = torch.flip(ids, [1]), torch.ones_like(ids)
    inputs = (ids, source, mask) if model.config.is_encoder_decoder else (ids,)
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            output = model(input_ids=source, attention_mask=mask, decoder_input_ids=ids, output_hidden_states=True)
            hidden = output.decoder_hidden_states
        else:
            output = model(input_ids=ids, output_hidden_states=True)
            hidden = output.hidden_states
        assert len(hidden) == 3  # the embedding and two layers
        last, states = layer_states(model, layer, *inputs)
        ended, wrapped = WithStates(model, layer)(*inputs)
    torch.testing.assert_close(states, hidden[layer], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(wrapped, hidden[layer], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(last, hidden[-1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(head_of(model)(ended), output.logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", [-2, -3])
def test_the_contrast_compares_the_chosen_layers_of_student_and_teacher(case: Case, layer: int) -> None:
    recipe = Distill(**{**RECIPE, "batch_size": 6}, contrast_layer=layer)
    loop = case.loop(case.run(recipe, "layer", micro_batch=6), LOW)
    rows = loop.order.batch(0, 6)
    ids, lengths, _ = loop.rows.get(rows.tolist())
    with torch.no_grad():
        theirs = load_model(case.teacher).eval()(input_ids=ids, output_hidden_states=True).hidden_states[layer]
        ours = loop.model.model(input_ids=ids, output_hidden_states=True).hidden_states[layer]
    expected = 0.0
    for row, student, teacher, length in zip(rows.tolist(), ours, theirs, lengths.tolist(), strict=True):
        offsets = draw_offsets(0, 0, row, length, 5).tolist()
        for i in range(length):
            others = [teacher[i], *(teacher[(i + offset) % length] for offset in offsets)]
            scores = torch.stack([cosine(student[i].double(), other.double()) for other in others]) / 0.1
            expected -= float(scores.log_softmax(0)[0])
    found = loop.backward(0)
    assert found["contrastive_nats"] == pytest.approx(expected / int(lengths.sum()), rel=1e-4)
    last = case.loop(case.run(Distill(**{**RECIPE, "batch_size": 6}), "last", micro_batch=6), LOW).backward(0)
    assert found["distillation_nats"] == pytest.approx(float(last["distillation_nats"]), rel=1e-6)


def test_a_layer_within_depends_neither_on_micro_batch_nor_on_recomputed_activations(case: Case) -> None:
    recipe = Distill(**RECIPE, contrast_layer=-2, contrast_weight=1.0)
    loss, grads = gradients(primed(case.loop(case.run(recipe, "one", micro_batch=12), LOW)))
    for resources in ({"micro_batch": 5}, {"micro_batch": 12, "activation_checkpointing": True}):
        other, found = gradients(primed(case.loop(case.run(recipe, "other", **resources), LOW)))
        assert other == pytest.approx(loss, rel=1e-6)
        assert relative(found, grads) < 1e-4
    run = case.run(recipe, "workers", micro_batch=5)
    shared = with_workers(2, case.root, lambda rank: steps_of(primed(case.loop(run, LOW)), 2)["losses"])
    assert shared[0] == shared[1]
    assert shared[0][0] == pytest.approx(loss, rel=1e-6)


Make = Callable[..., Config]


def test_states_of_another_layer_are_not_in_the_cache(tiny_config: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"distill\.contrast_layer is -2.*last layer.*cache\.mode: online"):
        tiny_config(tmp_path, distill={"contrast_layer": -2}, cache={"mode": "states"})


def test_where_nothing_is_contrasted_no_layer_is_asked_for(tiny_config: Make, tmp_path: Path) -> None:
    found = {"contrast_layer": -2, "contrast_weight": 0.0}
    assert tiny_config(tmp_path, distill=found, cache={"mode": "states"}).distill.contrast_layer == -2
    plan = plan_run(tiny_config(tmp_path, distill=found, cache={"mode": "auto"}))
    assert "distill.contrast_layer" not in plan.cache_mode[1]


@pytest.mark.parametrize("layer", [0, 1])
def test_layers_are_counted_from_the_end(tiny_config: Make, tmp_path: Path, layer: int) -> None:
    with pytest.raises(ValueError, match="contrast_layer"):
        tiny_config(tmp_path, distill={"contrast_layer": layer}, cache={"mode": "online"})


def test_a_layer_that_is_not_there_is_refused_by_the_plan(tiny_config: Make, tmp_path: Path) -> None:
    for mode in ("online", "auto"):
        plan_run(tiny_config(tmp_path, distill={"contrast_layer": -3}, cache={"mode": mode}))
        with pytest.raises(ConfigError, match=r"contrast_layer is -4, and the model has 2 decoder layers.*-1 to -3"):
            plan_run(tiny_config(tmp_path, distill={"contrast_layer": -4}, cache={"mode": mode}))
    assert not list(tmp_path.rglob("record.json"))


def test_auto_runs_the_teacher_where_another_layer_is_wanted(
    tiny_config: Make, run_flow: Callable[..., Any], cloned: Path
) -> None:
    """Also where states are the cheaper, and where they lie there already."""
    often = {"steps": None, "epochs": 3}  # in which each row is read
    assert plan_run(tiny_config(cloned, cache={"mode": "auto"}, distill=often)).cache_mode[0] == "states"
    for length in ({"steps": 2}, often):
        distill = {"contrast_layer": -2, **length}
        plan = plan_run(tiny_config(cloned, cache={"mode": "auto"}, distill=distill))
        assert plan.step(TeacherCache).recipe == {"cache": {"mode": "online", "max_kl_nats": 2e-3}}
        mode, reason = plan.cache_mode
        assert mode == "online"
        assert "distill.contrast_layer" in reason
        assert plan.cache_bytes == 0
        explicit = plan_run(tiny_config(cloned, cache={"mode": "online"}, distill=distill))
        assert explicit.run_key == plan.run_key
    distill = {"contrast_layer": -2, "steps": 2}
    ran = run_flow(tiny_config(cloned, cache={"mode": "auto"}, distill=distill), until="distill")
    assert ran.record("cache").mode == "online"
    assert ran.record("distill").recipe["distill"]["contrast_layer"] == -2
    # The diagnosis is of the last states, whichever layer is contrasted: students start alike.
    last = run_flow(tiny_config(cloned, cache={"mode": "auto"}, distill={"steps": 2}), until="distill")
    starts = [json.loads((one.folder("distill") / "history.json").read_text())[0] for one in (ran, last)]
    assert starts[0]["step"] == starts[1]["step"] == 0
    assert starts[0]["token_cosine"] == starts[1]["token_cosine"]
