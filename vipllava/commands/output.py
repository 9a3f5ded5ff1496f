"""How commands print: texts, tables, JSON, progress. rich is imported late, for ``--help``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from vipllava.serve.terminal.harmless import as_json, harmless

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

Tell = Callable[[str, str, int, int | None], None]
"""Is told a task's name, its unit, how much is done, and how much there is, if that is known."""


_PIPED: Final = 1000
"""Columns where nobody said how wide a page is: what reads a pipe wants whole lines."""


def make_console() -> Console:
    """Return the standard output, as wide as the terminal; a pipe is as wide as a line is long."""
    from rich.console import Console

    console = Console()
    narrow = console.is_terminal or "COLUMNS" in os.environ
    return console if narrow else Console(width=_PIPED)


def print_table(table: Table) -> None:
    """Print a table, as wide as the terminal."""
    make_console().print(table)


def say(text: str) -> None:
    """Print a text as it is: brackets are no markup, and long lines are not broken.

    What a terminal would obey is shown instead, as in tables and errors.
    """
    from rich.console import Console
    from rich.text import Text

    Console().print(Text(harmless(text)), soft_wrap=True)


def print_json(content: object) -> None:
    """Print a value as JSON, and nothing around it."""
    sys.stdout.write(as_json(content, indent=2) + "\n")


def facts_table(
    facts: Iterable[tuple[str, str]], title: str | None = None, indent: int = 0
) -> Table:
    """Return a table of names and values without lines, below a title in bold.

    A fact whose value is empty is left out.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title, title_justify="left", title_style="bold", show_header=False, box=None,
        padding=(0, 2, 0, indent),
    )  # fmt: skip
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        if value:
            table.add_row(Text(harmless(name)), Text(harmless(value)))
    return table


def rows_table(
    title: str,
    headers: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    right: Sequence[str] = (),
    whole: Sequence[str] = (),
    spare: Sequence[str] = (),
    console: Console | None = None,
    **look: Any,
) -> Table:
    """Return a table with lines, whose texts are no markup.

    Where a terminal is too narrow, columns are left out rather than words broken, and the table
    says which.

    Args:
        title: above it; empty for none.
        headers: a text per column.
        rows: a text per column.
        right: headers of the columns that stand on the right, such as numbers.
        whole: headers of the columns that are not broken.
        spare: headers of the columns that may be left out, the first one first.
        console: where it is printed; the standard output if not given.
        look: more of :class:`rich.table.Table`.
    """
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    console = console or make_console()
    endless = console.options.update_width(_PIPED)
    cells = [[Text(harmless(c)) if isinstance(c, str) else c for c in row] for row in rows]
    for num_left_out in range(len(spare) + 1):
        left_out = spare[:num_left_out]
        table = Table(title=title or None, **look)
        kept = [number for number, header in enumerate(headers) if header not in left_out]
        for header in (headers[number] for number in kept):
            justify = "right" if header in right else "left"
            table.add_column(header, justify=justify, overflow="fold", no_wrap=header in whole)
        for row in cells:
            table.add_row(*(row[number] for number in kept))
        if left_out:
            caption = look.get("caption") or ""
            table.caption = f"{caption} too narrow for: {', '.join(left_out)}".strip()
        if Measurement.get(console, endless, table).maximum <= console.width:
            break
    return table


@contextmanager
def progress_bars(console: Console | None = None) -> Iterator[Tell]:
    """Draw one bar per task on the error stream; tables and JSON stay on the other.

    The unit ``bytes`` is written as such, any other is counted. A finished bar stays as one line.
    Nothing is drawn where no terminal is: a log file is no place for bars.
    """
    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    tasks: dict[str, TaskID] = {}
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
        console=console or Console(stderr=True, quiet=not sys.stderr.isatty()),
    )

    def tell(task: str, unit: str, done: int, total: int | None) -> None:
        if task not in tasks:
            tasks[task] = progress.add_task(task, total=total, amount="")
        number, after = (decimal, "") if unit == "bytes" else (str, f" {unit}")
        amount = number(done) if total is None else f"{number(done)} of {number(total)}"
        progress.update(tasks[task], completed=done, total=total, amount=amount + after)

    with progress:
        yield tell
