"""Scores of a set: both kinds of value, and what is refused."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from vipllava.evaluation.captions.scores import check_metrics, score_captions
from vipllava.types import VipLlavaError

REFERENCES = {"1": ["A red bus.", "the bus on the left"], "2": ["two dogs"], "3": ["a cat"]}


def test_values_per_item_and_their_total():
    answers = {"3": "A cat!", "1": "a red bus", "2": ""}
    scores = score_captions(answers, REFERENCES, ["cider"])
    assert list(scores.items["cider"]) == ["3", "1", "2"]
    assert scores.items["cider"]["3"] == pytest.approx(5)
    assert scores.items["cider"]["2"] == 0
    assert scores.totals["cider"] == pytest.approx(sum(scores.items["cider"].values()) / 3)
    assert set(scores.totals) == {"cider"}


def test_items_that_do_not_match_are_named():
    with pytest.raises(VipLlavaError, match=r"no answer to `2`, `3`; .*without references: `4`"):
        score_captions({"1": "a", "4": "b"}, REFERENCES, ["cider"])
    many = {str(number): ["a"] for number in range(9)}
    with pytest.raises(VipLlavaError, match="no answer to `0`, `1`, `2` and 6 more"):
        score_captions({}, many, ["cider"])


def test_references_of_no_use_are_refused():
    with pytest.raises(VipLlavaError, match="list of texts, not one text: `1`"):
        score_captions({"1": "a", "2": "b"}, {"1": "a bus", "2": ["b"]}, ["cider"])
    for nothing in ([], [""], ["...", " "]):
        with pytest.raises(VipLlavaError, match="no reference with words: `1`"):
            score_captions({"1": "a", "2": "b"}, {"1": nothing, "2": ["b"]}, ["cider"])
    with pytest.raises(VipLlavaError, match="1 captions to score, and there have to be 2"):
        score_captions({"1": "a"}, {"1": ["a"]}, ["cider"])


def test_an_unknown_metric_is_named():
    with pytest.raises(VipLlavaError, match="metrics of captions: spice; there are cider, meteor"):
        check_metrics(["cider", "spice"])
    check_metrics(["cider"])


def test_the_documented_example(capsys: pytest.CaptureFixture[str]):
    page = Path(__file__).resolve().parents[3] / "docs" / "evaluation.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    (example,) = [block for block in blocks if "score_captions" in block]
    exec(example, {})
    # `two dogs on the grass` and `two dogs run`: of one word 2 / sqrt(5 x 3), of two words
    # 1 / sqrt(4 x 2), of three and four none, all of one weight; two words more
    second = 10 / 4 * (2 / math.sqrt(15) + 1 / math.sqrt(8)) * math.exp(-4 / 72)
    total, value = capsys.readouterr().out.split("} ")
    assert float(value) == pytest.approx(second) == pytest.approx(2.057346)
    assert total.startswith("{'cider': 2.0377")
