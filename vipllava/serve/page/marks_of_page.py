"""What a page sends as marks, and what it is told about them: geometry both ways."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from vipllava.serve.drawing_work import MOST_WORK, decoding_work, drawing_work
from vipllava.types import VipLlavaError, VisualPromptPlan
from vipllava.visual_prompts.mark_fields import parse_marks
from vipllava.visual_prompts.marks import MOST_MARKS, Mark, MarkError, plan_marks
from vipllava.visual_prompts.shapes import prompt_words

_ONLY_THE_PLACE: Final = ("rectangle", "ellipse", "point")


class TooMuchDrawing(VipLlavaError):
    """Drawing marks would take longer than a server can bear."""


def check_work(work: float) -> None:
    """Refuse marks that take too long to draw, as the API does.

    Args:
        work: of :mod:`vipllava.serve.drawing_work`.

    Raises:
        TooMuchDrawing: says how much too long.
    """
    if work > MOST_WORK:
        raise TooMuchDrawing(
            f"drawing the marks takes {work / MOST_WORK:.1f} times what one question may: use "
            "fewer or smaller ones, thinner lines, or a smaller picture"
        )


def plan_within(marks: Sequence[Mark], size: tuple[int, int]) -> VisualPromptPlan:
    """Return the plan of marks that can be drawn in seconds.

    Raises:
        MarkError: a mark cannot be drawn.
        TooMuchDrawing: they take too long.
    """
    work = decoding_work(marks)
    check_work(work)
    plan = plan_marks(marks, size)
    check_work(work + drawing_work(plan))
    return plan


def read_marks(value: object) -> list[Mark]:
    """Return the marks of a page, in its order.

    Raises:
        MarkError: a mark cannot be drawn; names it and its field.
    """
    if isinstance(value, list) and len(value) > MOST_MARKS:
        raise MarkError("regions", len(value), f"at most {MOST_MARKS} marks on one image")
    return parse_marks(value)


def describe(marks: Sequence[Mark], size: tuple[int, int]) -> tuple[VisualPromptPlan | None, Any]:
    """Plan each mark and say what a page shows of it.

    A mark that cannot be drawn is told apart from the others, which are shown all the same.

    Args:
        marks: of one picture.
        size: width and height of it, pixels.

    Raises:
        TooMuchDrawing: they take too long.

    Returns:
        The plan, or None if a mark cannot be drawn; per mark an object with ``words``, whether
        others have the same (``ambiguous``), ``rgb``, ``alpha`` and ``strokes``, or with ``error``.
    """
    try:
        plan = plan_within(marks, size)
    except MarkError:
        return None, [_alone(mark, size) for mark in marks]
    uses = Counter(map(prompt_words, plan.prompts))
    return plan, [_shown(prompt, uses[prompt_words(prompt)] > 1) for prompt in plan.prompts]


def _alone(mark: Mark, size: tuple[int, int]) -> dict[str, Any]:
    try:
        (prompt,) = plan_marks([mark], size).prompts
    except MarkError as error:
        return {"error": str(error.__cause__ or error)}
    return _shown(prompt, False)


def _shown(prompt: Any, ambiguous: bool) -> dict[str, Any]:
    strokes = [
        {"kind": stroke.kind, "points": stroke.points, "width": stroke.width}
        for stroke in prompt.strokes
    ]
    return {
        "words": prompt_words(prompt), "ambiguous": ambiguous, "rgb": prompt.rgb,
        "alpha": prompt.alpha, "strokes": strokes,
    }  # fmt: skip
