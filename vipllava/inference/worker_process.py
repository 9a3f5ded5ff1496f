"""A process with an engine, as :mod:`vipllava.inference.worker_pool` starts them; and its link.

It hears what the pool sends and nothing else: Ctrl-C and SIGTERM are the parent's, which ends its
workers; if the parent is killed, the link is closed, and the worker ends itself.
"""

from __future__ import annotations

import asyncio
import io
import logging
import logging.handlers
import os
import pickle
import sys
import threading
from collections.abc import Callable
from contextlib import aclosing, suppress
from multiprocessing.connection import Connection
from typing import Any, Final

from vipllava.inference.protocol import Delta, EngineStopped, Generation, GenerationEngine
from vipllava.processes import start_worker
from vipllava.types import VipLlavaError

logger = logging.getLogger(__name__)

OpenEngine = Callable[[str], GenerationEngine]
"""Opens the engine of a device, in the process that will use it; it can be pickled."""

UNPICKLABLE: Final = (OSError, pickle.PicklingError, TypeError, AttributeError, ValueError)
"""What pickling raises; ``OSError`` comes of an image whose file cannot be read any more."""


class Link:
    """Sends messages, each a word and a value, between a pool and one of its processes."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, word: str, value: object) -> None:
        """Send a message; from any thread.

        Raises:
            OSError: nobody reads any more.
        """
        self.send_packed(self.pack(word, value))

    def pack(self, word: str, value: object) -> bytes:
        """Return a message as it is sent; what cannot be is one of ``UNPICKLABLE``."""
        packed = io.BytesIO()
        _Pickler(packed, pickle.HIGHEST_PROTOCOL).dump((word, value))
        return packed.getvalue()

    def send_packed(self, message: bytes) -> None:
        """Send what :meth:`pack` made."""
        with self._lock:
            self._connection.send_bytes(message)

    def receive(self) -> tuple[str, Any]:
        """Wait for a message; from one thread.

        Raises:
            EOFError: the other side has ended.
            OSError: it has ended amid a message, or this side is closed.
        """
        return pickle.loads(self._connection.recv_bytes())

    def close(self) -> None:
        """End it for both sides; what is being sent meanwhile is sent first, or cannot be."""
        with self._lock:
            self._connection.close()


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        # Exceptions are made again from their message, which the constructors here may not take.
        if isinstance(obj, BaseException):
            return _rebuild, (type(obj), obj.args, obj.__dict__)
        return NotImplemented


def _rebuild(kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> Any:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class _ToParent(logging.handlers.QueueHandler):
    """Hands log records to the parent, whose log is one."""

    def __init__(self, link: Link) -> None:
        super().__init__(None)  # pyright: ignore[reportArgumentType] - `enqueue` has no need of it
        self.link = link

    def enqueue(self, record: logging.LogRecord) -> None:
        with suppress(*UNPICKLABLE):  # the parent has ended
            self.link.send("log", record)


def run_worker(
    connection: Connection, open_engine: OpenEngine, device: str, level: int, num_threads: int
) -> None:
    """Serve one device until the parent says ``end`` or is gone; the whole of a process.

    Args:
        connection: to the parent.
        open_engine: see there.
        device: its argument.
        level: of what is logged.
        num_threads: with which it computes on a CPU, unless the environment says so.
    """
    start_worker()
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))  # read when torch is imported
    link = Link(connection)
    root = logging.getLogger()
    root.setLevel(level)
    root.addHandler(_ToParent(link))
    asyncio.run(_serve(link, open_engine, device))


async def _serve(link: Link, open_engine: OpenEngine, device: str) -> None:
    loop = asyncio.get_running_loop()
    inbox: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
    threading.Thread(target=_listen, args=(link, loop, inbox), daemon=True, name="link").start()
    try:
        engine = open_engine(device)
    except VipLlavaError as error:
        _send(link, "failed", error)
        return
    link.send("ready", engine.max_positions)
    tasks: dict[str, asyncio.Task[Delta]] = {}
    while (message := await inbox.get())[0] != "end":
        word, value = message
        if word == "ask":
            key = value.request.key
            tasks[key] = task = asyncio.create_task(_answer(engine, value, link))
            task.add_done_callback(lambda task, key=key: _end(key, task, tasks, link, inbox))
        elif word == "cancel" and value in tasks:
            tasks[value].cancel()  # closes its stream
        elif word == "stopped":
            logger.error("%s: its engine has stopped: %s", device, value)
            sys.exit(1)
        elif word == "defect":
            raise value
    await engine.close()


async def _answer(engine: GenerationEngine, asked: Generation, link: Link) -> Delta:
    """Send all deltas but the last one, and return that."""
    async with aclosing(engine.generate([asked])) as deltas:
        async for delta in deltas:
            if delta.finish_reason is not None:
                return delta
            link.send("delta", delta)
    raise RuntimeError(f"request {asked.request.key!r} has no last delta")


def _end(
    key: str,
    task: asyncio.Task[Delta],
    tasks: dict[str, asyncio.Task[Delta]],
    link: Link,
    inbox: asyncio.Queue[tuple[str, Any]],
) -> None:
    """Send the last delta of a request."""
    del tasks[key]
    if task.cancelled():
        _send(link, "delta", Delta(key, finish_reason="cancelled"))
    elif (error := task.exception()) is None:
        _send(link, "delta", task.result())
    elif isinstance(error, VipLlavaError):
        _send(link, "delta", Delta(key, finish_reason="error", error=error))
        if isinstance(error, EngineStopped):
            inbox.put_nowait(("stopped", error))
    else:
        inbox.put_nowait(("defect", error))


def _send(link: Link, word: str, value: Any) -> None:
    try:
        message = link.pack(word, value)
    except UNPICKLABLE:  # an error that holds what cannot travel
        if isinstance(value, Delta):
            value = Delta(value.key, finish_reason="error", error=VipLlavaError(str(value.error)))
        else:
            value = VipLlavaError(str(value))
        message = link.pack(word, value)
    link.send_packed(message)


def _listen(
    link: Link, loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[tuple[str, Any]]
) -> None:
    while True:
        try:
            message = link.receive()
        except (EOFError, OSError):
            os._exit(1)  # the parent was killed
        loop.call_soon_threadsafe(inbox.put_nowait, message)
        if message[0] == "end":
            return
