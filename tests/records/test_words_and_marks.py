"""Texts and pixels agree: for every kind with regions, any draw, published and other policies.

What is named is planned, what is planned is drawn, and no two regions share their words.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.records.random_records import KINDS
from tests.toy_data import encode_picture
from tests.visual_prompts.policy_files import FILES, load_policies
from vipllava.records import KINDS as ALL_KINDS
from vipllava.records import NO_POLICY, parse_record
from vipllava.records.image_decode import decode_image
from vipllava.stream.sample_encoder import marks_generator, plan_sample, words_generator
from vipllava.types import Mention, Sample, Turn, VisualPromptPlan
from vipllava.visual_prompts.render import mark_opacity, render_plan
from vipllava.visual_prompts.shapes import PALETTE, SHAPES, prompt_words, shape_words

SIZES = ((336, 252), (120, 200))
IMAGES = {size: encode_picture(*size, fmt="PNG") for size in SIZES}

# All that could be read as the name of a mark; longer shapes first, "mask" begins "mask contour".
_SHAPE = "|".join(sorted(SHAPES, key=len, reverse=True))
_NAMED = re.compile(
    rf"(?:within|with|at|pointed to by) (?:the )?(?:(?:{'|'.join(PALETTE)}) )?(?:{_SHAPE})\b"
)


@dataclass(frozen=True)
class Made:
    """A sample and what training makes of it."""

    sample: Sample
    plan: VisualPromptPlan
    turns: tuple[Turn, ...]
    picture: Image.Image
    marked: Image.Image


def make(kind: str, seed: int, policies: str) -> Made:
    rng = np.random.default_rng(seed)
    size = SIZES[seed % len(SIZES)]
    record: dict[str, Any] = KINDS[kind](rng, size)
    stored, image = copy.deepcopy(record), IMAGES[size]
    sample = parse_record(
        record, key="k", dataset="d", image=image, rng=words_generator(seed, 0, "d", "k")
    )
    picture = decode_image(image, "d/k")
    before = picture.tobytes()
    marks = marks_generator(seed, 0, "d", "k")
    plan, turns = plan_sample(sample, picture.size, load_policies(policies), marks)
    marked = render_plan(picture, plan)
    assert record == stored
    assert image == encode_picture(*size, fmt="PNG")
    assert picture.tobytes() == before
    return Made(sample, plan, turns, picture, marked)


def test_every_kind_with_marks_is_covered() -> None:
    assert set(KINDS) == {name for name, kind in ALL_KINDS.items() if kind.policy != NO_POLICY}


@pytest.mark.parametrize("policies", FILES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 10**6))
def test_texts_and_pixels_agree(kind: str, policies: str, seed: int) -> None:
    made = make(kind, seed, policies)
    check_words(made)
    check_pixels(made)
    check_told_apart(made)


def check_words(made: Made) -> None:
    """Each mention reads as its mark's words, and nothing else in the texts names a mark."""
    words = {prompt.region: prompt_words(prompt) for prompt in made.plan.prompts}
    for draft, turn in zip(made.sample.turns, made.turns, strict=True):
        said = [words[part.region] for part in draft.parts if isinstance(part, Mention)]
        named = _NAMED.findall(turn.text)
        assert [_the(words) for words in named] == [_the(words) for words in said]
        for colour in PALETTE:
            if re.search(rf"\b{colour}\b", turn.text):
                assert any(colour in text.split(" ") for text in said)
        assert "<bbox" not in turn.text
        assert "<image>" not in turn.text
    for prompt in made.plan.prompts:
        if prompt.colour_name is not None:
            assert prompt.rgb == PALETTE[prompt.colour_name]


def _the(words: str) -> str:
    """Return words of a mark without the article, which each mention has or has not."""
    return words.replace("the ", "")


def check_pixels(made: Made) -> None:
    """Every region has its mark, and where that lies on top it shows in its colour."""
    assert [p.region for p in made.plan.prompts] == list(range(len(made.sample.regions)))
    before = np.asarray(made.picture).astype(np.float64)
    expected = before.copy()
    for prompt in made.plan.prompts:
        painted = mark_opacity(prompt, made.picture.size)
        assert painted is not None
        opacity, (left, top) = painted
        share = np.asarray(opacity, dtype=np.float64)[..., None] / 255
        assert (share > 0).sum() >= 4
        part = expected[top : top + opacity.height, left : left + opacity.width]
        part[:] = np.round((1 - share) * part + share * np.array(prompt.rgb))
        if prompt.alpha == 255:
            assert (part[share[..., 0] == 1] == prompt.rgb).all()
    marked = np.asarray(made.marked).astype(np.float64)
    assert np.abs(marked - expected).max() <= 2  # rounding, once a mark
    assert (marked != before).any()


def check_told_apart(made: Made) -> None:
    """No two regions share their words, but boxes of one phrase; "the" makes no difference."""
    words = [
        shape_words(prompt.shape, prompt.colour_name)
        for prompt, region in zip(made.plan.prompts, made.sample.regions, strict=True)
        if region.style_of is None
    ]
    assert len(set(words)) == len(words)
