"""An image, a conversation and the marks on it, as the request that an engine answers.

Whoever asks (Python, terminal, server, page) comes through here, so the same marks are the same
pixels and the same words everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from vipllava.types import Request, Turn, VipLlavaError, VisualPromptPlan
from vipllava.visual_prompts.marks import Mark, plan_marks, refer_text
from vipllava.visual_prompts.render import render_plan
from vipllava.visual_prompts.shapes import prompt_words


@dataclass(frozen=True, slots=True)
class Asked:
    """What a model is shown and asked."""

    request: Request  # its image has the marks drawn, its turns say their words
    plan: VisualPromptPlan | None  # of the marks; None without an image

    @property
    def words(self) -> tuple[str, ...]:
        """By which words the text names each mark, e.g. ``within the red rectangle``."""
        return tuple(map(prompt_words, self.plan.prompts)) if self.plan else ()

    @property
    def overlay(self) -> Image.Image | None:
        """The image with its marks, RGB; None without an image."""
        return self.request.image


@dataclass(frozen=True, slots=True)
class Marked:
    """An image with its marks drawn, about which several things may be asked."""

    image: Image.Image | None  # RGB; None for a conversation without an image
    plan: VisualPromptPlan | None  # of the marks; None without an image

    @property
    def words(self) -> tuple[str, ...]:
        """By which words texts name each mark."""
        return tuple(map(prompt_words, self.plan.prompts)) if self.plan else ()

    def said(self, text: str) -> str:
        """Return a text with the words of marks in place of ``{0}``, ``{1}``, ...

        Without an image a text is left as it is: there cannot be marks.

        Raises:
            RecordError: it mentions a mark that is not there or that words cannot tell apart.
        """
        return refer_text(text, self.plan) if self.plan else text

    def request(self, turns: Sequence[Turn], key: str) -> Request:
        """Return the request of turns whose texts are said already.

        The turn that has the image keeps it; where none has, it stands in the first of the user's.
        """
        turns = list(turns)
        if self.image is not None and not any(turn.has_image for turn in turns):
            first = next((n for n, turn in enumerate(turns) if turn.role == "user"), None)
            if first is not None:
                turns[first] = replace(turns[first], has_image=True)
        return Request(self.image, tuple(turns), key)


def draw_marks(image: Image.Image | None, marks: Sequence[Mark] = ()) -> Marked:
    """Draw marks on an image.

    Args:
        image: upright and RGB, left unchanged.
        marks: on the image.

    Raises:
        MarkError: a mark lies outside, is empty, or there are too many.
        VipLlavaError: there are marks and no image.
    """
    if image is None:
        if marks:
            raise VipLlavaError(f"{len(marks)} regions and no image: give the image they are on")
        return Marked(None, None)
    plan = plan_marks(marks, image.size)
    return Marked(render_plan(image, plan), plan)


def mark_request(
    image: Image.Image | None, turns: Sequence[Turn], marks: Sequence[Mark] = (), *, key: str = ""
) -> Asked:
    """Draw marks and put their words into the texts.

    Args:
        image: upright and RGB, left unchanged; None for a conversation without an image. The
            turn that has it is marked; where none is, the first of the user's is.
        turns: the conversation, the user's turn last; user's texts may say ``{0}`` for mark 0.
            Without marks they are left as they are.
        marks: on the image.
        key: names the request in errors and in an engine's deltas.

    Raises:
        MarkError: a mark lies outside, is empty, or there are too many.
        RecordError: a text mentions a mark that is not there or that words cannot tell apart.
        VipLlavaError: there are marks and no image.
    """
    marked = draw_marks(image, marks)
    said = [
        replace(turn, text=marked.said(turn.text)) if marks and turn.role == "user" else turn
        for turn in turns
    ]
    return Asked(marked.request(said, key), marked.plan)
