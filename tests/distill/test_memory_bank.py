import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pipeline.distill.memory_bank import MemoryBank

VOCABULARY, HIDDEN, MOMENTUM = 13, 5, 0.7


def bank(momentum=MOMENTUM):
    return MemoryBank(VOCABULARY, HIDDEN, momentum)


def batches(steps=5, rows=4, length=6):
    """Random ids (many of them repeated), states and a mask, for each step."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
        states = torch.randn(rows, length, HIDDEN, generator=generator)
        lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
        yield ids, states, torch.arange(length) < lengths


class DictBank:
    """The definition in plain Python floats: id -> vector."""

    def __init__(self, momentum):
        self.m, self.vectors = momentum, {}

    def query(self, token, h):
        old = self.vectors.get(token)
        return h if old is None else [self.m * o + (1 - self.m) * x for o, x in zip(old, h, strict=True)]

    def step(self, ids, states, valid):
        seen_now = {}
        for token, h, ok in zip(ids.flatten().tolist(), states.flatten(0, 1).tolist(), valid.flatten(), strict=True):
            if ok:
                seen_now.setdefault(token, []).append(h)
        for token, vectors in seen_now.items():
            mean = [sum(values) / len(vectors) for values in zip(*vectors, strict=True)]
            self.vectors[token] = self.query(token, mean)


def assert_same(ours, theirs):
    torch.testing.assert_close(ours.states, theirs.states, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours.seen, theirs.seen)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.7])
def test_queries_and_bank_follow_the_definition(momentum):
    ours, theirs = bank(momentum), DictBank(momentum)
    for ids, states, valid in batches():
        rows = zip(ids.flatten().tolist(), states.flatten(0, 1).tolist(), strict=True)
        expected = torch.tensor([theirs.query(token, h) for token, h in rows]).reshape(states.shape)
        torch.testing.assert_close(ours.query(ids, states), expected)
        ours.accumulate(ids, states, valid)
        ours.update()
        theirs.step(ids, states, valid)
        assert ours.seen.nonzero().flatten().tolist() == sorted(theirs.vectors)
        for token, vector in theirs.vectors.items():
            torch.testing.assert_close(ours.states[token], torch.tensor(vector))
    assert len(theirs.vectors) > 1
    assert not ours.states[~ours.seen].any()


def test_ids_seen_only_in_padding_stay_unseen():
    ours = bank()
    ours.accumulate(torch.tensor([[1, 2, 2]]), torch.ones(1, 3, HIDDEN), torch.tensor([[True, False, False]]))
    ours.update()
    assert ours.seen.nonzero().tolist() == [[1]]


def test_an_unseen_id_is_its_own_query_and_enters_as_its_mean():
    ours, states = bank(), torch.randn(1, 3, HIDDEN)
    ids = torch.tensor([[4, 4, 9]])
    assert torch.equal(ours.query(ids, states), states)
    ours.accumulate(ids, states, torch.ones(1, 3, dtype=torch.bool))
    ours.update()
    torch.testing.assert_close(ours.states[4], states[0, :2].mean(0))
    torch.testing.assert_close(ours.states[9], states[0, 2])


def test_every_query_of_a_step_reads_the_bank_of_the_step_before():
    ours = bank()
    for ids, states, valid in batches():
        before = ours.query(ids, states)
        ours.accumulate(ids[:2], states[:2], valid[:2])
        assert torch.equal(ours.query(ids, states), before)
        ours.accumulate(ids[2:], states[2:], valid[2:])
        assert torch.equal(ours.query(ids, states), before)
        ours.update()
    assert not torch.equal(ours.query(ids, states), before)


def test_an_update_forgets_the_states_of_its_step():
    ours, fresh = bank(), bank()
    first, second = batches(steps=2)
    ours.accumulate(*first)
    ours.update()
    fresh.load_state_dict(ours.state_dict())
    for each in (ours, fresh):
        each.accumulate(*second)
        each.update()
    assert torch.equal(ours.states, fresh.states)


@pytest.mark.parametrize("cuts", [[1], [2], [1, 2, 3]])
def test_micro_batches_give_the_bank_of_the_whole_batch(cuts):
    whole, split = bank(), bank()
    for batch in batches():
        whole.accumulate(*batch)
        whole.update()
        for micro_batch in zip(*(tensor.tensor_split(cuts) for tensor in batch), strict=True):
            split.accumulate(*micro_batch)
        split.update()
        assert_same(split, whole)


def update_together(banks):
    """Each bank's update in a thread of its own; `gather` waits for the others, as a collective does."""
    slots, barrier = [None] * len(banks), threading.Barrier(len(banks), timeout=30)

    def work(rank):
        def gather(*tensors):
            slots[rank] = tensors
            barrier.wait()
            values = [list(of_all) for of_all in zip(*slots, strict=True)]
            barrier.wait()
            return values

        banks[rank].update(gather)

    with ThreadPoolExecutor(len(banks)) as pool:
        list(pool.map(work, range(len(banks))))


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_hold_the_bank_of_one_worker_bit_for_bit_alike(workers):
    alone, banks = bank(), [bank() for _ in range(workers)]
    for batch in batches():
        alone.accumulate(*batch)
        alone.update()
        for rank, ours in enumerate(banks):
            ours.accumulate(*(tensor.tensor_split(workers)[rank] for tensor in batch))
        update_together(banks)
        for ours in banks:
            assert torch.equal(ours.states, banks[0].states)
            assert_same(ours, alone)


@pytest.mark.parametrize("empty_rank", [0, 1])
def test_a_worker_without_a_valid_token_takes_part(empty_rank):
    alone, banks = bank(), [bank(), bank()]
    for ids, states, valid in batches():
        alone.accumulate(ids, states, valid)
        alone.update()
        banks[1 - empty_rank].accumulate(ids, states, valid)
        banks[empty_rank].accumulate(ids[:0], states[:0], valid[:0])
        update_together(banks)
        assert torch.equal(banks[0].states, banks[1].states)
        assert_same(banks[0], alone)


def test_the_gradient_flows_through_the_current_state_only():
    ours = bank()
    seen, unseen = 3, 8
    ours.accumulate(torch.tensor([[seen]]), torch.randn(1, 1, HIDDEN), torch.tensor([[True]]))
    ours.update()
    h = torch.randn(1, 2, HIDDEN, requires_grad=True)
    upstream = torch.randn(1, 2, HIDDEN)
    ours.query(torch.tensor([[seen, unseen]]), h).backward(upstream)
    torch.testing.assert_close(h.grad[0, 0], (1 - MOMENTUM) * upstream[0, 0])
    assert torch.equal(h.grad[0, 1], upstream[0, 1])
    ours.accumulate(torch.tensor([[seen, unseen]]), h * 2, torch.ones(1, 2, dtype=torch.bool))
    ours.update()
    assert not ours.states.requires_grad


def test_half_precision_states_are_averaged_in_fp32():
    half, full = bank(), bank()
    for ids, states, valid in batches():
        states = states.bfloat16()
        assert half.query(ids, states).dtype == torch.float32
        assert torch.equal(half.query(ids, states), full.query(ids, states.float()))
        half.accumulate(ids, states, valid)
        full.accumulate(ids, states.float(), valid)
        half.update()
        full.update()
    assert half.states.dtype == torch.float32
    assert torch.equal(half.states, full.states)


def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_happened():
    steps = list(batches(steps=6))
    through, first = bank(), bank()
    for batch in steps[:3]:
        for ours in (through, first):
            ours.accumulate(*batch)
            ours.update()
    saved = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    resumed = bank()
    resumed.load_state_dict(saved)
    for batch in steps[3:]:
        for ours in (through, resumed):
            ours.accumulate(*batch)
            ours.update()
    assert torch.equal(resumed.states, through.states)
    assert torch.equal(resumed.seen, through.seen)
    assert torch.equal(saved["states"], first.states)  # loading copied: the later steps left the checkpoint alone
