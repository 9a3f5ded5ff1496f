"""``vipllava doctor``: what a machine has, what is wrong with it, and what to do about it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vipllava.commands.options import Json
from vipllava.commands.output import print_json

if TYPE_CHECKING:
    from rich.console import Console

    from vipllava.commands.doctor_sections import Row, Section

EXIT_PROBLEM: Final = 1
_STYLES: Final = {"ok": "", "warning": "yellow", "problem": "bold red"}
_PIPED_WIDTH: Final = 160


def doctor(
    as_json: Json = False,
    no_network: Annotated[
        bool, typer.Option("--no-network", help="Do not let two processes talk to each other.")
    ] = False,
) -> int:
    """Say what this machine has and lacks.

    Versions, devices, kernels, network, disk, extras: for a new machine, and for a bug report.
    Exit code 1 if something is wrong.
    """
    from rich.console import Console

    from vipllava.commands.doctor_facts import look
    from vipllava.commands.doctor_sections import sections

    found = sections(look(network=not no_network))
    if as_json:
        print_json(as_values(found))
    else:
        print_sections(found, Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH))
    return EXIT_PROBLEM if _rows_with("problem", found) else 0


def as_values(found: Sequence[Section]) -> dict[str, Any]:
    """Return the sections as plain values, with the worst status of all."""
    worst = next((s for s in ("problem", "warning") if _rows_with(s, found)), "ok")
    return {
        "status": worst,
        "sections": {section.title: [asdict(row) for row in section.rows] for section in found},
    }


def print_sections(found: Sequence[Section], console: Console) -> None:
    """Print a table for each section, then what is bad with its remedies."""
    from rich.table import Table
    from rich.text import Text

    for section in found:
        table = Table(
            title=section.title, title_justify="left", title_style="bold", show_header=False,
            box=None, padding=(0, 2, 0, 2),
        )  # fmt: skip
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        table.add_column(overflow="fold")
        for row in section.rows:
            status = "" if row.status == "ok" else row.status
            # What is bad has its remedy below.
            last = Text(status, style=_STYLES[row.status]) if status else Text(row.remedy)
            table.add_row(Text(row.name), Text(row.value), last)
        console.print(table)
        console.print()
    for status in ("problem", "warning"):
        for title, row in _rows_with(status, found):
            style = _STYLES[status]
            console.print(Text(f"{status}: {title}, {row.name}: {row.value}", style=style))
            console.print(Text(f"  -> {row.remedy}"))
    counts = [len(_rows_with(status, found)) for status in ("problem", "warning")]
    if not any(counts):
        console.print(Text("nothing is wrong", style="green"))


def _rows_with(status: str, found: Sequence[Section]) -> list[tuple[str, Row]]:
    return [(s.title, row) for s in found for row in s.rows if row.status == status]
