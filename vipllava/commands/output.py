"""How commands print: plain texts, tables of facts, JSON. rich is imported late, for ``--help``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def print_table(table: Table) -> None:
    """Print a table, as wide as the terminal."""
    from rich.console import Console

    Console().print(table)


def say(text: str, style: str = "") -> None:
    """Print a text as it is: brackets are no markup, and long lines are not broken."""
    from rich.console import Console
    from rich.text import Text

    Console().print(Text(text, style=style), soft_wrap=True)


def print_json(content: object) -> None:
    """Print a value as JSON, and nothing around it."""
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def facts_table(
    facts: Iterable[tuple[str, str]], title: str | None = None, indent: int = 0
) -> Table:
    """Return a table of names and values without lines; a title stands above, in bold."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title, title_justify="left", title_style="bold", show_header=False, box=None,
        padding=(0, 2, 0, indent),
    )  # fmt: skip
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(value))
    return table
