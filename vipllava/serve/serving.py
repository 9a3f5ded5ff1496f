"""The models of one server: who may ask them when, and whether they answer."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Final, Protocol, runtime_checkable

from vipllava.inference.protocol import (
    Delta,
    Generation,
    GenerationEngine,
    Sampling,
    call_it,
)
from vipllava.serve.admission import Admission
from vipllava.serve.bodies import Bodies
from vipllava.serve.errors import ApiError, of_fault
from vipllava.serve.lifecycle import Lifecycle
from vipllava.serve.limits import Memory
from vipllava.serve.metrics import Metrics
from vipllava.serve.pictures import Pictures
from vipllava.serve.settings import MB, ServerSettings
from vipllava.types import ConfigError, Request, Turn, VipLlavaError

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}")
_FRESH_S: Final = 30.0
"""Seconds in which an answer proves that an engine answers."""
_log = logging.getLogger(__name__)
_PROBE_S: Final = 10.0
"""Seconds that an engine has for one token."""


@runtime_checkable
class Checkable(Protocol):
    """An engine that can say by itself whether it answers, so that it need not be asked."""

    async def check(self) -> None:
        """Make sure of it.

        Raises:
            VipLlavaError: it does not.
        """
        ...


@runtime_checkable
class Startable(Protocol):
    """An engine that is started before it is asked."""

    async def start(self) -> None:
        """Start it.

        Raises:
            VipLlavaError: it cannot be.
        """
        ...


class ServedModel:
    """One model: its engine, and who may ask it."""

    def __init__(self, name: str, engine: GenerationEngine, settings: ServerSettings) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"name={name!r}: expected letters, digits and ._:/@+- beginning with a letter or "
                "digit"
            )
        self.name, self.engine = name, engine
        self.admission = Admission(settings.max_running, settings.max_queue, f"model `{name}`")
        self.created = int(time.time())
        self.fault: str | None = "it has not been asked yet"
        self._answered_at = -_FRESH_S
        self._probe: asyncio.Task[None] | None = None

    async def generate(self, generation: Generation) -> AsyncGenerator[Delta]:
        """Yield the deltas of one request, to which the caller has been admitted.

        Raises:
            ApiError: what the request did wrong, or that the engine answers nobody.
        """
        try:
            async with aclosing(self.engine.generate([generation])) as deltas:
                async for delta in deltas:
                    if delta.error is not None:
                        raise call_it(delta.error, delta.key, "the question")
                    self._has_answered()
                    yield delta
                    if delta.finish_reason is not None:
                        return
        except VipLlavaError as fault:
            found = of_fault(fault)
            if found.status < 500:
                self._has_answered()
            else:
                self.fault = str(fault)
            raise found from fault
        except ApiError:
            raise
        except Exception as defect:
            self.fault = "its engine failed, see the log"
            _log.exception("the engine of `%s` failed: a defect", self.name)
            raise ApiError(500, f"the engine of `{self.name}` failed; the server's log has more",
                           code="internal_error") from defect  # fmt: skip
        raise ApiError(502, f"the engine of `{self.name}` ended within an answer",
                       code="engine_broke_off")  # fmt: skip

    async def check(self) -> str | None:
        """Return why the model does not answer, or None; asks it at most twice a minute."""
        if time.monotonic() - self._answered_at > _FRESH_S:
            if self._probe is None or self._probe.done():
                self._probe = asyncio.ensure_future(self._ask())
            await asyncio.shield(self._probe)
        return self.fault

    def _has_answered(self) -> None:
        self.fault, self._answered_at = None, time.monotonic()

    async def _ask(self) -> None:
        try:
            async with asyncio.timeout(_PROBE_S):
                if isinstance(self.engine, Checkable):
                    await self.engine.check()
                    self._has_answered()
                else:
                    await self._ask_for_a_token()
        except ApiError:
            pass  # noted: what is the question's fault was an answer
        except VipLlavaError as fault:
            self.fault = str(fault)
        except TimeoutError:
            self.fault = f"it has not answered within {_PROBE_S:g} s"

    async def _ask_for_a_token(self) -> None:
        request = Request(None, (Turn("user", "Hello"),), f"probe-{time.monotonic_ns()}")
        asked = self.generate(Generation(request, Sampling(max_new_tokens=1)))
        async with aclosing(asked) as deltas:
            async for _ in deltas:
                pass


class Serving:
    """What the routes of one app share."""

    def __init__(self, engines: Mapping[str, GenerationEngine], settings: ServerSettings) -> None:
        self.settings = settings
        self.models = {name: ServedModel(name, each, settings) for name, each in engines.items()}
        self.lifecycle = Lifecycle()
        self.memory = Memory(int(settings.picture_memory_mb * MB))
        self.bodies = Bodies(settings, self.memory)
        self.pictures = Pictures(settings)
        self.previews = Admission(settings.picture_threads, settings.max_queue, "the preview")
        self.metrics = Metrics(
            lambda: [(name, model.admission) for name, model in self.models.items()]
        )

    def model(self, name: str) -> ServedModel:
        """Return the model of this name.

        Raises:
            ApiError: 404; lists those that are there.
        """
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(
                404, f"model is {name[:100]!r}; this server has {known}", param="model",
                code="model_not_found",
            )  # fmt: skip
        return self.models[name]

    async def start(self) -> None:
        """Start the engines, and say which do not answer yet.

        Raises:
            VipLlavaError: one cannot be started.
        """
        for name, model in self.models.items():
            if isinstance(model.engine, Startable):
                await model.engine.start()
            if fault := await model.check():
                _log.warning("`%s` does not answer yet: %s", name, fault)
        # What is here stays. Without this, a body of many lists has Python look through all of it
        # for garbage, during which no thread runs: half a second.
        gc.collect()
        gc.freeze()

    async def close(self) -> None:
        """Close the engines, and end the threads."""
        for model in self.models.values():
            await model.engine.close()
        self.bodies.close()
        self.pictures.close()
