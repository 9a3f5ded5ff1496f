"""The page of a grid of evaluations: how far a score depends on how regions are marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vipllava.files.atomic import write_whole
from vipllava.report.charts import HeatCell, heat_map, svg_file
from vipllava.report.html import Child, Html, markup, page, table


@dataclass(frozen=True, slots=True)
class RobustnessMap:
    """A heat map with what stands around it."""

    name: str  # of the benchmark, and what else tells it from the page's others
    summary: str  # one line: mean, worst cell
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Mapping[tuple[int, int], HeatCell]  # by row and column
    head: Sequence[str]  # of the table below
    table: Sequence[Sequence[str]]  # a row per cell, and one that sums them up
    failures: Sequence[str]  # which cells have no score, and why

    def chart(self) -> Html:
        """Return the heat map."""
        return heat_map(f"{self.name}: {self.summary}", self.rows, self.columns, self.cells)


def write_robustness_page(path: Path, maps: Sequence[RobustnessMap]) -> list[Path]:
    """Write the page, and each heat map as an SVG file beside it; return the paths."""
    written = [path]
    sections: list[Child] = []
    for number, each in enumerate(maps, start=1):
        chart = each.chart()
        written.append(path.with_name(f"{path.stem}{'' if len(maps) == 1 else f'-{number}'}.svg"))
        write_whole(written[-1], svg_file(chart))
        *rows, last = each.table
        sections.append(
            markup(
                '<h2>{}</h2><p>{}</p><div class="scroll">{}</div>{}{}',
                each.name,
                each.summary,
                chart,
                [markup('<p class="soft">{}</p>', failure) for failure in each.failures],
                table(each.head, rows, last),
            )
        )
    body = markup(
        "<h1>Robustness</h1><p>Scores in %, below them 95 % intervals. Every cell has the same "
        "items, and only what its row and column say is different. The lowest one is framed; the "
        "lowest of many is low by chance, too, and its interval does not know that.</p>{}",
        sections,
    )
    write_whole(path, page("Robustness", body, "style.css"))
    return written
