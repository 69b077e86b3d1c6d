"""The first override that matches wins, so their order is part of what determines a result."""

from __future__ import annotations

import pytest

from pipeline.config.quant import Quant
from pipeline.config.run import Config
from pipeline.store.keys import canonical_json, recipe_of

ONE, TWO = (".*c_fc", 8), ("transformer.*", 4)


def test_two_orders_are_two_recipes_and_one_override_keeps_its_spelling():
    first, second = (Quant(bits="2-2-8", overrides=dict(pairs)) for pairs in ((ONE, TWO), (TWO, ONE)))
    assert first.spec().weight_bits("transformer.h.0.mlp.c_fc", "linear") == 8
    assert second.spec().weight_bits("transformer.h.0.mlp.c_fc", "linear") == 4
    assert canonical_json(recipe_of(first)) != canonical_json(recipe_of(second))
    assert recipe_of(Quant(overrides={"a": 8}))["overrides"] == {"a": 8}
    assert recipe_of(Quant())["overrides"] == {}


@pytest.mark.parametrize("pairs", [(), (ONE,), (ONE, TWO), (TWO, ONE)])
def test_what_is_written_is_read_back_in_order(pairs):
    quant = Quant(bits="2-2-8", overrides=dict(pairs))
    again = Quant.model_validate_json(quant.model_dump_json())
    assert list(again.overrides.items()) == list(pairs)
    assert again.spec() == quant.spec()


NOTHING = {"name": "n", "model": {"source": "a/b"}, "data": {"source": "*.txt"}, "distill": {"steps": 3}}


@pytest.mark.parametrize(
    ("sections", "needle"),
    [
        ({"quant": {"quantizer": "laq"}, "distill": {"steps": 3, "optimizer": "muon"}}, "laq_uniform"),
        (
            {"quant": {"quantizer": "laq_uniform", "gamma_init": "one"}},
            "gamma_init is one, which the quantizer laq_uni",
        ),
        ({"quant": {"bits": "2-2-32", "attention": "qkv"}}, "attention is qkv and has no effect"),
        ({"quant": {"bits": "2-2-32", "activation_range": "tensor"}}, "activation_range is tensor and has no effect"),
        ({"distill": {"steps": 3, "negatives_from": "batch", "batch_size": 1}}, "no other sequence"),
        ({"evaluate": {"beams": 3}}, "evaluate.beams is 3 and has no effect"),
        ({"data": {"source": "*.txt", "candidates_column": "c"}}, "data.candidates_column is 'c'"),
        ({"cache": {"mode": "states", "draws": 12}}, "draws is 12 and has no effect, because mode is states"),
        ({"cache": {"mode": "online", "draws": 12}}, "draws is 12 and has no effect, because mode is online"),
        ({"cache": {"mode": "auto", "draws": 12}}, "draws is 12 and has no effect, because mode is auto"),
        ({"cache": {"mode": "logits", "dtype": "int8"}}, "dtype is int8 and has no effect, because mode is logits"),
    ],
    ids=str,
)
def test_what_would_do_nothing_is_refused(sections, needle):
    with pytest.raises(ValueError, match=needle):
        Config.model_validate({**NOTHING, **sections})


@pytest.mark.parametrize(
    ("sections", "needle"),
    [
        ({}, r"cache\.mode is logits.*distill\.contrast_weight is 0\.1.*set it to 0; or set cache\.mode: states"),
        (
            {"task": {"name": "next_utterance"}, "distill": {"steps": 3, "contrast_weight": 0}},
            r"cache\.mode is logits.*task\.name is next_utterance.*cache\.mode: states, or online",
        ),
    ],
    ids=["contrast", "candidates"],
)
def test_what_draws_do_not_tell_is_refused(sections, needle):
    with pytest.raises(ValueError, match=needle):
        Config.model_validate({**NOTHING, "cache": {"mode": "logits"}, **sections})
    for mode in ("states", "online", "auto"):
        Config.model_validate({**NOTHING, "cache": {"mode": mode}, **sections})
    fields = {**NOTHING, "cache": {"mode": "logits", "draws": 12}, "distill": {"steps": 3, "contrast_weight": 0}}
    assert Config.model_validate(fields).cache.draws == 12
