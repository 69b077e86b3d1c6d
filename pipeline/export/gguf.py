"""GPT-2 and Llama as one GGUF file for llama.cpp: codes in blocks, the tokenizer, the rest in floating point."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from pipeline.errors import ConfigError, UnfitExportError
from pipeline.export.companions import refuse_groups, valid_for
from pipeline.export.ggml_blocks import NoBlockError, pack_blocks
from pipeline.export.probes import PROMPTS
from pipeline.export.vocabulary import write_vocabulary
from pipeline.models.family import Gguf, family_with, names_with
from pipeline.package.package import read_package
from pipeline.quant.frozen import FrozenTensors
from pipeline.quant.granularity import row_scales
from pipeline.quant.spec import grid

FILE = "model.gguf"
MOST_PROBABILITIES = 2**23  # that the server tells of a file, 6 µs each: about a minute
COMPUTED = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # buffers that older transformers stored


def check(config: PreTrainedConfig) -> Gguf:
    """Return what llama.cpp makes of a model's family. Raises ConfigError for one that it would compute otherwise."""
    family = family_with("gguf", config.model_type)
    if family is None or family.gguf is None:
        raise ConfigError(
            f"--format gguf takes {' and '.join(names_with('gguf'))} models, not {config.model_type}: llama.cpp has no "
            f"such architecture. Valid for it: {valid_for(config)}."
        )
    reason = family.gguf.refuses(config)
    if reason:
        raise ConfigError(f"--format gguf {reason}.")
    for name, value in family.gguf.requires.items():
        if getattr(config, name) != value:
            raise ConfigError(f"--format gguf needs {name} {value!r} in config.json, not {getattr(config, name)!r}.")
    return family.gguf


def write(package: Path, out: Path, widened: bool = False) -> list[str]:
    """Write `out`/model.gguf; return what is not held as codes. With `widened` every tensor is in fp32, with the values
    that it would have else. Raises as `check` and `write_vocabulary` do."""
    frozen, config, _ = read_package(package)
    family = check(config)
    refuse_groups(frozen, config, "gguf")
    writer = (_Widening if widened else GGUFWriter)(out / FILE, family.architecture)
    settings = {
        "name": package.resolve().name,
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "head_count": config.num_attention_heads,
        **family.settings(config),
    }
    for setting, value in settings.items():
        getattr(writer, f"add_{setting}")(value)
    write_vocabulary(writer, package, config.vocab_size)
    rest = [name for name in frozen.rest if not name.endswith(COMPUTED)]
    notes = [note for module in (*frozen.codes, *rest) for note in _add(writer, frozen, module, config)]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return notes


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
        exact = values.ndim == 1 or frozen.rest[name].dtype != torch.float16
        writer.add_tensor(f"{gguf_name(module, config)}.{leaf}", values if exact else values.astype(np.float16))
        return []
    codes = _ordered(frozen.codes[name], name, config)
    rows, bits = codes.shape[0], frozen.bits[name]
    scale = _ordered(row_scales(frozen.scales[name].float(), rows).contiguous(), name, config)
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


def gguf_name(module: str, config: PreTrainedConfig) -> str:
    """Return llama.cpp's name of a module."""
    for pattern, name in check(config).names.items():
        if match := re.fullmatch(pattern, module):
            return name.format(*match.groups())
    raise ConfigError(f"--format gguf: llama.cpp's {config.model_type} has no place for {module}.")


def _ordered(rows: torch.Tensor, module: str, config: PreTrainedConfig) -> torch.Tensor:
    """Return rows in llama.cpp's order: rotary pairs lie side by side there, half a head apart in transformers."""
    heads = check(config).rotary.get(module.rpartition(".")[2])
    if heads is None:
        return rows
    return rows.reshape(getattr(config, heads), 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape).contiguous()


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
