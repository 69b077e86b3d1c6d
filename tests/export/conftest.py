"""GPT-2, Llama and BART of width 256, trained for seconds on the tiny corpus, as packages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ran

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
    "bart": {
        "architecture": "bart",
        "d_model": 256,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 256,
        "decoder_ffn_dim": 256,
        "max_position_embeddings": 80,
    },
}
SOURCES["llama in groups"] = SOURCES["llama"]
QUANT: dict[str, dict[str, Any]] = {
    "gpt2": {"bits": "2-2-8"},
    "llama": {"bits": "2-2-8", "quantizer": "seq", "granularity": "per_channel"},
    "llama in groups": {"bits": "2-2-8", "quantizer": "seq", "granularity": {"per_group": 32}},
    "bart": {"bits": "2-2-8", "granularity": "per_channel"},
}
# 512 is the default, which says that it is not set: this task has its own lengths
SUMMARIES = {"name": "summarization", "block_length": 512, "source_length": 40, "target_length": 24}


@pytest.fixture(scope="session")
def trained(trained_run: Callable[[str], Ran]) -> Callable[[str], Path]:
    """`trained(name)`: the package of a run of SOURCES, made once."""
    return lambda name: trained_run(name).package


@pytest.fixture(scope="session")
def trained_run(
    corpus: Path,
    tiny_config: Callable[..., Any],
    run_flow: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Ran]:
    """`trained_run(name)`: a run of SOURCES as far as its package, made once."""
    made: dict[str, Ran] = {}

    def run(name: str) -> Ran:
        if name not in made:
            folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
            more = sums_up(corpus, folder) if name == "bart" else {}
            config = tiny_config(
                folder,
                model={"source": SOURCES[name], "tokenizer": {"train_bpe": 300}},
                finetune={"steps": 40, "lr": 2e-3, "eval_every": 40},
                cache={"mode": "online"},
                quant=QUANT[name],
                distill={"steps": 20, "lr": 1e-3, "eval_every": 20, "contrast_weight": 0},
                **more,
            )
            made[name] = run_flow(config, until="pack")
        return made[name]

    return run


def sums_up(corpus: Path, folder: Path) -> dict[str, Any]:
    """Sections of a run that learns to give a line's first words."""
    lines = [line for line in corpus.read_text().splitlines() if line.strip()]
    rows = [{"text": line, "summary": " ".join(line.split()[:4])} for line in lines]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return {
        "data": {"source": str(folder / "rows.jsonl"), "holdout": 0.1},
        "task": SUMMARIES,
        "evaluate": {"beams": 1, "generated_rows": 2},
    }
