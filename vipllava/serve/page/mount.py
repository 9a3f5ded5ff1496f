"""The page in a FastAPI app."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import gradio as gr
from fastapi import FastAPI
from gradio.themes import Base

from vipllava.serve.page.blocks import Sessions, build_blocks
from vipllava.serve.page.component import page_css
from vipllava.serve.page.conversation import Conversation
from vipllava.serve.page.examples import Example
from vipllava.serve.page.feedback import Feedback
from vipllava.serve.page.gate import GradioGate
from vipllava.serve.page.models import ModelList
from vipllava.serve.page.pictures import PictureLimits, PictureStore
from vipllava.serve.page.routes import build_routes
from vipllava.serve.page.work import PictureWork
from vipllava.serve.serving import Serving

# Fonts of the system: a page asks no other server for anything.
_FONT: Final = ("system-ui", "Segoe UI", "Roboto", "Noto Sans CJK SC", "WenQuanYi Micro Hei",
                "Microsoft YaHei", "sans-serif")  # fmt: skip
_MONO: Final = ("ui-monospace", "Consolas", "monospace")


@dataclass(frozen=True)
class PageSettings:
    """How the page is served."""

    feedback: Path | None = None  # votes are written here, one JSON object a line
    log_conversations: bool = False  # whether every answered question is, too
    limits: PictureLimits = field(default_factory=PictureLimits)
    at_once: int = 16  # questions answered at the same time; more of them wait
    tick_s: float = 5.0  # after which an open page looks for other models


def mount_page(
    app: FastAPI, models: ModelList, examples: Sequence[Example] = (), settings: Any = None
) -> FastAPI:
    """Add the page to an app, behind whatever routes it has.

    Args:
        app: of :func:`vipllava.serve.app.build_app`; its routes go first.
        models: who can be asked; closed with the app.
        examples: pictures to begin with.
        settings: a :class:`PageSettings`.
    """
    wanted: PageSettings = settings or PageSettings()
    serving: Serving = app.state.serving
    timeout_s = serving.settings.body_timeout_s
    store = PictureStore(wanted.limits, PictureWork(serving.memory))
    feedback = Feedback(wanted.feedback, wanted.log_conversations)
    sessions = Sessions(lambda: Conversation(store, models, feedback))
    app.include_router(build_routes(store, examples, timeout_s))

    async def mount() -> None:
        blocks = build_blocks(
            models, store, sessions, serving.lifecycle,
            num_examples=len(examples), at_once=wanted.at_once, tick_s=wanted.tick_s,
        )  # fmt: skip
        gr.mount_gradio_app(
            app, blocks, "/",
            css=page_css(), theme=_theme(), footer_links=[], run_history=False, ssr_mode=False,
            enable_monitoring=False, mcp_server=False, show_error=True, max_file_size=1, pwa=False,
        )  # fmt: skip

    _run_in_loop(mount())
    mounted: Any = app.routes[-1]
    _end_with(app, models, store.work, mounted.app)
    mounted.app = GradioGate(mounted.app, serving.memory, timeout_s)
    return app


def _run_in_loop(work: Coroutine[Any, Any, None]) -> None:
    """Do what waits for nothing; without a loop, Gradio would open two and close none."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
    else:
        with contextlib.suppress(StopIteration):
            work.send(None)


def _end_with(app: FastAPI, models: ModelList, work: PictureWork, gradio_app: Any) -> None:
    """Close the models with the app, and let go of open pages when the server ends.

    Each page holds a connection for as long as it is open, which Gradio closes for nobody but its
    own server.
    """
    serving: Serving = app.state.serving
    lifecycle = serving.lifecycle
    before = app.router.lifespan_context

    async def let_go() -> None:
        while not lifecycle.ending or (lifecycle.num_running and not lifecycle.cut_off):
            await asyncio.sleep(0.1)
        gradio_app.stop_event.set()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[Any]:
        async with before(app) as state:
            watching = asyncio.create_task(let_go())
            asking = asyncio.create_task(models.refresh())  # says at once who does not answer
            try:
                yield state
            finally:
                watching.cancel()
                asking.cancel()
                await models.close()
                work.close()

    app.router.lifespan_context = lifespan


def _theme() -> Base:
    """Return Gradio's controls in the page's colours, see page.css."""
    theme = Base(primary_hue="indigo", neutral_hue="slate", font=list(_FONT), font_mono=list(_MONO))
    colours = {
        "body_background_fill": "var(--vip-ground)",
        "body_text_color": "var(--vip-ink)",
        "body_text_color_subdued": "var(--vip-quiet)",
        "background_fill_primary": "var(--vip-paper)",
        "background_fill_secondary": "var(--vip-paper)",
        "block_background_fill": "var(--vip-paper)",
        "block_label_text_color": "var(--vip-quiet)",
        "block_title_text_color": "var(--vip-quiet)",
        "block_info_text_color": "var(--vip-quiet)",
        "border_color_primary": "var(--vip-line)",
        "block_border_color": "var(--vip-line)",
        "input_background_fill": "var(--vip-field)",
        "input_border_color": "var(--vip-line)",
        "input_placeholder_color": "var(--vip-quiet)",
        "slider_color": "var(--vip-main)",
        "checkbox_background_color_selected": "#3447c8",
    }
    dark = {f"{name}_dark": value for name, value in colours.items()}
    return theme.set(**colours, **dark, block_radius="12px")
