"""Sizes from shapes alone equal the files that are written, to the byte."""

from __future__ import annotations

import itertools
import re

import pytest

from pipeline.config.quant import Quant
from pipeline.models.build import build, read_config, skeleton
from pipeline.models.family import family_named
from pipeline.models.student import freeze_student, make_student
from pipeline.package.package import write_package
from pipeline.package.size import layout
from tests.conftest import ARCHITECTURES
from tests.packages import NO_METRICS, WIDE

MODELS = {
    "gpt2": {**ARCHITECTURES["gpt2"], "n_embd": 18},  # rows that do not fill their last byte
    "llama": ARCHITECTURES["llama"],
    "llama, tied": {**ARCHITECTURES["llama"], "tie_word_embeddings": True},
    "bart": ARCHITECTURES["bart"],
}
SETTINGS = [
    {"granularity": "per_tensor"},
    {"granularity": "per_channel", "scale_dtype": "float16"},
    {"granularity": "per_channel", "scale_dtype": "bfloat16", "rest_dtype": "float16"},
    {"granularity": "per_tensor", "rest_dtype": "bfloat16"},
    {"granularity": "per_channel", "rest_dtype": "float16", "positions": "fp32"},
    {"granularity": "per_channel", "scale_dtype": "float16", "rest_dtype": "float16", "positions": "int8"},
]


def written_bytes(config, family, quant, folder, encoding="dense"):
    folder.mkdir()
    model = build(config, seed=0)
    make_student(model, quant.spec(), family_named(family))
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.fill_(0.5)  # all zero, it would be left out
    frozen = freeze_student(model, quant, family_named(family))
    facts = {"name": "x", "teacher_bytes": 1, "lineage": {}, "metrics": NO_METRICS}
    size = write_package(folder, frozen, config, quant, encoding, family, facts)["size"]
    return size["packed_bytes"], size["paper_bytes"]


CASES = {
    **{f"{name}, {quant}": (source, quant) for name, source in MODELS.items() for quant in SETTINGS},
    **{
        f"{name}, groups of {size}": (source, {"granularity": {"per_group": size}, "scale_dtype": dtype})
        for name, source in WIDE.items()
        for size, dtype in ((32, "float16"), (64, "float32"), (128, "bfloat16"))
    },
}


@pytest.mark.parametrize(("source", "quant"), CASES.values(), ids=CASES)
def test_the_file_is_as_long_as_predicted_at_any_widths(source, quant, tmp_path):
    source, family = {**source, "vocab_size": 301}, source["architecture"]
    config = read_config(source)
    found = layout(skeleton(config), family_named(family), Quant(**quant))
    draws = {name: itertools.cycle(widths) for name, widths in {"same": [4], "mixed": [2, 8, 4, 32, 2, 4]}.items()}
    for label, draw in draws.items():
        widths = {name: next(draw) for name in found.modules}
        overrides = {re.escape(name): bits for name, bits in widths.items()}
        written = written_bytes(config, family, Quant(**quant, gamma_init="one", overrides=overrides), tmp_path / label)
        assert (found.packed_bytes(widths), found.paper_bytes(widths)) == written


@pytest.mark.parametrize("name", MODELS)
def test_so_it_is_where_the_ternary_are_five_a_byte(name, tmp_path):
    source, family = {**MODELS[name], "vocab_size": 301}, MODELS[name]["architecture"]
    config, draw = read_config(source), itertools.cycle([2, 2, 8, 32])
    found = layout(skeleton(config), family_named(family), Quant(), "base3")
    widths = {name: next(draw) for name in found.modules}
    overrides = {re.escape(name): bits for name, bits in widths.items()}
    quant = Quant(gamma_init="one", overrides=overrides)
    written = written_bytes(config, family, quant, tmp_path / "base3", "base3")
    assert (found.packed_bytes(widths), found.paper_bytes(widths)) == written
