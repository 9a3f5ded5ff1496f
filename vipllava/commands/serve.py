"""``vipllava serve``: models behind the API of OpenAI, which also takes regions."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from typing import Annotated, Any, Final, Literal

import typer

from vipllava.types import ConfigError

_log = logging.getLogger(__name__)
_NEEDED: Final = ("fastapi", "uvicorn", "prometheus_client", "openai")


def _some(what: str, *names: str, metavar: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=what, show_default=False)


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL...", help="Folders or Hugging Face ids of any format."),
    ] = None,
    engine: Annotated[
        list[str] | None,
        _some(
            "An OpenAI-compatible server, as vLLM; #NAME says which of its models.",
            "--engine",
            metavar="URL",
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        _some(
            "What a model is called, in their order, engines last; else its folder's name.",
            "--name",
            metavar="NAME",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    devices: Annotated[
        str | None,
        _some("A process on each of these devices, e.g. 0,1.", "--devices", metavar="LIST"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    load_in: Annotated[
        Literal["4bit", "8bit"] | None,
        typer.Option(help="Hold the language model in few bits.", show_default=False),
    ] = None,
    device_map: Annotated[
        Literal["auto"] | None,
        typer.Option(help="auto: one model over all devices.", show_default=False),
    ] = None,
    base: Annotated[
        str | None, _some("What an adapter is put on.", "--base", metavar="MODEL")
    ] = None,
    chat_template: Annotated[
        str | None,
        _some("Of a model that does not say its own.", "--chat-template", metavar="NAME"),
    ] = None,
    engine_key_env: Annotated[
        str | None,
        _some("Variable with the key of the engines.", "--engine-key-env", metavar="VARIABLE"),
    ] = None,
    api_key_env: Annotated[
        str | None,
        _some("Variable with the key that clients must have.", "--api-key-env", metavar="VARIABLE"),
    ] = None,
    cors: Annotated[
        list[str] | None,
        _some("A web page's origin that may ask, or *.", "--cors", metavar="ORIGIN"),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        _some("A name that clients may use beside localhost.", "--allow-host", metavar="NAME"),
    ] = None,
    allow_image_urls: Annotated[
        bool, typer.Option("--allow-image-urls", help="Fetch images from public addresses.")
    ] = False,
    prepend_system: Annotated[
        bool,
        typer.Option("--prepend-system", help="Put system messages before the first question."),
    ] = False,
    max_batch_size: Annotated[
        int, typer.Option(min=1, help="Requests that a model computes together.")
    ] = 16,
    max_queue: Annotated[
        int, typer.Option(min=0, help="Requests that may wait for a model; further ones get 429.")
    ] = 64,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Of an answer where the request says nothing.")
    ] = 512,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of one image.")] = 50_000_000,
    max_body_mb: Annotated[float, typer.Option(help="Of one request, megabytes.")] = 32.0,
    picture_memory_mb: Annotated[
        float, typer.Option(help="For the images of all requests, megabytes.")
    ] = 2048.0,
    deadline_s: Annotated[float, typer.Option(help="For a request, seconds.")] = 300.0,
    grace_s: Annotated[
        float, typer.Option(help="For what runs when the server is asked to end, seconds.")
    ] = 30.0,
) -> None:
    """Serve models by the API of OpenAI, with regions.

    Ends gracefully on Ctrl-C or SIGTERM, at once on the second one. A line of JSON for each request
    goes to the standard output.
    """
    missing = [module for module in _NEEDED if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"a server needs {', '.join(missing)}, which is not installed: "
            'pip install "vipllava-lightning[serve]"'
        )
    from vipllava.serve.app import build_app
    from vipllava.serve.engines import EngineOptions, open_engines, read_key
    from vipllava.serve.server import bind, run
    from vipllava.serve.settings import ServerSettings

    settings = ServerSettings(
        host=host,
        port=port,
        api_key=read_key(api_key_env),
        cors_origins=tuple(cors or ()),
        allowed_hosts=tuple(allow_host or ()),
        allow_image_urls=allow_image_urls,
        prepend_system=prepend_system,
        max_running=2 * max_batch_size,  # so that a batch is refilled at once
        max_queue=max_queue,
        max_tokens=max_tokens,
        max_pixels=max_pixels,
        max_body_mb=max_body_mb,
        picture_memory_mb=picture_memory_mb,
        deadline_s=deadline_s,
        grace_s=grace_s,
    )
    options: dict[str, Any] = {"base": base, "chat_template": chat_template}
    options |= {"bits": int(load_in[0]) if load_in else None, "device_map": device_map}
    how = EngineOptions(
        device=device,
        dtype=dtype,
        devices=devices,
        max_batch_size=max_batch_size,
        options={key: value for key, value in options.items() if value is not None},
        engine_key_env=engine_key_env,
        max_running=settings.max_running,
        deadline_s=deadline_s,
    )
    listener = bind(host, port)  # before the models, which take longer
    try:
        _log_to_stdout()
        app = build_app(open_engines(models or (), engine or (), name or (), how), settings)
        if not settings.is_loopback and settings.api_key is None:
            _log.warning(
                "%s can be reached from other machines, and everybody may ask: give --api-key-env",
                host,
            )
        address = listener.getsockname()
        where = f"[{address[0]}]" if ":" in address[0] else address[0]
        names = ", ".join(app.state.serving.models)
        run(
            app, app.state.serving, listener,
            lambda: _log.info("serving %s at http://%s:%d/v1", names, where, address[1]),
        )  # fmt: skip
    finally:
        listener.close()


def _log_to_stdout() -> None:
    """Send the lines about requests, which are JSON, where nothing else goes."""
    from vipllava.serve.request_log import LOG

    LOG.handlers = [logging.StreamHandler(sys.stdout)]
    LOG.propagate = False
    for name in ("uvicorn", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
