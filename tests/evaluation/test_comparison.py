"""Evaluations compared item by item, against values counted by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vipllava.evaluation.bench import Prediction, jsonl
from vipllava.evaluation.comparison import Evaluated, compare, read_evaluation
from vipllava.types import VipLlavaError


def evaluated(
    name: str, scores: Sequence[float | None], *, bench: str = "v7w", **settings: Any
) -> Evaluated:
    """An item per score and image; those of even numbers are in the group `even`."""
    items = [
        Prediction(
            f"q{at}", f"{at}.jpg", "kept", "Which?", "A", ("all", "even")[: 2 - at % 2], "A", score
        )
        for at, score in enumerate(scores)
    ]
    return Evaluated(Path(name), bench, settings, {item.key: item for item in items})


def test_ten_of_forty_gained_and_two_lost():
    first = evaluated("a", [0] * 20 + [1] * 20)
    other = evaluated("b", [1] * 10 + [0] * 10 + [1] * 18 + [0] * 2)
    compared = compare([first, other])
    assert (compared.bench, compared.first, compared.is_share) == ("v7w", "a", True)
    (comparison,) = compared.comparisons
    assert comparison.folder == "b"
    total = comparison.total
    assert (total.first.value, total.other.value) == (0.5, 0.7)
    of = total.difference
    assert (of.num_lower, of.num_higher) == (2, 10)
    # McNemar, exact: 2 * (1 + 12 + 66) / 2**12
    assert of.p_value == total.p_corrected == pytest.approx(158 / 4096)
    assert of.estimate.value == pytest.approx(0.2)
    # scipy.stats.bootstrap with 1,000,000 resamples
    assert (of.estimate.low, of.estimate.high) == pytest.approx((0.05, 0.375))
    assert total.shown == "higher"
    assert list(comparison.groups) == ["all", "even"]
    even = comparison.groups["even"]
    assert (even.first.num_items, even.difference.num_lower) == (20, 1)
    assert compare([other, first]).comparisons[0].total.shown == "lower"


@pytest.mark.parametrize(
    ("before", "after", "p_value"),
    [
        ([0, 0, 1, 1], [1, 1, 0, 1], 1.0),  # two gained, one lost
        ([0, 1, 1, 0, 1], [0, 1, 1, 0, 1], 1.0),
        ([0, 0, 0], [1, 1, 1], 0.25),  # which shows no spread, either
    ],
)
def test_no_difference_that_these_items_can_show(before, after, p_value: float):
    (comparison,) = compare([evaluated("a", before), evaluated("b", after)]).comparisons
    assert comparison.total.shown is None
    assert comparison.total.difference.p_value == p_value


def test_an_interval_without_0_does_not_suffice_where_images_are_few():
    before, after = [0.0] * 4, [0.5, 0.6, 0.7, 0.8]
    (comparison,) = compare([evaluated("a", before), evaluated("b", after)]).comparisons
    low = comparison.total.difference.estimate.low
    assert low is not None
    assert low > 0
    assert comparison.total.p_corrected == 0.125
    assert comparison.total.shown is None


def test_all_wrong_against_all_right():
    """There is no interval, but 2 ways of signs of 2**10 are as far from 0."""
    (comparison,) = compare([evaluated("a", [1] * 10), evaluated("b", [0] * 10)]).comparisons
    total = comparison.total
    assert (total.difference.estimate.value, total.difference.estimate.low) == (-1, None)
    assert total.p_corrected == 2 / 1024
    assert total.shown == "lower"


def test_several_models_are_corrected_for():
    first = evaluated("a", [0] * 12)
    six, seven = ([1] * n + [0] * (12 - n) for n in (6, 7))
    # Alone: 2 / 2**6 and 2 / 2**7. Holm: the smaller one twice, the other once.
    compared = compare([first, evaluated("b", six), evaluated("c", seven)])
    totals = [each.total for each in compared.comparisons]
    assert [total.difference.p_value for total in totals] == [2 / 64, 2 / 128]
    assert [total.p_corrected for total in totals] == [2 / 64, 2 * 2 / 128]
    # Of the groups there are four: 2 / 64 and 2 / 8, then 2 / 128 and 2 / 16.
    p_values = [row.p_corrected for each in compared.comparisons for row in each.groups.values()]
    assert p_values == [3 * 2 / 64, 2 / 8, 4 * 2 / 128, 2 * 2 / 16]


def test_items_without_a_score_are_left_out_and_counted():
    first = evaluated("a", [1, None, 0, 1, None])
    other = evaluated("b", [1, 1, None, 0, None])
    (comparison,) = compare([first, other]).comparisons
    assert comparison.total.first.num_items == 2
    assert (comparison.num_unscored_first, comparison.num_unscored_other) == (2, 2)
    nothing = compare([evaluated("a", [None]), evaluated("b", [1])]).comparisons[0].total
    assert (nothing.first.value, nothing.p_corrected, nothing.shown) == (None, None, None)


def test_other_items_are_refused_by_name_or_left_out():
    first, other = evaluated("a", [1, 0, 1]), evaluated("b", [1, 0, 1, 1])
    message = r"0 items only in a, 1 items \(q3\) only in b; --common compares those of both"
    with pytest.raises(VipLlavaError, match=message):
        compare([first, other])
    (comparison,) = compare([first, other], common=True).comparisons
    assert (comparison.num_only_first, comparison.num_only_other) == (0, 1)
    assert comparison.total.first.num_items == 3
    many = evaluated("a", [1] * 9)
    with pytest.raises(VipLlavaError, match=r"7 items \(q2, q3, q4, q5, q6 and 2 more\) only in a"):
        compare([many, evaluated("b", [1] * 2)])
    with pytest.raises(VipLlavaError, match="a and b have no item in common"):
        compare([many, Evaluated(Path("b"), "v7w", {}, {})], common=True)


@pytest.mark.parametrize("changed", [{"image": "0.png"}, {"ground_truth": "B"}])
def test_an_item_that_is_another_one_is_refused(changed: dict[str, Any]):
    first, other = evaluated("a", [1, 0]), evaluated("b", [1, 0])
    items = {**other.items, "q1": replace(other.items["q1"], **changed)}
    (field,) = changed
    with pytest.raises(VipLlavaError, match=rf"1 items \(q1\) differ in `{field}` between a and b"):
        compare([first, Evaluated(Path("b"), "v7w", {}, items)], common=True)


def test_answers_that_mention_marks_are_worded_as_they_were_asked():
    first, other = evaluated("a", [1], encoding="overlay"), evaluated("b", [1], encoding="crop")
    items = {"q0": replace(other.items["q0"], ground_truth="shown in image 2")}
    (comparison,) = compare([first, replace(other, items=items)]).comparisons
    assert comparison.total.first.num_items == 1


def test_groups_are_those_that_items_have_in_both():
    """Shapes, e.g., follow from the marks and not from the item."""
    first, other = evaluated("a", [1, 0]), evaluated("b", [1, 0])
    items = {**other.items, "q0": replace(other.items["q0"], groups=("all", "arrow"))}
    (comparison,) = compare([first, Evaluated(Path("b"), "v7w", {}, items)]).comparisons
    assert {name: row.first.num_items for name, row in comparison.groups.items()} == {"all": 2}


def test_another_benchmark_is_refused():
    with pytest.raises(VipLlavaError, match="a is of the benchmark v7w, b of pointqa"):
        compare([evaluated("a", [1]), evaluated("b", [1], bench="pointqa")])
    with pytest.raises(VipLlavaError, match="name two folders or more"):
        compare([evaluated("a", [1])])


def test_different_judges_are_refused_unless_allowed():
    first = evaluated("a", [1, 0], **{"judge.model": "small", "judge.seed": 1, "seed": 42})
    other = evaluated("b", [1, 0], **{"judge.model": "big", "judge.seed": 2, "seed": 42})
    message = r"different judges do not compare(.|\n)*a: judge.model=small\n  b: judge.model=big"
    with pytest.raises(VipLlavaError, match=message):
        compare([first, other])
    prompt = {"judge.model": "small", "judge.prompt_sha256": "f00"}
    with pytest.raises(VipLlavaError, match=r"b: judge\.model=-, judge\.prompt_sha256=-"):
        compare([evaluated("a", [1, 0], **prompt), evaluated("b", [1, 0])])
    compared = compare([first, other], allow_different_judges=True)
    assert compared.settings == {"judge.model": ["small", "big"], "judge.seed": [1, 2]}
    again = evaluated("b", [1, 0], **{"judge.model": "small", "judge.seed": 2, "seed": 42})
    assert compare([first, again]).settings == {"judge.seed": [1, 2]}


def test_different_metrics_are_refused():
    exact = evaluated("a", [0, 0], **{"bench.score": "exact"})
    offline = evaluated("b", [1, 1], **{"bench.score": "offline"})
    message = (
        r"different metrics do not compare(.|\n)*b anew: its command with bench\.score=exact and "
        r"name=NEW_NAME\n  a: metric=-, bench\.score=exact\n  b: .*bench\.score=offline"
    )
    with pytest.raises(VipLlavaError, match=message):
        compare([exact, offline], allow_different_judges=True)
    with pytest.raises(VipLlavaError, match=r"c: metric=-, bench\.score=offline"):
        compare([exact, exact, replace(offline, folder=Path("c"))])
    judged = evaluated("b", [1, 1], **{"bench.score": "judge", "judge.model": "big"})
    with pytest.raises(VipLlavaError, match=r"different metrics .*(.|\n)*bench\.score=judge"):
        compare([exact, judged], allow_different_judges=True)
    accuracy, share = (replace(evaluated("a", [1]), metric=name) for name in ("accuracy", "share"))
    with pytest.raises(VipLlavaError, match=r"a: metric=accuracy, .*\n  a: metric=share"):
        compare([accuracy, share])
    assert compare([exact, exact]).settings == {}
    # The metric of what was graded is its judge's name: one may have several.
    named = [replace(judged, metric=name) for name in ("graded by big", "graded by also-big")]
    assert compare(named).settings == {}


def test_scores_without_an_upper_end():
    """CIDEr of a caption may be 10."""
    first, other = evaluated("a", [0.5, 3.0, 0.0]), evaluated("b", [1.0, 2.0, 0.0])
    compared = compare([first, other])
    assert not compared.is_share
    total = compared.comparisons[0].total
    assert (total.first.value, total.other.value) == pytest.approx((3.5 / 3, 1.0))
    assert (total.difference.num_lower, total.difference.num_higher) == (1, 1)


def test_an_evaluation_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(VipLlavaError, match=r"there is no .*metrics.json: name the folder"):
        read_evaluation(tmp_path)
    metrics = tmp_path / "metrics.json"
    metrics.write_text(
        '{"bench": "v7w", "metric": "share", "settings": {"seed": 1, "judge": {"model": "m"}}}'
    )
    with pytest.raises(VipLlavaError, match=r"predictions.jsonl has no items with their marks"):
        read_evaluation(tmp_path)
    items = evaluated("a", [0.5, None]).items
    lenient = replace(items["q0"], more={"lenient": 1})
    (tmp_path / "predictions.jsonl").write_text(jsonl([lenient.row(), items["q1"].row()]))
    found = read_evaluation(tmp_path)
    assert found.settings == {"seed": 1, "judge.model": "m"}
    assert found.metric == "share"
    assert [each.score for each in found.items.values()] == [0.5, None]
    assert [each.score for each in read_evaluation(tmp_path, "lenient").items.values()] == [1, None]
    with pytest.raises(VipLlavaError, match=r"has no cider; it has score, lenient"):
        read_evaluation(tmp_path, "cider")
    metrics.write_text('{"benchmark": "v7w"}')
    with pytest.raises(VipLlavaError, match=r"metrics.json has no `bench` .*earlier version"):
        read_evaluation(tmp_path)
    metrics.write_text("{")
    with pytest.raises(VipLlavaError, match=r"cannot read .*metrics.json: .*; evaluate again"):
        read_evaluation(tmp_path)
