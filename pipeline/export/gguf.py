"""A decoder alone as one GGUF file for llama.cpp: codes in blocks, the tokenizer, the rest in floating point. Names of
tensors are those that the `gguf` package has for an architecture; what llama.cpp would compute otherwise is refused."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from pipeline.errors import ConfigError, UnfitExportError
from pipeline.export.companions import valid_for
from pipeline.export.ggml_blocks import NoBlockError, pack_blocks
from pipeline.export.probes import PROMPTS
from pipeline.export.vocabulary import write_vocabulary
from pipeline.models.blocks import Blocks, Numbers, angles_change_at, numbers_of, rope_types
from pipeline.models.build import skeleton
from pipeline.models.family import Gguf, family_with, names_with
from pipeline.package.package import read_package
from pipeline.quant.frozen import FrozenTensors
from pipeline.quant.spec import grid

FILE = "model.gguf"
MOST_PROBABILITIES = 2**23  # that the server tells of a file, 6 µs each: about a minute
ANGLE_DIVISORS = "rope_freqs.weight"  # one for each pair of a head
DIVIDED = "llama3"  # the kind of rotary angles that are plain ones, each divided by a number of its own
CONTEXTS = 256  # tokens, of which llama.cpp's contexts are multiples
LENGTHS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}  # of longrope
YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # what llama.cpp computes yarn's angles with
COMPUTED = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # buffers that older transformers stored


def check(config: PreTrainedConfig) -> None:
    """Raise ConfigError for a model whose architecture llama.cpp does not have, or would compute otherwise."""
    reason = _computed_otherwise(config, *_described(config))
    if reason:
        raise ConfigError(
            f"--format gguf: llama.cpp computes {reason}. Valid for it: {valid_for(config, refused='gguf')}."
        )


def check_read(config: PreTrainedConfig, path: Path) -> None:
    """Raise ConfigError for a configuration that transformers made of a GGUF file and that is not what llama.cpp
    computes of it. Of a family without an architecture there nothing is known."""
    family = family_with("gguf", config.model_type)
    if family is None or family.gguf is None or family.blocks is None:
        return
    reason = _computed_otherwise(config, family.gguf, family.blocks)
    if reason:
        raise ConfigError(
            f"model.source: of {path} llama.cpp computes {reason}: transformers reads it as another model. Name the "
            "checkpoint that the file was made from, as a folder or org/name@commit."
        )


def _described(config: PreTrainedConfig) -> tuple[Gguf, Blocks]:
    family = family_with("gguf", config.model_type)
    if family is None or family.gguf is None or family.blocks is None:
        raise ConfigError(
            f"--format gguf takes {', '.join(names_with('gguf'))} models, not {config.model_type}: llama.cpp has no "
            "such architecture, computes it otherwise, or serves none with an encoder. Valid for it: "
            f"{valid_for(config)}."
        )
    return family.gguf, family.blocks


def _computed_otherwise(config: PreTrainedConfig, of: Gguf, blocks: Blocks) -> str:
    """Return what llama.cpp would compute that the configuration says otherwise; nothing where both agree."""
    numbers = numbers_of(config, blocks)
    for name, value in of.requires.items():
        if getattr(config, name) != value:
            return f"with {name} {value!r}, not {getattr(config, name)!r}"
    layers, longest = range(1, numbers.layers + 1), config.max_position_embeddings
    scale = (config.hidden_size / numbers.heads if numbers.layers == of.largest else numbers.head_size) ** -0.5
    windowed = [bool(of.window_every) and layer % of.window_every != 0 for layer in layers]
    turned = [not of.unturned_every or layer % of.unturned_every != 0 for layer in layers]
    if numbers.activation not in of.activations:
        return f"{of.activations[0]}, not the activation {numbers.activation!r}"
    if turned_otherwise := _turned_otherwise(config, of):
        return turned_otherwise
    if [0 < window < longest for window in numbers.windows] != [w and _window(numbers) < longest for w in windowed]:
        every = f"a window in all but every {of.window_every}th layer" if of.window_every else "no window"
        return f"{every}, not sliding_window {_window(numbers)} in the layers that config.json says"
    if numbers.rotary.count(None) < numbers.layers and [kind is not None for kind in numbers.rotary] != turned:
        return f"no positions in every {of.unturned_every}th layer, not in those of no_rope_layers"
    if not of.scaled and abs(numbers.attention_scale / scale - 1) > 1e-6:
        return f"scores times {scale:.6g}, not {numbers.attention_scale:.6g}"
    if (bool(numbers.attention_cap), bool(numbers.logit_cap)) != (of.capped, of.capped):
        return f"{'capped' if of.capped else 'no caps of'} scores and logits, unlike config.json"
    return ""


def _turned_otherwise(config: PreTrainedConfig, of: Gguf) -> str:
    """Return which rotary angles llama.cpp would compute otherwise; nothing where both agree."""
    valid = ("default", "dynamic", *of.scales_angles, *([DIVIDED] if of.divides_angles else []))  # see `_divisors`
    if kinds := rope_types(config).difference(valid):
        return f"rotary angles of rope_type {', '.join(valid)}, not {min(kinds)!r}"
    for name, value in YARN.items() if "yarn" in rope_types(config) else ():
        if _angles(config).get(name) not in (None, value):
            return f"yarn with {name} {value}, whatever a file says, not {_angles(config)[name]}"
    if (change := angles_change_at(config)) is not None and change % CONTEXTS:
        return f"longrope in contexts of a multiple of {CONTEXTS} tokens, of which {change} is none"
    in_window = config.rope_parameters.get("sliding_attention", {}) if of.angles_in_window else {}
    if of.angles_in_window and float(in_window.get("rope_theta", 0)) != of.angles_in_window:
        return f"layers with a window with a rope_theta of {of.angles_in_window:g}, not {in_window.get('rope_theta')}"
    if (kind := in_window.get("rope_type", "default")) != "default":
        return f"layers with a window with plain rotary angles, not of rope_type {kind!r}"
    return ""


def _window(numbers: Numbers) -> int:
    return max(numbers.windows)


def write(package: Path, out: Path, widened: bool = False) -> list[str]:
    """Write `out`/model.gguf; return notes of what is not as in the package. With `widened` every tensor is in fp32,
    with the values that it would have else. Raises as `check` and `write_vocabulary` do."""
    frozen, config, _ = read_package(package)
    check(config)
    writer = (_Widening if widened else GGUFWriter)(out / FILE, _described(config)[0].architecture)
    writer.add_name(package.resolve().name)
    for setting, value in _settings(config).items():
        getattr(writer, f"add_{setting}")(value)
    write_vocabulary(writer, package, config.vocab_size)
    if DIVIDED in rope_types(config):
        writer.add_tensor(ANGLE_DIVISORS, _divisors(config))
    for factors, name in LENGTHS.items() if angles_change_at(config) else ():
        writer.add_tensor(name, np.asarray(_angles(config)[factors], np.float32))
    rest = [name for name in frozen.rest if not name.endswith(COMPUTED)]
    notes = [note for module in (*frozen.codes, *rest) for note in _add(writer, frozen, module, config)]
    if (longest := _longest(config)) < config.max_position_embeddings:
        notes.append(
            f"texts of up to {longest} tokens, of the model's {config.max_position_embeddings}: llama.cpp chooses "
            "longrope's angles by its context, and would take those of long texts for short ones too"
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return notes


def _angles(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what a configuration says of the rotary angles of layers without a window."""
    angles: dict[str, Any] = config.rope_parameters.get("full_attention", config.rope_parameters)
    return angles


def _scaling(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what llama.cpp is told of angles that are scaled, in the form of `_settings`; nothing of others."""
    angles = _angles(config)
    kind = angles.get("rope_type", "default")
    if kind not in ("linear", "yarn", "longrope"):
        return {}
    if kind == "linear":
        return {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": float(angles["factor"])}
    original = int(angles["original_max_position_embeddings"])
    turned = type(skeleton(config).base_model.rotary_emb)(config)
    if kind == "longrope":
        return {"rope_scaling_orig_ctx_len": original, "rope_scaling_attn_factors": turned.attention_scaling}
    factor = float(angles["factor"] or config.max_position_embeddings / original)
    return {
        "rope_scaling_type": gguf.RopeScalingType.YARN,
        "rope_scaling_factor": factor,
        "rope_scaling_orig_ctx_len": original,
        # what multiplies the turned heads, beside what llama.cpp takes for this factor
        "rope_scaling_attn_factors": turned.attention_scaling / (1 + 0.1 * math.log(max(factor, 1.0))),
    }


def _longest(config: PreTrainedConfig) -> int:
    """Return the tokens of a context in which llama.cpp takes the model's angles, whatever the length of a text."""
    longest = int(config.max_position_embeddings)
    return min(longest, angles_change_at(config) or longest)


def _divisors(config: PreTrainedConfig) -> NDArray[np.float32]:
    """Return what plain angles are divided by to be the model's own. Dynamic ones are plain within its positions."""
    rotary = type(skeleton(config).base_model.rotary_emb)(config)
    plain, _ = rotary.compute_default_rope_parameters(config)
    divisors: NDArray[np.float32] = (plain / rotary.inv_freq).float().numpy()
    return divisors


class _Widening(GGUFWriter):  # type: ignore[misc]
    """A writer of tensors in fp32, with the values that the `gguf` package reads from their blocks."""

    def add_tensor(self, name: str, tensor: NDArray[Any], raw_dtype: GGMLQuantizationType | None = None) -> None:
        values = tensor if raw_dtype is None else gguf.quants.dequantize(tensor, raw_dtype)
        super().add_tensor(name, values.astype(np.float32))


def _add(writer: GGUFWriter, frozen: FrozenTensors, name: str, config: PreTrainedConfig) -> list[str]:
    """Add one module's codes, or one other tensor; returns a note if codes are not held as such."""
    if name not in frozen.codes:
        module, _, leaf = name.rpartition(".")
        values = _ordered(frozen.rest[name].float(), module, config).numpy()
        if values.ndim == 1 and leaf == "weight":  # of a norm
            values = values + np.float32(_described(config)[1].norm_offset)
        exact = values.ndim == 1 or frozen.rest[name].dtype != torch.float16
        writer.add_tensor(f"{gguf_name(module, config)}.{leaf}", values if exact else values.astype(np.float16))
        return []
    codes = _ordered(frozen.codes[name], name, config)
    rows, bits = codes.shape[0], frozen.bits[name]
    scale = _ordered(frozen.row_scales(name), name, config)
    target, kind = f"{gguf_name(name, config)}.weight", grid(frozen.levels, bits)
    try:
        block, packed = pack_blocks(codes.numpy(), scale.numpy(), kind, bits)
    except NoBlockError as error:
        reason = str(error)
    else:
        writer.add_tensor(target, packed, raw_dtype=GGMLQuantizationType[block])
        return []
    values = _ordered(frozen.weight(name), name, config).numpy()
    half = values.astype(np.float16)
    fits = np.isfinite(half).all() and np.allclose(half.astype(np.float32), values, rtol=2.0**-10, atol=0)
    stored = half if fits else values
    writer.add_tensor(target, stored)
    return [f"{name}: {reason}, so its {rows} rows are {'F16' if fits else 'F32'}, {stored.nbytes:,} bytes"]


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what an architecture's layers compute with, by the part of GGUFWriter's method behind `add_`."""
    of, blocks = _described(config)
    numbers = numbers_of(config, blocks)
    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": _longest(config),
        "embedding_length": config.hidden_size,
        "block_count": numbers.layers,
        "head_count": numbers.heads,
        "head_count_kv": numbers.kv_heads,
        "feed_forward_length": numbers.inner,
        "layer_norm_rms_eps" if blocks.epsilon == "rms_norm_eps" else "layer_norm_eps": numbers.epsilon,
    }
    if not blocks.positions:
        angles = _angles(config)
        settings |= _scaling(config) | {
            "key_length": numbers.head_size,
            "value_length": numbers.head_size,
            "rope_dimension_count": int(numbers.head_size * angles.get("partial_rotary_factor", 1.0)),
            "rope_freq_base": float(angles["rope_theta"]),
        }
    if of.window_every:
        settings["sliding_window"] = _window(numbers)
    if of.capped:
        settings |= {"attn_logit_softcapping": numbers.attention_cap, "final_logit_softcapping": numbers.logit_cap}
    if of.scaled:
        settings |= {
            "attention_scale": numbers.attention_scale,
            "embedding_scale": numbers.embedding_scale,
            "residual_scale": numbers.residual_scale,
            "logit_scale": numbers.logit_divisor,
        }
    if hasattr(config, "use_parallel_residual"):
        settings["parallel_residual"] = numbers.parallel
    return settings


def gguf_name(module: str, config: PreTrainedConfig) -> str:
    """Return llama.cpp's name of a module."""
    name = _names(_described(config)[0].architecture, config.num_hidden_layers).get_name(module)
    if name is None:
        raise ConfigError(f"--format gguf: llama.cpp's {config.model_type} has no place for {module}.")
    return str(name)


@lru_cache(maxsize=1)
def _names(architecture: str, layers: int) -> gguf.TensorNameMap:
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(kind, layers)


def _ordered(rows: torch.Tensor, module: str, config: PreTrainedConfig) -> torch.Tensor:
    """Return rows in llama.cpp's order: rotary pairs lie side by side there, half a head apart in transformers, and in
    one matrix of all three, all queries come before all keys and values."""
    of, blocks = _described(config)
    numbers = numbers_of(config, blocks)
    heads = dict(zip(blocks.qkv, (numbers.heads, numbers.kv_heads), strict=False))
    count = next((count for part, count in heads.items() if module.endswith(f".{part}")), 0)
    if count and of.side_by_side:
        ordered = rows.reshape(count, 2, -1, *rows.shape[1:]).swapaxes(1, 2)
    elif count and blocks.by_head:
        ordered = rows.reshape(count, 3, -1, *rows.shape[1:]).swapaxes(0, 1)
    else:
        return rows
    return ordered.reshape(rows.shape).contiguous()


def read_back(package: Path, out: Path) -> tuple[float, int]:
    """Return the largest deviation of a tensor of the file from scale times level, relative to it, and the number of
    tensors with codes. Read by the `gguf` package, not by the code that wrote it."""
    frozen, config, _ = read_package(package)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(out / FILE).tensors}
    worst = 0.0
    for name in frozen.codes:
        tensor = stored[f"{gguf_name(name, config)}.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        wanted = _ordered(frozen.weight(name), name, config).numpy()
        worst = max(worst, float((np.abs(values - wanted) / np.maximum(np.abs(wanted), 1e-30)).max()))
    return worst, len(frozen.codes)


def open_server(file: Path, threads: int) -> Any:
    """Open llama.cpp's server on a file, for one sequence at a time, and let it answer once: closed before its loop has
    begun, it would be waited for without end. Raises RunError if llama.cpp does not take the file."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_parallel, params.warmup, params.fit_params, params.verbosity = 1, False, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    # exact keys and values: only weights and activations are to differ from the package's
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.swa_full = True  # else the server takes up checkpoints of windows that another text left
    try:
        server = xllamacpp.Server(params)
    except (RuntimeError, ValueError) as error:
        raise UnfitExportError(f"llama.cpp cannot load the file that was written: {error}") from error
    _complete(server, [0])
    return server


def open_logits(out: Path, threads: int) -> Callable[[list[int]], NDArray[np.float32]]:
    """Give llama.cpp's log-probabilities (length, vocabulary) of what follows each prefix of a sequence shorter than
    the model's context; where `whole_steps` is false, of the likeliest token alone.

    Its server has no teacher forcing, so each prefix is asked for one token; the key-value cache keeps the rest. It
    withholds the probabilities of a token that is not whole text, so a bias, which they do not see, names a letter.

    Raises:
        RunError: llama.cpp does not take the file, or does not answer.
    """
    tokens = gguf.GGUFReader(out / FILE).fields["tokenizer.ggml.tokens"].contents()
    letter = next(token for token, text in enumerate(tokens) if len(text) == 1 and text.isascii() and text.isalpha())
    server = open_server(out / FILE, threads)

    def after(ids: list[int], whole: bool) -> NDArray[np.float32]:
        choice = _complete(server, ids, n_probs=len(tokens) if whole else 1, logit_bias=[[letter, 1000.0]])
        row = np.full(len(tokens), -np.inf, np.float32)
        for entry in choice["logprobs"]["content"][0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        return row

    def logits(ids: list[int]) -> NDArray[np.float32]:
        whole = whole_steps(len(tokens), len(ids))
        return np.stack([after(ids[: end + 1], bool(whole[end])) for end in range(len(ids))])

    return logits


def whole_steps(vocabulary: int, steps: int) -> NDArray[np.bool_]:
    """Return (steps,): at which steps of a row llama.cpp tells of its whole distribution. Its server writes each
    probability down, so for a large vocabulary these are some, at equal distances."""
    every = -(-PROMPTS * steps * vocabulary // MOST_PROBABILITIES)
    whole: NDArray[np.bool_] = np.arange(steps) % every == min(every, steps) // 2
    return whole


def open_in_fp32(package: Path, out: Path, threads: int) -> Callable[[list[int]], NDArray[np.float32]]:
    """Give the log-probabilities of a file with the same values in fp32, for which llama.cpp rounds no activations. It
    lives as long as llama.cpp has it open."""
    with tempfile.TemporaryDirectory(prefix="bitmill-", dir=out.parent) as folder:
        write(package, Path(folder), widened=True)
        return open_logits(Path(folder), threads)


def _complete(server: Any, ids: list[int], **settings: Any) -> Any:
    """Return the likeliest token after a prefix, as llama.cpp tells of it."""
    answer = server.handle_completions(
        {"prompt": ids, "n_predict": 1, "temperature": 0, "cache_prompt": True, **settings}
    )
    if "choices" not in answer:
        raise UnfitExportError(f"llama.cpp does not answer for the file that was written: {answer}")
    return answer["choices"][0]
