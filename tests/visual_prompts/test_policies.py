"""Policies from configuration: published values, evaluation, errors that name every problem."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.visual_prompts.policy_files import FILES, load_policies
from vipllava.records import KINDS, NO_POLICY
from vipllava.sample_world import TINY_POLICIES
from vipllava.types import Region, Shape, VipLlavaError
from vipllava.visual_prompts.policies import (
    POLICIES,
    ShapeRanges,
    VisualPromptPolicy,
    build_policies,
    get_policy,
)
from vipllava.visual_prompts.shapes import PALETTE, SHAPES

PUBLISHED_SHAPES: dict[str, tuple[Shape, ...]] = {
    "refcocog": SHAPES,
    "vg_rel": ("rectangle", "ellipse"),
    "vg_rel-gpt4v": ("rectangle", "ellipse"),
    "flickr30k": ("rectangle", "ellipse", "arrow"),
    "vcr": tuple(shape for shape in SHAPES if shape != "point"),
    "v7w": ("rectangle",),
    "pointQA_twice": ("rectangle",),
    "regions": SHAPES,
}


@pytest.mark.parametrize("name", ["published", "evaluation"])
def test_the_policies_in_code_are_those_of_the_configuration(name: str) -> None:
    assert POLICIES[name] == load_policies(name)
    assert list(POLICIES) == ["published", "evaluation"]


def test_the_policies_of_the_tiny_model_are_those_of_its_configuration() -> None:
    assert load_policies("tiny") == TINY_POLICIES


def test_the_palette_is_the_published_one() -> None:
    assert PALETTE == {
        "red": (255, 0, 0),
        "lime": (0, 255, 0),
        "blue": (0, 0, 255),
        "yellow": (255, 255, 0),
        "fuchsia": (255, 0, 255),
        "aqua": (0, 255, 255),
        "orange": (255, 165, 0),
        "purple": (128, 0, 128),
        "gold": (255, 215, 0),
    }


def test_the_published_ranges_are_the_defaults() -> None:
    published = ShapeRanges(
        anchor=336,
        rectangle_width=(2, 8),
        ellipse_width=(2, 8),
        triangle_width=(2, 8),
        scribble_width=(2, 12),
        arrow_width=(1, 6),
        contour_width=(1, 2),
        point_radius=(5, 20),
        point_aspect=(0.5, 2.0),
        ellipse_scale=(1.0, 1.5),
        arrow_length=(0.8, 50.0),
        arrow_head=(0.2, 0.5),
        arrow_head_min=6.0,
        arrow_bend=5.0,
        constant_rectangle_width=3,
        constant_point_radius=8,
        alpha=(96, 255),
        mask_alpha=(48, 128),
    )
    assert published == ShapeRanges()
    for name in ("published", "evaluation"):
        assert {policy.ranges for policy in load_policies(name).values()} == {published}


def test_the_published_shapes() -> None:
    policies = load_policies()
    assert {name: set(policy.shapes) for name, policy in policies.items()} == {
        name: set(shapes) for name, shapes in PUBLISHED_SHAPES.items()
    }


def test_the_published_words_and_styles() -> None:
    policies = load_policies()
    half = {name for name, policy in policies.items() if policy.article_rate == 0.5}
    assert half == {"vcr", "v7w", "vg_rel-gpt4v"}
    assert all(policies[name].article_rate == 1.0 for name in set(policies) - half)
    constant = {name for name, policy in policies.items() if policy.constant_style}
    assert constant == {"v7w", "pointQA_twice"}
    assert all(policy.named_colour_rate == 0.5 for policy in policies.values())
    assert all(policy.fixed_alpha is None for policy in policies.values())
    red = {name for name, policy in policies.items() if policy.colour is not None}
    assert red == {"pointQA_twice"}
    assert (policies["pointQA_twice"].colour, policies["pointQA_twice"].name_colour) == (
        "red",
        False,
    )
    told_apart = {name for name, policy in policies.items() if policy.distinguishable}
    assert told_apart == {"flickr30k", "vcr", "v7w", "regions"}


def test_evaluation_differs_in_opacity_and_in_vcrs_points() -> None:
    expected = {name: replace(policy, fixed_alpha=128) for name, policy in load_policies().items()}
    expected["vcr"] = replace(
        expected["vcr"],
        shapes=("point",),
        constant_style=True,
        released_point_jitter=True,
        distinguishable=False,
    )
    assert load_policies("evaluation") == expected


@pytest.mark.parametrize("name", FILES)
def test_every_kind_with_marks_has_its_policy(name: str) -> None:
    wanted = {kind.policy for kind in KINDS.values()} - {NO_POLICY}
    assert set(load_policies(name)) == wanted


def test_a_policys_own_ranges_lie_over_the_common_ones() -> None:
    policies = build_policies(
        {"a": {"ranges": {"point_radius": [9, 9]}}, "b": {}}, {"anchor": 100, "alpha": [7, 7]}
    )
    assert policies["a"].ranges == ShapeRanges(anchor=100, alpha=(7, 7), point_radius=(9, 9))
    assert policies["b"] == VisualPromptPolicy(ranges=ShapeRanges(anchor=100, alpha=(7, 7)))


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(VipLlavaError) as caught:
        build_policies(
            {
                "a": {"shapes": ["circle"]},
                "b": {"colours": "red"},
                "c": {"ranges": {"alpha": [200, 100]}},
                "d": {"article_rate": 2},
                "e": {"ranges": {"anchor": 0}},
                "f": {"ranges": {"point_radius": 3}},
                "g": {"fixed_alpha": 256},
                "h": {"shapes": []},
                "i": {"colour": "pink"},
                "j": {"ranges": {"mask_alpha": [0, 9]}},
                "k": {"shapes": "rectangle"},
                "l": {"colour": [255, 0, 0]},
                "m": {"distinguishable": "no"},
                "n": {"ranges": {"point_radius": [5.5, 9]}},
                "o": {"ranges": {"arrow_bend": "much"}},
                "p": {"ranges": 5},
                "q": ["rectangle"],
                "r": {"article_rate": "often"},
            }
        )
    messages = str(caught.value).splitlines()
    assert [message.split(":")[0] for message in messages] == [
        f"visual_prompts.policies.{name}" for name in "abcdefghijklmnopqr"
    ]
    for message, fragment in zip(
        messages,
        (
            "unknown shape `circle`; the shapes are: rectangle",
            "['colours']; known: shapes",
            "alpha is [200, 100]; give [low, high]",
            "article_rate is 2; a rate lies in 0..1",
            "anchor is 0; it must be positive",
            "point_radius is 3; give [low, high]",
            "fixed_alpha is 256; opacity lies in 1..255",
            "shapes is empty; name at least one shape",
            "unknown colour `pink`; the palette has: red",
            "mask_alpha is [0, 9]; opacity lies in 1..255",
            "shapes is 'rectangle'; give a list of rectangle, ellipse, ",
            "unknown colour `(255, 0, 0)`; the palette has: red",
            "distinguishable is no; give true or false",
            "point_radius is [5.5, 9]; give [low, high] with low <= high, whole numbers",
            "arrow_bend is 'much'; give a number",
            "ranges: 5 is no section; it may have anchor, ",
            "['rectangle'] is no section; it may have shapes, ",
            "article_rate is often; a rate lies in 0..1",
        ),
        strict=True,
    ):
        assert fragment in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shapes": ("rectangel",)}, "unknown shape `rectangel`; the shapes are: rectangle"),
        ({"shapes": ("rectangle"), "colour": "red"}, "shapes is 'rectangle'; give a list of"),
        ({"colour": "crimson"}, "unknown colour `crimson`; the palette has: red"),
        ({"fixed_alpha": 0}, "fixed_alpha is 0; opacity lies in 1..255"),
    ],
)
def test_a_policy_made_by_hand_is_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(VipLlavaError, match=message):
        VisualPromptPolicy(**fields)
    with pytest.raises(VipLlavaError, match=message):
        replace(VisualPromptPolicy(), **fields)


@pytest.mark.parametrize(
    ("box", "polygons"),
    [
        ((1, 2, 3), ()),
        ("1234", ()),
        ((1, 2, 3, float("nan")), ()),
        (5, ()),
        ((1, 2, 3, 4), ((1, 2), (3, 4), (5, 6))),
        ((1, 2, 3, 4), (((1, 2, 3),),)),
        ((1, 2, 3, 4), (((1, 2), (3, float("nan")), (5, 6)),)),
        ((1, 2, 3, 4), (("ab", "cd", "ef"),)),
    ],
)
def test_a_region_made_by_hand_is_checked(box: Any, polygons: Any) -> None:
    with pytest.raises(VipLlavaError, match="expected four finite numbers x1, y1, x2, y2"):
        Region(box, polygons)


def test_an_unknown_policy_lists_the_known() -> None:
    with pytest.raises(VipLlavaError, match="known: a"):
        get_policy(build_policies({"a": {}}), "b")
