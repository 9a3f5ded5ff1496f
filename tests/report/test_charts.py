"""Charts: coordinates as numbers."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from vipllava.report.charts import Bar, bar_chart, loss_chart, nice_ticks


@pytest.mark.parametrize(
    ("highest", "ticks"),
    [
        (5.2, [0, 2, 4, 6]),
        (4.0, [0, 1, 2, 3, 4]),
        (0.31, [0, 0.1, 0.2, 0.3, 0.4]),
        (250, [0, 100, 200, 300]),
        (1.0, [0, 0.5, 1.0]),
        (0, [0, 0.5, 1.0]),
    ],
)
def test_ticks_are_round_and_reach_the_highest(highest: float, ticks: list[float]):
    assert nice_ticks(highest) == ticks


def test_bars_and_whiskers_stand_at_their_shares():
    built = bar_chart([Bar("mark drawn", 0.89, 0.866, 0.91, "marked")])
    root = ElementTree.fromstring(built)
    styles = [node.get("style") for node in root.iter("div") if node.get("style")]
    assert styles == ["width:89.00%", "left:86.60%;width:4.40%"]
    assert "mark drawn" in built


def test_an_axis_of_another_length_and_a_line_across():
    built = bar_chart([Bar("a", 0.5, 0.5, 0.5, "marked")] * 2, top=200, unit="", reference=0.1)
    root = ElementTree.fromstring(built)
    lines = [node.get("style") for node in root.iterfind(".//div[@class='reference']")]
    assert lines == ["left:10.00%"] * 2
    assert [node.text for node in root.iter("span")] == ["0", "50", "100", "150", "200"]


def test_loss_chart_draws_every_step_and_the_average():
    # A flat 4 on an axis of 0..6 stands a third of the 186 pixels below the top edge at 26.
    root = ElementTree.fromstring(loss_chart("pretrain", [(step, 4.0) for step in range(4)]))
    raw, average = root.findall("polyline")
    assert raw.get("points") == average.get("points") == "40,88 162.7,88 285.3,88 408,88"
    assert root.get("aria-label") == "pretrain: loss 4.00 at step 0, 4.00 at step 3"
    texts = [node.text for node in root.iter("text")]
    assert texts == ["0", "2", "4", "6", "0", "1", "2", "3", "optimizer step", "loss"]


def test_a_first_peak_is_cut_off_at_the_top_edge():
    curve = [(0, 1.0), (1, 90.0), *((step, 1.0) for step in range(2, 300))]
    root = ElementTree.fromstring(loss_chart("x", curve))
    for line in root.findall("polyline"):
        heights = [float(pair.split(",")[1]) for pair in (line.get("points") or "").split()]
        assert min(heights) >= 26


def test_a_long_curve_stays_light_and_a_single_step_draws():
    assert len(loss_chart("x", [(step, 1.0) for step in range(100_000)])) < 20_000
    assert re.search(r'points="40,[\d.]+"', loss_chart("x", [(7, 1.0)]))
