"""``vipllava dashboard ENTITY/PROJECT``: the W&B workspace of this project's metrics, as code.

What it shows are plain values, so that they can be read and tested without the package that turns
them into a workspace (extra ``dashboard``).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from vipllava.commands.settings import Setting, describe_settings, read_settings
from vipllava.types import VipLlavaError

if TYPE_CHECKING:
    from rich.console import Console

STEP: Final = "trainer/global_step"
"""Lightning's own axis: W&B's counts calls."""

_SETTINGS: Final = (Setting("name", str, "ViP-LLaVA", "of the workspace (default: ViP-LLaVA)"),)


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    Attributes:
        title: above it.
        metrics: the lines; or the one table of a panel that shows a table.
        pattern: regular expression of further metrics, such as those of each data set.
        is_table: shows the logged table and not lines.
    """

    title: str
    metrics: tuple[str, ...] = ()
    pattern: str | None = None
    is_table: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """Panels under one heading."""

    name: str
    panels: tuple[Panel, ...]


def dashboard_sections() -> tuple[Section, ...]:
    """Return what the workspace shows, from top to bottom."""
    from vipllava.training import metrics

    return (
        Section(
            "Learning",
            (
                Panel("Loss", (metrics.LOSS, metrics.VALIDATION_LOSS)),
                Panel("Loss by data set", pattern=f"^{metrics.LOSS}/.*"),
                Panel("Gradient norm", (metrics.GRADIENT_NORM,)),
                Panel("Learning rate", (metrics.LEARNING_RATE,)),
                Panel("Learning rate by part", pattern=f"^{metrics.LEARNING_RATE}/.*"),
            ),
        ),
        Section(
            "Samples", (Panel("Marked pictures and answers", (metrics.SAMPLES,), is_table=True),)
        ),
        Section(
            "Speed",
            (
                Panel("Samples per second", (metrics.SAMPLES_PER_SECOND,)),
                Panel(
                    "Tokens per second",
                    (metrics.TOKENS_PER_SECOND, metrics.SUPERVISED_TOKENS_PER_SECOND),
                ),
                Panel("Model FLOPs utilisation", (metrics.MFU,)),
                Panel("Memory, GB", (metrics.MEMORY,)),
            ),
        ),
        Section(
            "Data",
            (
                Panel("Share of the time waited for data", (metrics.WAIT_SHARE,)),
                Panel("Quarantined samples", (metrics.QUARANTINED,)),
                Panel("Supervised tokens of a step", (metrics.SUPERVISED_TOKENS,)),
            ),
        ),
    )


def run(words: Sequence[str], console: Console | None = None) -> int:
    """Make the workspace and print its address.

    Args:
        words: the command line after ``dashboard``.
        console: where the address goes; the standard output if None.

    Raises:
        VipLlavaError: the arguments cannot be used, or the package is not installed.
    """
    from rich.console import Console as MakeConsole

    console = console or MakeConsole()
    if not words or words[0] in ("-h", "--help", "help"):
        console.print(_help(), highlight=False, markup=False, soft_wrap=True)
        return 0
    values = read_settings(words, _SETTINGS, positional=("ENTITY/PROJECT",))
    entity, slash, project = values["ENTITY/PROJECT"].partition("/")
    if not (entity and slash and project) or "/" in project:
        raise VipLlavaError(
            f"dashboard {values['ENTITY/PROJECT']}: expected ENTITY/PROJECT, the user or team and "
            "the project of logger.wandb.project"
        )
    if find_spec("wandb_workspaces") is None:
        raise VipLlavaError(
            "the dashboard needs wandb-workspaces, which is not installed: "
            "pip install -e '.[dashboard]'"
        )
    workspace = build_workspace(entity, project, values["name"])
    workspace.save()
    console.print(workspace.url, highlight=False, markup=False, soft_wrap=True)
    return 0


def build_workspace(entity: str, project: str, name: str) -> Any:
    """Return the workspace, not saved yet.

    Args:
        entity: user or team on W&B.
        project: of the runs.
        name: of the workspace.
    """
    workspaces: Any = importlib.import_module("wandb_workspaces.workspaces")
    reports: Any = importlib.import_module("wandb_workspaces.reports.v2")

    def panel(of: Panel) -> Any:
        if of.is_table:
            (table,) = of.metrics
            return reports.WeavePanelSummaryTable(table_name=table)
        lines: dict[str, Any] = {"title": of.title, "x": STEP, "y": list(of.metrics)}
        if of.pattern is not None:
            lines["metric_regex"] = of.pattern
        return reports.LinePlot(**lines)

    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            workspaces.Section(
                name=section.name, panels=[panel(p) for p in section.panels], is_open=True
            )
            for section in dashboard_sections()
        ],
    )


def _help() -> str:
    return (
        "usage: vipllava dashboard ENTITY/PROJECT [NAME=VALUE ...]\n\n"
        "Makes a workspace on W&B that shows this project's metrics: loss (also by data set),\n"
        "samples with predictions, speed, data. Needs the extra `dashboard` and `wandb login`.\n\n"
        + describe_settings(_SETTINGS)
    )
