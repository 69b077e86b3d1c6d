"""Sizes from shapes alone equal the files that are written, to the byte."""

from __future__ import annotations

import itertools
import re

import pytest

from pipeline.config.quant import Quant
from pipeline.models.build import FAMILIES, build, freeze_student, make_student, read_config, skeleton
from pipeline.package import package as artifact
from pipeline.package.size import layout
from tests.conftest import ARCHITECTURES

NOTHING = {"teacher": {}, "student": {}, "protocol": ""}
MODELS = {
    "gpt2": {**ARCHITECTURES["gpt2"], "n_embd": 18},  # rows that do not fill their last byte
    "llama": ARCHITECTURES["llama"],
    "llama, tied": {**ARCHITECTURES["llama"], "tie_word_embeddings": True},
    "bart": ARCHITECTURES["bart"],
}
SETTINGS = [
    {"granularity": "tensor"},
    {"granularity": "row", "scale_dtype": "float16"},
    {"granularity": "row", "scale_dtype": "bfloat16", "rest_dtype": "float16"},
    {"granularity": "tensor", "rest_dtype": "bfloat16"},
    {"granularity": "row", "rest_dtype": "float16", "positions": "fp32"},
    {"granularity": "row", "scale_dtype": "float16", "rest_dtype": "float16", "positions": "int8"},
]


def written_bytes(config, family, quant, folder):
    folder.mkdir()
    model = build(config, seed=0)
    make_student(model, quant.spec(), FAMILIES[family])
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.fill_(0.5)  # all zero, it would be left out
    frozen = freeze_student(model, quant, FAMILIES[family])
    facts = {"name": "x", "teacher_bytes": 1, "lineage": {}, "metrics": NOTHING}
    return artifact.write(folder, frozen, config, quant, "dense", family, facts)["size"]["packed_bytes"]


@pytest.mark.parametrize("quant", SETTINGS, ids=str)
@pytest.mark.parametrize("source", MODELS.values(), ids=MODELS)
def test_the_file_is_as_long_as_predicted_at_any_widths(source, quant, tmp_path):
    config, family = read_config(source, vocab_size=301), source["architecture"]
    found = layout(skeleton(config), FAMILIES[family], Quant(**quant))
    draws = {name: itertools.cycle(widths) for name, widths in {"same": [4], "mixed": [2, 8, 4, 32, 2, 4]}.items()}
    for label, draw in draws.items():
        widths = {name: next(draw) for name in found.modules}
        overrides = {re.escape(name): bits for name, bits in widths.items()}
        written = written_bytes(config, family, Quant(**quant, gamma_init="one", overrides=overrides), tmp_path / label)
        assert found.packed_bytes(widths) == written
