"""Policies from configuration: published values, and errors that name every problem."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vipllava.types import VipLlavaError
from vipllava.visual_prompts.policies import ShapeRanges, build_policies, get_policy

CONF = Path(__file__).parents[2] / "conf" / "visual_prompts"


def test_the_published_file_holds_the_published_defaults():
    config = yaml.safe_load((CONF / "published.yaml").read_text())
    policies = build_policies(config["policies"], config["ranges"])
    assert policies["refcocog"].ranges == ShapeRanges()
    assert policies["v7w"].shapes == ("rectangle",)
    assert "point" not in policies["vcr"].shapes
    assert policies["pointQA_twice"].colour == "red"


def test_every_problem_is_named_at_once():
    with pytest.raises(VipLlavaError) as caught:
        build_policies(
            {
                "a": {"shapes": ["circle"]},
                "b": {"colours": "red"},
                "c": {"ranges": {"alpha": [200, 100]}},
                "d": {"article_rate": 2},
                "e": {"ranges": {"anchor": 0}},
                "f": {"ranges": {"point_radius": 3}},
            }
        )
    for fragment in ("circle", "colours", "ranges.alpha", "article_rate", "anchor", "point_radius"):
        assert fragment in str(caught.value)


def test_an_unknown_policy_lists_the_known():
    with pytest.raises(VipLlavaError, match="known: a"):
        get_policy(build_policies({"a": {}}), "b")
