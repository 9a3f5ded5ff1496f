"""``vipllava lint``: table, JSON and exit code."""

from __future__ import annotations

import json

import pytest

from tests.commands.conftest import UserData
from vipllava import cli


def lint(data: UserData, *arguments: str) -> tuple[int, dict]:
    path = data.root / "lint.json"
    code = cli.main(["lint", *data.arguments, f"json={path}", *arguments])
    return code, json.loads(path.read_text())


def test_faults_are_listed_and_only_strict_fails(
    faulty_data: UserData, capsys: pytest.CaptureFixture[str]
):
    code, report = lint(faulty_data)
    assert code == 0
    assert report["counts"]["box-empty"] == 1
    assert report["num_checked"] == 11
    assert "box-empty" in capsys.readouterr().out
    assert lint(faulty_data, "strict=true")[0] == 1


def test_thresholds_are_the_jobs(user_data: UserData):
    assert "mark-small" not in lint(user_data)[1]["counts"]
    # Nothing is as large as the picture: every mark is flagged.
    assert lint(user_data, "lint.min_mark_pixels=113")[1]["counts"]["mark-small"] == 4


def test_an_unknown_threshold_lists_the_known(
    user_data: UserData, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["lint", *user_data.arguments, "lint.min_pixels=3"]) == 2
    assert "min_mark_pixels" in capsys.readouterr().err
