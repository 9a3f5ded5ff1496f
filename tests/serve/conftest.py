"""A server of a fake engine, for each test or for a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from tests.serve.fake_engine import FakeEngine
from tests.toy_server import ToyServer, run_app
from vipllava.serve.app import build_app
from vipllava.serve.serving import Serving
from vipllava.serve.settings import ServerSettings


@dataclass
class Served:
    """A server and what is behind it."""

    http: ToyServer
    engine: FakeEngine
    serving: Serving


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Start servers of one fake engine called `toy`; keywords are settings."""
    with ExitStack() as stack:

        def start(engine: FakeEngine | None = None, **settings: Any) -> Served:
            engine = engine or FakeEngine()
            app = build_app({"toy": engine}, ServerSettings(**settings))
            server = stack.enter_context(run_app(app))
            return Served(server, engine, app.state.serving)

        yield start
