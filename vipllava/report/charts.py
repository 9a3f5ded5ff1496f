"""Charts as inline SVG; colours come from the page's style, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vipllava.report.html import Html, element
from vipllava.report.loss_curves import smooth, thin

_MOST_POINTS = 400
"""More than a chart has pixels; longer curves only make the page heavier."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar with its interval, all as shares 0..1; ``kind`` is a class of the style."""

    label: str
    value: float
    low: float
    high: float
    kind: str


def bar_chart(bars: Sequence[Bar]) -> Html:
    """Build horizontal bars from 0 to 100 % with the interval as a whisker.

    Plain boxes instead of SVG: their labels keep the page's text size on a narrow screen.
    """
    rows = [
        element(
            "div",
            element("div", bar.label, class_="label"),
            element(
                "div",
                element("div", class_=f"bar {bar.kind}", style=f"width:{100 * bar.value:.2f}%"),
                element(
                    "div",
                    class_="whisker",
                    style=f"left:{100 * bar.low:.2f}%;width:{100 * (bar.high - bar.low):.2f}%",
                ),
                class_="track",
            ),
        )
        for bar in bars
    ]
    ticks = [element("span", f"{tick} %") for tick in (0, 25, 50, 75, 100)]
    return element("div", rows, element("div", ticks, class_="ticks"), class_="bars")


def loss_chart(title: str, curve: Sequence[tuple[int, float]]) -> Html:
    """Draw a loss over steps: each step faint, the moving average strong.

    The vertical axis starts at 0. Losses far above the average, as in the first steps, are cut
    off at the top edge, so that the rest stays readable.
    """
    width, height, left, right, top, bottom = 420, 250, 40, 12, 26, 38
    average = smooth(curve)
    highest = 1.15 * max(value for _, value in average)
    y_ticks = nice_ticks(highest)
    y_end = y_ticks[-1]
    first, last = curve[0][0], max(curve[-1][0], curve[0][0] + 1)

    def x(step: float) -> float:
        return left + (width - left - right) * (step - first) / (last - first)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (1 - min(value, y_end) / y_end)

    def path(points: Sequence[tuple[int, float]], kind: str) -> Html:
        spelled = " ".join(f"{_n(x(s))},{_n(y(v))}" for s, v in thin(points, _MOST_POINTS))
        return element("polyline", points=spelled, class_=kind)

    parts: list[Html] = []
    for tick in y_ticks:
        parts.append(_line(left, y(tick), width - right, y(tick), "grid"))
        parts.append(_text(left - 7, y(tick) + 4, f"{tick:g}", "tick", "end"))
    for tick in nice_ticks(last, 4):
        if first <= tick <= last:
            anchor = "end" if x(tick) > width - right - 12 else "middle"
            parts.append(_text(x(tick), height - bottom + 17, f"{tick:g}", "tick", anchor))
    parts.append(_text((left + width - right) / 2, height - 4, "optimizer step", "tick", "middle"))
    parts.append(_text(left - 7, 10, "loss", "tick", "end"))
    parts += [path(curve, "raw"), path(average, "smooth")]
    (start_step, start), (end_step, end) = average[0], average[-1]
    parts += [
        element("circle", cx=_n(x(step)), cy=_n(y(value)), r=3.5, class_="end")
        for step, value in (average[0], average[-1])
    ]
    label = f"{title}: loss {start:.2f} at step {start_step}, {end:.2f} at step {end_step}"
    return _svg(width, height, label, parts)


def nice_ticks(highest: float, count: int = 4) -> list[float]:
    """Return ticks from 0 up to the first one at or above ``highest``, 1, 2 or 5 apart.

    Args:
        highest: largest value to show; what is not positive counts as 1.
        count: about how many steps to make.
    """
    highest = highest if highest > 0 else 1.0
    magnitude = 10.0 ** math.floor(math.log10(highest / count))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude * count >= highest * 0.999)
    return [round(index * step, 10) for index in range(math.ceil(highest / step - 1e-9) + 1)]


def _svg(width: float, height: float, label: str, parts: Sequence[Html]) -> Html:
    return element("svg", parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=label)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    return element("line", x1=_n(x1), y1=_n(y1), x2=_n(x2), y2=_n(y2), class_=kind)


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> Html:
    return element("text", text, x=_n(x), y=_n(y), class_=kind, text_anchor=anchor)


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
