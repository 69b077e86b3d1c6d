"""The numbers of CAPACITY.md, computed by what `--plan` computes with."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from pipeline.config.resources import Prices
from pipeline.flow.capacity import GIB, H200, HOUR_S, Model, Rates, caching
from pipeline.flow.requests import DOCUMENT, fetched, stored
from pipeline.stages.kept import Kept, KeptDraws, KeptStates
from pipeline.store.shards import SHARD_TOKENS
from tests.infra.chart import INFRA

PAGE = (INFRA / "CAPACITY.md").read_text()
RATES, PASS = Rates.of(H200), H200.pass_tokens
DEAR = Prices(worker_hour=100, gib_month=1)  # a GPU's hour costs as much as 100 GiB for a month


@dataclass(frozen=True)
class Case:
    """A model and its text."""

    model: Model
    hidden: int
    row: int  # tokens
    tokens: float
    epochs: int
    contrast: bool

    def distill_h(self, pass_tokens: float = PASS) -> float:
        return RATES.distill_s(self.model, self.tokens * self.epochs, self.contrast, pass_tokens) / HOUR_S

    @property
    def online_h(self) -> float:
        return RATES.teach_s(self.model, self.tokens * self.epochs, PASS) / HOUR_S

    def line(self, name: str, kept: Kept) -> str:
        """A row of a table: bytes, hours, requests, and from how many reads on it pays."""
        token_bytes = kept.row_bytes(self.row, self.hidden) / self.row
        shards = self.tokens / SHARD_TOKENS
        fill = RATES.cache_s(self.model, self.tokens, token_bytes) / HOUR_S
        writes = shards * (stored(SHARD_TOKENS * token_bytes) + DOCUMENT).writes
        reads = shards * fetched(SHARD_TOKENS * token_bytes).reads
        pays = [caching(self.model, RATES, prices, token_bytes, 1, PASS).pays_from for prices in (Prices(), DEAR)]
        size = f"{token_bytes * self.tokens / GIB:,.0f}"
        hours = f"{fill:,.2f}" if fill < 10 else f"{fill:,.0f}"
        first, second = (f"{reads:.1f}" for reads in pays if reads is not None)
        return f"| {name} | {token_bytes:,.0f} | {size} | {hours} | {writes:,.0f} | {reads:,.0f} | {first} | {second} |"


GPT2 = Case(Model(124_439_808, 12), 768, 512, 118e6, 8, True)
LLAMA = Case(Model(6_738_415_616, 32), 4096, 2048, 10e9, 1, False)
LINES = [
    GPT2.line("`states`, float16", KeptStates("float16")),
    GPT2.line("`states`, int8", KeptStates("int8")),
    LLAMA.line("`states`, float16", KeptStates("float16")),
    LLAMA.line("`states`, int8", KeptStates("int8")),
    f"fine-tuning for an epoch takes {RATES.finetune_s(GPT2.model, GPT2.tokens, PASS) / HOUR_S:.2f} GPU-hours",
    f"eight epochs of preset `paper` {GPT2.distill_h():.2f}",
    f"the teacher in each step {GPT2.online_h:.2f} more",
    f"in four passes, or by four workers of 8 rows, {GPT2.distill_h(PASS / 4):.2f}",
    f"one pass of preset `best` takes {LLAMA.distill_h():,.0f} GPU-hours",
    f"the teacher in each step {LLAMA.online_h:,.0f} more",
    f"{KeptDraws('uint16', 50).row_bytes(LLAMA.row, LLAMA.hidden) / LLAMA.row * LLAMA.tokens / GIB:,.0f} GiB",
    f"{20 * LLAMA.model.parameters / GIB:,.0f} GiB",
    f"{64 * LLAMA.tokens / LLAMA.distill_h() / HOUR_S * 2 * LLAMA.hidden / 1e9:.1f} GB/s",
    f"{GPT2.tokens * 8 / GPT2.distill_h() / HOUR_S * 2 * GPT2.hidden / 1e9:.2f} GB/s",
]


@pytest.mark.parametrize("line", LINES)
def test_the_page_says_what_is_computed(line: str) -> None:
    assert line in " ".join(PAGE.split("\n")) if not line.startswith("|") else line in PAGE.splitlines()
