"""Colours and words of several regions in one picture, data set by data set, as published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from tests.visual_prompts.policy_files import load_policies
from vipllava.keyed_random import generator_for
from vipllava.types import FixedVisualPrompt, RecordError, Region, VisualPrompt
from vipllava.visual_prompts.policies import VisualPromptPolicy
from vipllava.visual_prompts.sampling import sample_plan
from vipllava.visual_prompts.shapes import PALETTE, prompt_words, shape_words

SIZE = (336, 252)
BOX = Region((20.0, 20.0, 120.0, 110.0))
Prompts = Sequence[VisualPrompt]


def marks(
    policy: str | VisualPromptPolicy,
    count: int = 1,
    regions: Sequence[Region] = (),
    fixed: Sequence[FixedVisualPrompt] = (),
    draws: int = 300,
) -> Iterator[Prompts]:
    """Yield the marks of ``draws`` plans."""
    chosen = load_policies()[policy] if isinstance(policy, str) else policy
    for draw in range(draws):
        rng = generator_for("colours", draw)
        yield sample_plan(regions or [BOX] * count, SIZE, chosen, rng, fixed).prompts


def names_of(prompts: Prompts) -> list[str | None]:
    return [prompt.colour_name for prompt in prompts]


def is_about(share: float, expected: float, count: int) -> bool:
    """Four standard deviations of a share of ``count`` draws."""
    return abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / count)


def test_a_named_mark_has_the_colour_of_its_name_and_an_unnamed_one_any() -> None:
    unnamed = [p.rgb for (p,) in marks("refcocog") if p.colour_name is None]
    assert len(set(unnamed)) > 0.9 * len(unnamed)
    assert np.mean(unnamed, axis=0) == pytest.approx((127.5,) * 3, abs=25)
    for (prompt,) in marks("refcocog"):
        if prompt.colour_name is not None:
            assert prompt.rgb == PALETTE[prompt.colour_name]


@pytest.mark.parametrize("policy", ["refcocog", "vg_rel", "vg_rel-gpt4v", "flickr30k", "vcr"])
def test_a_shape_used_once_is_named_half_of_the_time_uniformly(policy: str) -> None:
    draws = 1800
    names = [prompts[0].colour_name for prompts in marks(policy, draws=draws)]
    counts = Counter(names)
    assert is_about(counts.pop(None) / draws, 0.5, draws)
    assert set(counts) == set(PALETTE)
    assert all(is_about(count / draws, 1 / 18, draws) for count in counts.values())


@pytest.mark.parametrize("policy", ["vg_rel", "vg_rel-gpt4v"])
def test_relations_two_of_a_shape_get_two_names_else_each_half_of_the_time(policy: str) -> None:
    named = {False: [0, 0], True: [0, 0]}
    for first, second in marks(policy, 2, draws=600):
        same = first.shape == second.shape
        named[same][0] += sum(name is not None for name in names_of([first, second]))
        named[same][1] += 2
        if same:
            assert first.colour_name != second.colour_name
    assert named[True][0] == named[True][1]
    assert is_about(named[False][0] / named[False][1], 0.5, named[False][1])
    assert is_about(named[True][1] / 1200, 0.5, 600)


@pytest.mark.parametrize(("policy", "count"), [("flickr30k", 6), ("vcr", 9), ("regions", 12)])
def test_a_shape_used_again_gets_distinct_names_and_a_single_one_half(
    policy: str, count: int
) -> None:
    single = [0, 0]
    for prompts in marks(policy, count):
        by_shape: dict[str, list[str | None]] = {}
        for prompt in prompts:
            by_shape.setdefault(prompt.shape, []).append(prompt.colour_name)
        for names in by_shape.values():
            if len(names) == 1:
                single[0] += names[0] is not None
                single[1] += 1
            else:
                assert None not in names
                assert len(set(names)) == len(names)
    assert single[1] > 100
    assert is_about(single[0] / single[1], 0.5, single[1])


def test_visual7w_four_rectangles_of_four_colours_and_one_width() -> None:
    for prompts in marks("v7w", 4):
        assert {prompt.shape for prompt in prompts} == {"rectangle"}
        assert {prompt.strokes[0].width for prompt in prompts} == {3}
        assert len({*names_of(prompts), None}) == 5


def test_pointqa_is_red_and_does_not_say_so() -> None:
    for (prompt,) in marks("pointQA_twice", draws=30):
        assert (prompt.shape, prompt.rgb, prompt.strokes[0].width) == ("rectangle", (255, 0, 0), 3)
        assert prompt_words(prompt) == "within the rectangle"


def test_a_tenth_object_of_vcr_is_asked_unnamed() -> None:
    for prompts in marks(load_policies("evaluation")["vcr"], 10, draws=30):
        assert Counter(names_of(prompts)) == Counter([*PALETTE, None])
        assert {prompt_words(p) for p in prompts if p.colour_name is None} == {"at the point"}


def test_vcr_is_marked_with_anything_but_points_and_at_evaluation_with_points() -> None:
    shapes = {p.shape for prompts in marks("vcr", 3) for p in prompts}
    assert shapes == set(load_policies()["vcr"].shapes)
    assert "point" not in shapes
    for prompts in marks(load_policies("evaluation")["vcr"], 9, draws=30):
        assert {(p.shape, p.alpha) for p in prompts} == {("point", 128)}
        assert set(names_of(prompts)) == set(PALETTE)
        for prompt in prompts:
            (x1, y1), (x2, y2) = prompt.strokes[0].points
            assert (x2 - x1, y2 - y1) == pytest.approx((16, 16))


@pytest.mark.parametrize("policy", list(load_policies("evaluation")))
def test_evaluation_draws_at_half_opacity(policy: str) -> None:
    chosen = load_policies("evaluation")[policy]
    assert {p.alpha for prompts in marks(chosen, draws=30) for p in prompts} == {128}


def test_all_boxes_of_a_phrase_share_one_style_and_count_once() -> None:
    regions = [BOX, *(Region((150.0, y, 190.0, y + 40), style_of=0) for y in (10.0, 90.0)), BOX]
    unnamed = 0
    for first, second, third, other in marks("flickr30k", regions=regions):
        for repeated in (second, third):
            assert prompt_words(repeated) == prompt_words(first)
            assert (repeated.rgb, repeated.alpha) == (first.rgb, first.alpha)
            assert repeated.strokes[0].width == first.strokes[0].width
        assert prompt_words(other) != prompt_words(first)
        unnamed += first.colour_name is None
    assert unnamed > 50  # three boxes of one phrase are one use of the shape


@pytest.mark.parametrize(("policy", "most"), [("flickr30k", 27), ("vcr", 63), ("v7w", 9)])
def test_the_palette_lasts_for_nine_marks_a_shape(policy: str, most: int) -> None:
    for prompts in marks(policy, most, draws=3):
        assert len({prompt_words(p).replace("the ", "") for p in prompts}) == most
    shapes = most // 9
    message = (
        rf"^{most + 1} regions cannot be told apart by words: {shapes} shapes with 9 colour names "
        "each; use more shapes or fewer regions$"
    )
    with pytest.raises(RecordError, match=message) as caught:
        next(marks(policy, most + 1))
    assert caught.value.fault == "same-words"


def test_where_nothing_needs_telling_apart_names_run_out() -> None:
    policy = VisualPromptPolicy(shapes=("rectangle",))
    for prompts in marks(policy, 12, draws=20):
        counts = Counter(names_of(prompts))
        assert counts.pop(None) == 3
        assert counts == dict.fromkeys(PALETTE, 1)
        unnamed = {p.rgb for p in prompts if p.colour_name is None}
        assert len(unnamed) == 3


# What users fix.


def test_fixed_words_are_left_to_their_region() -> None:
    fixed = [
        FixedVisualPrompt(),
        FixedVisualPrompt(shape="rectangle", colour="red"),
        FixedVisualPrompt(colour="red"),
        FixedVisualPrompt(shape="rectangle"),
        FixedVisualPrompt(shape="ellipse", colour=(9, 9, 9)),
    ]
    for prompts in marks("regions", 5, fixed=fixed):
        words = [shape_words(p.shape, p.colour_name) for p in prompts]
        assert len(set(words)) == 5
        assert words[1] == "within the red rectangle"
        assert prompts[2].colour_name == "red"
        assert prompts[2].shape != "rectangle"
        assert prompts[3].shape == "rectangle"
        assert words[4] == "within the ellipse"


def test_fixed_colours_use_up_every_shape_before_they_are_refused() -> None:
    fixed = [FixedVisualPrompt(), *[FixedVisualPrompt(colour="red")] * 8]
    for prompts in marks("regions", 9, fixed=fixed, draws=20):
        assert len({p.shape for p in prompts[1:]}) == 8
        assert (prompts[0].colour_name or "") != "red"
    fixed = [FixedVisualPrompt(colour="red")] * 9
    with pytest.raises(RecordError, match="9 regions cannot be told apart by words: 8 shapes"):
        next(marks("regions", 9, fixed=fixed))


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (("arrow", "red"), ("arrow", "red"), "pointed to by the red arrow"),
        (("mask", (1, 2, 3)), ("mask", (3, 2, 1)), "with the mask"),
    ],
)
def test_two_regions_fixed_to_the_same_words_are_refused(
    first: tuple[str, str], second: tuple[str, str], words: str
) -> None:
    fixed = [
        FixedVisualPrompt(),
        *(FixedVisualPrompt(shape, colour) for shape, colour in (first, second)),  # type: ignore[arg-type]
    ]
    with pytest.raises(RecordError) as caught:
        next(marks("regions", 3, fixed=fixed))
    assert str(caught.value) == (
        f"regions 1 and 2 would both be called `{words}`; fix another shape or colour for one of "
        "them"
    )
    assert caught.value.fault == "same-words"


def test_ten_regions_fixed_to_one_shape_exhaust_the_palette() -> None:
    fixed = [FixedVisualPrompt(shape="point")] * 11
    for prompts in marks("regions", 9, fixed=fixed[:9], draws=5):
        assert set(names_of(prompts)) == set(PALETTE)
    with pytest.raises(RecordError, match="regions 9 and 10 would both be called `at the point`"):
        next(marks("regions", 11, fixed=fixed))
