"""`make demo-retrain`: a schedule in four ticks on conversations that come in slices, a rollback, and the lineage of
both champions.

Every line that begins with $ is a command that a person or a scheduler would give.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from jobs.commands.options import VARIABLES, open_console
from pipeline.sources.packaged import packaged_texts

NAME, CONFIG = "retrain-chitchat", "configs/retrain-chitchat.yaml"
FOLDER = Path("bitmill-demo")
TEXT = FOLDER / "text"
SLICE = 800  # conversations
UNCHANGED_S = 5  # that a tick without new data may take
TICK = f"retrain {CONFIG} --json"
STORE = "--storage-uri bitmill-demo/store"
CONSOLE = open_console()


def main() -> None:
    """Run the demonstration in the current directory, below bitmill-demo, of which what an earlier one left is
    deleted."""
    for left in (TEXT, FOLDER / "store"):
        shutil.rmtree(left, ignore_errors=True)
    conversations = list(packaged_texts("chitchat"))
    say("The first tick: a slice of text, and no champion yet.")
    grow(conversations, 1)
    expect("promoted", TICK)
    say("More text came: a challenger by the same recipe meets the champion on rows that neither was trained on.")
    grow(conversations, 3)
    expect("promoted", TICK)
    say("More text, and a recipe that somebody spoilt.")
    grow(conversations, 4)
    expect("rejected", f"{TICK} --set distill.lr=1e-7")
    say(f"The same again: nothing is new, which is to take less than {UNCHANGED_S} s.")
    expect("unchanged", f"{TICK} --set distill.lr=1e-7", within_s=UNCHANGED_S)
    say("Somebody wants the first one back.")
    bitmill(f"rollback {NAME} --reason 'the new one is too chatty' {STORE}")
    bitmill(f"history {NAME} {STORE}")
    say("What both were made of, and what else was made of the same.")
    bitmill(f"lineage {NAME}@champion {STORE}")
    bitmill(f"lineage {NAME}@previous {STORE}")


def say(text: str) -> None:
    """Print what comes next, for people."""
    CONSOLE.print(f"\n{text}")


def grow(conversations: list[str], slices: int) -> None:
    """Write the first so many slices, each a file of rows."""
    TEXT.mkdir(parents=True, exist_ok=True)
    for number in range(slices):
        part = conversations[number * SLICE : (number + 1) * SLICE]
        lines = [json.dumps({"text": text}) + "\n" for text in part]
        (TEXT / f"slice-{number}.jsonl").write_text("".join(lines), encoding="utf-8")


def bitmill(arguments: str) -> str:
    """Run a command as a person would, shown; return what it printed on stdout. Store and registry are those of the
    demonstration, which begins without a champion, whatever the environment names."""
    CONSOLE.print(f"$ bitmill {arguments}", soft_wrap=True)
    command = [sys.executable, "-m", "jobs.cli", *shlex.split(arguments)]
    own = {name: value for name, value in os.environ.items() if name not in VARIABLES.values()}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=own).stdout


def expect(decision: str, arguments: str, within_s: float = math.inf) -> None:
    """Run a tick and say how long it took; stop the demonstration if it decides otherwise, or takes longer: it would
    show what is not so."""
    begun = time.monotonic()
    document = json.loads(bitmill(arguments))
    took_s = time.monotonic() - begun
    CONSOLE.print(f"{document['decision']} after {took_s:.1f} s")
    if document["decision"] != decision:
        sys.exit(f"The tick was to be {decision}, and was {document['decision']}: {document['reason']}")
    if took_s >= within_s:
        sys.exit(f"The tick was to take less than {within_s:g} s, and took {took_s:.1f} s.")


if __name__ == "__main__":
    main()
