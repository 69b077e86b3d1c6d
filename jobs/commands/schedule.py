"""Commands on what a schedule decided: rollback, history, lineage."""

from __future__ import annotations

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

    It stands until new data, or another recipe, makes a challenger that was not decided on before.
    """
    from jobs.schedule.retrain import standing
    from pipeline.retrain.rollback import rollback as run

    decision = run(name, to, reason, resources)
    console.print(standing(decision))
    return decision.model_dump(mode="json")


@command(commands)
def history(console: Console, resources: Any, name: ModelName) -> dict[str, Any]:
    """Show every decision on a name: who became champion when, and why."""
    from jobs.schedule.history import history as run

    return run(name, resources, console)


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
