"""What `bitmill inspect` shows to people."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column

from jobs.display import print_table
from pipeline.flow.inspection import Inspection

MIB = 2**20


def show(inspected: Inspection, console: Console) -> None:
    """Print a table of the matrices, one of sizes, what takes the model, and what is unusual."""
    own = inspected.family == inspected.model_type
    kind = inspected.family if own else f"{inspected.model_type} as {inspected.family}"
    console.print(f"{inspected.model}: {kind}, {inspected.parameters:,} parameters", soft_wrap=True, markup=False)
    numbers = [Column(name, justify="right") for name in ("matrices", "rows", "columns", "weights")]
    rows = (
        [m.name, str(m.count), f"{m.rows:,}", f"{m.columns:,}", f"{m.count * m.rows * m.columns:,}"]
        for m in inspected.matrices
    )
    print_table(console, ["quantized", *numbers], rows, box=SIMPLE_HEAD)
    sizes = {"fp32": inspected.fp32_bytes, **inspected.packed_bytes}
    sized = ([bits, f"{size / MIB:.2f}", f"{inspected.fp32_bytes / size:.1f}"] for bits, size in sizes.items())
    headings = [Column(name, justify="right") for name in ("MiB", "times smaller")]
    print_table(console, ["bits, a scale a row", *headings], sized, box=SIMPLE_HEAD)
    for name, reason in inspected.takes.items():
        console.print(f"  {name}: {reason or 'yes'}", soft_wrap=True, markup=False)
    sizes_of_groups = ", ".join(map(str, inspected.groups)) or "none, for the rows of all are no whole groups"
    console.print(f"  per_group, wherever it is taken: {sizes_of_groups}", soft_wrap=True, markup=False)
    for told in inspected.unusual or ("Nothing is unusual.",):
        console.print(told, style="yellow" if inspected.unusual else None, soft_wrap=True, markup=False)
