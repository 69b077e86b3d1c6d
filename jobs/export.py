"""`bitmill export`: a packed model in another runtime's format, kept only if it computes the same there."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from jobs.display import Display, print_table
from jobs.model_argument import is_registered, locate, pinned
from pipeline.config.resources import Resources
from pipeline.errors import ConfigError, UnfitExportError
from pipeline.export import Format, format_named
from pipeline.export.probes import PROMPTS, make_probes, width_of
from pipeline.export.verify import Comparison, Floors, Logits, Verdict, bytes_of, measure, reasons_against
from pipeline.package.manifest import MANIFEST, check
from pipeline.package.package import load, load_in_fp32, read_package
from pipeline.sources.content import ContentMemo
from pipeline.sources.files import pin_text
from pipeline.sources.text import documents, parts
from pipeline.store.locations import tracking_uri
from pipeline.store.shards import row_hashes
from pipeline.tasks.language_modeling import encode
from pipeline.tasks.tokenizers import read_tokenizer
from pipeline.tracking import registry

VERDICT = "verdict.json"


def export(
    model: str, name: str, out: Path, data: str | None, threads: int, resources: Resources, console: Console
) -> dict[str, Any]:
    """Write, verify, and keep or delete; returns the verdict as the document of `--json`. Raises ConfigError before
    anything is written, and RunError if the export was written, did not hold and was deleted."""
    kind = format_named(name)
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()) or out.samefile("."))):
        raise ConfigError(
            f"--out is {str(out)!r}, which exists and is not an empty directory that can be replaced; name another."
        )
    model = pinned(model, resources)
    with tempfile.TemporaryDirectory() as temporary:
        package = locate(model, resources, Path(temporary) / "model")
        if not (package / MANIFEST).is_file():
            raise ConfigError(f"MODEL is {model!r}, which is not a packed model: it has no {MANIFEST}.")
        _, config, _ = read_package(package)
        kind.load().check(config)
        text = _text(data, package, width_of(config), Path(temporary)) if data else None
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        except OSError as error:
            raise ConfigError(f"--out is {str(out)!r}, which cannot be made: {error}") from error
        try:
            with Display(console) as display:
                verdict = _prove(package, draft, name, kind, text, data, threads, display)
            if not verdict.passed:
                _log(model, verdict, resources)
                raise UnfitExportError(f"The {name} export of {model} was deleted: {'; '.join(verdict.reasons)}.")
            (draft / VERDICT).write_text(verdict.model_dump_json(indent=1) + "\n", encoding="utf-8")
            draft.chmod(0o755)
            for path in draft.iterdir():
                path.chmod(0o644)
            draft.replace(out)
            _log(model, verdict, resources)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    _show(verdict, out, console)
    return {"out": str(out), **verdict.model_dump(mode="json")}


def _prove(
    package: Path,
    draft: Path,
    name: str,
    kind: Format,
    text: Tensor | None,
    data: str | None,
    threads: int,
    display: Display,
) -> Verdict:
    module = kind.load()
    with display.stage("write"):
        notes = module.write(package, draft)
        error, tensors = module.read_back(package, draft) if hasattr(module, "read_back") else (None, 0)
    with display.stage("prompts"):
        scored = load(package)
        probes = make_probes(scored, text)
    with display.stage("verify") as advance:
        as_it_runs = _counted(module.open_logits(draft, threads), len(probes.rows), advance)
        in_fp32 = module.open_in_fp32(package, draft, threads) if hasattr(module, "open_in_fp32") else None
        whole_steps = getattr(module, "whole_steps", lambda vocabulary, steps: None)
        whole = whole_steps(scored.config.vocab_size, probes.rows.shape[1] - 1)
        measured = measure(load_in_fp32(package), scored, as_it_runs, in_fp32, probes, whole)
    return Verdict(
        format=name,
        digest=check(package)["digest"],
        runtime=kind.ran(),
        probe=data or "sampled from the packed model",
        activations=kind.activations,
        tensors_read_back=tensors,
        read_back_error=error,
        bytes=bytes_of(draft),
        package_bytes=bytes_of(package),
        notes=tuple(notes),
        reasons=reasons_against(measured, error),
        **dict(measured),
    )


def _counted(logits: Logits, total: int, advance: Callable[[int, int], None]) -> Logits:
    """Return the same, which tells of each sequence that the runtime has computed."""
    done = itertools.count(1)

    def counted(*sequences: list[int]) -> Any:
        values = logits(*sequences)
        advance(next(done), total)
        return values

    return counted


def _text(data: str, package: Path, width: int, temporary: Path) -> Tensor:
    """Return some full rows of a text, drawn by a hash of their content."""
    files = pin_text(data, "--data", ContentMemo(f"{temporary}/text"))
    texts = (text for file in files for part in parts(file) for text in documents(part, "document", "text"))
    ids, held, _ = encode(texts, read_tokenizer(package), width, "document")
    full = ids[held == width]
    if len(full) < PROMPTS:
        raise ConfigError(f"--data {data!r} fills {len(full)} rows of {width} tokens; {PROMPTS} are needed.")
    lowest = row_hashes(full, held[held == width]).argsort(kind="stable")[:PROMPTS]
    return torch.from_numpy(full[lowest]).long()


def _log(model: str, verdict: Verdict, resources: Resources) -> None:
    """Keep the verdict with the model, if it is registered."""
    if is_registered(model):
        uri = tracking_uri(resources)
        registry.keep_verdict(uri, model, verdict.format, verdict.passed, verdict.model_dump(mode="json"))


def _show(verdict: Verdict, out: Path, console: Console) -> None:
    comparisons = {
        "under fp32 activations": (verdict.exact, verdict.exact_floors),
        f"with activations in {verdict.activations}": (verdict.as_it_runs, verdict.as_it_runs_floors),
        "beside the package as it was scored": (verdict.as_scored, None),
    }
    rows = [_row(name, measured, floors) for name, (measured, floors) in comparisons.items() if measured is not None]
    whole = "" if verdict.whole_steps == verdict.steps else f" of {verdict.whole_steps:,}"
    columns = (
        f"{verdict.steps:,} tokens",
        f"KL(package || export), nats{whole}",
        "same likeliest token",
        f"perplexity{whole}",
    )
    print_table(console, columns, rows, title=f"{verdict.format}, verified by {verdict.runtime}: {out}")
    if verdict.read_back_error is not None:
        console.print(
            f"{verdict.tensors_read_back} tensors read back, at most {verdict.read_back_error:.2g} off a level"
        )
    console.print(f"bytes of package; export: {verdict.package_bytes:,}; {verdict.bytes:,}")
    for note in verdict.notes:
        console.print(note)
    if (serve_command := getattr(format_named(verdict.format).load(), "serve_command", None)) is not None:
        console.print(f"serve it: {serve_command(out)}")


def _row(name: str, measured: Comparison, floors: Floors | None) -> tuple[str, str, str, str]:
    """Return a comparison, each number with its floor, for people."""
    kl, same = f"{measured.kl_nats:.2g}", f"{measured.agreement:.2%}"
    perplexity = f"{measured.perplexity:.4f}, {measured.perplexity_change:+.3%}"
    if floors is None:
        return name, kl, same, perplexity
    return (
        name,
        f"{kl} (at most {floors.max_kl_nats:.2g})",
        f"{same} (at least {floors.least_agreement:.0%})",
        f"{perplexity} (within {floors.max_perplexity_change:.1%})",
    )
