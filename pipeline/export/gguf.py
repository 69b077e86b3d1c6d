"""GPT-2 and Llama as one GGUF file for llama.cpp: codes in blocks, the tokenizer, the rest in floating point."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from pipeline.errors import ConfigError, RunError
from pipeline.export.ggml_blocks import NoBlockError, pack_blocks
from pipeline.export.vocabulary import write_vocabulary
from pipeline.package import package as artifact
from pipeline.quant.layers import FrozenTensors
from pipeline.quant.spec import grid

FILE = "model.gguf"
GPT2 = {
    r"transformer\.wte": "token_embd",
    r"transformer\.wpe": "position_embd",
    r"transformer\.ln_f": "output_norm",
    r"transformer\.h\.(\d+)\.ln_1": "blk.{}.attn_norm",
    r"transformer\.h\.(\d+)\.attn\.c_attn": "blk.{}.attn_qkv",
    r"transformer\.h\.(\d+)\.attn\.c_proj": "blk.{}.attn_output",
    r"transformer\.h\.(\d+)\.ln_2": "blk.{}.ffn_norm",
    r"transformer\.h\.(\d+)\.mlp\.c_fc": "blk.{}.ffn_up",
    r"transformer\.h\.(\d+)\.mlp\.c_proj": "blk.{}.ffn_down",
    r"lm_head": "output",
}
LLAMA = {
    r"model\.embed_tokens": "token_embd",
    r"model\.norm": "output_norm",
    r"model\.layers\.(\d+)\.input_layernorm": "blk.{}.attn_norm",
    r"model\.layers\.(\d+)\.self_attn\.q_proj": "blk.{}.attn_q",
    r"model\.layers\.(\d+)\.self_attn\.k_proj": "blk.{}.attn_k",
    r"model\.layers\.(\d+)\.self_attn\.v_proj": "blk.{}.attn_v",
    r"model\.layers\.(\d+)\.self_attn\.o_proj": "blk.{}.attn_output",
    r"model\.layers\.(\d+)\.post_attention_layernorm": "blk.{}.ffn_norm",
    r"model\.layers\.(\d+)\.mlp\.gate_proj": "blk.{}.ffn_gate",
    r"model\.layers\.(\d+)\.mlp\.up_proj": "blk.{}.ffn_up",
    r"model\.layers\.(\d+)\.mlp\.down_proj": "blk.{}.ffn_down",
    r"lm_head": "output",
}
NAMES = {"gpt2": GPT2, "llama": LLAMA}


def check(config: PreTrainedConfig) -> None:
    """Raises ConfigError for a model that llama.cpp would compute otherwise."""
    if config.model_type not in NAMES:
        raise ConfigError(
            f"--format gguf takes {' and '.join(NAMES)} models, not {config.model_type}: llama.cpp has no such "
            "architecture. Valid for it: onnx, transformers."
        )
    wanted = {"activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    if config.model_type == "llama":
        wanted = {"hidden_act": "silu", "mlp_bias": False}
        rope = dict(config.rope_parameters)
        if rope.get("rope_type", "default") != "default":
            raise ConfigError(f"--format gguf takes plain rotary positions, not rope_type {rope['rope_type']!r}.")
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ConfigError(f"--format gguf needs {name} {value!r} in config.json, not {getattr(config, name)!r}.")


def write(package: Path, out: Path) -> list[str]:
    """Write `out`/model.gguf; returns what is not held as codes, with its bytes.

    Raises:
        ConfigError: see `check` and `write_vocabulary`.
    """
    frozen, config, _ = artifact.read(package)
    check(config)
    writer = GGUFWriter(out / FILE, config.model_type)
    _describe(writer, config, package.resolve().name)
    write_vocabulary(writer, package, config.vocab_size)
    notes = [
        note
        for module in (*frozen.codes, *(name for name in frozen.rest if not _computed(name)))
        for note in _add(writer, frozen, module, config)
    ]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return notes


def _describe(writer: GGUFWriter, config: PreTrainedConfig, name: str) -> None:
    hidden = config.hidden_size
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * hidden)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))


def _add(writer: GGUFWriter, frozen: FrozenTensors, name: str, config: PreTrainedConfig) -> list[str]:
    """One module's codes, or one other tensor."""
    if name not in frozen.codes:
        module, _, leaf = name.rpartition(".")
        values = _ordered(frozen.rest[name].float(), module, config).numpy()
        exact = values.ndim == 1 or frozen.rest[name].dtype != torch.float16
        writer.add_tensor(f"{gguf_name(module, config)}.{leaf}", values if exact else values.astype(np.float16))
        return []
    codes = _ordered(frozen.codes[name], name, config)
    rows, bits = codes.shape[0], frozen.bits[name]
    step = _ordered(frozen.scales[name].float().expand(rows, 1).contiguous(), name, config)
    target, kind = f"{gguf_name(name, config)}.weight", grid(frozen.levels, bits)
    try:
        block, packed = pack_blocks(codes.numpy(), step.numpy(), kind, bits)
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
    """llama.cpp's name of a module."""
    for pattern, name in NAMES[config.model_type].items():
        if match := re.fullmatch(pattern, module):
            return name.format(*match.groups())
    raise ConfigError(f"--format gguf: llama.cpp's {config.model_type} has no place for {module}.")


def _ordered(rows: torch.Tensor, module: str, config: PreTrainedConfig) -> torch.Tensor:
    """Rows in llama.cpp's order: rotary pairs of a head lie side by side there, half a head apart in transformers."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(module.rpartition(".")[2])
    if heads is None:
        return rows
    return rows.reshape(getattr(config, heads), 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape).contiguous()


def _computed(name: str) -> bool:
    """Buffers that older versions of transformers stored with GPT-2's weights."""
    return name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq"))


def read_back(package: Path, out: Path) -> tuple[float, int]:
    """The largest deviation of a tensor of the file from step times level, relative to it, and the number of tensors
    with codes. Read by the `gguf` package, not by the code that wrote it."""
    frozen, config, _ = artifact.read(package)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(out / FILE).tensors}
    worst = 0.0
    for name in frozen.codes:
        tensor = stored[f"{gguf_name(name, config)}.weight"]
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        wanted = _ordered(frozen.weight(name), name, config).numpy()
        worst = max(worst, float((np.abs(found - wanted) / np.maximum(np.abs(wanted), 1e-30)).max()))
    return worst, len(frozen.codes)


def open_server(file: Path, threads: int) -> Any:
    """llama.cpp's server on a file, with the model's own context, for one sequence at a time.

    It is given out when it has answered once: closed before its loop has begun, it would be waited for without end.

    Raises:
        RunError: llama.cpp does not take the file.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_parallel, params.warmup, params.fit_params, params.verbosity = 1, False, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    try:
        server = xllamacpp.Server(params)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"llama.cpp cannot load the file that was written: {error}") from error
    _complete(server, [0])
    return server


def open_logits(out: Path, threads: int) -> Callable[[list[int]], NDArray[np.float32]]:
    """llama.cpp's log-probabilities (length, vocabulary) of what follows each prefix of a sequence shorter than the
    model's context.

    Its server has no teacher forcing, so each prefix is asked for one token; the key-value cache keeps the rest. It
    withholds the probabilities of a token that is not whole text, so a bias, which they do not see, names a letter.

    Raises:
        RunError: llama.cpp does not take the file, or does not answer.
    """
    tokens = gguf.GGUFReader(out / FILE).fields["tokenizer.ggml.tokens"].contents()
    letter = next(token for token, text in enumerate(tokens) if len(text) == 1 and text.isascii() and text.isalpha())
    server = open_server(out / FILE, threads)

    def after(ids: list[int]) -> NDArray[np.float32]:
        choice = _complete(server, ids, n_probs=len(tokens), logit_bias=[[letter, 1000.0]])
        row = np.full(len(tokens), -np.inf, np.float32)
        for entry in choice["logprobs"]["content"][0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        return row

    return lambda ids: np.stack([after(ids[: end + 1]) for end in range(len(ids))])


def _complete(server: Any, ids: list[int], **settings: Any) -> Any:
    """The likeliest token after a prefix, as llama.cpp tells of it."""
    answer = server.handle_completions(
        {"prompt": ids, "n_predict": 1, "temperature": 0, "cache_prompt": True, **settings}
    )
    if "choices" not in answer:
        raise RunError(f"llama.cpp does not answer for the file that was written: {answer}")
    return answer["choices"][0]
