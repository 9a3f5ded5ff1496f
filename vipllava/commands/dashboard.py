"""``vipllava dashboard ENTITY/PROJECT``: the W&B workspace of this project's metrics, as code."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any, Final

import typer

from vipllava.commands.output import say
from vipllava.types import VipLlavaError

STEP: Final = "trainer/global_step"
"""Lightning's own axis: W&B's counts calls."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel."""

    title: str  # above it
    metrics: tuple[str, ...] = ()  # the lines; or the one table of a panel that shows a table
    pattern: str | None = None  # of further metrics, such as those of each data set
    is_table: bool = False  # shows the logged table and not lines


def dashboard_sections() -> dict[str, tuple[Panel, ...]]:
    """Return the panels that the workspace shows under each heading, from top to bottom."""
    from vipllava.training import metrics

    tokens = (metrics.TOKENS_PER_SECOND, metrics.SUPERVISED_TOKENS_PER_SECOND)
    return {
        "Learning": (
            Panel("Loss", (metrics.LOSS, metrics.VALIDATION_LOSS)),
            Panel("Loss by data set", pattern=f"^{metrics.LOSS}/.*"),
            Panel("Gradient norm", (metrics.GRADIENT_NORM,)),
            Panel("Learning rate", (metrics.LEARNING_RATE,)),
            Panel("Learning rate by part", pattern=f"^{metrics.LEARNING_RATE}/.*"),
        ),
        "Samples": (Panel("Marked pictures and answers", (metrics.SAMPLES,), is_table=True),),
        "Speed": (
            Panel("Samples per second", (metrics.SAMPLES_PER_SECOND,)),
            Panel("Tokens per second", tokens),
            Panel("Model FLOPs utilisation", (metrics.MFU,)),
            Panel("Memory, GB", (metrics.MEMORY,)),
        ),
        "Data": (
            Panel("Share of the time waited for data", (metrics.WAIT_SHARE,)),
            Panel("Quarantined samples", (metrics.QUARANTINED,)),
            Panel("Samples shortened to the length limit", (metrics.TRUNCATED,)),
            Panel("Supervised tokens of a step", (metrics.SUPERVISED_TOKENS,)),
        ),
    }


def dashboard(
    place: Annotated[
        str,
        typer.Argument(
            metavar="ENTITY/PROJECT",
            help="User or team, and logger.wandb.project.",
            show_default=False,
        ),
    ],
    name: Annotated[str, typer.Option(help="Of the workspace.")] = "ViP-LLaVA",
) -> None:
    """Make a Weights & Biases workspace of the metrics.

    It shows loss (by data set, too), samples with predictions, speed and data. Needs the extra
    `dashboard` and `wandb login`.
    """
    entity, slash, project = place.partition("/")
    if not (entity and slash and project) or "/" in project:
        raise VipLlavaError(
            f"dashboard {place}: expected ENTITY/PROJECT, the user or team and the project of "
            "logger.wandb.project"
        )
    if find_spec("wandb_workspaces") is None:
        raise VipLlavaError(
            "the dashboard needs wandb-workspaces, which is not installed: "
            'pip install "vipllava-lightning[dashboard]"'
        )
    workspace = build_workspace(entity, project, name)
    workspace.save()
    say(workspace.url)


def build_workspace(entity: str, project: str, name: str) -> Any:
    """Return the workspace ``name`` of an entity's project, not saved yet."""
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
            workspaces.Section(name=heading, panels=[panel(p) for p in panels], is_open=True)
            for heading, panels in dashboard_sections().items()
        ],
    )
