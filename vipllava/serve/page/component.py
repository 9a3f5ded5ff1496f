"""The page as one Gradio component: geometry comes out of it, a conversation goes in.

Gradio brings the queue, the session and the controls; what a person draws on is the script's. The
component has no ``${value}`` in its template, so Gradio never draws it anew: the script watches.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Final

import gradio as gr

from vipllava.visual_prompts.shapes import PALETTE, SHAPES

_TEMPLATE: Final = (
    '<header class="vip-head"></header><section class="vip-stage"></section>@children'
    '<section class="vip-talk"></section>'
)
# In this order: the later ones use the earlier ones.
_SCRIPTS: Final = (
    "dom", "geometry", "marks", "view", "paint", "gestures", "keyboard", "stage", "toolbar",
    "chips", "question", "answers", "export", "page",
)  # fmt: skip
EVENTS: Final = ("ask", "regenerate", "stop", "clear", "vote", "rate", "language")
"""What the script triggers; each with an object of its own."""


def mark_page(*, examples: int = 0, limits: dict[str, int] | None = None) -> gr.HTML:
    """Return the component, to be used as a context for the controls between its parts.

    Its value is the conversation's view, see
    :meth:`vipllava.serve.page.conversation.Conversation.view`; its events carry geometry. It is no
    subclass: Gradio writes a stub file beside the source of each of those.

    Args:
        examples: how many pictures to begin with there are.
        limits: of what may be opened, for messages before anything is sent.
    """
    return gr.HTML(
        value=None,
        html_template=_TEMPLATE,
        js_on_load=page_script(),
        apply_default_css=False,
        elem_classes=["vip"],
        texts=page_texts(),
        palette={name: list(rgb) for name, rgb in PALETTE.items()},
        shapes=list(SHAPES),
        examples=examples,
        limits=limits or {},
    )


@functools.cache
def page_script() -> str:
    """Return the page's script: its files joined, in a scope of their own."""
    folder = importlib.resources.files(__package__ or "") / "script"
    parts = [(folder / f"{name}.js").read_text("utf-8") for name in _SCRIPTS]
    events = ", ".join(f'"{name}"' for name in EVENTS)  # Gradio looks for them in quotes
    begin = "startPage({element, props, trigger, watch});"
    return "\n".join(["'use strict';", f"const EVENTS = [{events}];", *parts, begin])


@functools.cache
def page_texts() -> dict[str, dict[str, str]]:
    """Return the page's texts by language and name."""
    text = (importlib.resources.files(__package__ or "") / "texts.json").read_text("utf-8")
    texts: dict[str, dict[str, str]] = json.loads(text)
    return texts


@functools.cache
def page_css() -> str:
    """Return the page's style sheet."""
    return (importlib.resources.files(__package__ or "") / "page.css").read_text("utf-8")
