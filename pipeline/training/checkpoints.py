"""Checkpoints of a training job in the directory of its step: fenced, checksummed, and no pickle in them.

A checkpoint is a file of tensors, the best weights so far among them, and, written last, a small JSON that names it. An
attempt keeps its last one; until it has one, it goes on from that of the attempt before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import DamagedError
from pipeline.models.device import all_so_far, room_on_host
from pipeline.models.hidden_states import WithStates
from pipeline.models.sharded import whole
from pipeline.store.records import StoredFile
from pipeline.store.step_store import StepDir

MICRO_BATCH = "attempt/micro-batch.json"


@dataclass
class Progress:
    """How far a training job is; what a checkpoint holds beside tensors."""

    step: int = 0
    best_step: int = -1
    best_nats: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)
    modules: list[dict[str, Any]] = field(default_factory=list)  # what `diagnostics.Watch` saw
    workers: int = 0  # that it was made by

    def exploded(self, vocabulary: int) -> int:
        """Count the newest validations in a row that are worse, by a nat, than guessing among all tokens, and than the
        first one was."""
        scored = [point["validation_nats"] for point in self.history if "validation_nats" in point]
        worst = max([math.log(vocabulary), *scored[:1]]) + 1
        return next((count for count, nats in enumerate(reversed(scored)) if nats <= worst), len(scored))


class CheckpointWriter:
    """Stores checkpoints in a thread of its own while training goes on; inside, as a context, it may be used.

    One at a time: whoever begins the next waits for the last, so the host holds one copy of what trains at most. What
    a write raises is raised by the next call, or where the context ends.
    """

    def __init__(self, step_dir: StepDir, device: torch.device) -> None:
        self._dir, self._device = step_dir, device
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._thread.shutdown()  # also of a job that failed: a checkpoint that was begun is a good one
        if kind is None:
            self.wait()

    def begin(self, tensors: dict[str, Tensor], progress: Progress) -> None:
        """Copy a checkpoint as it is now, and begin to store it."""
        self.wait()
        copies, wait = copied(tensors, self._device)
        so_far = replace(progress, history=list(progress.history), modules=list(progress.modules))

        def write() -> None:
            wait()
            write_checkpoint(self._dir, copies, so_far)

        self._writing = self._thread.submit(write)

    def look(self) -> None:
        """Raise what a write raised that has ended."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is stored."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def copied(tensors: dict[str, Tensor], device: torch.device) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """Return copies on the host of what tensors hold now, and what waits until they are whole. Nobody else waits: a
    device makes them in their turn, before whatever it is asked to do next. What is shared out is gathered whole, one
    after the other, while other workers `give_parts`."""
    copies = {
        name: room_on_host(tuple(t.shape), t.dtype, t.device).copy_(whole(t.detach()), non_blocking=True)
        for name, t in tensors.items()
    }
    return copies, all_so_far(device)


def write_checkpoint(step_dir: StepDir, tensors: dict[str, Tensor], progress: Progress) -> None:
    """Store a checkpoint, then drop the one before it."""
    state = f"attempt/state-{progress.step:09d}.safetensors"
    marker = f"attempt/checkpoint-{progress.step:09d}.json"
    stored = store_tensors(step_dir, state, tensors)
    fields = {"file": state, "stored": stored.model_dump(), "progress": vars(progress)}
    written = step_dir.write(marker, json.dumps(fields).encode())
    kept = {stored.place(state), written.place(marker)}
    for prefix in ("attempt/checkpoint-", "attempt/state-"):
        for old in set(step_dir.sizes(prefix)) - kept:
            step_dir.delete(old)


def latest_checkpoint(step_dir: StepDir) -> dict[str, Any] | None:
    """Return the newest attempt's last checkpoint that is whole, as `load_checkpoint` takes it."""
    for place in reversed(step_dir.sizes("attempt/checkpoint-")):
        try:
            fields: dict[str, Any] = json.loads(step_dir.read(place))
            step_dir.local(fields["file"], StoredFile(**fields["stored"]))
        except (FileNotFoundError, DamagedError, ValueError):
            continue
        return fields
    return None


def note_micro_batch(step_dir: StepDir, given: int, fits: int) -> None:
    """Store how many rows fit into memory at once where `given` did not, for whoever begins again."""
    step_dir.write(MICRO_BATCH, json.dumps({"given": given, "fits": fits}).encode())


def noted_micro_batch(step_dir: StepDir, given: int) -> int:
    """Return how many rows fit into memory at once where `given` are asked for, as far as attempts found out."""
    for place in reversed(step_dir.sizes(MICRO_BATCH)):
        note = json.loads(step_dir.read(place))
        return int(note["fits"]) if note["given"] == given else given
    return given


def load_checkpoint(step_dir: StepDir, fields: dict[str, Any]) -> tuple[dict[str, Tensor], Progress]:
    """Return the tensors and the progress of a checkpoint that `latest_checkpoint` returned."""
    path = step_dir.local(fields["file"], StoredFile(**fields["stored"]))
    return load_file(path), Progress(**fields["progress"])


def store_tensors(step_dir: StepDir, name: str, tensors: dict[str, Tensor]) -> StoredFile:
    """Store tensors as a safetensors file of a step directory."""
    with step_dir.scratch_folder() as folder:
        path = folder / "tensors.safetensors"
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
        return step_dir.upload(name, path)


def finish(step_dir: StepDir, progress: Progress, steps: int, files: dict[str, StoredFile], **facts: str) -> None:
    """Write what the stage needs for its record, on rank 0, when its weights are stored as `files`."""
    files = files | {"history.json": step_dir.write("history.json", json.dumps(progress.history).encode())}
    if progress.modules:
        files = files | {"modules.json": step_dir.write("modules.json", json.dumps(progress.modules).encode())}
    result = {
        "steps": steps,
        "best_step": progress.best_step,
        "validation_nats": progress.best_nats,
        "files": {name: stored.model_dump() for name, stored in files.items()},
        **facts,
    }
    step_dir.write("attempt/result.json", json.dumps(result).encode())


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def weights(model: WithStates) -> dict[str, Tensor]:
    """Return every parameter of the wrapped model by name, a tied one once."""
    return dict(model.model.named_parameters())
