"""Which models answer now: those of this process, and those of servers that come and go."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from vipllava.inference.protocol import GenerationEngine
from vipllava.types import VipLlavaError

logger = logging.getLogger(__name__)

ListNames = Callable[[str], Awaitable[Sequence[str]]]
"""Of a server's address the names of its models; raises whatever if it does not answer."""
MakeEngine = Callable[[str, str], GenerationEngine]
"""Of a server's address and a model's name the engine that asks it."""

_MOST_SILENT: Final = 2
"""Times in a row that a server may be silent until its models are taken off the list."""


class NoSuchModel(VipLlavaError):
    """A model was asked for that is not, or no longer, there."""


@dataclass
class _Server:
    address: str
    names: tuple[str, ...] = ()
    silent: int = 0
    why_silent: str = ""
    engines: dict[str, GenerationEngine] = field(default_factory=dict)


class ModelList:
    """Names and engines; ``refresh`` asks the servers again.

    Args:
        engines: of this process, by the names that people see.
        addresses: of OpenAI-compatible servers, up to and with ``/v1``.
        list_names: asks a server for its models.
        make_engine: makes the engine of a server's model, once.
        seconds_between: servers are asked again after so long at the earliest.
    """

    def __init__(
        self,
        engines: Mapping[str, GenerationEngine],
        addresses: Sequence[str] = (),
        *,
        list_names: ListNames | None = None,
        make_engine: MakeEngine | None = None,
        seconds_between: float = 4.0,
    ) -> None:
        self._own = dict(engines)
        self._servers = [
            _Server(address)
            for address in dict.fromkeys(address.rstrip("/") for address in addresses)
        ]
        self._list_names = list_names
        self._make_engine = make_engine
        self._seconds_between = seconds_between
        self._asked_at = -seconds_between
        self._lock = asyncio.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The names that can be asked now, this process's first."""
        return (*self._own, *(label for label, _, _ in self._remote()))

    @property
    def silent(self) -> tuple[tuple[str, str], ...]:
        """The addresses at which no server answers, and why."""
        return tuple((s.address, s.why_silent) for s in self._servers if s.silent and not s.names)

    def engine(self, name: str) -> GenerationEngine:
        """Return the engine of a model.

        Raises:
            NoSuchModel: it is not, or no longer, there; lists those that are.
        """
        if name in self._own:
            return self._own[name]
        for label, server, model in self._remote():
            if label == name:
                if model not in server.engines:
                    assert self._make_engine is not None
                    server.engines[model] = self._make_engine(server.address, model)
                return server.engines[model]
        raise NoSuchModel(
            f"the model {name} does not answer now; there are: {', '.join(self.names) or 'none'}"
        )

    async def refresh(self) -> tuple[str, ...]:
        """Ask the servers, unless that was done seconds ago, and return the names."""
        async with self._lock:
            if self._servers and time.monotonic() - self._asked_at >= self._seconds_between:
                await asyncio.gather(*map(self._ask, self._servers))
                self._asked_at = time.monotonic()
        return self.names

    async def close(self) -> None:
        """Close every engine."""
        for engine in (
            *self._own.values(),
            *(e for s in self._servers for e in s.engines.values()),
        ):
            await engine.close()

    async def _ask(self, server: _Server) -> None:
        assert self._list_names is not None
        try:
            names = tuple(dict.fromkeys(await self._list_names(server.address)))
        except Exception as error:  # noqa: BLE001  # whatever a foreign server does, others go on
            server.silent += 1
            server.why_silent = str(error).removeprefix(f"{server.address} ")
            if server.silent == _MOST_SILENT or (server.silent == 1 and not server.names):
                logger.warning("%s does not answer: %s", server.address, server.why_silent)
            if server.silent >= _MOST_SILENT:
                server.names = ()
            return
        if names != server.names:
            logger.info("%s has: %s", server.address, ", ".join(names) or "no model")
        server.names, server.silent = names, 0

    def _remote(self) -> list[tuple[str, _Server, str]]:
        """Return label, server and model; of two with one name the later says where it is."""
        found: list[tuple[str, _Server, str]] = []
        taken = set(self._own)
        for server in self._servers:
            for name in server.names:
                label = name
                if label in taken:
                    label = f"{name} ({urlsplit(server.address).netloc})"
                if label in taken:
                    label = f"{name} ({server.address})"
                taken.add(label)
                found.append((label, server, name))
        return found


def openai_servers(key_env: str | None = None) -> tuple[ListNames, MakeEngine]:
    """Return how OpenAI-compatible servers are asked for their models, and how these are asked.

    Args:
        key_env: the environment variable with the key of all of them.
    """
    from vipllava.inference.endpoint_client import EndpointSettings
    from vipllava.inference.openai_engine import OpenAIEngine

    def make_engine(address: str, model: str) -> OpenAIEngine:
        return OpenAIEngine(EndpointSettings(address, model, api_key_env=key_env, max_retries=1))

    async def list_names(address: str) -> Sequence[str]:
        engine = make_engine(address, "?")
        try:
            return [model.name for model in await engine.served_models()]
        finally:
            await engine.close()

    return list_names, make_engine
