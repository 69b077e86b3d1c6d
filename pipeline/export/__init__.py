"""Packed models in the formats of other runtimes, each proven in its own runtime before it is kept: see `verify`.

A format is a module of `check(config)`, which refuses before work what it cannot hold, `write(package, out) -> notes`
and `open_logits(out, threads)`, which gives logits or log-probabilities (length, vocabulary) of a sequence of ids, for
an encoder and decoder with the source's ids as second argument. Where the runtime rounds activations,
`open_in_fp32(package, out, threads)` gives them without; where it tells of all logits at some steps alone,
`whole_steps(vocabulary, steps)` says which; some also `read_back` codes or have `serve_command`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module, metadata, util
from types import ModuleType

from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Format:
    """Where a format's code lies, the packages it needs, the runtime that verifies it, as packages with a version, and
    what that does with activations."""

    module: str
    needs: tuple[str, ...]
    runtime: tuple[str, ...]
    activations: str
    not_run: str = ""  # a runtime that reads the format as well

    def load(self) -> ModuleType:
        """Import the format's module."""
        return import_module(f"pipeline.export.{self.module}")

    def ran(self) -> str:
        """Return what verifies an export here, with versions, and what does not."""
        versions = " and ".join(f"{package} {metadata.version(package)}" for package in self.runtime)
        return f"{versions}; {self.not_run} was not run" if self.not_run else versions


FORMATS = {
    "transformers": Format("dequantized", (), ("transformers",), "fp32, not rounded"),
    "onnx": Format("onnx", (), ("onnxruntime",), "8 bits, one range a block of up to 128"),
    "gguf": Format(
        "gguf", ("gguf", "xllamacpp"), ("xllamacpp",), "8 bits in blocks of 32 or 256, by llama.cpp's own rounding"
    ),
    "compressed-tensors": Format(
        "compressed_tensors",
        ("compressed_tensors",),
        ("transformers", "compressed-tensors"),
        "fp32, not rounded",
        not_run="vLLM",
    ),
}


def format_named(name: str) -> Format:
    """Return a format. Raises ConfigError for an unknown one, or one whose writer or verifier is not installed."""
    if name not in FORMATS:
        raise ConfigError(f"--format is {name!r}; valid: {', '.join(FORMATS)}")
    missing = [package for package in FORMATS[name].needs if util.find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"--format {name} is written and verified with {', '.join(missing).replace('_', '-')}, which is not "
            "installed; what cannot be verified is not kept. Install the extra: pip install 'bitmill[export]'."
        )
    return FORMATS[name]
