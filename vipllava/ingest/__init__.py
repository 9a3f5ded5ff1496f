"""What makes and checks data sets before training: fetch, build, check, lint."""

from collections.abc import Callable

Tell = Callable[[str, str, int, "int | None"], None]
"""Told a task's name, its unit (``bytes`` or what is counted), how much is done, of how much."""


def tell_nobody(task: str, unit: str, done: int, total: int | None) -> None:
    """Leave progress untold."""
