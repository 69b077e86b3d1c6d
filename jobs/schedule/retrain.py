"""`bitmill retrain`: one tick of a schedule, shown; what the gate asks beside scores; who is told of the decision."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from jobs.compress import print_shared, watched
from jobs.display import print_table, print_warnings
from pipeline.config.retrain import PromotionGate
from pipeline.config.run import Config
from pipeline.errors import UnfitExportError
from pipeline.flow.plan import reasons
from pipeline.retrain.decisions import Decision
from pipeline.retrain.gate import Evidence
from pipeline.retrain.tick import Tick, Verdict, plan_tick, run_tick
from pipeline.store.records import ModelVersion, Package
from pipeline.store.step_store import FinishedStep

TELL_S = 60.0  # that the command of retrain.on_decision may take


def retrain(config: Config, console: Console, *, force: bool, only_plan: bool) -> dict[str, Any]:
    """Run (or only plan) one tick and print for people on `console`; returns the document of `--json`."""
    if only_plan:
        tick = plan_tick(config, force)
        document = plan_document(tick)
        print_plan(tick, document, console)
        return document
    listens, proves = partial(watched, console=console), partial(prove, console=console)
    verdict = run_tick(config, listens, proves, force, partial(tell, config, console=console))
    print_verdict(verdict, console)
    return verdict_document(verdict)


def plan_document(tick: Tick) -> dict[str, Any]:
    """Return the document of `--plan --json`."""
    return {
        "name": tick.name,
        "champion": None if tick.champion is None else tick.champion.version,
        "decided": None if tick.decided is None else tick.decided.model_dump(mode="json"),
        "challengers": [
            {
                "recipe": recipe,
                "run_key": plan.run_key,
                "stages": [
                    {"stage": s.name, "key": s.key, "status": "reused" if s.record else "run"} for s in plan.steps
                ],
            }
            for recipe, plan in tick.challengers
        ],
    }


def print_plan(tick: Tick, document: dict[str, Any], console: Console) -> None:
    """Print which challengers a tick would make, and why, for people."""
    champion = "none so far" if tick.champion is None else f"version {tick.champion.version}"
    console.print(f"{tick.name}: champion {champion}")
    if tick.decided is not None:
        console.print(f"nothing to do: {tick.decided.decision} on {tick.decided.at}: {tick.decided.reason}")
    for recipe, plan in tick.challengers:
        why = reasons(plan)
        rows = [(s.name, s.key[:12], "reused" if s.record else "would run", why[s.name]) for s in plan.steps]
        print_table(console, ("stage", "key", "status", "why"), rows, title=f"challenger, {recipe}")
        print_warnings(console, plan.warnings)
        print_shared(plan.overlap, console)


def verdict_document(verdict: Verdict) -> dict[str, Any]:
    """Return the document of `--json`: what came of the tick, and the last decision on the name with all its
    numbers."""
    decision = verdict.decision
    return {
        "decision": verdict.outcome,
        "reason": verdict.reason,
        "champion": verdict.champion,
        "challenger": None if decision is None else decision.challenger,
        "details": None if decision is None else decision.model_dump(mode="json"),
    }


def print_verdict(verdict: Verdict, console: Console) -> None:
    """Print what came of a tick, rule by rule, for people."""
    decision = verdict.decision
    if decision is not None and decision.rulings and verdict.outcome in ("promoted", "rejected"):
        style = {True: Text("passed", "green"), False: Text("failed", "red")}
        rows = [(ruling.rule, style[ruling.passed], ruling.said) for ruling in decision.rulings]
        print_table(console, ("rule", "", "what was measured"), rows)
        console.print(f"decided by {decision.decided_by}")
    console.print(f"{verdict.outcome}: {verdict.reason}", soft_wrap=True)
    console.print(standing(verdict))


def standing(decided: Verdict | Decision) -> str:
    """Return where the aliases are, for people."""
    champion, previous = (
        "none" if version is None else f"version {version}" for version in (decided.champion, decided.previous)
    )
    return f"champion {champion}, previous {previous}"


def prove(config: Config, package: FinishedStep[Package], version: ModelVersion, console: Console) -> Evidence:
    """Measure and export what the gate asks of a challenger beside its scores."""
    gate = PromotionGate() if config.retrain is None else config.retrain.gate
    milliseconds = None
    if gate.max_latency_ms is not None:
        from jobs.report import latency  # beside what draws, which no other tick need import

        latency.measure([("challenger", package)], console)
        measured = latency.measured(package)
        milliseconds = None if measured is None else measured.median_ms
    flaws: dict[str, str] = {name: _export_flaw(version, name, config, console) for name in gate.exports}
    return Evidence(milliseconds, flaws)


def _export_flaw(version: ModelVersion, name: str, config: Config, console: Console) -> str:
    """Export a version, and return why it cannot be kept; empty if it was verified. The export itself is dropped.
    Raises what else goes wrong, so that the tick decides nothing."""
    from jobs.export import export  # runtimes, which a tick without exports need not import

    with tempfile.TemporaryDirectory() as folder:
        try:
            export(f"{version.name}/{version.version}", name, Path(folder) / "out", None, 1, config.resources, console)
        except UnfitExportError as error:
            return str(error)
    return ""


def tell(config: Config, decision: Decision, console: Console) -> bool:
    """Give a decision to the user's command as JSON, and tell whether it arrived, or nobody wants it. That it did not
    is said, and changes nothing: the next tick tries again."""
    command = None if config.retrain is None else config.retrain.on_decision
    if command is None:
        return True
    try:
        done = subprocess.run(
            shlex.split(command),
            input=decision.told(),
            text=True,
            errors="replace",
            capture_output=True,
            timeout=TELL_S,
            check=False,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        console.print(f"retrain.on_decision {command!r} could not be run: {error}", style="yellow")
        return False
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it said nothing"]
        console.print(f"retrain.on_decision {command!r} ended with status {done.returncode}: {last[0]}", style="yellow")
    return not done.returncode
