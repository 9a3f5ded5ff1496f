"""The tars that a process has open, by their numbers."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict


class OpenFile:
    """A file that stays open as long as someone holds this object."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Read at a place, without a position that threads or processes would share."""
        data = b""
        while len(data) < size:
            more = os.pread(self.descriptor, size - len(data), offset + len(data))
            if not more:
                break
            data = data + more if data else more
        return data


class OpenFiles:
    """The files that were used last.

    Args:
        most: files that are kept open.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.process = os.getpid()
        self._files: OrderedDict[int, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, number: int) -> OpenFile | None:
        """Return a file, or None if it is not open."""
        with self._lock:
            if (file := self._files.get(number)) is not None:
                self._files.move_to_end(number)
            return file

    def put(self, number: int, file: OpenFile) -> OpenFile:
        """Keep a file; returns the one that another thread has put first, if one has."""
        with self._lock:
            file = self._files.setdefault(number, file)
            self._files.move_to_end(number)
            if len(self._files) > self.most:
                self._files.popitem(last=False)
            return file

    def drop(self, number: int) -> None:
        """Open a file anew when it is wanted again."""
        with self._lock:
            self._files.pop(number, None)
