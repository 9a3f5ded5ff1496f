"""What the chat writes: answers as they come, made harmless, and everything around them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Final, TextIO

from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vipllava.serve.terminal.harmless import harmless
from vipllava.serve.terminal.pictures import Protocol, has_true_colour, write_picture

_HINT: Final = "bright_black"


class Output:
    """Where the chat writes to.

    Args:
        answers: where they go as they come; None for nowhere.
        aside: where everything else goes: the same terminal, or the error stream of a script.
        protocol: how pictures are shown.
        environment: variables that say what the terminal can.
    """

    def __init__(
        self,
        answers: TextIO | None,
        aside: TextIO,
        protocol: Protocol,
        environment: Mapping[str, str],
    ) -> None:
        self.protocol: Protocol = protocol
        self._answers = answers
        self._aside = aside
        self._true_colour = has_true_colour(environment)
        file: IO[str] = aside
        self._console = Console(file=file, highlight=False, emoji=False, markup=False)
        self._at_line_start = True

    def piece(self, text: str) -> None:
        """Write the next piece of an answer at once."""
        if text and self._answers is not None:
            self._answers.write(harmless(text))
            self._answers.flush()
            self._at_line_start = text.endswith("\n")

    def end_line(self) -> None:
        """End the line that an answer has begun."""
        if not self._at_line_start:
            self.piece("\n")

    def say(self, text: str) -> None:
        """Write a line about what was done."""
        self._line(text, "")

    def hint(self, text: str) -> None:
        """Write a line that helps, in grey."""
        self._line(text, _HINT)

    def error(self, error: object) -> None:
        """Write what went wrong."""
        self._line(f"error: {error}", "red")

    def table(self, rows: Iterable[tuple[str, ...]], headers: tuple[str, ...] = ()) -> None:
        """Write texts in columns."""
        self.end_line()
        table = Table(box=None, show_header=bool(headers), pad_edge=False, padding=(0, 2, 0, 0))
        rows = list(rows)
        for number in range(max(map(len, rows), default=0)):
            header = headers[number] if headers else ""
            table.add_column(header, no_wrap=number == 0, overflow="fold")
        for row in rows:
            table.add_row(*(Text(harmless(cell)) for cell in row))
        self._console.print(table)

    def picture(self, image: Image.Image, path: Path) -> None:
        """Show a picture where the terminal can, and say where it lies."""
        self.end_line()
        size = self._console.size
        write_picture(self._aside, image, self.protocol, size, true_colour=self._true_colour)
        self.hint(f"what the model sees: {path}")

    def _line(self, text: str, style: str) -> None:
        self.end_line()
        self._console.print(Text(harmless(text), style=style), soft_wrap=True)
