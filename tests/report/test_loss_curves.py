"""Reading Lightning's CSV log, smoothing and thinning."""

from __future__ import annotations

import pytest

from vipllava.report.charts import read_loss_curve, smooth, thin
from vipllava.types import VipLlavaError


@pytest.fixture
def log(tmp_path):
    def write(text: str):
        path = tmp_path / "metrics.csv"
        path.write_text(text)
        return path

    return write


def test_rows_of_other_values_are_passed_over(log):
    path = log("epoch,step,train/loss,train/lr\n0,0,2.5,\n,1,,0.1\n0,1,1.25,0.1\n")
    assert read_loss_curve(path) == [(0, 2.5), (1, 1.25)]
    assert read_loss_curve(path, "train/lr") == [(1, 0.1), (1, 0.1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch,step\n0,0\n", r"no column train/loss; it has epoch, step"),
        ("", "no column step, train/loss; it has none"),
        ("step,train/loss\n0,\n", "has no value of train/loss"),
        ("step,train/loss\n0,1.0\n1,x\n", r"metrics.csv:3: could not convert"),
        ("step,train/loss\n0,nan\n", r"metrics.csv:2: train/loss is nan at step 0"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(log, text: str, message: str):
    with pytest.raises(VipLlavaError, match=message):
        read_loss_curve(log(text))


def test_a_missing_log_says_what_to_do(tmp_path):
    with pytest.raises(VipLlavaError, match="train with logger=csv"):
        read_loss_curve(tmp_path / "metrics.csv")


def test_smoothing_starts_at_the_first_value():
    # half-life 1: (3 + 1/2 * 6) / 1.5 = 4, then (0 + 1/2 * 6) / 1.75
    assert smooth([(0, 6.0), (5, 3.0), (7, 0.0)], half_life=1) == [
        (0, 6.0), (5, 4.0), (7, pytest.approx(12 / 7)),
    ]  # fmt: skip


def test_thinning_keeps_both_ends():
    curve = [(step, float(step)) for step in range(101)]
    assert thin(curve, 5) == [(0, 0.0), (25, 25.0), (50, 50.0), (75, 75.0), (100, 100.0)]
    assert thin(curve[:3], 5) == curve[:3]
