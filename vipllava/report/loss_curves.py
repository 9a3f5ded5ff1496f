"""The loss of a run from the CSV file that Lightning's ``CSVLogger`` writes."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from vipllava.types import VipLlavaError

Curve = list[tuple[int, float]]
"""(step, loss) in the order of the steps."""


def read_loss_curve(path: Path, column: str = "train/loss") -> Curve:
    """Read one logged value per step; rows that log something else are passed over.

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
