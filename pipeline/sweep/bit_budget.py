"""Mixed precision under a budget: a width for every module so that the packed file fits, the most promising first.

What each module costs at each width is measured once, untrained, and kept. The choice is exact under the sum of these,
each times the share of it that training leaves.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, product
from typing import Any

from pipeline.config.run import Config
from pipeline.errors import ConfigError
from pipeline.flow import preflight
from pipeline.flow import run as flow
from pipeline.flow.run import Plan, Planned
from pipeline.models.build import FAMILIES, skeleton
from pipeline.package.size import Layout, layout
from pipeline.quant.spec import TERNARY_ONLY, UNQUANTIZED, BitWidths
from pipeline.stages import sensitivity
from pipeline.store.keys import step_key
from pipeline.store.locations import scratch_dir, storage_uri
from pipeline.store.records import Sensitivity, Teacher, TeacherCache, Tokens
from pipeline.store.step_store import StepDir
from pipeline.sweep.knapsack import Option, Options, allocations
from pipeline.tracking.listener import Observer

MIB = 2**20
WIDTHS = (2, 4, 8)
ROWS = 32
# KL after training as a share of the sum of sensitivities, at uniform widths (configs/quickstart.yaml, quantgpt by row,
# 120 steps: 0.043 of 0.220 nats at 2 bits, 0.0030 of 0.0073 at 4). Only the proportions matter.
REMAINS = {2: 0.2, 4: 0.4, 8: 0.4}


@dataclass(frozen=True)
class Proposal:
    """A width for every module; `packed_bytes` is the weights file to the byte, `kl_nats` what is expected to stay."""

    bits: str
    overrides: dict[str, int]
    packed_bytes: int
    kl_nats: float

    def dotted(self) -> dict[str, Any]:
        """To be laid over the configuration."""
        return {"quant.bits": self.bits, "quant.overrides": self.overrides}


def proposals(
    config: Config, budget_mib: float, count: int, observer: Observer, wait: bool = True
) -> list[dict[str, Any]]:
    """Up to `count` assignments of widths within the budget, each to be laid over the configuration as one trial.

    Makes tokens, teacher and cache where they are not there, and the sensitivities beside them. Modules that
    `quant.overrides` names keep the width it gives them.

    Raises:
        ConfigError: the budget is below the smallest model, or nothing can be chosen; said before any worker starts.
    """
    shape = layout_of(config)
    budget_bytes = math.floor(budget_mib * MIB)
    check_budget(config, shape, budget_mib)
    planned = plan(config)
    found: Sensitivity = flow.run(planned, observer, wait).done[Sensitivity.stage].record
    return [proposal.dotted() for proposal in best(config, shape, found, budget_bytes, count)]


def layout_of(config: Config) -> Layout:
    """Of the student, from its configuration alone."""
    inputs = preflight.inspect(config, scratch_dir(config.resources))
    return layout(skeleton(inputs.config), FAMILIES[inputs.family], config.quant)


def plan(config: Config) -> Plan:
    """The line as far as the cache, and the sensitivities after it."""
    line = flow.plan(config, TeacherCache.stage)
    recipe = {
        "quantizer": config.quant.quantizer,
        "granularity": config.quant.granularity,
        "widths": list(WIDTHS),
        "rows": ROWS,
    }
    inputs = {stage: line.step(stage).place.key for stage in (Tokens.stage, Teacher.stage, TeacherCache.stage)}
    key = step_key(Sensitivity.stage, sensitivity.VERSION, recipe, inputs)
    place = StepDir(storage_uri(config.resources), Sensitivity.stage, key, scratch_dir(config.resources))
    record = place.record(Sensitivity)
    step = Planned(Sensitivity.stage, recipe, inputs, place, record, "done before" if record else "never run before")
    return replace(line, steps=(*line.steps, step))


def check_budget(config: Config, shape: Layout, budget_mib: float) -> None:
    """Raises ConfigError for a budget that no assignment fits, or a quantizer or encoding that leaves no choice."""
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
            "quant.rest_dtype), or take quant.granularity: tensor."
        )


def best(config: Config, shape: Layout, found: Sensitivity, budget_bytes: int, count: int) -> list[Proposal]:
    """The `count` assignments of least expected loss that fit; the best uniform one, to compare with, is among them
    if it fits and `count` is more than one."""
    options = {
        name: {bits: Option(shape.bytes_of(name, bits), _loss(found, name, bits)) for bits in widths}
        for name, widths in _offered(config, shape).items()
    }
    # A header is shortest where all is smallest; what a longer one pushes over the limit is passed over.
    least = {name: min(of) for name, of in options.items()}
    fixed = shape.packed_bytes(least) - sum(shape.bytes_of(name, bits) for name, bits in least.items())
    fitting = (a.widths for a in allocations(options, budget_bytes - fixed) if _fits(shape, a.widths, budget_bytes))
    chosen = list(islice(fitting, count))
    level = [widths for widths in _uniform(shape, options) if _fits(shape, widths, budget_bytes)]
    if level and count > 1 and (best_level := min(level, key=partial(_sum, options))) not in chosen:
        chosen = [*chosen[: count - 1], best_level]
    return [_proposal(config, shape, widths, _sum(options, widths)) for widths in chosen]


def _fits(shape: Layout, widths: dict[str, int], budget_bytes: int) -> bool:
    return shape.packed_bytes(widths) <= budget_bytes


def _sum(options: Options, widths: dict[str, int]) -> float:
    return sum(options[name][bits].loss for name, bits in widths.items())


def _uniform(shape: Layout, options: Options) -> Iterator[dict[str, int]]:
    """One width for linears and one for embeddings, but for modules that have no choice."""
    for linear, embedding in product(WIDTHS, WIDTHS):
        wanted = {"linear": linear, "embedding": embedding}
        yield {n: next(iter(of)) if len(of) == 1 else wanted[shape.roles[n]] for n, of in options.items()}


def _offered(config: Config, shape: Layout) -> dict[str, tuple[int, ...]]:
    """Widths that each module may take: any, or the one that the configuration sets by name."""
    spec = config.quant.spec()
    named = {n: [bits for pattern, bits in spec.overrides if re.fullmatch(pattern, n)] for n in shape.modules}
    return {name: (bits[0],) if bits else WIDTHS for name, bits in named.items()}


def _loss(found: Sensitivity, name: str, bits: int) -> float:
    return 0.0 if bits == UNQUANTIZED else REMAINS[bits] * found.kl_nats[name][bits]


def _proposal(config: Config, shape: Layout, widths: dict[str, int], loss: float) -> Proposal:
    """With the width that most modules have as the base, and the others by exact name."""

    def usual(role: str) -> int:
        counted = Counter(widths[name] for name in shape.modules if shape.roles[name] == role)
        return min(counted, key=lambda bits: (-counted[bits], bits))

    base = BitWidths(usual("linear"), usual("embedding"), BitWidths.parse(config.quant.bits).activations)
    usual_of = {"linear": base.weights, "embedding": base.embedding}
    overrides = {re.escape(name): widths[name] for name in shape.modules if widths[name] != usual_of[shape.roles[name]]}
    return Proposal(str(base), overrides, shape.packed_bytes(widths), loss)
