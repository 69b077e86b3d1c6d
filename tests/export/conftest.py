"""A GPT-2 and a Llama of width 256, trained for seconds on the tiny corpus, as packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SOURCES: dict[str, dict[str, Any]] = {
    "gpt2": {"architecture": "gpt2", "n_layer": 2, "n_embd": 256, "n_head": 4, "n_positions": 80},
    "llama": {
        "architecture": "llama",
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 80,
    },
}
QUANT: dict[str, dict[str, Any]] = {
    "gpt2": {"bits": "2-2-8"},
    "llama": {"bits": "2-2-8", "quantizer": "seq", "granularity": "row"},
}


@pytest.fixture(scope="session")
def trained(
    tiny_config: Callable[..., Any], run_flow: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`trained(family)`: the package of a run, made once."""
    made: dict[str, Path] = {}

    def package(family: str) -> Path:
        if family not in made:
            config = tiny_config(
                tmp_path_factory.mktemp(family),
                model={"source": SOURCES[family], "tokenizer": {"train_bpe": 300}},
                finetune={"steps": 40, "lr": 2e-3, "eval_every": 40},
                cache={"mode": "online"},
                quant=QUANT[family],
                distill={"steps": 20, "lr": 1e-3, "eval_every": 20, "contrast_weight": 0},
            )
            made[family] = run_flow(config, until="pack").package
        return made[family]

    return package
