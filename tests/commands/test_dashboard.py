"""What the W&B workspace shows, read without W&B."""

from __future__ import annotations

import re
import sys
from types import ModuleType, SimpleNamespace

import pytest

from vipllava import cli
from vipllava.commands.dashboard import build_workspace, dashboard_sections
from vipllava.training.metrics import METRICS, SAMPLES, dataset_loss


def panels():
    return [panel for shown in dashboard_sections().values() for panel in shown]


def test_every_metric_has_its_place_and_only_metrics_have():
    shown = [metric for panel in panels() for metric in panel.metrics]
    assert sorted(shown) == sorted([*METRICS, SAMPLES])
    patterns = [panel.pattern for panel in panels() if panel.pattern]
    for more in (dataset_loss("vcr"), "train/lr/projector"):
        assert sum(bool(re.match(pattern, more)) for pattern in patterns) == 1
    assert not any(re.match(pattern, metric) for pattern in patterns for metric in METRICS)


def test_panels_become_a_workspace(monkeypatch: pytest.MonkeyPatch):
    workspaces, reports = ModuleType("w"), ModuleType("r")
    for module, names in ((workspaces, ("Workspace", "Section")), (reports, ("LinePlot",))):
        for name in names:
            setattr(module, name, SimpleNamespace)
    reports.WeavePanelSummaryTable = SimpleNamespace
    monkeypatch.setitem(sys.modules, "wandb_workspaces", ModuleType("wandb_workspaces"))
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", workspaces)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", reports)

    made = build_workspace("team", "vipllava", "Mine")
    assert (made.entity, made.project, made.name) == ("team", "vipllava", "Mine")
    assert [s.name for s in made.sections] == ["Learning", "Samples", "Speed", "Data"]
    loss, by_dataset, *_ = made.sections[0].panels
    assert loss == SimpleNamespace(
        title="Loss", x="trainer/global_step", y=["train/loss", "val/loss"]
    )
    assert (by_dataset.y, by_dataset.metric_regex) == ([], "^train/loss/.*")
    assert made.sections[1].panels == [SimpleNamespace(table_name="samples")]


def test_what_cannot_be_made(monkeypatch: pytest.MonkeyPatch, capsys):
    for words, message in (
        (["vipllava"], "expected ENTITY/PROJECT"),
        (["a/b/c"], "expected ENTITY/PROJECT"),
        (["team/vipllava"], 'which is not installed: pip install "vipllava-lightning[dashboard]"'),
    ):
        monkeypatch.setattr("vipllava.commands.dashboard.find_spec", lambda name: None)
        assert cli.main(["dashboard", *words]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["dashboard", "--help"]) == 0
    assert "vipllava dashboard [OPTIONS] {ENTITY/PROJECT}" in capsys.readouterr().out
