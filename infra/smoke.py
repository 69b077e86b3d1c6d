"""Compress, sweep, look up and retrain once, as jobs of a cluster: the proof that all its parts work together.

    python infra/smoke.py

Reads what every command reads: RAY_API_SERVER_ADDRESS, RAY_AUTH_TOKEN, BITMILL_STORAGE_URI (an s3:// URI),
MLFLOW_TRACKING_URI with its user and password, and the AWS variables. Writes below `smoke/` of the store alone; given
again, it reuses what is there. Takes a few minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from string import Template
from typing import Any

import boto3

TEXTS = sorted(topics.values())
HALF = len(TEXTS) // 2


def bitmill(*arguments: str) -> Any:
    """Run a command, its log on stderr, and return the document of its `--json`."""
    print("$ bitmill", *arguments, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "jobs.cli", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(f"smoke: bitmill {' '.join(arguments[:2])} ended with exit status {done.returncode}")
    return json.loads(done.stdout)


def put(uri: str, texts: list[str]) -> None:
    """Store texts in S3, one a line."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=lines.encode())


def expect(holds: bool, what: str) -> None:
    """End, saying what went otherwise, unless it holds."""
    if not holds:
        sys.exit(f"smoke: {what}")
    print(f"smoke: {what}: as expected", file=sys.stderr, flush=True)


def smoke(bitmill: Callable[..., Any]) -> dict[str, Any]:
    """Run it all by the commands that are given, and return what is printed."""
    store = os.environ["BITMILL_STORAGE_URI"].rstrip("/")
    text = f"{store}/smoke/text"
    put(f"{text}/first.jsonl", TEXTS[:HALF])
    with tempfile.TemporaryDirectory() as folder:
        config = str(Path(folder, "smoke.yaml"))
        Path(config).write_text(Template(Path(__file__).with_suffix(".yaml").read_text()).substitute(TEXT=text))
        compressed = bitmill("submit", "compress", config)
        expect(compressed["model_version"] is not None, "compress registers a version")
        swept = bitmill("submit", "sweep", config)
        expect([trial["status"] for trial in swept["trials"]] == ["done", "done"], "both trials of the sweep are done")
        smallest = min(trial["size"]["packed_bytes"] for trial in swept["trials"])
        models = bitmill("lookup", "--name", "smoke", "--order-by", "packed_bytes", "--limit", "1")
        expect(models[0]["size_mib"] * 2**20 <= smallest + 1, "lookup finds the smallest")
        decided = bitmill("submit", "retrain", config)
        expect(decided["decision"] in ("promoted", "rejected", "unchanged"), "a tick decides")
        put(f"{text}/second.jsonl", TEXTS[HALF:])
        decided = bitmill("submit", "retrain", config)
        expect(decided["decision"] in ("promoted", "rejected", "unchanged"), "a tick on more text decides")
        again = bitmill("submit", "retrain", config)
        expect(again["decision"] == "unchanged", "a tick without new text finds nothing to do")
    return {"smoke": "passed", "champion": again["champion"]}


if __name__ == "__main__":
    print(json.dumps(smoke(bitmill)))
