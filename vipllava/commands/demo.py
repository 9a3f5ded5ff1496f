"""``vipllava demo``: a page to draw on a picture, ask, and compare models."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import typer

from vipllava.types import ConfigError, VipLlavaError, first_line

_log = logging.getLogger(__name__)
_NEEDED: Final = ("gradio", "fastapi", "uvicorn", "prometheus_client", "openai")
FEEDBACK: Final = Path("runs/demo/feedback.jsonl")
"""Where votes go by default."""


def _some(what: str, *names: str, metavar: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=what, show_default=False)


def demo(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help="Folders or Hugging Face ids of any format.",
            show_default="without --base-url, the newest of runs/quickstart",
        ),
    ] = None,
    base_url: Annotated[
        list[str] | None,
        _some(
            "An OpenAI-compatible server whose models are offered while it answers.",
            "--base-url",
            metavar="URL",
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        _some("What a MODEL is called, in their order.", "--name", metavar="NAME"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 7860,
    share: Annotated[
        bool, typer.Option("--share", help="Make a public link through Gradio's servers.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    load_in: Annotated[
        Literal["4bit", "8bit"] | None,
        typer.Option(help="Hold the language model in few bits.", show_default=False),
    ] = None,
    base: Annotated[
        str | None, _some("What an adapter is put on.", "--base", metavar="MODEL")
    ] = None,
    chat_template: Annotated[
        str | None,
        _some("Of a model that does not say its own.", "--chat-template", metavar="NAME"),
    ] = None,
    key_env: Annotated[
        str | None,
        _some("Variable with the key of the servers.", "--key-env", metavar="VARIABLE"),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        _some("A name that browsers may use beside localhost.", "--allow-host", metavar="NAME"),
    ] = None,
    feedback: Annotated[
        Path, typer.Option(help="Votes, thumbs and flags go here, one JSON object a line.")
    ] = FEEDBACK,
    log_conversations: Annotated[
        bool, typer.Option("--log-conversations", help="Every question and its answers, too.")
    ] = False,
    max_mb: Annotated[float, typer.Option(help="Of one picture's file, megabytes.")] = 20.0,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of one picture.")] = 50_000_000,
    max_batch_size: Annotated[
        int, typer.Option(min=1, help="Answers that a model computes together.")
    ] = 16,
) -> None:
    """Draw on a picture in the browser, ask, compare models.

    The API of `vipllava serve` is at /v1 of the same address.
    """
    missing = [module for module in _NEEDED if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"the page needs {', '.join(missing)}, which is not installed: "
            'pip install "vipllava-lightning[demo]"'
        )
    sources = list(models or ())
    if not sources and not base_url:
        from vipllava.serve.terminal.opening import newest_export

        sources = [str(newest_export())]
    if not max_mb > 0:
        raise ConfigError(f"max_mb={max_mb}: expected a number above 0")
    from vipllava.serve.engines import EngineOptions, open_engines, read_key
    from vipllava.serve.page.pictures import PictureLimits
    from vipllava.serve.server import bind, run

    read_key(key_env)  # complains before anything is loaded
    options: dict[str, Any] = {"base": base, "chat_template": chat_template}
    options["bits"] = int(load_in[0]) if load_in else None
    how = EngineOptions(
        device=device,
        dtype=dtype,
        max_batch_size=max_batch_size,
        options={key: value for key, value in options.items() if value is not None},
    )
    limits = PictureLimits(most_bytes=int(max_mb * 2**20), most_pixels=max_pixels)
    listener = bind(host, port)  # before the models, which take longer
    try:
        engines = open_engines(sources, (), name or (), how) if sources else {}
        address = listener.getsockname()
        hosts = list(allow_host or ())
        if share:
            link = share_link(address[1])
            hosts.append(urlsplit(link).hostname or "")
        app = build_demo(
            engines, base_url or (), key_env, host=host, allowed_hosts=hosts, limits=limits,
            feedback=feedback, log_conversations=log_conversations,
        )  # fmt: skip
        if not app.state.serving.settings.is_loopback:
            _log.warning("%s can be reached from other machines, and everybody may ask", host)
        logging.getLogger("vipllava.serve.requests").setLevel(logging.WARNING)
        where = f"[{address[0]}]" if ":" in address[0] else address[0]

        def ready() -> None:
            _log.info("the page is at http://%s:%d", where, address[1])
            if share:
                _log.warning("whoever has this link may use the page: %s", link)

        run(app, app.state.serving, listener, ready)
    finally:
        listener.close()


def build_demo(
    engines: dict[str, Any],
    addresses: Sequence[str],
    key_env: str | None = None,
    *,
    host: str = "127.0.0.1",
    allowed_hosts: Sequence[str] = (),
    limits: Any = None,
    feedback: Path = FEEDBACK,
    log_conversations: bool = False,
) -> Any:
    """Return the app of `vipllava demo`: the server's API, and the page at its root.

    Args:
        engines: of this process, by name.
        addresses: of servers whose models are offered, too.
        key_env: the environment variable with the key of those.
        host: where it will listen.
        allowed_hosts: names by which browsers may address it.
        limits: of pictures, a :class:`vipllava.serve.page.pictures.PictureLimits`.
        feedback: see :class:`vipllava.serve.page.feedback.Feedback`, as the next.
        log_conversations: whether every answered question is kept.
    """
    from vipllava.serve.app import build_app
    from vipllava.serve.page.examples import sample_examples
    from vipllava.serve.page.models import ModelList, openai_servers
    from vipllava.serve.page.mount import PageSettings, mount_page
    from vipllava.serve.page.pictures import PictureLimits
    from vipllava.serve.settings import ServerSettings

    limits = limits or PictureLimits()
    settings = ServerSettings(
        host=host, allowed_hosts=tuple(allowed_hosts), max_pixels=limits.most_pixels
    )
    app = build_app(engines, settings)
    list_names, make_engine = openai_servers(key_env)
    offered = ModelList(engines, addresses, list_names=list_names, make_engine=make_engine)
    page = PageSettings(feedback=feedback, log_conversations=log_conversations, limits=limits)
    return mount_page(app, offered, sample_examples(), page)


def share_link(port: int) -> str:
    """Return a public address that leads to a port of this machine, by Gradio's tunnel.

    Raises:
        VipLlavaError: there is none, e.g. without a network.
    """
    from gradio import networking

    try:
        return networking.setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)
    except (RuntimeError, OSError, ValueError) as error:
        raise VipLlavaError(
            f"no public link could be made ({first_line(error)}): leave out --share, or see that "
            "this machine reaches Gradio's servers"
        ) from error
