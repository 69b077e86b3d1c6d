"""The packed model at work: ONNX Runtime over packed codes, with a key-value cache that is written in place."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from pipeline.errors import ConfigError
from pipeline.models.build import read_config
from pipeline.package import manifest
from pipeline.runtime.build import DECODER, ENCODER, MODEL, build, cache_of, longest
from pipeline.runtime.decoder import FIRST_LOGIT
from pipeline.runtime.graph import with_activations

QUIET = 3  # errors only
AT_ONCE = 32  # tokens of a prompt: what a layer computes on its way is memory too


class Runtime:
    """A model of one sequence at a time, from a package or from a folder that the ONNX export wrote.

    Every byte of a package is checked against its manifest, and its tensors against the architecture; what
    `pipeline.load` does besides, the digest of the unpacked tensors, would take longer than the rest of the load.

    A package is opened by writing an ONNX export into a scratch folder and mapping it: one way to draw a graph serves
    both. Weights stay packed in memory. `activations` is their width: 8, or 32, which is exact and much slower; by
    default what the package was trained for.
    """

    def __init__(self, folder: Path, threads: int = 1, activations: int | None = None) -> None:
        """Open the model in `folder`. Raises DamagedError for a damaged package, ConfigError for an architecture
        without a graph or where no model is."""
        if activations not in (None, 8, 32):
            raise ConfigError(f"activations is {activations!r}; valid: 8, 32")
        if (folder / manifest.MANIFEST).exists():
            with tempfile.TemporaryDirectory(prefix="bitmill-") as scratch:  # mapped into memory, so it may go
                self.config = build(folder, Path(scratch), activations, sliced=True)
                self._open(Path(scratch), threads, None)
        elif (folder / f"{MODEL}.onnx").exists() or (folder / f"{DECODER}.onnx").exists():
            self.config = read_config(folder)
            self._open(folder, threads, activations)
        else:
            raise ConfigError(f"{folder} is neither a packed model nor an ONNX export.")

    def logits(self, ids: Sequence[int], source: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Return the logits (length, vocabulary) of one sequence; `source` is for an encoder. Raises as `generate`."""
        self._check(ids)
        if self._encoder is not None:
            self._check(source or ())
        return _KeyValueCache(self._decoder, self.config, len(ids), self._encoded(source)).feed(ids, first=0)

    def generate(
        self,
        ids: Sequence[int],
        new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[int] | None = None,
    ) -> Iterator[int]:
        """Yield tokens that follow `ids`, or answer them where there is an encoder; the likeliest at temperature 0.

        Ends after `new_tokens`, at a token of `stop` (by default the model's end of text), which is the last one
        given, or where the model's positions end. Raises ConfigError for ids that the model does not have, or no or too
        many of them.
        """
        end = self.config.eos_token_id if stop is None else list(stop)
        ends = set(end) if isinstance(end, list) else {end}
        self._check(ids)
        prompt, encoded = list(ids), {}
        if self.config.is_encoder_decoder:
            prompt, encoded = [self.config.decoder_start_token_id], self._encoded(ids)
            self._check(prompt)
        room = min(longest(self.config) - len(prompt), new_tokens)
        cache = _KeyValueCache(self._decoder, self.config, len(prompt) + room, encoded)
        draw = np.random.default_rng(seed)
        *earlier, prompt = (prompt[start : start + AT_ONCE] for start in range(0, len(prompt), AT_ONCE))
        for chunk in earlier:
            cache.feed(chunk, first=-1)
        for _ in range(room):
            token = _chosen(cache.feed(prompt, first=-1)[-1], temperature, draw)
            yield token
            if token in ends:
                return
            prompt = [token]

    def _check(self, ids: Sequence[int]) -> None:
        room, vocabulary = longest(self.config), self.config.vocab_size
        if not 1 <= len(ids) <= room:
            raise ConfigError(f"The text has {len(ids)} tokens; the model takes 1 to {room}.")
        unknown = [token for token in ids if token is None or not 0 <= token < vocabulary]
        if unknown:
            raise ConfigError(f"The token {unknown[0]} is not one of the model's, 0 to {vocabulary - 1}.")

    def _open(self, folder: Path, threads: int, activations: int | None) -> None:
        two = self.config.is_encoder_decoder
        self._encoder = _session(folder / f"{ENCODER}.onnx", threads, activations) if two else None
        self._decoder = _session(folder / f"{DECODER if two else MODEL}.onnx", threads, activations)

    def _encoded(self, source: Sequence[int] | None) -> dict[str, NDArray[np.float32]]:
        """Return the tensors that the decoder takes from the encoder, by their names."""
        if self._encoder is None or source is None:
            return {}
        names = [output.name for output in self._encoder.get_outputs()]
        return dict(zip(names, self._encoder.run(names, {"input_ids": _row(source)}), strict=True))


class _KeyValueCache:
    """Keys and values of one sequence, and the tokens they stand for."""

    def __init__(
        self, session: Any, config: PreTrainedConfig, longest: int, encoded: dict[str, NDArray[np.float32]]
    ) -> None:
        self._session, self._binding, self._length = session, session.io_binding(), 0
        self._vocabulary = config.vocab_size
        self._sliced = FIRST_LOGIT in {value.name for value in session.get_inputs()}
        shape, self._kept = cache_of(config), []
        for past, present in zip(shape.names("past_key_values"), shape.names("present"), strict=True):
            zeros = np.zeros((1, shape.heads, longest, shape.head_size), np.float32)  # memory is taken as it is written
            buffer = onnxruntime.OrtValue.ortvalue_from_numpy(zeros)
            self._binding.bind_ortvalue_input(past, buffer)
            self._binding.bind_ortvalue_output(present, buffer)
            self._kept.append(buffer)
        for name, value in encoded.items():
            self._binding.bind_cpu_input(name, value)

    def feed(self, ids: Sequence[int], first: int) -> NDArray[np.float32]:
        """Return logits (places, vocabulary) of the tokens that follow those fed before, from place `first` on."""
        self._length += len(ids)
        self._binding.bind_cpu_input("input_ids", _row(ids))
        self._binding.bind_cpu_input("attention_mask", np.ones((1, self._length), np.int64))
        if self._sliced:
            self._binding.bind_cpu_input(FIRST_LOGIT, np.array([first]))
        places = len(range(len(ids))[first:]) if self._sliced else len(ids)
        logits = np.empty((1, places, self._vocabulary), np.float32)
        self._binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        return logits[0, 0 if self._sliced else first :]


def _session(path: Path, threads: int, activations: int | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = QUIET
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # the graphs are fused
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    graph = str(path) if activations is None else with_activations(path, activations)
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _row(ids: Sequence[int]) -> NDArray[np.int64]:
    return np.array([ids], np.int64)


def _chosen(logits: NDArray[np.float32], temperature: float, draw: np.random.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    scaled = (logits - logits.max()) / temperature
    weights = np.exp(scaled.astype(np.float64))
    return int(draw.choice(len(weights), p=weights / weights.sum()))
