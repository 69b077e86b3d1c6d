import hashlib
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from pipeline.store.keys import canonical_json, differences, recipe_of, step_key

RECIPE = {"bits": "2-2-8", "lr": 5e-4, "text": "é", "layers": [1, 2], "none": None, "on": True}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def test_a_key_in_use_stays_what_it_is():
    # Changing this literal makes every stored step of every user run again.
    assert step_key("distill", 3, RECIPE, {"cache": "ab"}) == "9cfe5bb8b050c55402a205220f8a1616"


def test_a_key_is_the_digest_of_the_sorted_compact_spelling():
    spelled = (
        '{"inputs":{"cache":"ab"},"recipe":{"bits":"2-2-8","layers":[1,2],"lr":0.0005,"none":null,"on":true,'
        '"text":"\\u00e9"},"stage":"distill","version":3}'
    )
    assert step_key("distill", 3, RECIPE, {"cache": "ab"}) == hashlib.sha256(spelled.encode()).hexdigest()[:32]


@pytest.mark.parametrize(
    "changed",
    [
        ("cache", 3, RECIPE, {"cache": "ab"}),
        ("distill", 4, RECIPE, {"cache": "ab"}),
        ("distill", 3, RECIPE | {"lr": 6e-4}, {"cache": "ab"}),
        ("distill", 3, RECIPE | {"layers": [2, 1]}, {"cache": "ab"}),
        ("distill", 3, RECIPE, {"cache": "ac"}),
        ("distill", 3, RECIPE, {"tokens": "ab"}),
    ],
)
def test_everything_that_changes_the_answer_changes_the_key(changed):
    assert step_key(*changed) != step_key("distill", 3, RECIPE, {"cache": "ab"})


@settings(database=None, deadline=None)
@given(VALUES, st.randoms(use_true_random=False))
def test_the_order_of_keys_is_irrelevant_and_nothing_is_lost(value, random):
    def shuffled(item):
        if isinstance(item, dict):
            pairs = [(key, shuffled(inner)) for key, inner in item.items()]
            random.shuffle(pairs)
            return dict(pairs)
        return [shuffled(inner) for inner in item] if isinstance(item, list) else item

    assert canonical_json(shuffled(value)) == canonical_json(value)
    assert json.loads(canonical_json(value)) == value


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        ({1, 2}, "set"),
        (object(), "object"),
        (b"raw", "bytes"),
        ({1: "a"}, "key 1"),
        ({None: "a"}, "key None"),
    ],
)
def test_what_has_no_canonical_form_is_refused_with_its_path(bad, named):
    with pytest.raises(TypeError) as raised:
        canonical_json({"data": [{"source": bad}]})
    assert str(raised.value).startswith("$.data[0].source")
    assert named in str(raised.value)
    with pytest.raises(TypeError, match=r"recipe\.lr"):
        step_key("distill", 1, {"lr": bad}, {})


class Inner(BaseModel):
    width: int = 4
    later: str = "old"


class Section(BaseModel):
    lr: float
    inner: Inner = Inner()
    optional: Inner | None = None
    added: bool = False


def test_every_field_enters_the_key_whether_it_is_set_or_not():
    inner = {"width": 4, "later": "old"}
    assert recipe_of(Section(lr=1, optional=Inner())) == {"lr": 1.0, "inner": inner, "optional": inner, "added": False}
    changed = recipe_of(Section(lr=1, inner=Inner(later="new"), added=True))
    assert changed == {"lr": 1.0, "inner": {"width": 4, "later": "new"}, "optional": None, "added": True}


def test_one_spelling_for_equal_settings():
    assert canonical_json(recipe_of(Section(lr=1))) == canonical_json(recipe_of(Section(lr="1.0", added=False)))


def test_differences_name_each_leaf():
    old = {"quant": {"bits": "2-2-8", "overrides": {"a": 4}}, "distill": {"lr": 1e-3, "steps": 5}}
    new = {"quant": {"bits": "4-4-8", "overrides": {}}, "distill": {"lr": 1e-3, "steps": 5, "seed": 1}}
    assert differences(old, new) == [
        "distill.seed: null -> 1",
        'quant.bits: "2-2-8" -> "4-4-8"',
        "quant.overrides.a: 4 -> null",
    ]
    assert differences(old, json.loads(json.dumps(old))) == []


def test_differences_cut_long_values():
    (line,) = differences({"files": []}, {"files": ["x" * 500]})
    assert line.startswith("files: [] -> ")
    assert line.endswith("...")
    assert len(line) < 100
