"""What a request may hold of memory, and its JSON, read within bounds of size and depth."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from vipllava.serve.errors import ApiError
from vipllava.serve.settings import MB

MOST_VALUES: Final = 500_000
"""Lists, objects and their elements in one body: a few bytes of JSON become a hundred in Python."""
MOST_NAMES: Final = 50_000
"""Names of all objects in one body, each of which costs ten times as much as a number."""
MOST_OF_OBJECT: Final = 100
"""Names of one object: no more can be unknown, and each unknown one is an error that is built."""
_HALF_CHARACTERS: Final = (b"\\ud", b"\\uD")


class Memory:
    """Bytes that the images of all requests may hold together, and the bodies being read."""

    def __init__(self, num_bytes: int) -> None:
        self.free = self.size = num_bytes

    @contextmanager
    def hold(self) -> Generator[Held]:
        """Give back what was taken when the block ends."""
        held = Held(self)
        try:
            yield held
        finally:
            self.free += held.num_bytes


class Held:
    """What one request has taken of :class:`Memory`."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.num_bytes = 0

    def take(self, num_bytes: int, param: str | None = None) -> None:
        """Take some more.

        Raises:
            ApiError: 413 if there is never as much, 429 if there is not now.
        """
        if num_bytes + self.num_bytes > self._memory.size:
            raise ApiError(
                413,
                f"the request needs {(num_bytes + self.num_bytes) / MB:.0f} MB for its image, and "
                f"this server has {self._memory.size / MB:.0f} MB for all: send a smaller image",
                param=param,
                code="request_too_large",
            )
        if num_bytes > self._memory.free:
            raise ApiError(
                429,
                "the images of the requests that run fill the memory for them: ask again later",
                code="memory_full",
                retry_after_s=2,
                close=True,
            )
        self._memory.free -= num_bytes
        self.num_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Give back what was taken and is not needed."""
        self._memory.free += num_bytes
        self.num_bytes -= num_bytes


def parse_json(body: bytes) -> Any:
    """Return JSON values, strictly: each name once, finite numbers, whole characters.

    Raises:
        ApiError: 400; it is none, or has more values or levels than any request needs.
    """
    num_values = body.count(b",") + body.count(b"[") + body.count(b"{")
    if num_values > MOST_VALUES:
        raise _no_json(f"it has about {num_values} values; at most {MOST_VALUES} are read")
    if (num_names := body.count(b":")) > MOST_NAMES:
        raise _no_json(f"it has about {num_names} names; at most {MOST_NAMES} are read")
    try:
        text = body.decode("utf-8")
        values = json.loads(
            text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_each_once
        )
        if any(start in body for start in _HALF_CHARACTERS):
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise _no_json(f"byte {error.start} is not UTF-8") from None
    except UnicodeEncodeError:
        raise _no_json("a text has half a character (a lone surrogate)") from None
    except RecursionError:
        raise _no_json("it is nested too deeply") from None
    except ValueError as error:
        raise _no_json(str(error)) from None
    return values


def _no_json(why: str) -> ApiError:
    return ApiError(400, f"the body is not the JSON that this server reads: {why}",
                    code="invalid_json")  # fmt: skip


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise ValueError(f"{text[:40]} is beyond what a number can hold")
    return value


def _each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MOST_OF_OBJECT:
        raise ValueError(f"an object has {len(pairs)} names; at most {MOST_OF_OBJECT} are read")
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {twice[:100]!r} stands twice in one object")
    return found
