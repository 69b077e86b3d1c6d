"""Mixed precision under a budget: a width for every module so that the packed file fits, the most promising first.

What each module costs at each width is measured once, untrained, and kept. The choice is exact under the sum of these,
each times the share of it that training leaves.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from typing import Any

from pipeline.config.run import Config
from pipeline.errors import ConfigError
from pipeline.flow import preflight
from pipeline.flow.plan import RunPlan, plan_beside
from pipeline.flow.run import run_plan
from pipeline.models.build import skeleton
from pipeline.package.size import Layout, layout
from pipeline.quant.spec import TERNARY_ONLY, UNQUANTIZED, BitWidths
from pipeline.stages import sensitivity
from pipeline.stages.sensitivity import WIDTHS
from pipeline.store.records import Sensitivity
from pipeline.sweep.knapsack import Option, Options, allocations
from pipeline.tracking.listener import Listener

MIB = 2**20
# KL after training as a share of the sum of sensitivities, at uniform widths (configs/quickstart.yaml, quantgpt,
# per_channel, 120 steps: 0.043 of 0.220 nats at 2 bits, 0.0030 of 0.0073 at 4). Only the proportions matter. Square
# roots of the sensitivities (tried) damp what tells modules apart, and leave the word embedding at 2 bits.
REMAINS = {2: 0.2, 4: 0.4, 8: 0.4}


@dataclass(frozen=True)
class Proposal:
    """A width for every module; `packed_bytes` is the weights file to the byte, `kl_nats` what is expected to stay."""

    bits: str
    overrides: dict[str, int]
    packed_bytes: int
    kl_nats: float

    def dotted(self) -> dict[str, Any]:
        """Return the widths as values to be laid over the configuration."""
        return {"quant.bits": self.bits, "quant.overrides": self.overrides}


def proposals(
    config: Config, budget_mib: float, count: int, listener: Listener, wait: bool = True
) -> list[dict[str, Any]]:
    """Return up to `count` assignments of widths within the budget, each to be laid over the configuration as a trial.

    Makes tokens, teacher and cache where they are not there, and the sensitivities beside them. Modules that
    `quant.overrides` names keep the width it gives them.

    Raises:
        ConfigError: the budget is below the smallest model, or nothing can be chosen; said before any worker starts.
    """
    shape = layout_of(config)
    check_budget(config, shape, budget_mib)
    measured = run_plan(plan_sensitivities(config), listener, wait).finished(Sensitivity).record
    return [proposal.dotted() for proposal in best(config, shape, measured, math.floor(budget_mib * MIB), count)]


def layout_of(config: Config) -> Layout:
    """Return the layout of the student's file, from its configuration alone."""
    run = preflight.pin(config)
    preflight.inspect(run)
    return layout(skeleton(preflight.model_config(run)), run.family, config.quant)


def plan_sensitivities(config: Config) -> RunPlan:
    """Return the line as far as the cache, and the sensitivities after it."""
    return plan_beside(sensitivity.STAGE, config)


def check_budget(config: Config, shape: Layout, budget_mib: float) -> None:
    """Raise ConfigError for a budget that no assignment fits, or a quantizer or encoding that leaves no choice."""
    if config.quant.quantizer in TERNARY_ONLY:
        raise ConfigError(
            f"sweep.budget_mib chooses among 2, 4 and 8 bits, and quant.quantizer {config.quant.quantizer} has ternary "
            "weights only. Use another quantizer, such as quantgpt, lsq or seq."
        )
    if config.pack.encoding != "dense":
        raise ConfigError(
            f"sweep.budget_mib chooses among 2, 4 and 8 bits, and pack.encoding {config.pack.encoding} holds ternary "
            "codes only. Use pack.encoding: dense."
        )
    least = shape.packed_bytes({name: min(widths) for name, widths in _offered(config, shape).items()})
    if least > math.floor(budget_mib * MIB):
        raise ConfigError(
            f"sweep.budget_mib is {budget_mib:g} ({math.floor(budget_mib * MIB):,} bytes), and the smallest possible "
            f"model is {least:,} bytes, every module at its least width. Set sweep.budget_mib to "
            f"{math.ceil(least / MIB * 1e4) / 1e4:g} or more, ship scales and rest as float16 (quant.scale_dtype, "
            "quant.rest_dtype), or take quant.granularity: per_tensor."
        )


def best(config: Config, shape: Layout, measured: Sensitivity, budget_bytes: int, count: int) -> list[Proposal]:
    """Return the `count` assignments of least expected loss that fit; the best uniform one, to compare with, is among
    them if it fits and `count` is more than one."""

    def loss(name: str, bits: int) -> float:
        return 0.0 if bits == UNQUANTIZED else REMAINS[bits] * measured.kl_nats[name][bits]

    options = {
        name: {bits: Option(shape.bytes_of(name, bits), loss(name, bits)) for bits in widths}
        for name, widths in _offered(config, shape).items()
    }
    # A header is shortest where all is smallest; what a longer one pushes over the limit is passed over.
    least = {name: min(of) for name, of in options.items()}
    fixed = shape.packed_bytes(least) - sum(shape.bytes_of(name, bits) for name, bits in least.items())

    def fits(widths: dict[str, int]) -> bool:
        return shape.packed_bytes(widths) <= budget_bytes

    chosen = list(islice(filter(fits, allocations(options, budget_bytes - fixed)), count))
    level = list(filter(fits, _uniform(shape, options)))
    if level and count > 1 and (best_level := min(level, key=partial(_sum, options))) not in chosen:
        chosen = [*chosen[: count - 1], best_level]
    return [_proposal(config, shape, widths, _sum(options, widths)) for widths in chosen]


def _sum(options: Options, widths: dict[str, int]) -> float:
    return sum(options[name][bits].loss for name, bits in widths.items())


def _uniform(shape: Layout, options: Options) -> Iterator[dict[str, int]]:
    """Yield assignments of one width for linears and one for embeddings, but for modules that have no choice."""
    for linear, embedding in product(WIDTHS, WIDTHS):
        wanted = {"linear": linear, "embedding": embedding}
        yield {n: next(iter(of)) if len(of) == 1 else wanted[shape.roles[n]] for n, of in options.items()}


def _offered(config: Config, shape: Layout) -> dict[str, tuple[int, ...]]:
    """Return the widths that each module may take: any, or the one that the configuration sets by name."""
    spec = config.quant.spec()
    named = {n: [bits for pattern, bits in spec.overrides if re.fullmatch(pattern, n)] for n in shape.modules}
    return {name: (bits[0],) if bits else WIDTHS for name, bits in named.items()}


def _proposal(config: Config, shape: Layout, widths: dict[str, int], loss: float) -> Proposal:
    """Return widths as a proposal: the width that most modules have as the base, and the others by exact name."""

    def usual(role: str) -> int:
        counted = Counter(widths[name] for name in shape.modules if shape.roles[name] == role)
        return min(counted, key=lambda bits: (-counted[bits], bits))

    base = BitWidths(usual("linear"), usual("embedding"), BitWidths.parse(config.quant.bits).activations)
    usual_of = {"linear": base.weights, "embedding": base.embedding}
    overrides = {re.escape(name): widths[name] for name in shape.modules if widths[name] != usual_of[shape.roles[name]]}
    return Proposal(str(base), overrides, shape.packed_bytes(widths), loss)
