"""The page's Gradio blocks: the component, the controls beside it, and what its events do."""

from __future__ import annotations

import hashlib
import html
import logging
import re
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Final

import gradio as gr

from vipllava.inference.protocol import LARGEST_SEED, Sampling, SamplingError
from vipllava.serve.lifecycle import Lifecycle
from vipllava.serve.page.component import mark_page, page_texts
from vipllava.serve.page.conversation import (
    MOST_MODELS,
    Conversation,
    View,
    whole_characters,
)
from vipllava.serve.page.marks_of_page import read_marks
from vipllava.serve.page.models import ModelList
from vipllava.serve.page.pictures import PictureStore
from vipllava.types import VipLlavaError

logger = logging.getLogger(__name__)

_MOST_SESSIONS: Final = 500
_MOST_BYTES: Final = 512 * 2**20  # of all conversations
_IDLE_S: Final = 6 * 3600.0
_REMEMBERED: Final = 5000  # pages whose conversation was forgotten
_SEED: Final = re.compile(r"-?[0-9]{1,19}")
_QUIET: Final[dict[str, Any]] = {"show_progress": "hidden", "api_visibility": "private"}
# Gradio's default blocks wait for each other; these may not, least of all `stop`.
_AT_ONCE: Final[dict[str, Any]] = _QUIET | {"queue": False}


class Sessions:
    """One conversation per open page, forgotten when nothing was done for long or room is needed.

    Args:
        make: a new conversation.
        most: conversations that are kept.
        most_bytes: that they take together, see
            :attr:`vipllava.serve.page.conversation.Conversation.num_bytes`.
    """

    def __init__(
        self, make: Callable[[], Conversation], most: int = _MOST_SESSIONS,
        most_bytes: int = _MOST_BYTES,
    ) -> None:  # fmt: skip
        self._make, self._most, self._most_bytes = make, most, most_bytes
        self._kept: OrderedDict[bytes, tuple[float, Conversation]] = OrderedDict()
        self._forgotten: OrderedDict[bytes, None] = OrderedDict()

    def of(self, request: gr.Request) -> Conversation:
        """Return the conversation of the page that sends a request."""
        key, now = _key(request), time.monotonic()
        _, found = self._kept.pop(key, (now, None))
        if found is None:
            found = self._make()
            if self._forgotten.pop(key, False) is None:
                found.say_forgotten()
        self._make_room(now)
        self._kept[key] = now, found
        return found

    def leave(self, request: gr.Request) -> None:
        """End what is being written for a page that was closed."""
        if found := self._kept.get(_key(request)):
            found[1].stop()

    def _make_room(self, now: float) -> None:
        """Forget those that were used least recently, and none that is being answered."""
        num_bytes = sum(kept.num_bytes for _, kept in self._kept.values())
        for key, (used_at, kept) in list(self._kept.items()):
            if (
                len(self._kept) < self._most
                and num_bytes <= self._most_bytes
                and now - used_at <= _IDLE_S
            ):
                return
            if kept.answering:
                continue
            del self._kept[key]
            num_bytes -= kept.num_bytes
            if kept.rounds:
                self._forgotten[key] = None
                if len(self._forgotten) > _REMEMBERED:
                    self._forgotten.popitem(last=False)


def _key(request: gr.Request) -> bytes:
    return hashlib.sha256(str(request.session_hash).encode("utf-8", "replace")).digest()


def build_blocks(
    models: ModelList,
    store: PictureStore,
    sessions: Sessions,
    lifecycle: Lifecycle,
    *,
    num_examples: int,
    at_once: int,
    tick_s: float,
) -> gr.Blocks:
    """Return the page.

    Args:
        models: who can be asked.
        store: the pictures.
        sessions: the conversations.
        lifecycle: of the server, whose end waits for answers.
        num_examples: how many pictures to begin with the page's routes have.
        at_once: questions that are answered at the same time; more of them wait.
        tick_s: seconds after which an open page looks for other models.
    """
    texts = page_texts()["en"]
    limits = {"bytes": store.limits.most_bytes}
    with gr.Blocks(title="ViP-LLaVA", fill_width=True, analytics_enabled=False) as blocks:
        with mark_page(examples=num_examples, limits=limits) as page:
            with gr.Column(elem_classes=["vip-models"]):
                chosen = gr.Dropdown(
                    choices=[*models.names], value=[*models.names[:1]], multiselect=True,
                    max_choices=MOST_MODELS, label=texts["models"], elem_id="vip-models",
                    allow_custom_value=True, filterable=True,
                )  # fmt: skip
                silent = gr.HTML(visible=False, elem_id="vip-silent")
                blind = gr.Checkbox(label=texts["blind"], elem_id="vip-blind", container=False)
            with gr.Accordion(texts["parameters"], open=False, elem_classes=["vip-params"]) as more:
                temperature = gr.Slider(0, 2, 0.2, step=0.05, label=texts["temperature"])
                top_p = gr.Slider(0.05, 1, 1.0, step=0.05, label=texts["top_p"])
                length = gr.Slider(1, 2048, 512, step=1, label=texts["max_new_tokens"])
                seed = gr.Textbox(label=texts["seed"], placeholder=texts["seed_hint"], max_lines=1)
        labelled = {
            chosen: "models", blind: "blind", more: "parameters", temperature: "temperature",
            top_p: "top_p", length: "max_new_tokens", seed: "seed",
        }  # fmt: skip
        settings = [temperature, top_p, length, seed]

        async def ask(
            event: gr.EventData, request: gr.Request, names: Any, blind: Any, *given: Any
        ) -> AsyncGenerator[View]:
            conversation, sent = sessions.of(request), _sent(event)
            try:
                sampling, marks = _sampling(*given), read_marks(sent.get("marks") or [])
            except VipLlavaError as error:
                yield conversation.refusal(str(error))
                return
            picture = sent.get("picture")
            views = conversation.ask(
                str(sent.get("question", "")), picture and str(picture), marks,
                [str(name) for name in names or ()], sampling, blind=bool(blind),
            )  # fmt: skip
            if lifecycle.ending:
                yield conversation.refusal("the server is ending")
                return
            with lifecycle.running():
                async for view in views:
                    yield view

        async def regenerate(request: gr.Request, *given: Any) -> AsyncGenerator[View]:
            conversation = sessions.of(request)
            try:
                sampling = _sampling(*given)
            except SamplingError as error:
                yield conversation.refusal(str(error))
                return
            if lifecycle.ending:
                yield conversation.refusal("the server is ending")
                return
            with lifecycle.running():
                async for view in conversation.regenerate(sampling):
                    yield view

        async def stop(request: gr.Request) -> View:
            conversation = sessions.of(request)
            conversation.stop()
            return conversation.view()

        async def clear(request: gr.Request) -> View:
            conversation = sessions.of(request)
            conversation.clear()
            return conversation.view()

        async def judge(event: gr.EventData, request: gr.Request) -> View:
            conversation, sent = sessions.of(request), _sent(event)
            try:
                if "choice" in sent:
                    await conversation.vote(str(sent["choice"]))
                else:
                    await conversation.rate(int(sent["place"]), str(sent["kind"]))
            except (VipLlavaError, KeyError, ArithmeticError, ValueError, TypeError) as error:
                return conversation.refusal(str(error))
            except OSError as error:
                logger.exception("a vote could not be written")
                return conversation.refusal(f"it could not be written: {error}")
            return conversation.view()

        async def refresh(names: list[str] | None, known: list[Any]) -> Any:
            found = [*await models.refresh()]
            faults = silent_html(models.silent)
            listed, said = gr.skip(), gr.skip()
            if found != known[0]:
                there = [name for name in names or () if name in found]
                listed = gr.update(choices=found, value=there or found[:1])
            if faults != known[1]:
                said = gr.update(value=faults, visible=bool(faults))
            return listed, said, [found, faults]

        async def load(request: gr.Request) -> Any:
            found = [*await models.refresh()]
            faults = silent_html(models.silent)
            asked = request.query_params.get("model", "").split(",")
            first = [name for name in asked if name in found][:MOST_MODELS]
            listed = gr.update(choices=found, value=first or found[:1])
            return listed, gr.update(value=faults, visible=bool(faults)), [found, faults]

        def speak(event: gr.EventData) -> list[Any]:
            language = str(_sent(event).get("language"))
            said = page_texts().get(language, texts)
            return [
                gr.update(label=said[name], placeholder=said["seed_hint"])
                if name == "seed"
                else gr.update(label=said[name])
                for name in labelled.values()
            ]

        known = gr.State([[*models.names], ""])
        page.ask(ask, [chosen, blind, *settings], page, concurrency_limit=at_once, **_QUIET)
        page.regenerate(regenerate, settings, page, concurrency_limit=at_once, **_QUIET)
        page.stop(stop, None, page, **_AT_ONCE)
        page.clear(clear, None, page, **_AT_ONCE)
        page.vote(judge, None, page, **_AT_ONCE)
        page.rate(judge, None, page, **_AT_ONCE)
        page.language(speak, None, [*labelled], **_AT_ONCE)
        gr.Timer(tick_s).tick(refresh, [chosen, known], [chosen, silent, known], **_AT_ONCE)
        blocks.load(load, None, [chosen, silent, known], **_AT_ONCE)
        blocks.unload(sessions.leave)
    return blocks


def silent_html(silent: Sequence[tuple[str, str]]) -> str:
    """Return which servers do not answer, in every language; the style sheet shows the reader's."""
    return "".join(
        f'<p lang="{language}">{html.escape(_filled(texts["silent"], address, why))}</p>'
        for address, why in silent
        for language, texts in page_texts().items()
    )


def _filled(text: str, address: str, why: str) -> str:
    return text.replace("%address%", address).replace("%why%", why)


def _sent(event: gr.EventData) -> dict[str, Any]:
    sent: Any = event._data
    return sent if isinstance(sent, dict) else {}


def _sampling(temperature: Any, top_p: Any, max_new_tokens: Any, seed: Any) -> Sampling:
    text = str(seed or "").strip()
    if text and not _SEED.fullmatch(text):
        text = whole_characters(text if len(text) <= 40 else f"{text[:40]}...")
        raise SamplingError("seed", text, f"a whole number up to {LARGEST_SEED}, or nothing")
    return Sampling(
        temperature=temperature, top_p=top_p, max_new_tokens=_whole(max_new_tokens),
        seed=int(text) if text else None,
    )  # fmt: skip


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
