"""Engines by name, from what a command line says: models of this machine, and endpoints."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag

from vipllava.inference.endpoint_client import EndpointSettings
from vipllava.inference.protocol import GenerationEngine
from vipllava.types import ConfigError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How models are opened, and how many requests are sent to an endpoint."""

    device: str = "auto"
    dtype: str = "auto"
    devices: str | None = None  # e.g. ``0,1``: a process for each
    max_batch_size: int = 16
    # further arguments of :meth:`vipllava.inference.engine.Engine.from_checkpoint`
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    engine_key_env: str | None = None  # variable with the key of all endpoints
    max_running: int = 32  # requests at once, of an endpoint
    deadline_s: float = 300.0


def open_engines(
    models: Sequence[str], endpoints: Sequence[str], names: Sequence[str], how: EngineOptions
) -> dict[str, GenerationEngine]:
    """Return engines by the names under which they are served.

    Args:
        models: folders or Hugging Face ids.
        endpoints: addresses of OpenAI-compatible servers, e.g. ``http://localhost:8001/v1``;
            ``#NAME`` behind one says which of its models.
        names: of ``models``, then of ``endpoints``, as far as they go; the others are called by
            their folder, id, or as their endpoint calls them.
        how: for all of them.

    Raises:
        ConfigError: nothing is to be served, two have one name, or there are too many names.
        VipLlavaError: a model cannot be opened, or an endpoint does not say what it has.
    """
    if not models and not endpoints:
        raise ConfigError("nothing to serve: name a model's folder, or an endpoint by --engine URL")
    if len(names) > len(models) + len(endpoints):
        raise ConfigError(
            f"{len(names)} names for {len(models) + len(endpoints)} models: give --name at most "
            "once for each"
        )
    asked = [_endpoint(url, how) for url in endpoints]
    found = [*map(_name_of_source, models), *(each.model for each in asked)]
    found[: len(names)] = names
    twice = {name for name in found if found.count(name) > 1}
    if twice:
        raise ConfigError(
            f"two models are called {min(twice)!r}: give each its own by --name, in the order of "
            "the models, engines last"
        )
    engines = [_open_model(source, how) for source in models]
    engines += [_open_endpoint(settings) for settings in asked]
    return dict(zip(found, engines, strict=True))


def _name_of_source(source: str) -> str:
    """Return what a model is called if nobody says; a run's `export` is called as the run."""
    path = Path(source)
    if not path.exists():
        return source
    folder = path.resolve()
    return folder.parent.name if folder.name == "export" else folder.name


def _open_model(source: str, how: EngineOptions) -> GenerationEngine:
    from vipllava.inference.engine_settings import EngineSettings, LocalEngineSettings

    _log.info("opening %s ...", source)
    settings = EngineSettings(source, how.device, how.dtype, dict(how.options))
    local: dict[str, Any] = {"max_batch_size": how.max_batch_size}
    if how.devices is None:
        from vipllava.inference.local_engine import LocalEngine

        return LocalEngine(settings.open(), **local)
    from vipllava.inference.worker_pool import WorkerPool, device_names

    return WorkerPool(LocalEngineSettings(settings, options=local), device_names(how.devices))


def _endpoint(url: str, how: EngineOptions) -> EndpointSettings:
    base_url, model = urldefrag(url)
    settings = EndpointSettings(
        base_url,
        model or "?",
        api_key_env=how.engine_key_env,
        concurrency=how.max_running,
        max_retries=1,
        timeout_s=how.deadline_s,
        total_s=how.deadline_s,
    )
    if model:
        return settings
    from vipllava.inference.openai_engine import OpenAIEngine

    async def listed() -> list[str]:
        engine = OpenAIEngine(settings)
        try:
            return [each.name for each in await engine.served_models()]
        finally:
            await engine.close()

    names = asyncio.run(listed())
    if len(names) != 1:
        raise ConfigError(
            f"{base_url} serves {', '.join(names) or 'no model'}: say which, --engine "
            f"{base_url}#NAME"
        )
    return replace(settings, model=names[0])


def _open_endpoint(settings: EndpointSettings) -> GenerationEngine:
    from vipllava.inference.openai_engine import OpenAIEngine

    return OpenAIEngine(settings)


def read_key(variable: str | None) -> str | None:
    """Return the key that an environment variable holds; None without a variable.

    Raises:
        ConfigError: it holds none.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"api_key_env={variable}: this environment variable holds no key")
    return key
