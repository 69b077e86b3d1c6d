"""`bitmill lineage`: what a version was made of and what else was, or which versions a file of text went into."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.tree import Tree

from pipeline.config.resources import Resources
from pipeline.flow.line import LINE
from pipeline.flow.lineage import Lineage, data_of, lineage_of, made_of, step_dirs_of, trained_on_from
from pipeline.retrain.decisions import Decisions
from pipeline.sources.content import ContentMemo
from pipeline.sources.files import pin_text
from pipeline.store.locations import make_scratch_dir, tracking_uri
from pipeline.store.records import Tokens
from pipeline.tracking import registry
from pipeline.tracking.lookup import reach
from pipeline.tracking.registry import Registered

SHORT = 12  # digits of a key, for people


def lineage(model: str, resources: Resources, console: Console) -> dict[str, Any]:
    """Print a tree; returns the document of `--json`. Raises ConfigError for what is neither a version nor a text."""
    client = reach(tracking_uri(resources))
    everything = registry.registered_versions(client)
    if os.path.isfile(model) or "://" in model:
        return _of_text(model, everything, resources, console)
    version = registry.described(registry.resolve(client, model))
    ancestry = lineage_of(version, everything, step_dirs_of(resources))
    document = _document(ancestry, resources)
    console.print(_tree(ancestry, document))
    return document


def _of_text(source: str, versions: Sequence[Registered], resources: Resources, console: Console) -> dict[str, Any]:
    files = pin_text(source, "MODEL", ContentMemo(make_scratch_dir(resources)))
    document = dict[str, Any]()
    for file in files:
        went = made_of(file.content, versions, step_dirs_of(resources))
        named = {split: [v.title for v in of_split] for split, of_split in went.items()}
        trained_on = trained_on_from([v for of_split in went.values() for v in of_split], versions)
        document[file.uri] = {"content": file.content, "versions": named, "trained_on_from_these": trained_on}
        tree = Tree(f"{file.uri} ({file.content[:SHORT]})")
        for split, titles in named.items():
            tree.add(f"source of {split}: {', '.join(titles)}")
        if trained_on:
            tree.add(f"trained on from these: {', '.join(trained_on)}")
        if not named:
            tree.add("no registered version was made of it, as far as this store knows")
        console.print(tree)
    return document


def _document(ancestry: Lineage, resources: Resources) -> dict[str, Any]:
    version = ancestry.version
    decisions = [
        d for d in Decisions.of(version.name, resources).all() if version.version in (d.champion, d.challenger)
    ]
    return {
        "name": version.name,
        "version": version.version,
        "digest": version.digest,
        "package_uri": version.package_uri,
        "data": {
            split: [
                {**file, "shared_with": [v.title for v in ancestry.sharing_text.get(file["content"], [])]}
                for file in files
            ]
            for split, files in data_of(ancestry.steps.get(Tokens.stage)).items()
        },
        "steps": {
            stage.name: {
                "key": step.record.key,
                "inputs": step.record.inputs,
                "recipe": step.record.recipe,
                "provenance": step.record.provenance,
                "uri": step.dir.uri,
                "files_gone": stage.name in ancestry.gone,
            }
            for stage in LINE
            if (step := ancestry.steps.get(stage.name)) is not None
        },
        "ancestors": ancestry.ancestors,
        "descendants": ancestry.descendants,
        "shared": {stage: [v.title for v in others] for stage, others in ancestry.shared.items()},
        "decisions": [decision.model_dump(mode="json") for decision in decisions],
    }


def _tree(ancestry: Lineage, document: dict[str, Any]) -> Tree:
    """Return the steps, the last one first, each below what was made of it; recipes are in the document alone."""
    root = branch = Tree(f"{ancestry.version.title}, digest {ancestry.version.digest[:SHORT]}")
    for decision in reversed(document["decisions"]):
        root.add(f"{decision['at']} {decision['decision']}: {decision['reason']}")
    if ancestry.ancestors:
        root.add(f"trained on from {', which was from '.join(ancestry.ancestors)}")
    if ancestry.descendants:
        root.add(f"trained on from this: {', '.join(ancestry.descendants)}")
    for stage, step in reversed(document["steps"].items()):
        ran = step["provenance"]
        code = f"bitmill {ran.get('bitmill', '?')} at {ran.get('commit', '?')[:SHORT]}, torch {ran.get('torch', '?')}"
        files = "; its files are gone" if step["files_gone"] else ""
        branch = branch.add(
            f"{stage} {step['key'][:SHORT]}: {ran.get('date', '?')} on {ran.get('machine', '?')}, {code}{files}"
        )
        if others := document["shared"].get(stage):
            branch.add(f"shared with {', '.join(others)}")
    for split, files in document["data"].items():
        texts = branch.add(f"data of {split}: {len(files)} files")
        for file in files:
            others = ", ".join(file["shared_with"])
            texts.add(f"{file['content'][:SHORT]} ({file['format']}){others and f', shared with {others}'}")
    missing = [stage.name for stage in LINE if stage.name not in document["steps"]]
    if missing:
        root.add(f"not in this store: {', '.join(missing)}")
    return root
