"""One measurement of one engine, in a process of its own: ENGINE FOLDER THREADS PROMPT NEW are its arguments. It prints
one JSON line. What an engine imports is imported before the load is timed; memory is the growth of the resident set
from before the load to after the first token."""

from __future__ import annotations

import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PAGE_MIB = 4096 / 2**20
Rates = dict[str, float]
Run = Callable[[list[int], int], Rates]  # prompt and number of new tokens to prefill and decode rates, tokens/s


def packed(folder: Path, threads: int) -> Run:
    """Load our runtime on the package."""
    from pipeline.runtime import Runtime

    runtime = Runtime(folder / "package", threads)
    return lambda prompt, new: _timed(runtime.generate(prompt, new, stop=()), len(prompt))


def transformers_fp32(folder: Path, threads: int) -> Run:
    """Load transformers on the same weights in fp32."""
    from pipeline.models.build import load_model

    return _by_torch(load_model(folder / "fp32").eval(), threads)


def torch_int8(folder: Path, threads: int) -> Run:
    """Load the same with every linear layer, the head included, quantized by torch's dynamic int8."""
    import torch
    from transformers.pytorch_utils import Conv1D

    from pipeline.models.build import load_model

    model = load_model(folder / "fp32").eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = torch.nn.Linear(*module.weight.shape)
            linear.weight.data, linear.bias.data = module.weight.data.T.contiguous(), module.bias.data
            model.set_submodule(name, linear)
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    return _by_torch(quantized, threads)


def llama_cpp(folder: Path, threads: int) -> Run:
    """Load llama.cpp on the GGUF file of the package."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(folder / "gguf" / "model.gguf")
    params.n_parallel, params.warmup, params.fit_params, params.verbosity = 1, False, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)

    def run(prompt: list[int], new: int) -> Rates:
        request = {"prompt": prompt, "n_predict": new, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
        timings = server.handle_completions(request)["timings"]
        return {"prefill": timings["prompt_per_second"], "decode": timings["predicted_per_second"]}

    return run


# What loads each engine, and what that imports.
ENGINES: dict[str, tuple[Callable[[Path, int], Run], tuple[str, ...]]] = {
    "packed": (packed, ("pipeline.runtime",)),
    "fp32": (transformers_fp32, ("pipeline.models.build",)),
    "int8": (torch_int8, ("torch", "transformers.pytorch_utils", "pipeline.models.build")),
    "llama.cpp": (llama_cpp, ("xllamacpp",)),
}


def measure(engine: str, folder: Path, threads: int, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    """Measure the load and the rates of one engine: load_s, prefill_tokens_per_s, decode_tokens_per_s, resident_mib."""
    load, imported = ENGINES[engine]
    for module in imported:
        importlib.import_module(module)
    prompt = [(7919 * place) % 251 for place in range(prompt_tokens)]
    before, begun = _resident_mib(), time.perf_counter()
    run = load(folder, threads)
    loaded = time.perf_counter() - begun
    run(prompt, 1)
    resident = _resident_mib() - before
    rates = {f"{name}_tokens_per_s": rate for name, rate in run(prompt, new_tokens).items()}
    return {"load_s": loaded, "resident_mib": resident, **rates}


def _timed(tokens: Iterator[int], prompt_tokens: int) -> Rates:
    begun = time.perf_counter()
    next(tokens)
    prefill, begun = time.perf_counter() - begun, time.perf_counter()
    following = sum(1 for _ in tokens)
    return {"prefill": prompt_tokens / prefill, "decode": following / (time.perf_counter() - begun)}


def _by_torch(model: Any, threads: int) -> Run:
    import torch

    torch.set_num_threads(threads)

    @torch.inference_mode()
    def tokens(prompt: list[int], new: int) -> Iterator[int]:
        ids, cache = torch.tensor([prompt]), None
        for _ in range(new):
            output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            yield int(ids)

    return lambda prompt, new: _timed(tokens(prompt, new), len(prompt))


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_MIB


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    engine, folder, *numbers = sys.argv[1:]
    sys.stdout.write(json.dumps(measure(engine, Path(folder), *map(int, numbers))) + "\n")
