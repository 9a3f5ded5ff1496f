"""A plan into words: mentions become the names of the marks that the plan draws."""

from __future__ import annotations

from collections.abc import Sequence

from vipllava.types import DraftTurn, Mention, RecordError, Turn, VisualPromptPlan
from vipllava.visual_prompts.shapes import prompt_words


def refer_turns(turns: Sequence[DraftTurn], plan: VisualPromptPlan) -> tuple[Turn, ...]:
    """Replace every mention by the words of its region's mark.

    Raises:
        RecordError: a mention of a region that the plan does not mark.
    """
    words = {prompt.region: prompt_words(prompt) for prompt in plan.prompts}

    def text_of(part: str | Mention) -> str:
        if isinstance(part, str):
            return part
        if part.region not in words:
            raise RecordError(
                f"the text mentions region {part.region}, the plan marks {sorted(words)}; "
                "every mentioned region needs a box",
                "placeholder-without-region",
            )
        return words[part.region]

    return tuple(
        Turn(turn.role, "".join(map(text_of, turn.parts)), turn.has_image) for turn in turns
    )
