"""``vipllava lint``: table, JSON and exit code."""

from __future__ import annotations

import json

import pytest

from tests.commands.conftest import UserData
from vipllava import cli


@pytest.fixture
def lint(capsys: pytest.CaptureFixture[str]):
    """Return the exit code and the report of a command."""

    def run(data: UserData, *arguments: str) -> tuple[int, dict]:
        code = cli.main(["lint", *data.arguments, "--json", *arguments])
        return code, json.loads(capsys.readouterr().out)

    return run


def test_errors_are_listed_and_fail(
    faulty_data: UserData, lint, capsys: pytest.CaptureFixture[str]
):
    code, report = lint(faulty_data)
    assert code == 1
    assert report["counts"]["box-empty"] == 1
    assert report["num_checked"] == 11
    assert lint(faulty_data, "--strict")[0] == 1
    assert cli.main(["lint", *faulty_data.arguments, "--num-samples", "11"]) == 1
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "box-empty" in shown
    assert "bad: field `bboxes[0]`" in shown


def test_thresholds_are_the_jobs(user_data: UserData, lint):
    assert "mark-small" not in lint(user_data)[1]["counts"]
    # Nothing is as large as the picture: every mark is flagged.
    code, report = lint(user_data, "lint.min_mark_pixels=113")
    assert (code, report["counts"]["mark-small"], report["num_errors"]) == (0, 4, 0)
    assert lint(user_data, "lint.min_mark_pixels=113", "--strict")[0] == 1


def test_an_unknown_threshold_lists_the_known(
    user_data: UserData, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["lint", *user_data.arguments, "lint.min_pixels=3"]) == 2
    assert "min_mark_pixels" in capsys.readouterr().err
