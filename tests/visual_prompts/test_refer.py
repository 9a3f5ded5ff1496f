"""Words: the published phrases, and mentions that follow the plan."""

from __future__ import annotations

from collections import Counter

import pytest

from vipllava.keyed_random import generator_for
from vipllava.types import (
    DraftTurn,
    Mention,
    RecordError,
    Stroke,
    Turn,
    VisualPrompt,
    VisualPromptPlan,
)
from vipllava.visual_prompts.shapes import refer_turns, shape_words


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("rectangle", "within the red rectangle"),
        ("ellipse", "within the red ellipse"),
        ("triangle", "with the red triangle"),
        ("point", "at the red point"),
        ("scribble", "with the red scribble"),
        ("mask contour", "with the red mask contour"),
        ("mask", "with the red mask"),
        ("arrow", "pointed to by the red arrow"),
    ],
)
def test_published_words(shape, words):
    assert shape_words(shape, "red") == words
    assert shape_words(shape, None) == words.replace("red ", "")
    assert shape_words(shape, "red", article=False) == words.replace("the ", "")


def prompt(region: int, colour: str) -> VisualPrompt:
    return VisualPrompt(
        region, "rectangle", (255, 0, 0), colour, 255, (Stroke("box", ((0, 0), (1, 1)), 1),)
    )


def test_mentions_become_words_by_region():
    plan = VisualPromptPlan((9, 9), (prompt(1, "red"), prompt(0, "blue")))
    draft = (
        DraftTurn("user", ("What is ", Mention(0), " and ", Mention(1), "?"), has_image=True),
        DraftTurn("assistant", ("The cup ", Mention(1), ".")),
    )
    assert refer_turns(draft, plan, generator_for(0)) == (
        Turn("user", "What is within the blue rectangle and within the red rectangle?", True),
        Turn("assistant", "The cup within the red rectangle."),
    )


def test_a_mention_without_a_mark_is_an_error():
    plan = VisualPromptPlan((9, 9), (prompt(0, "red"),))
    with pytest.raises(RecordError, match=r"mentions region 3, the plan marks \[0\]"):
        refer_turns((DraftTurn("user", (Mention(3),)),), plan, generator_for(0))


def test_the_article_is_drawn_for_each_mention():
    draft = (DraftTurn("user", (Mention(0), " and ", Mention(0))),)
    plan = VisualPromptPlan((9, 9), (prompt(0, "red"),), article_rate=0.5)
    texts = Counter(refer_turns(draft, plan, generator_for(n))[0].text for n in range(400))
    long, short = "within the red rectangle", "within red rectangle"
    assert set(texts) == {f"{a} and {b}" for a in (long, short) for b in (long, short)}
    assert all(65 <= count <= 135 for count in texts.values())  # a quarter each
