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
        if isinstance(part, Mention) and part.region not in words:
            raise RecordError(
                f"the text mentions region {part.region}, the plan marks {sorted(words)}; "
                "every mentioned region needs a box",
                "placeholder-without-region",
            )
        return part if isinstance(part, str) else words[part.region]

    return tuple(Turn(t.role, "".join(map(text_of, t.parts)), t.has_image) for t in turns)
