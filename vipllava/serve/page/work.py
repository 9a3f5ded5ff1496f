"""The page's work on pictures: a few threads of its own, places to wait for them, and memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar, TypeVarTuple, Unpack

from vipllava.files.pools import threads_beside_a_loop
from vipllava.serve.admission import Admission
from vipllava.serve.limits import Memory
from vipllava.serve.settings import MB, ServerSettings

Args = TypeVarTuple("Args")
T = TypeVar("T")
_MOST_WAITING: Final = 64


class Lane:
    """A few threads, and a bound on those that wait for them; used from one event loop."""

    def __init__(self, num_threads: int) -> None:
        self._places = Admission(num_threads, _MOST_WAITING, "the page")
        self._workers = threads_beside_a_loop(num_threads, "page")

    async def run(self, job: Callable[[Unpack[Args]], T], *args: *Args) -> T:
        """Return what a job returns that one of the threads does.

        It is not begun if the caller is cancelled before its turn.

        Raises:
            ApiError: 429; too many wait.
        """
        with self._places.enter() as place:
            await place.start()
            return await asyncio.get_running_loop().run_in_executor(self._workers, job, *args)

    def close(self) -> None:
        """Drop what waits, and wait for what runs: seconds, since drawing is bounded."""
        self._workers.shutdown(wait=True, cancel_futures=True)


class PictureWork:
    """Who does what with pictures, for all open pages; to be closed.

    Args:
        memory: of pictures being asked about and of bodies; the server's, or one of its size.
    """

    def __init__(self, memory: Memory | None = None) -> None:
        self.memory = memory or Memory(int(ServerSettings().picture_memory_mb * MB))
        self.drawing = Lane(2)  # and decoding and encoding
        self.planning = Lane(1)  # which a person that draws waits for

    def close(self) -> None:
        """Close both lanes."""
        self.drawing.close()
        self.planning.close()
