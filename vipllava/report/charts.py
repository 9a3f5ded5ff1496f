"""Charts as inline SVG in the colours of the page, and the loss that one of them draws."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vipllava.report.html import Html, markup, read_asset
from vipllava.types import VipLlavaError

Curve = list[tuple[int, float]]
"""(step, loss) in the order of the steps."""

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


def bar_chart(
    bars: Sequence[Bar], *, top: float = 100, unit: str = " %", reference: float | None = None
) -> Html:
    """Build horizontal bars with the interval as a whisker.

    Plain boxes instead of SVG: their labels keep the page's text size on a narrow screen.

    Args:
        bars: in shares of the axis.
        top: where the axis ends; it starts at 0.
        unit: of the axis.
        reference: the share of the axis at which a line crosses all bars.
    """
    line = '<div class="reference" style="left:{}%"></div>'
    across = None if reference is None else markup(line, f"{100 * reference:.2f}")
    rows = [
        markup(
            '<div><div class="label">{label}</div><div class="track">'
            '<div class="bar {kind}" style="width:{value}%"></div>'
            '<div class="whisker" style="left:{low}%;width:{width}%"></div>{across}</div></div>',
            label=bar.label,
            kind=bar.kind,
            value=f"{100 * bar.value:.2f}",
            low=f"{100 * bar.low:.2f}",
            width=f"{100 * (bar.high - bar.low):.2f}",
            across=across,
        )
        for bar in bars
    ]
    ticks = [markup("<span>{}{}</span>", f"{top * n / 4:g}", unit) for n in range(5)]
    return markup('<div class="bars">{}<div class="ticks">{}</div></div>', rows, ticks)


def loss_chart(title: str, curve: Sequence[tuple[int, float]]) -> Html:
    """Draw a loss over steps: each step faint, the moving average strong.

    The vertical axis starts at 0. Losses far above the average, as in the first steps, are cut
    off at the top edge, so that the rest stays readable.
    """
    width, height, left, right, top, bottom = 420, 250, 40, 12, 26, 38
    average = smooth(curve)
    y_ticks = nice_ticks(1.15 * max(value for _, value in average))
    y_end = y_ticks[-1]
    first, last = curve[0][0], max(curve[-1][0], curve[0][0] + 1)

    def x(step: float) -> float:
        return left + (width - left - right) * (step - first) / (last - first)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (1 - min(value, y_end) / y_end)

    def path(points: Sequence[tuple[int, float]], kind: str) -> Html:
        spelled = " ".join(f"{_n(x(s))},{_n(y(v))}" for s, v in thin(points, _MOST_POINTS))
        return markup('<polyline points="{}" class="{}"/>', spelled, kind)

    parts: list[Html] = []
    for tick in y_ticks:
        grid = '<line x1="{}" y1="{}" x2="{}" y2="{}" class="grid"/>'
        parts.append(markup(grid, left, _n(y(tick)), width - right, _n(y(tick))))
        parts.append(_text(left - 7, y(tick) + 4, f"{tick:g}", "end"))
    for tick in nice_ticks(last):
        if first <= tick <= last:
            anchor = "end" if x(tick) > width - right - 12 else "middle"
            parts.append(_text(x(tick), height - bottom + 17, f"{tick:g}", anchor))
    parts.append(_text((left + width - right) / 2, height - 4, "optimizer step", "middle"))
    parts.append(_text(left - 7, 10, "loss", "end"))
    parts += [path(curve, "raw"), path(average, "smooth")]
    (start_step, start), (end_step, end) = average[0], average[-1]
    for step, value in (average[0], average[-1]):
        circle = '<circle cx="{}" cy="{}" r="3.5" class="end"/>'
        parts.append(markup(circle, _n(x(step)), _n(y(value))))
    return markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>',
        width,
        height,
        f"{title}: loss {start:.2f} at step {start_step}, {end:.2f} at step {end_step}",
        parts,
    )


def nice_ticks(highest: float) -> list[float]:
    """Return about five ticks from 0 to the first at or above ``highest``, 1, 2 or 5 apart.

    A ``highest`` that is not positive counts as 1.
    """
    highest = highest if highest > 0 else 1.0
    magnitude = 10.0 ** math.floor(math.log10(highest / 4))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude * 4 >= highest * 0.999)
    return [round(index * step, 10) for index in range(math.ceil(highest / step - 1e-9) + 1)]


def read_loss_curve(path: Path, column: str = "train/loss") -> Curve:
    """Read one value per step from a log of Lightning's ``CSVLogger``; other rows are passed over.

    Raises:
        VipLlavaError: the file is missing, lacks a column, holds something other than finite
            numbers, or has no value at all.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise VipLlavaError(
            f"cannot read {path}: {error.strerror}; train with logger=csv to get it"
        ) from error
    reader = csv.DictReader(text.splitlines())
    names = reader.fieldnames or ()
    if missing := [name for name in ("step", column) if name not in names]:
        raise VipLlavaError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(names) or 'none'}"
        )
    curve: Curve = []
    for row in reader:
        if not row[column]:
            continue
        try:
            step, loss = int(row["step"]), float(row[column])
        except ValueError as error:
            raise VipLlavaError(f"{path}:{reader.line_num}: {error}") from error
        if not math.isfinite(loss):
            raise VipLlavaError(f"{path}:{reader.line_num}: {column} is {loss} at step {step}")
        curve.append((step, loss))
    if not curve:
        raise VipLlavaError(f"{path} has no value of {column}; did the run make a step?")
    return curve


def smooth(curve: Sequence[tuple[int, float]], half_life: float | None = None) -> Curve:
    """Return the exponential moving average, without the bias towards its start.

    A value counts half after ``half_life`` points; by default a sixtieth of the curve.
    """
    half_life = max(1.0, len(curve) / 60) if half_life is None else half_life
    decay = 0.5 ** (1 / half_life)
    smoothed: Curve = []
    total = weight = 0.0
    for step, value in curve:
        total, weight = decay * total + value, decay * weight + 1
        smoothed.append((step, total / weight))
    return smoothed


def thin(curve: Sequence[tuple[int, float]], limit: int) -> Curve:
    """Keep at most ``limit`` points, evenly spread, with the first and the last."""
    if len(curve) <= limit:
        return list(curve)
    stride = (len(curve) - 1) / (limit - 1)
    return [curve[round(index * stride)] for index in range(limit)]


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> Html:
    shown = '<text x="{}" y="{}" class="{}" text-anchor="{}">{}</text>'
    return markup(shown, _n(x), _n(y), kind, anchor, text)


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


@dataclass(frozen=True, slots=True)
class HeatCell:
    """One cell of a heat map: a share with the ends of its interval, where there are any."""

    value: float | None  # None: there is none, and ``note`` says why
    low: float | None = None
    high: float | None = None
    note: str = "failed"


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[int, int], HeatCell],
) -> Html:
    """Draw shares in percent with their intervals below, the darker the higher; the lowest framed.

    Shades go from the lowest value to the highest, or over ten points where those are nearer: what
    a few items change is no contrast.

    Args:
        title: says what it shows.
        rows, columns: their names; a comma breaks the line of a column's.
        cells: by the numbers of row and column; what is not there stays blank.
    """
    wide, tall, gap = 104, 52, 3
    left = 14 + 7.4 * max(map(len, rows))
    heads = [name.split(", ") for name in columns]
    top = 14 + 16 * max(map(len, heads))
    values = [cell.value for cell in cells.values() if cell.value is not None]
    lowest = min(values, default=0.0)
    spread = max(max(values, default=0.0) - lowest, 0.1)

    def x(column: int) -> float:
        return left + wide * (column + 0.5)

    parts: list[Html] = []
    for number, lines in enumerate(heads):
        for line, text in enumerate(lines):
            parts.append(_text(x(number), top - 10 - 16 * (len(lines) - 1 - line), text, "middle"))
    for number, name in enumerate(rows):
        parts.append(_text(left - 8, top + tall * (number + 0.5) + 4, name, "end"))
    shown = '<rect x="{}" y="{}" width="{}" height="{}" rx="5" class="{}" fill-opacity="{}"/>'
    for (row, column), cell in sorted(cells.items()):
        y, place = top + tall * row, x(column)
        kind = "failed" if cell.value is None else "lowest" if cell.value == lowest else ""
        shade = 0.0 if cell.value is None else 0.06 + 0.54 * (cell.value - lowest) / spread
        size = (_n(wide - gap), _n(tall - gap))
        parts.append(
            markup(shown, _n(place - wide / 2), _n(y), *size, f"cell {kind}", f"{shade:.3f}")
        )
        if cell.value is None:
            parts.append(_text(place, y + 29, cell.note, "middle", "bad"))
            continue
        parts.append(_text(place, y + 23, f"{100 * cell.value:.1f}", "middle", "value"))
        if cell.low is not None and cell.high is not None:
            ends = f"{100 * cell.low:.0f} to {100 * cell.high:.0f}"
            parts.append(_text(place, y + 40, ends, "middle"))
    width, height = left + wide * len(columns), top + tall * len(rows)
    return markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" style="max-width:{}px" '
        'role="img" aria-label="{}">{}</svg>',
        _n(width),
        _n(height),
        _n(width),
        title,
        parts,
    )


def svg_file(chart: Html) -> str:
    """Return a chart as a file of its own, with the page's colours on the page's paper."""
    paper = '<style>{}</style><rect width="100%" height="100%" fill="var(--paper)"/>'
    start = chart.index(">") + 1
    return chart[:start] + paper.format(read_asset("style.css")) + chart[start:] + "\n"
