"""Commands on what a schedule decided and made: rollback, history, lineage, gc."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from jobs.commands.options import command

commands = typer.Typer()
ModelName = Annotated[str, typer.Argument(metavar="NAME", help="A registered name.")]


@command(commands)
def rollback(
    console: Console,
    resources: Any,
    name: ModelName,
    reason: Annotated[str, typer.Option(help="Why; kept with the decision.")],
    to: Annotated[
        int | None, typer.Option("--to", min=1, metavar="VERSION", help="By default the previous champion.")
    ] = None,
) -> dict[str, Any]:
    """Take a promotion back: the alias champion goes to the version before.

    It stands until new data, or another recipe, makes a challenger that was not decided on before. It waits for no
    tick: one that is under way decides nothing, and what it trained is kept for the next.
    """
    from jobs.schedule.retrain import standing
    from pipeline.retrain.rollback import rollback as run

    decision = run(name, to, reason, resources)
    console.print(standing(decision))
    return decision.model_dump(mode="json")


@command(commands)
def history(
    console: Console,
    resources: Any,
    name: ModelName,
    out: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw measure and bytes over time.")] = None,
) -> dict[str, Any]:
    """Show every tick and decision on a name: who became champion when, and why. The report of a run shows them too.

    Ticks in a row that decided nothing (`unchanged`, `busy`, or `failed`, with the error) are one line.
    """
    from jobs.schedule.history import history as run

    return run(name, out, resources, console)


@command(commands)
def lineage(
    console: Console,
    resources: Any,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="name@alias, name/version, or a file of text.")],
) -> dict[str, Any]:
    """Show what a version was made of: data by content, recipes, code and libraries; and what else was made of the
    same.

    Of a file of text: which versions it went into.
    """
    from jobs.schedule.lineage import lineage as run

    return run(model, resources, console)


@command(commands)
def gc(
    console: Console,
    resources: Any,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would go and why; deletes nothing.")] = False,
    keep: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Newest versions of each name that keep all that made them; by default retrain.keep of its schedule's "
            "last tick, 3 of a name without a schedule.",
        ),
    ] = None,
    grace: Annotated[float, typer.Option(min=0, metavar="HOURS", help="What was written within so many stays.")] = 24,
) -> dict[str, Any]:
    """Delete what no registered version, running command or grace period needs: rows, caches, checkpoints and latent
    weights of older versions, trials and challengers given up, unfinished steps, temporary files of this machine.

    Never packages, scores and registrations of what was registered, nor what `lineage` says of it, nor decisions.
    Champion, previous and every version with an alias keep all that made them, as the newest do, and a tick that was
    begun and not decided, or ended by worker-hours, what it goes on from. What is gone, a command that needs it makes
    again. If the registry cannot be reached, nothing is deleted. Safe beside running commands.
    """
    from jobs.schedule.gc import collect

    return collect(resources, keep, grace, plan, console)
