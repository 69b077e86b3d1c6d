"""Named recipes: `preset` fills sections of a configuration, and what the file itself sets wins."""

from __future__ import annotations

from typing import Any, Literal

PresetName = Literal["paper", "best", "smallest"]

PRESETS: dict[PresetName, dict[str, dict[str, Any]]] = {
    # Tao et al. 2022: one gamma a matrix, started at 1; contrast with 64 negatives of the same sequence
    "paper": {
        "quant": {"quantizer": "quantgpt", "granularity": "tensor", "gamma_init": "one"},
        "distill": {"gamma_lr": 1e-3, "contrast_weight": 0.1, "temperature": 0.1, "negatives": 64, "momentum": 0.5},
    },
    "best": {
        "quant": {"quantizer": "seq", "granularity": "row", "gamma_init": "mse"},
        "distill": {"contrast_weight": 0.0},
    },
    "smallest": {
        "quant": {"quantizer": "quantgpt", "granularity": "row", "gamma_init": "mse"},
        "distill": {"contrast_weight": 0.0},
        "pack": {"encoding": "base3"},
    },
}


def filled(fields: dict[str, Any], preset: PresetName) -> dict[str, Any]:
    """The fields of a configuration with the preset's values where they set none themselves."""
    result = dict(fields)
    for section, values in PRESETS[preset].items():
        given = result.get(section)
        if given is None or isinstance(given, dict):
            result[section] = {**values, **(given or {})}
    return result
