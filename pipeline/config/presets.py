"""Named recipes: `preset` fills sections of a configuration, and what the file itself sets wins."""

from __future__ import annotations

from typing import Any, Literal

from pipeline.quant.spec import TAKES

PresetName = Literal["paper", "best", "smallest"]

RATIO_LR = 2e-2  # of scales that are learned as a ratio to where they start
# Above 2 bits levels are fine enough for smaller moves: what the rate search of the bench is around there, and the
# paper's rate of the scales.
WIDE_MUON_LR, WIDE_RATIO_LR = 0.004, 1e-3
LANGUAGE_MODELING = "language_modeling"
FEW_NEGATIVES = 32  # the paper's, of its other tasks

_BY_MUON = {
    "optimizer": "muon",
    "muon_lr": 0.03,
    "muon_momentum": 0.6,
    "lr": 2e-3,
    "embedding_lr_scale": 0.25,
    "vector_lr_scale": 4.0,
    "schedule": "cosine",
    "contrast_weight": 0.0,
}
PRESETS: dict[PresetName, dict[str, dict[str, Any]]] = {
    # Tao et al. 2022: one gamma a matrix, started at 1; contrast with 64 negatives of the same sequence
    "paper": {
        "quant": {"quantizer": "quantgpt", "granularity": "per_tensor", "gamma_init": "one"},
        "distill": {"gamma_lr": 1e-3, "contrast_weight": 0.1, "temperature": 0.1, "negatives": 64, "momentum": 0.5},
    },
    # Four levels at 2 bits around zero, a learned scale a row, faded in; matrices moved by Muon in proportion to their
    # size, little momentum
    "best": {
        "quant": {"quantizer": "seq", "granularity": "per_channel", "gamma_init": "mse"},
        "distill": {**_BY_MUON, "vector_lr_scale": 8.0, "gamma_lr": RATIO_LR, "fade_in": 0.3, "betas": (0.8, 0.98)},
    },
    # The same with three levels, which want more momentum: 1.6 bits a weight.
    # Shorter scales, norms, biases and positions change perplexity by less than 0.02 %, measured on three students
    "smallest": {
        "quant": {
            "quantizer": "lsq_symmetric",
            "granularity": "per_channel",
            "gamma_init": "mse",
            "ste": "wide",
            "scale_dtype": "float16",
            "rest_dtype": "float16",
            "positions": "int8",
        },
        "distill": {**_BY_MUON, "muon_momentum": 0.9, "gamma_lr": RATIO_LR, "fade_in": 0.2, "betas": (0.9, 0.98)},
        "pack": {"encoding": "base3"},
    },
}


def suited(sections: dict[str, dict[str, Any]], bits: str, task: str) -> dict[str, dict[str, Any]]:
    """Return a recipe for layers of 2 bits and language modelling, made to suit others: layers of more bits want other
    rates of Muon and of scales, and other tasks have fewer negatives."""
    other = {} if bits.startswith("2-") else {"muon_lr": WIDE_MUON_LR, "gamma_lr": WIDE_RATIO_LR}
    other |= {} if task == LANGUAGE_MODELING else {"negatives": FEW_NEGATIVES}
    return {section: {k: other.get(k, value) for k, value in values.items()} for section, values in sections.items()}


def filled(fields: dict[str, Any], preset: PresetName) -> dict[str, Any]:
    """Return the fields of a configuration with the preset's values where they set none themselves."""
    result = dict(fields)
    bits, task = _value(fields, "quant", "bits", "2-2-8"), _value(fields, "task", "name", LANGUAGE_MODELING)
    for section, values in suited(PRESETS[preset], bits, task).items():
        given = result.get(section)
        if given is None or isinstance(given, dict):
            result[section] = {**_without_effect_dropped(values, given or {}), **(given or {})}
    return result


def set_otherwise(fields: dict[str, Any], preset: PresetName) -> dict[str, tuple[Any, Any]]:
    """Return by path the value that a filled configuration has where the preset has another, and the preset's."""
    values = suited(PRESETS[preset], fields["quant"]["bits"], fields["task"]["name"])
    return {
        f"{section}.{knob}": (fields[section][knob], value)
        for section, knobs in values.items()
        for knob, value in _without_effect_dropped(knobs, fields[section]).items()
        if fields[section][knob] != value
    }


def _value(fields: dict[str, Any], section: str, knob: str, default: str) -> str:
    given = fields.get(section)
    return str(given.get(knob, default)) if isinstance(given, dict) else default


def _without_effect_dropped(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return a preset's values for a section without those that its own optimizer, quantizer or start does not
    take."""
    other_optimizer = given.get("optimizer", "muon") != "muon"
    quantizer = given.get("quantizer", values.get("quantizer"))
    misfits = {knob for knob, takers in TAKES.items() if quantizer not in takers}
    misfits |= {knob for knob in values if knob.startswith("muon_") and other_optimizer}
    misfits |= {"fade_in"} if given.get("start") is not None else set()
    return {knob: value for knob, value in values.items() if knob not in misfits}
