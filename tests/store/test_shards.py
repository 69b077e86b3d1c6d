import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.errors import DamagedError
from pipeline.store.records import TeacherCache
from pipeline.store.shards import (
    SHARD_TOKENS,
    Rows,
    StoredDraws,
    StoredStates,
    cached_name,
    drawn_shards,
    dtype_of_ids,
    is_sound,
    map_stored,
    open_shard,
    read_tokens,
    rows_per_shard,
    store_shard,
    to_stored,
    write_stored,
    write_tokens,
)
from pipeline.store.step_store import FinishedStep, StepDir, _digest_of, _matches, checksum
from tests.operations import Launches

BLOCK, HIDDEN = 6, 4
SIZES = (3, 1, 4, 2, 5)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def random_rows(rows, seed=0):
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, 2**31 - 1, (rows, BLOCK), dtype=np.int32)
    return ids, draw.integers(1, BLOCK + 1, rows, dtype=np.int32)


@pytest.fixture
def step_dir(tmp_path):
    with StepDir(str(tmp_path / "store"), "tokenize", "0" * 32, str(tmp_path / "scratch")).hold(False, print) as held:
        yield held


@pytest.fixture
def stored(step_dir):
    """Shards of unequal sizes, those of their states, and what they hold as whole arrays."""
    ids, lengths = random_rows(sum(SIZES))
    states = torch.randn(sum(SIZES), BLOCK, HIDDEN, generator=torch.Generator().manual_seed(1))
    shards, states_shards, start = [], [], 0
    for number, rows in enumerate(SIZES):
        here = slice(start, start + rows)
        name = f"rows/train-{number}.parquet"
        tokens = int(lengths[here].sum())
        shards.append(store_shard(step_dir, name, rows, tokens, lambda p, h=here: write_tokens(p, ids[h], lengths[h])))
        write = partial(write_stored, stored=StoredStates.of(states[here], "bfloat16"))
        states_shards.append(store_shard(step_dir, cached_name(name), rows, tokens, write))
        start += rows
    whole = torch.from_numpy(ids).long(), torch.from_numpy(lengths), states.bfloat16().float()
    return shards, states_shards, whole


@pytest.fixture
def corpus(stored):
    """The shards of token rows, and ids, lengths and states as whole arrays."""
    shards, _, whole = stored
    return shards, *whole


def finished(step_dir, shards):
    """The finished step that shards of states are of."""
    common = {"key": "", "stage_version": 1, "recipe": {}, "inputs": {}, "provenance": {}}
    return FinishedStep(TeacherCache(**common, mode="states", dtype="", hidden=HIDDEN, shards=shards), step_dir)


@pytest.fixture
def cache(step_dir, stored):
    """The finished step that the states are of."""
    return finished(step_dir, stored[1])


@pytest.mark.parametrize("rows", [0, 1, 5000])
def test_tokens_survive(tmp_path, rows):
    ids, lengths = random_rows(rows)
    write_tokens(tmp_path / "a.parquet", ids, lengths)
    found_ids, found_lengths = read_tokens(tmp_path / "a.parquet")
    assert (found_ids.dtype, found_lengths.dtype) == (np.int32, np.int32)
    np.testing.assert_array_equal(found_ids, ids)
    np.testing.assert_array_equal(found_lengths, lengths)


def test_rows_of_several_lengths_survive(tmp_path):
    ids = np.arange(24, dtype=np.int32).reshape(4, 6)
    for count in (4, 0):
        lengths = np.arange(12, dtype=np.int32).reshape(4, 3)[:count]
        write_tokens(tmp_path / "a.parquet", ids[:count], lengths)
        found_ids, found_lengths = read_tokens(tmp_path / "a.parquet")
        assert (found_ids.dtype, found_lengths.dtype) == (np.int32, np.int32)
        np.testing.assert_array_equal(found_ids, ids[:count])
        np.testing.assert_array_equal(found_lengths, lengths)


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_survive_in_every_bit(tmp_path, dtype):
    finest = torch.finfo(DTYPES[dtype])
    states = torch.randn(5, BLOCK, HIDDEN, generator=torch.Generator().manual_seed(1))
    states[0, 0] = torch.tensor([-0.0, finest.tiny, finest.max, finest.smallest_normal / 2])
    write_stored(tmp_path / "a.arrow", StoredStates.of(states, dtype))
    found, (mapped,) = map_stored(tmp_path / "a.arrow")
    assert (found, mapped.shape) == (dtype, (5, BLOCK, HIDDEN))
    expected = states.to(DTYPES[dtype])
    words = torch.from_numpy(mapped.copy())
    assert torch.equal(words.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(to_stored(dtype, [mapped]).values, expected)
    assert torch.equal(to_stored(dtype, [mapped[3]]).values, expected[3])


def test_codes_have_a_scale_for_each_token_and_for_each_channel_of_a_row(tmp_path):
    states = torch.randn(5, 2, BLOCK, HIDDEN, generator=torch.Generator().manual_seed(1))
    states[..., 1] *= 1000  # as some channels are
    states[0, :, :, 2] = 0
    states[1, 0, 3] = 0
    stored = StoredStates.of(states, "int8")
    assert stored.scales.shape == states.shape[:-1]
    assert stored.channels.shape == (5, HIDDEN)
    assert stored.values.abs().amax(-1)[states.any(-1)].min() == 127
    assert not stored.values[1, 0, 3].any()
    steps = stored.scales.unsqueeze(-1) * stored.channels.view(5, 1, 1, HIDDEN)
    torch.testing.assert_close(stored.wide(), stored.values * steps)
    assert ((stored.wide() - states).abs() <= 0.5001 * steps).all()
    assert steps[..., 1].min() > 50 * steps[..., 0].max()
    write_stored(tmp_path / "a.arrow", stored)
    mapped = map_stored(tmp_path / "a.arrow")
    assert mapped.dtype == stored.dtype == "int8"
    for found, expected in zip(to_stored(*mapped).tensors, stored.tensors, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_rows_of_codes_are_widened_on_the_device(device, step_dir, corpus):
    shards, *_, states = corpus
    ends, codes = np.cumsum(SIZES), []
    for shard, end in zip(shards, ends, strict=True):
        write = partial(write_stored, stored=StoredStates.of(states[end - shard.rows : end], "int8"))
        codes.append(store_shard(step_dir, cached_name(shard.name), shard.rows, 9, write))
    wanted = [14, 0, 3, 3, 2]
    stored = Rows(step_dir, shards, finished(step_dir, codes)).get(wanted)[2]
    assert {str(tensor.dtype) for tensor in stored.tensors} == {"torch.int8", "torch.float32"}
    widened = stored.to(device).wide()
    assert widened.device == device
    assert torch.equal(widened.cpu(), StoredStates.of(states[wanted], "int8").wide())


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(256, "uint8"), (257, "uint16"), (2**16, "uint16"), (2**17, "uint32")]
)
def test_drawn_tokens_are_kept_in_the_smallest_integers(device, step_dir, corpus, vocabulary, dtype):
    shards, ends, drawn = corpus[0], np.cumsum(SIZES), []
    assert dtype_of_ids(vocabulary) == dtype
    tokens = torch.randint(vocabulary, (sum(SIZES), BLOCK, 7), generator=torch.Generator().manual_seed(1))
    tokens[0, 0, 0] = vocabulary - 1
    stored = StoredDraws(tokens.to(getattr(torch, dtype)))
    for shard, end in zip(shards, ends, strict=True):
        write = partial(write_stored, stored=stored.each(lambda t, e=end, s=shard: t[e - s.rows : e]))
        drawn.append(store_shard(step_dir, cached_name(shard.name), shard.rows, 9, write))
    wanted = [14, 0, 3, 3, 2]
    found = Rows(step_dir, shards, finished(step_dir, drawn)).get(wanted)[2]
    assert (type(found), found.dtype) == (StoredDraws, dtype)
    assert found.values.nbytes == len(wanted) * BLOCK * 7 * np.dtype(dtype).itemsize
    widened = found.to(device).wide()
    assert widened.device == device
    assert torch.equal(widened.cpu(), tokens[wanted])


def test_states_that_do_not_lie_in_order_are_written_in_order(tmp_path):
    states = torch.randn(HIDDEN, BLOCK, 3).transpose(0, 2)
    write_stored(tmp_path / "a.arrow", StoredStates(states))
    assert torch.equal(to_stored(*map_stored(tmp_path / "a.arrow")).values, states)


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_are_mapped_and_not_copied(tmp_path, dtype):
    path = tmp_path / "a.arrow"
    write_stored(path, StoredStates.of(torch.ones(64, BLOCK, HIDDEN), dtype))
    allocated = pa.total_allocated_bytes()
    (mapped,) = map_stored(path).arrays
    assert pa.total_allocated_bytes() - allocated < mapped.nbytes / 4
    assert not mapped.flags.writeable
    data = path.read_bytes()
    place_of_rows = data.index(mapped.tobytes())
    with open(path, "r+b") as file:  # the view is the file: what is written there shows
        file.seek(place_of_rows)
        file.write(bytes(mapped.itemsize))
    assert mapped[0, 0, 0] == 0
    assert mapped[0, 0, 1] != 0


def test_rows_are_found_across_shards(step_dir, corpus, cache):
    shards, ids, lengths, states = corpus
    rows = Rows(step_dir, shards, cache)
    assert rows.rows == sum(SIZES)
    for wanted in ([0], range(sum(SIZES)), [14, 0, 3, 3, 2, 4, 9], [7, 8]):
        wanted = list(wanted)
        found = rows.get(wanted)
        assert torch.equal(found[0], ids[wanted])
        assert torch.equal(found[1], lengths[wanted])
        assert torch.equal(found[2].wide(), states[wanted])
        assert torch.equal(rows.lengths(wanted), lengths[wanted])
    assert found[0].dtype == torch.int64
    assert found[2].values.dtype == torch.bfloat16  # as stored: a device widens them


def test_shards_of_several_dtypes_are_read_together(step_dir, corpus, stored):
    """Of a cache in float16, a shard that overflows it is in bfloat16."""
    shards, *_, states = corpus
    wanted = [4, 0, 2, 14]
    for dtype in ("float16", "int8"):
        here = StoredStates.of(states[: SIZES[0]], dtype)
        write = partial(write_stored, stored=here)
        mixed = [store_shard(step_dir, cached_name(shards[0].name), SIZES[0], 9, write), *stored[1][1:]]
        rows = Rows(step_dir, shards, finished(step_dir, mixed))
        expected = torch.cat([here.wide(), states[SIZES[0] :]])[wanted]
        assert torch.equal(rows.get(wanted)[2].wide(), expected)
        assert rows.get([0, 2])[2].dtype == dtype


def test_states_are_copied_once_straight_to_their_place(step_dir):
    """Neither torch nor numpy makes anything of them on the way."""
    shards = committed(step_dir, "wide", *random_rows(12), 6)
    write = partial(write_stored, stored=StoredStates(torch.ones(6, 1, 4096).bfloat16()))
    wide = [store_shard(step_dir, cached_name(shard.name), 6, 9, write) for shard in shards]
    rows = Rows(step_dir, shards, finished(step_dir, wide))
    with Launches() as launches:
        states = rows.get(range(12))[2].values
    assert torch.equal(states, torch.ones(12, 1, 4096, dtype=torch.bfloat16))
    assert launches.count == 0
    tracemalloc.start()
    rows.get(range(12))
    assert tracemalloc.get_traced_memory()[1] < states.nbytes / 4
    tracemalloc.stop()


def test_lengths_are_read_in_one_indexing_a_shard(step_dir, corpus):
    shards, _, lengths, _ = corpus
    rows = Rows(step_dir, shards)
    with Launches() as launches:
        found = rows.lengths([14, 0, 3, 3])
    assert torch.equal(found, lengths[[14, 0, 3, 3]].long())
    assert launches.count == 0


def test_rows_are_the_same_in_pinned_memory(device, step_dir, corpus, cache):
    shards, ids, lengths, states = corpus
    pinned = Rows(step_dir, shards, cache).get([3, 0, 9], pin=True)
    assert torch.equal(pinned[0], ids[[3, 0, 9]])
    assert torch.equal(pinned[1], lengths[[3, 0, 9]])
    there = pinned[2].to(device).wide()
    assert there.device == device
    assert torch.equal(there.cpu(), states[[3, 0, 9]])


def test_rows_are_read_by_two_threads(step_dir, corpus, cache):
    shards, ids, _, states = corpus
    rows = Rows(step_dir, shards, cache, open_shards=2)

    def read(seed):
        order = torch.randperm(sum(SIZES), generator=torch.Generator().manual_seed(seed)).tolist()
        return [(row, rows.get([row])) for row in order * 4]

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(read, (0, 1)):
            for row, (found_ids, _, found_states) in found:
                assert torch.equal(found_ids[0], ids[row])
                assert torch.equal(found_states.wide()[0], states[row])


def test_rows_without_a_cache_have_no_states(step_dir, corpus):
    shards, ids, _, _ = corpus
    found = Rows(step_dir, shards).get([1, 12])
    assert torch.equal(found[0], ids[[1, 12]])
    assert found[2] is None


def contents(rows, chosen):
    ids, lengths, _ = rows.get(chosen)
    return {(tuple(row), length) for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)}


def committed(step_dir, prefix, ids, lengths, per_shard):
    starts = range(0, len(ids), per_shard)
    return [
        store_shard(
            step_dir,
            f"rows/{prefix}-{start}.parquet",
            len(ids[start : start + per_shard]),
            int(lengths[start : start + per_shard].sum()),
            lambda path, here=slice(start, start + per_shard): write_tokens(path, ids[here], lengths[here]),
        )
        for start in starts
    ]


def test_drawn_rows_depend_on_what_rows_hold_and_not_on_where_they_lie(step_dir):
    ids, lengths = random_rows(400)
    shards = committed(step_dir, "first", ids, lengths, 64)
    drawn = Rows(step_dir, shards).drawn(40)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 40
    spread = np.bincount(np.array(drawn) // 100, minlength=4)
    assert spread.min() > 0  # from all over the split
    elsewhere = Rows(step_dir, [*reversed(committed(step_dir, "other", ids, lengths, 150))])
    assert contents(elsewhere, elsewhere.drawn(40)) == contents(Rows(step_dir, shards), drawn)
    assert set(Rows(step_dir, shards).drawn(20)) < set(drawn)


def test_rows_that_are_added_displace_few_of_those_drawn(step_dir):
    ids, lengths = random_rows(440)
    rows = Rows(step_dir, committed(step_dir, "before", ids[40:], lengths[40:], 64))
    more = Rows(step_dir, committed(step_dir, "after", ids, lengths, 64))
    kept = contents(rows, rows.drawn(40)) & contents(more, more.drawn(40))
    assert 28 <= len(kept) < 40  # 36 are expected


def test_the_length_of_a_row_is_of_its_content(step_dir):
    ids = np.zeros((6, BLOCK), np.int32)
    rows = Rows(step_dir, committed(step_dir, "padded", ids, np.arange(1, 7, dtype=np.int32), 3))
    assert rows.drawn(3) != [0, 1, 2]


def test_all_rows_are_drawn_where_there_are_no_more_and_none_is_read_for_it(step_dir, corpus):
    shards, *_ = corpus
    for shard in shards:
        step_dir.delete(shard.file.place(shard.name))
    for count in (sum(SIZES), 512):
        assert Rows(step_dir, shards).drawn(count) == list(range(sum(SIZES)))


def test_drawn_shards_are_those_of_the_same_names_in_any_order(corpus):
    shards, *_ = corpus
    drawn = drawn_shards(shards, 3)
    assert len(drawn) == 3
    assert drawn == [shard for shard in shards if shard in drawn] != shards[:3]
    assert drawn_shards([*reversed(shards)], 3) == [*reversed(drawn)]
    assert drawn_shards(shards, 9) == shards


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_a_bounded_number_of_shards_stays_open(step_dir, corpus, cache, limit):
    shards, ids, _, states = corpus
    rows = Rows(step_dir, shards, cache, open_shards=limit)
    order = torch.randperm(sum(SIZES), generator=torch.Generator().manual_seed(0)).tolist()
    for row in order * 2:
        found = rows.get([row])
        assert torch.equal(found[0][0], ids[row])
        assert torch.equal(found[2].wide()[0], states[row])
        with open("/proc/self/maps") as maps:
            assert len({line.split()[-1] for line in maps if step_dir.key in line}) <= limit


def test_a_shard_that_is_open_is_not_read_again(step_dir, corpus):
    shards, ids, _, _ = corpus
    rows = Rows(step_dir, shards, open_shards=2)
    rows.get([0, 3])
    step_dir.delete(shards[0].file.place(shards[0].name))
    assert torch.equal(rows.get([1])[0], ids[[1]])
    rows.get([4, 8])
    with pytest.raises(DamagedError):
        rows.get([0])


def test_a_shard_that_is_opened_again_is_not_hashed_again(step_dir, corpus, cache):
    shards, *_ = corpus
    rows = Rows(step_dir, shards, cache, open_shards=1)
    before = _digest_of.cache_info().misses
    for _ in range(3):
        for row in (0, 3, 4, 8, 10):
            rows.get([row])
    assert _digest_of.cache_info().misses - before == 2 * len(SIZES)


def test_a_store_of_many_shards_is_hashed_once(tmp_path):
    """As many as a teacher's states of half a milliard tokens."""
    (tmp_path / "shard").write_bytes(b"states")
    digest = checksum(tmp_path / "shard")
    paths = [tmp_path / str(number) for number in range(8_000)]
    for path in paths:
        os.link(tmp_path / "shard", path)
    before = _digest_of.cache_info().misses
    for _ in range(2):
        assert all(_matches(path, digest) for path in paths)
    assert _digest_of.cache_info().misses - before == len(paths)


def spoil(step_dir, shard, how):
    if how == "missing":
        step_dir.delete(shard.file.place(shard.name))
    else:
        data = bytearray(step_dir.read(shard.file.place(shard.name)))
        data[len(data) // 2] ^= 1
        step_dir.write(shard.name, bytes(data) if how == "flipped" else bytes(data[:-1]))


@pytest.mark.parametrize("how", ["missing", "flipped", "cut"])
@pytest.mark.parametrize("kind", [0, 1], ids=["tokens", "states"])
def test_a_damaged_shard_is_refused(step_dir, stored, cache, how, kind):
    shards, _, (ids, *_) = stored
    damaged = stored[kind][1]
    assert is_sound(step_dir, damaged)
    spoil(step_dir, damaged, how)
    with pytest.raises(DamagedError, match=damaged.name.split("/")[1]):
        open_shard(step_dir, damaged)
    assert not is_sound(step_dir, damaged)
    rows = Rows(step_dir, shards, cache)
    assert torch.equal(rows.get([0])[0], ids[[0]])
    with pytest.raises(DamagedError):
        rows.get([SIZES[0]])


def test_a_shard_is_stored_with_its_checksum_and_leaves_no_scratch(step_dir):
    ids, lengths = random_rows(2)
    shard = store_shard(step_dir, "rows/a.parquet", 2, 9, lambda path: write_tokens(path, ids, lengths))
    assert (shard.name, shard.rows, shard.tokens, shard.file.fence) == ("rows/a.parquet", 2, 9, step_dir.fence)
    assert step_dir.sizes() == {"1/rows/a.parquet": shard.file.bytes}
    np.testing.assert_array_equal(read_tokens(open_shard(step_dir, shard))[0], ids)
    assert os.listdir(step_dir.scratch) == []


def test_a_shard_whose_writing_fails_is_not_stored(step_dir):
    def fail(path):
        path.write_bytes(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store_shard(step_dir, "rows/a.parquet", 2, 9, fail)
    assert step_dir.sizes() == {}
    assert os.listdir(step_dir.scratch) == []


def test_shards_are_of_bounded_size():
    for block in (2, 7, 128, SHARD_TOKENS):
        assert rows_per_shard(block) * block <= SHARD_TOKENS < (rows_per_shard(block) + 1) * block
    assert rows_per_shard(SHARD_TOKENS + 1) == 1
