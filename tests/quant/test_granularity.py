"""How many weights share a scale: the folding alone, and every quantizer by matrix, row and group of a row.

The formulas of a matrix and of rows are written out below as sums over one or both dimensions, with no folding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.config.quant import Quant
from pipeline.quant.frozen import FrozenTensors
from pipeline.quant.granularity import GROUP_SIZES, PER_CHANNEL, PER_TENSOR, Granularity
from pipeline.quant.grid import dequantize
from pipeline.quant.quantizers import QUANTIZERS
from pipeline.quant.quantizers.base import after_step
from pipeline.quant.spec import levels_of
from tests.quant.cases import GRANULARITIES, make, trained

TERNARY = ("twn", "statistics")
LEARN_A_RATIO = ("lsq", "lsq_symmetric", "seq")
WIDTHS = [(name, bits) for name in QUANTIZERS for bits in ((2,) if name in TERNARY else (2, 4, 8))]
STARTS = [
    (name, bits, start)
    for name, bits in WIDTHS
    for start in (("one", "mse") if name in ("quantgpt", "pact", *LEARN_A_RATIO) else ("auto",))
]
SIZES = [(1, 1), (1, 7), (7, 1), (3, 5), (9, 31), (33, 129), (130, 257), (64, 768)]
each_width = pytest.mark.parametrize(("name", "bits"), WIDTHS)
each_start = pytest.mark.parametrize(("name", "bits", "start"), STARTS)
each_size = pytest.mark.parametrize("size", GROUP_SIZES)
few = settings(max_examples=60)


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Weights with heavy tails and a mean that is not zero."""
    generator = torch.Generator().manual_seed(1000 * rows + columns + seed)
    return (torch.randn(rows, columns, generator=generator) ** 3 + 0.1) * 0.05


def bits_of(tensor: Tensor) -> Tensor:
    """Tells 0.0 from -0.0."""
    return tensor.detach().contiguous().view(torch.int32)


@dataclass(frozen=True)
class Formulas:
    """One scale of a matrix (1, 1), or one of each row (rows, 1), by sums over the dimensions it spans."""

    kind: str  # of granularity
    name: str
    bits: int

    @property
    def ends(self) -> tuple[int, int, float]:
        """The lowest and the highest code, and how far a level lies above its code."""
        half = 2 ** (self.bits - 1)
        if levels_of(self.name) == "symmetric":
            return 1 - half, half - 1, 0.0
        return -half, half - 1, 0.5 if self.name == "seq" else 0.0

    def total(self, values: Tensor) -> Tensor:
        return values.sum().reshape(1, 1) if self.kind == "per_tensor" else values.sum(1, keepdim=True)

    def mean(self, values: Tensor) -> Tensor:
        return values.mean().reshape(1, 1) if self.kind == "per_tensor" else values.mean(1, keepdim=True)

    def largest(self, values: Tensor) -> Tensor:
        return values.max().reshape(1, 1) if self.kind == "per_tensor" else values.amax(1, keepdim=True)

    def codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        low, high, shift = self.ends
        places = weight / scale.clamp(min=1e-30)
        return (places - shift if shift else places).round().clamp(low, high) + 0.0

    def levels(self, codes: Tensor, scale: Tensor) -> Tensor:
        shift = self.ends[2]
        return (codes + shift if shift else codes) * scale

    def error(self, weight: Tensor, scale: Tensor) -> Tensor:
        return self.total((weight - self.levels(self.codes(weight, scale), scale)).square())

    def searched(self, weight: Tensor) -> Tensor:
        """The scale of least squared error among 24 and then 64 between half the mean and the largest magnitude."""
        low, high, shift = self.ends
        edge = max(-(low + shift), high + shift)
        mean = self.mean(weight.abs())
        lowest, highest = mean / 2 / edge, self.largest(weight.abs()) / edge
        for points in (24, 64):
            ratio = (highest / torch.where(lowest == 0, 1, lowest)).clamp(min=1) ** (1 / (points - 1))
            candidates = torch.stack([lowest * ratio**i for i in range(points)])
            errors = torch.stack([self.error(weight, scale) for scale in candidates])
            best = candidates.gather(0, errors.argmin(0, keepdim=True))[0]
            lowest, highest = best / ratio, best * ratio
        at_mean = mean / edge
        return torch.where(self.error(weight, best) < self.error(weight, at_mean), best, at_mean)

    def parameters(self, weight: Tensor, start: str) -> dict[str, Tensor]:
        """What a quantizer begins with."""
        (low, high, _), mean = self.ends, self.mean(weight.abs())
        if self.name in TERNARY:
            return {}
        if self.name in ("laq", "laq_uniform"):
            return {"scale": self.searched(weight)}
        if self.name == "quantgpt":
            gamma = torch.ones_like(mean)
            if start == "mse":
                alpha = self.searched(weight) * high
                gamma = torch.where(alpha > 0, alpha / torch.where(mean == 0, 1, mean), gamma)
            return {"gamma": gamma}
        if self.name == "pact":
            clip = torch.full_like(mean, 2.5) if start == "one" else self.searched(weight) * high
            return {"high": clip, "low": -clip}
        published = self.largest(weight.abs()) / -low if self.name == "seq" else 2 * mean / math.sqrt(high)
        first = published if start == "one" else self.searched(weight)
        return {"first": first, "gamma": torch.ones_like(first)}

    def frozen(self, weight: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Codes and scale of a weight."""
        high = self.ends[1]
        if self.name == "twn":
            beyond = weight.abs() > 0.7 * self.mean(weight.abs())
            scale = self.total(weight.abs() * beyond) / self.total(beyond).clamp(min=1)
            return weight.sign() * beyond + 0.0, scale
        if self.name == "statistics":
            weight = weight - self.mean(weight)
            scale = 4 / 3 * self.mean(weight.abs())
        elif self.name == "pact":
            weight = torch.minimum(torch.maximum(weight, parameters["low"]), parameters["high"])
            scale = self.largest(weight.abs()) / high
        elif self.name == "quantgpt":
            scale = parameters["gamma"] * self.mean(weight.abs()) / high
        elif self.name in LEARN_A_RATIO:
            scale = parameters["gamma"] * parameters["first"]
        else:
            scale = parameters["scale"]
        return self.codes(weight, scale), scale

    def ratio_gradient(self, weight: Tensor, parameters: dict[str, Tensor], upstream: Tensor) -> Tensor:
        """Of gamma, where a ratio is learned."""
        low, high, shift = self.ends
        codes, scale = self.frozen(weight, parameters)
        reach = 0.5 if self.name == "seq" else 0.0
        inside = (weight > (low + shift - reach) * scale) & (weight < (high + shift + reach) * scale)
        slope = codes + shift - torch.where(inside, weight / torch.where(scale == 0, 1, scale), 0)
        of_scale = self.total(upstream * slope) * (scale != 0)
        if self.name == "quantgpt":
            return of_scale / high * self.mean(weight.abs())
        weights = weight.numel() if self.kind == "per_tensor" else weight.shape[1]
        return of_scale * (1 / math.sqrt(weights * high)) * parameters["first"]

    def alternated(self, weight: Tensor, moment: Tensor, scale: Tensor) -> Tensor:
        """LAQ's scale after up to ten rounds: codes for the scale, the scale for the codes."""
        importance = moment.sqrt() + 1e-8 if self.name == "laq" else torch.ones_like(weight)
        dead = ((scale == 0) & (self.mean(weight.abs()) > 0))[:, 0]
        if dead.any():
            scale = torch.where(dead[:, None], self.searched(weight), scale)
        for _ in range(10):
            codes, before = self.codes(weight, scale), scale
            above = self.total(importance * codes * weight)
            below = self.total(importance * codes.square())
            scale = torch.where(below > 0, above / torch.where(below > 0, below, 1), scale)
            if ((scale - before).abs() / before.clamp(min=1e-8)).max() < 1e-6:
                break
        return scale


def options_of(start: str) -> dict[str, str]:
    return {} if start == "auto" else {"gamma_init": start}


@each_start
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dead_row", [False, True])
def test_matrices_and_rows_start_and_freeze_with_the_bits_of_the_formulas(name, bits, start, granularity, dead_row):
    formulas = Formulas(granularity, name, bits)
    for rows, columns in SIZES:
        weight = random(rows, columns)
        if dead_row:
            weight[rows // 2] = 0
        quantizer = make(name, weight, bits, granularity, **options_of(start))
        parameters = formulas.parameters(weight, start)
        assert {key for key, _ in quantizer.named_parameters()} == parameters.keys()
        for key, value in parameters.items():
            assert torch.equal(getattr(quantizer, key), value), (key, rows, columns)
        for at in (weight, random(rows, columns, seed=1)):  # at the start, and where training led
            codes, scale = formulas.frozen(at, parameters)
            found = quantizer.freeze(at)
            assert torch.equal(found[0], codes.to(torch.int8)), (rows, columns)
            assert torch.equal(found[1], scale), (rows, columns)
            assert torch.equal(bits_of(quantizer(at)), bits_of(formulas.levels(codes, scale))), (rows, columns)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["quantgpt", *LEARN_A_RATIO])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradient_of_a_ratio_has_the_bits_of_the_formula(name, bits, granularity):
    formulas = Formulas(granularity, name, bits)
    for rows, columns in SIZES:
        weight, upstream = random(rows, columns), random(rows, columns, seed=2)
        quantizer = make(name, weight, bits, granularity, gamma_init="one")
        with torch.no_grad():
            quantizer.gamma *= 0.6 + torch.rand(quantizer.gamma.shape, generator=torch.Generator().manual_seed(rows))
        quantizer(weight).backward(upstream)
        parameters = {key: p.detach() for key, p in quantizer.named_parameters()}
        expected = formulas.ratio_gradient(weight, parameters, upstream)
        assert torch.equal(quantizer.gamma.grad, expected), (rows, columns)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["laq", "laq_uniform"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_scale_of_least_loss_has_the_bits_of_the_alternations(name, bits, granularity):
    formulas = Formulas(granularity, name, bits)
    for rows, columns in SIZES:
        weight, moment = random(rows, columns), random(rows, columns, seed=3).square()
        start = weight.clone()
        start[rows // 2] = 0  # comes alive
        quantizer = make(name, start, bits, granularity)
        expected = formulas.alternated(weight, moment, formulas.searched(start))
        after_step([(quantizer, weight, moment)])
        assert torch.equal(quantizer.scale, expected), (rows, columns)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, Granularity]:
    """A matrix with a granularity that divides its rows."""
    written = draw(st.sampled_from(["per_tensor", "per_channel", *({"per_group": size} for size in GROUP_SIZES)]))
    granularity = Granularity.parse(written)
    rows, groups = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    columns = groups * granularity.group_size if granularity.kind == "per_group" else draw(st.integers(1, 40))
    return torch.arange(rows * columns).reshape(rows, columns), granularity


@few
@given(matrices())
def test_unfolding_is_the_inverse_of_folding_and_scales_fit_what_is_folded(case):
    weight, granularity = case
    rows, columns = weight.shape
    folded = granularity.fold(weight)
    assert torch.equal(granularity.unfold(folded, weight.shape), weight)
    assert sorted(folded.flatten().tolist()) == weight.flatten().tolist()
    scale = granularity.scale_shape((rows, columns))
    assert math.prod(scale) == len(folded)
    assert granularity.divides(columns)
    # What a row of the folded weight holds: everything, a row, or neighbours of a row.
    width = {"per_tensor": rows * columns, "per_channel": columns, "per_group": granularity.group_size}
    assert folded.shape[1] == width[granularity.kind]
    assert (folded.diff(dim=1) == 1).all()


@few
@given(matrices())
def test_the_shapes_of_scale_and_weight_tell_the_granularity(case):
    weight, granularity = case
    shape = tuple(weight.shape)
    stored = granularity.scale_shape(shape)
    found = Granularity.of_scale(stored, shape)
    # Where one scale serves a whole row, or a matrix of one row, the names mean the same.
    assert found == granularity or stored[1] == 1
    assert torch.equal(found.fold(weight), granularity.fold(weight))
    assert found.scale_shape(shape) == stored


@pytest.mark.parametrize(
    "scale",
    [(), (4,), (4, 96), (4, 2), (4, 4), (4, 6), (4, 0), (1, 3), (3, 1), (4, 3, 1), (2, 3), (96, 4)],
    ids=str,
)
def test_a_scale_that_no_granularity_gives_is_refused(scale):
    """Of rows of 96, which are three groups of 32 and nothing else."""
    assert Granularity.of_scale((4, 3), (4, 96)) == Granularity("per_group", 32)
    with pytest.raises(ValueError, match=r"is not one a matrix, a row or a group of a weight of shape \(4, 96\)"):
        Granularity.of_scale(scale, (4, 96))


@few
@given(matrices(), st.integers(1, 3))
def test_every_block_of_a_row_has_the_scale_of_its_weights(case, finer):
    weight, granularity = case
    rows, columns = weight.shape
    groups = granularity.scale_shape((rows, columns))[1]
    blocks = next(n for n in (groups * finer, groups) if columns % n == 0)
    scale = torch.arange(1.0, 1 + math.prod(granularity.scale_shape((rows, columns))))
    stored = scale.reshape(granularity.scale_shape((rows, columns)))
    each = granularity.unfold(scale.reshape(-1, 1).expand(granularity.fold(weight).shape), weight.shape)
    found = granularity.block_scales(stored, (rows, columns), blocks)
    assert found.shape == (rows, blocks)
    assert torch.equal(found.repeat_interleave(columns // blocks, 1), each)


def test_a_block_that_lies_in_two_groups_is_refused():
    groups = Granularity("per_group", 32)
    for blocks in (1, 2, 4):
        with pytest.raises(ValueError, match=f"{blocks} blocks of a row do not lie in 3 groups"):
            groups.block_scales(torch.ones(4, 3), (4, 96), blocks)


@pytest.mark.parametrize(
    ("scale", "rows"),
    [([[2.0]], [[2.0], [2.0]]), ([[1.0], [2.0]], [[1.0], [2.0]]), ([[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 4.0]])],
)
def test_every_row_has_its_scales(scale, rows):
    frozen = FrozenTensors({"w": torch.zeros(2, 64, dtype=torch.int8)}, {"w": torch.tensor(scale).half()}, {"w": 2})
    assert torch.equal(frozen.row_scales("w"), torch.tensor(rows))


@pytest.mark.parametrize("columns", [1, 31, 33, 48])
def test_only_whole_groups_divide_a_row(columns):
    assert PER_TENSOR.divides(columns)
    assert PER_CHANNEL.divides(columns)
    assert not Granularity("per_group", 32).divides(columns)


@pytest.mark.parametrize("written", ["per_tensor", "per_channel", *({"per_group": size} for size in GROUP_SIZES)])
def test_what_is_read_is_written_again(written):
    granularity = Granularity.parse(written)
    assert granularity.written() == written
    assert Quant(granularity=written).spec().granularity == granularity
    assert str(granularity) in (written, f"per_group {granularity.group_size}")


@pytest.mark.parametrize(
    "unknown",
    [
        "tensor", "row", "per_group", "per_group 32", "PER_TENSOR", "", None, 32, True, ["per_tensor"], {},
        {"per_group": 16}, {"per_group": 0}, {"per_group": -32}, {"per_group": 256}, {"per_group": "32"},
        {"per_group": None}, {"per_group": [32]}, {"per_channel": 32}, {"per_group": 32, "rows": 1},
        [("per_group", 32)],
    ],
    ids=repr,
)  # fmt: skip
def test_a_granularity_that_is_not_known_is_refused_naming_the_valid_ones(unknown):
    with pytest.raises(ValueError, match=r"is not known; valid: per_tensor, per_channel, \{per_group: 32, 64, 128\}"):
        Granularity.parse(unknown)
    with pytest.raises(ValueError, match="granularity"):
        Quant(granularity=unknown)


def shipped(name: str, bits: int, codes: Tensor, scale: Tensor) -> Tensor:
    """The weight that codes and scale stand for."""
    frozen = FrozenTensors(codes={"w": codes}, scales={"w": scale}, bits={"w": bits}, levels=levels_of(name))
    return frozen.weight("w")


@each_size
@each_width
def test_what_ships_of_groups_is_the_forward_pass_before_and_after_training(name, bits, size):
    for rows, groups in ((1, 1), (3, 2), (5, 3)):
        weight, upstream = random(rows, groups * size), random(rows, groups * size, seed=4)
        quantizer = make(name, weight, bits, {"per_group": size})
        for latent in (weight, trained(quantizer, weight, upstream, lr=1e-3)):
            codes, scale = quantizer.freeze(latent)
            assert codes.dtype == torch.int8
            assert (codes.shape, tuple(scale.shape)) == (weight.shape, (rows, groups))
            assert codes.is_contiguous()
            assert scale.is_contiguous()
            assert torch.equal(bits_of(shipped(name, bits, codes, scale)), bits_of(quantizer(latent)))
            groupwise = dequantize(codes.reshape(-1, size), scale.reshape(-1, 1), quantizer.grid).reshape(weight.shape)
            assert torch.equal(bits_of(shipped(name, bits, codes, scale)), bits_of(groupwise))
            assert quantizer.grid.low <= int(codes.min()) <= int(codes.max()) <= quantizer.grid.high


@each_size
@each_width
def test_a_group_is_quantized_as_if_it_were_a_row_of_its_own(name, bits, size):
    weight, upstream = random(4, 3 * size), random(4, 3 * size, seed=5)
    weight[1, size : 2 * size] = 0  # one group of a row that lives
    rows, upstream_rows = weight.reshape(-1, size), upstream.reshape(-1, size)
    for options in ({}, {"gamma_init": "mse"} if name in ("quantgpt", "pact", *LEARN_A_RATIO) else {}):
        groups = make(name, weight, bits, {"per_group": size}, **options)
        alone = make(name, rows, bits, "per_channel", **options)
        assert [p.shape for p in groups.parameters()] == [p.shape for p in alone.parameters()]
        latents = [weight.clone().requires_grad_(), rows.clone().requires_grad_()]
        values = [groups(latents[0]), alone(latents[1])]
        assert torch.equal(bits_of(values[0]).reshape(-1, size), bits_of(values[1]))
        values[0].backward(upstream)
        values[1].backward(upstream_rows)
        assert torch.equal(latents[0].grad.reshape(-1, size), latents[1].grad)
        for ours, theirs in zip(groups.parameters(), alone.parameters(), strict=True):
            assert torch.equal(ours, theirs)
            assert (ours.grad is None and theirs.grad is None) or torch.equal(ours.grad, theirs.grad)
        after = [trained(groups, weight, upstream, lr=1e-3), trained(alone, rows, upstream_rows, lr=1e-3)]
        assert torch.equal(after[0].reshape(-1, size), after[1])
        codes, scale = groups.freeze(after[0])
        codes_alone, scale_alone = alone.freeze(after[1])
        assert torch.equal(codes.reshape(-1, size), codes_alone)
        assert torch.equal(scale.reshape(-1, 1), scale_alone)


@each_width
def test_groups_as_long_as_a_row_are_rows(name, bits):
    weight = random(6, 64)
    found = [make(name, weight, bits, granularity).freeze(weight) for granularity in ({"per_group": 64}, "per_channel")]
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_more_scales_fit_closer(bits):
    """By the scale of least squared error."""
    weight = random(64, 256)
    errors = []
    for granularity in ("per_tensor", "per_channel", {"per_group": 128}, {"per_group": 64}, {"per_group": 32}):
        quantizer = make("quantgpt", weight, bits, granularity, gamma_init="mse")
        errors.append(float((weight - quantizer(weight).detach()).square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]
