"""A server of a fake engine as a process; prints its port. Argument: the seconds of its grace."""

from __future__ import annotations

import sys

from tests.serve.fake_engine import FakeEngine
from vipllava.processes import begin
from vipllava.serve.app import build_app
from vipllava.serve.server import bind, run
from vipllava.serve.settings import ServerSettings

if __name__ == "__main__":
    begin()
    app = build_app({"toy": FakeEngine()}, ServerSettings(grace_s=float(sys.argv[1])))
    listener = bind("127.0.0.1", 0)
    print(listener.getsockname()[1], flush=True)  # noqa: T201
    run(app, app.state.serving, listener)
    listener.close()
    print("closed", app.state.serving.models["toy"].engine.is_closed)  # noqa: T201
