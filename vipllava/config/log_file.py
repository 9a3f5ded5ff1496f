"""The log file of a run."""

from __future__ import annotations

import logging
import sys


class LogFile(logging.FileHandler):
    """A log file whose disk may be full: that ends the run, like any other write.

    Python's own prints a traceback for every line and goes on. The file is UTF-8 everywhere.

    Args:
        filename: the file; lines are added at its end.
    """

    def __init__(self, filename: str) -> None:
        super().__init__(filename, encoding="utf-8", errors="backslashreplace")

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise what the disk says, with the file's name; anything else is the line's own fault."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            error.filename = error.filename or self.baseFilename
            raise error
        super().handleError(record)
