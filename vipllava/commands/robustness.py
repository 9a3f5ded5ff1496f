"""``vipllava robustness FOLDER``: a sweep of evaluations over ``perturb`` as heat map and table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from vipllava.commands.options import Json
from vipllava.commands.output import print_json, print_table, rows_table, say
from vipllava.commands.sweep_table import read_jobs
from vipllava.types import VipLlavaError

_SCORE: Final = "marks.kept"
_WORDS: Final[Mapping[str, str]] = {
    "shape": "{}", "colour": "{}", "width": "width {}", "alpha": "opacity {}",
    "jitter": "jitter {}", "jpeg_quality": "JPEG {}",
}  # fmt: skip
_UNFINISHED: Final = "no metrics.json: it still runs, or was killed"
_RECORD: Final = re.compile(r"^\d{4}-\S+ \S+ ([A-Z]+) \S+: ", re.MULTILINE)
"""Where a record of a job's log starts."""

Perturbed = Mapping[str, Any]
"""What ``perturb`` sets, by key."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One evaluation of a grid."""

    perturb: Perturbed
    folder: str  # of the job, relative to the sweep's
    score: float | None  # None: it failed, or is not done
    low: float | None  # of the score's interval; None: there is none
    high: float | None
    num_items: int  # that the score is over
    num_failures: int  # that it leaves out
    failure: str | None  # why there is no score

    @property
    def note(self) -> str:
        """What stands in the place of a score."""
        return "unfinished" if self.failure == _UNFINISHED else "failed"


@dataclass(frozen=True, slots=True)
class Grid:
    """The evaluations of one benchmark that differ only in what is perturbed."""

    name: str
    score: str  # where in metrics.json it stands
    cells: Sequence[Cell]  # the worst first, failed ones last

    @property
    def scored(self) -> list[float]:
        """The scores of those that have one, the lowest first."""
        return [cell.score for cell in self.cells if cell.score is not None]

    def summary(self) -> str:
        """Return mean and worst cell in a line."""
        scored, failed = self.scored, len(self.cells) - len(self.scored)
        if not scored:
            return f"none of {failed} cells has a score"
        note = f"; {failed} of {len(self.cells)} cells have no score, not counted" if failed else ""
        worst = self.cells[0]
        return (
            f"mean of {len(scored)} cells {100 * sum(scored) / len(scored):.1f}; worst "
            f"{score_text(worst)}: {label(worst.perturb)}; best {100 * scored[-1]:.1f}{note}"
        )


def read_grids(folder: Path, score: str = _SCORE) -> list[Grid]:
    """Read every evaluation below a sweep's folder.

    Args:
        folder: of the sweep.
        score: where in a ``metrics.json`` the score stands, with ``low`` and ``high``.

    Returns:
        A grid for each benchmark, and for each value of what else the jobs differ in.

    Raises:
        VipLlavaError: there is no job, nothing is perturbed, or a file has no such score.
    """
    import yaml

    jobs: dict[tuple[str, ...], list[tuple[Path, Perturbed, dict[str, Any]]]] = {}
    alone: dict[tuple[str, ...], str] = {}
    for job, overrides in read_jobs(folder):
        others = tuple(o for o in overrides if not o.lstrip("+").startswith("perturb"))
        cfg: Any = yaml.safe_load((job / ".hydra" / "config.yaml").read_text(encoding="utf-8"))
        perturb = {k: v for k, v in (cfg.get("perturb") or {}).items() if v is not None}
        files = [*job.glob("metrics.json"), *sorted(job.glob("*/metrics.json"))]
        read = dict(map(_read_metrics, files))
        jobs.setdefault(others, []).append((job, perturb, read))
        alone.setdefault(others, str((cfg.get("bench") or {}).get("name")))
    grids: list[Grid] = []
    for others, found in jobs.items():
        benches = dict.fromkeys(name for *_, read in found for name in read) or [alone[others]]
        for bench in benches:
            cells = [
                _cell(folder, job, perturb, read.get(bench), score) for job, perturb, read in found
            ]
            cells.sort(key=lambda cell: (cell.score is None, cell.score, cell.folder))
            more = [o for o in others if not o.startswith("bench=")]
            grids.append(Grid(", ".join([bench, *more]), score, cells))
    if not any(cell.perturb for grid in grids for cell in grid.cells):
        raise VipLlavaError(
            f"nothing is perturbed in the jobs below {folder}: name the folder of a sweep of "
            "evaluations, such as `evaluate -m hydra/sweeper=robustness` makes"
        )
    return grids


def _read_metrics(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        metrics: Any = json.loads(path.read_text(encoding="utf-8"))
        return str(metrics["bench"]), metrics
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise VipLlavaError(f"{path} cannot be read ({error!r}); evaluate again") from error


def _cell(folder: Path, job: Path, perturb: Perturbed, metrics: Any, score: str) -> Cell:
    place = str(job.relative_to(folder))
    failure = None
    if metrics is None:
        failure = _last_error(job) or _UNFINISHED
    elif (job / "metrics.json").exists():
        # What an earlier start has left is none of one that failed. A job of several benchmarks,
        # which have folders of their own, may have failed in another of them.
        failure = _last_error(job)
    if metrics is None or failure is not None:
        return Cell(perturb, place, None, None, None, 0, 0, failure)
    of = _scores(metrics).get(score)
    if of is None:
        raise VipLlavaError(
            f"{job}: metrics.json of {metrics['bench']} has no score {score}; it has "
            f"{', '.join(_scores(metrics)) or 'none with an interval'}"
        )
    return Cell(
        perturb, place, of["score"], of.get("low"), of.get("high"), of.get("num_items", 0),
        of.get("num_failures", 0), None if of["score"] is not None else "no item has a score",
    )  # fmt: skip


def _last_error(job: Path) -> str | None:
    """Return the error that ended a job's last start, if one did."""
    for log in job.glob("*.log"):
        text = log.read_text(encoding="utf-8")
        records = list(_RECORD.finditer(text))
        if records and records[-1][1] == "ERROR":
            return text[records[-1].end() :].strip()
    return None


def _scores(metrics: Mapping[str, Any], above: str = "") -> dict[str, Mapping[str, Any]]:
    """Return what has a ``score``, by dotted names; other parts are a benchmark's own."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, value in metrics.items():
        if isinstance(value, dict) and (above or name in ("marks", "faithfulness")):
            if "score" in value:
                found[f"{above}{name}"] = value
            found |= _scores(value, f"{above}{name}.")
    return found


def label(perturb: Perturbed) -> str:
    """Return what is perturbed in words, such as ``arrow, opacity 64``."""
    said = (w.format(perturb[k]) for k, w in _WORDS.items() if perturb.get(k) is not None)
    return ", ".join(said) or "unchanged"


def score_text(cell: Cell) -> str:
    """Return a cell's score, such as ``48.3 (43.1 to 53.5)``."""
    if cell.score is None:
        return cell.note
    from vipllava.evaluation.statistics import estimate_text

    return estimate_text(cell.score, cell.low, cell.high)


def lay_out(cells: Sequence[Perturbed]) -> tuple[list[str], list[str]]:
    """Return the keys that make rows and those that make columns.

    They leave the fewest places empty, and of those make the squarest grid.
    """
    keys = [key for key in _WORDS if len({cell.get(key) for cell in cells}) > 1]

    def cost(rows: Sequence[str]) -> tuple[int, int]:
        columns = [key for key in keys if key not in rows]
        num_rows, num_columns = (len({_at(c, side) for c in cells}) for side in (rows, columns))
        return num_rows * num_columns, abs(num_rows - num_columns)

    ways = [list(rows) for many in range(len(keys) + 1) for rows in combinations(keys, many)]
    rows = min(ways, key=cost)
    return rows, [key for key in keys if key not in rows]


def _at(cell: Perturbed, keys: Sequence[str]) -> tuple[Any, ...]:
    return tuple(cell.get(key) for key in keys)


def _ordered(cells: Sequence[Perturbed], keys: Sequence[str]) -> list[tuple[Any, ...]]:
    """Return the values of keys: what changes least first, then by key and value."""

    def place(values: tuple[Any, ...]) -> tuple[Any, ...]:
        given = [value is not None for value in values]
        return sum(given), [not each for each in given], [v for v in values if v is not None]

    return sorted({_at(cell, keys) for cell in cells}, key=place)


def draw_grids(folder: Path, grids: Sequence[Grid]) -> list[Path]:
    """Write page and heat maps into a sweep's folder; return their paths."""
    from vipllava.report.charts import HeatCell
    from vipllava.report.robustness_page import RobustnessMap, write_robustness_page

    maps: list[RobustnessMap] = []
    for grid in grids:
        perturbed = [cell.perturb for cell in grid.cells]
        sides = lay_out(perturbed)
        values = [_ordered(perturbed, keys) for keys in sides]
        rows, columns = (
            [label(dict(zip(keys, own, strict=True))) for own in of]
            for keys, of in zip(sides, values, strict=True)
        )
        cells = {
            (values[0].index(_at(c.perturb, sides[0])), values[1].index(_at(c.perturb, sides[1]))):
                HeatCell(c.score, c.low, c.high, c.note)
            for c in grid.cells
        }  # fmt: skip
        table = [row[:-1] for row in _table_rows(grid)]
        failures = [f"{label(c.perturb)}: {c.failure}" for c in grid.cells if c.failure]
        maps.append(
            RobustnessMap(
                grid.name, grid.summary(), rows, columns, cells, _HEAD[:-1], table, failures
            )
        )
    score = grids[0].score
    name = "robustness" if score == _SCORE else f"robustness-{score}"
    return write_robustness_page(folder / f"{name}.html", maps)


_HEAD: Final = ("marks and image", "items", "failures", "score", "folder, or why there is none")


def _table_rows(grid: Grid) -> list[tuple[str, ...]]:
    rows = [
        (
            label(cell.perturb),
            *("-" if cell.failure else str(n) for n in (cell.num_items, cell.num_failures)),
            score_text(cell),
            cell.failure or cell.folder,
        )
        for cell in grid.cells
    ]
    scored = grid.scored
    mean = f"{100 * sum(scored) / len(scored):.1f}" if scored else "-"
    return [*rows, (f"mean of {len(scored)}", "", "", mean, "")]


def print_robustness(
    folder: Annotated[Path, typer.Argument(help="Of a sweep over `perturb`: runs/sweeps/NAME.")],
    score: Annotated[
        str, typer.Option(help="Which score of metrics.json, e.g. faithfulness.follows.")
    ] = _SCORE,
    as_json: Json = False,
) -> None:
    """Show how far a score depends on how regions are marked."""
    grids = read_grids(folder, score)
    if as_json:
        print_json([asdict(grid) for grid in grids])
        return
    for grid in grids:
        right = ("items", "failures", "score")
        title = f"{grid.name}: {grid.score} in % (95 %)"
        print_table(rows_table(title, _HEAD, _table_rows(grid), right=right, spare=_HEAD[-1:]))
        say(grid.summary())
    say(f"heat map: {', '.join(map(str, draw_grids(folder, grids)))}")
