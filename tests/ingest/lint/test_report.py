from __future__ import annotations

import io
import json
import re
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from tests.ingest.lint.corpus import (
    lint,
    members_of,
    picture,
    record_of,
    sample_encoder,
    write_tar,
)
from vipllava.conversation.encode import ConversationEncoder
from vipllava.ingest.lint.findings import (
    CODES,
    Finding,
    LintLimits,
    LintReport,
    print_report,
    report_table,
)

FINDINGS = (
    Finding("box-empty", "toy", "toy/0.tar", "a", "m1"),
    Finding("truncated", "toy", "toy/0.tar", "a", "m2"),
    Finding("box-empty", "toy", "toy/0.tar", "a", "m3"),
    Finding("box-empty", "toy", "toy/1.tar", "[red]b", "m4"),
    Finding("shard-broken", "toy", "toy/2.tar", "", "m5"),
)
REPORT = LintReport("toy", 9, 7, FINDINGS)


def shown(report: LintReport) -> str:
    out = io.StringIO()
    print_report(report, Console(file=out, width=160, color_system=None), max_keys=2)
    return out.getvalue()


def test_counts_and_severities() -> None:
    assert REPORT.counts == {"shard-broken": 1, "box-empty": 3, "truncated": 1}
    assert (REPORT.num_of("error"), REPORT.num_of("warning")) == (4, 1)
    assert {severity for severity, _ in CODES.values()} == {"error", "warning"}


def test_json(tmp_path: Path, encoder: ConversationEncoder) -> None:
    record = record_of("vg_rel", bboxes=[[9, 9, 1, 1], [20, 20, 400, 110]])
    write_tar(tmp_path / "toy" / "0.tar", members_of("a", record, picture()))
    report = lint(tmp_path, sample_encoder(encoder))
    assert json.loads(json.dumps(report.to_json())) == {
        "schema_version": 1,
        "dataset": "toy",
        "num_samples": 1,
        "num_checked": 1,
        "num_errors": 1,
        "num_warnings": 1,
        "counts": {"box-reversed": 1, "box-clipped": 1},
        "findings": [
            {
                "code": "box-reversed",
                "severity": "error",
                "dataset": "toy",
                "shard": "toy/0.tar",
                "key": "a",
                "message": "field `bboxes[0]` is [9, 9, 1, 1]; expected x1 <= x2 and y1 <= y2: "
                "this box is reversed; if it says x, y, width and height, write [9, 9, 10, 10]",
            },
            {
                "code": "box-clipped",
                "severity": "warning",
                "dataset": "toy",
                "shard": "toy/0.tar",
                "key": "a",
                "message": "field `bboxes[1]` is [20, 20, 400, 110]; it reaches 64 pixels out of "
                "the 336 x 252 image and is cut there: check whether box and image belong "
                "together",
            },
        ],
    }


def test_the_table() -> None:
    text = shown(REPORT)
    lines = [line for line in text.splitlines() if "│" in line]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert rows == [
        ["shard-broken", "error", "1", CODES["shard-broken"][1], "toy/2.tar"],
        ["", "", "", "toy/2.tar: m5", ""],
        ["box-empty", "error", "3", "a box without an area", "a"],
        ["", "", "", "a: m1", "[red]b"],
        ["truncated", "warning", "1", CODES["truncated"][1], "a"],
        ["", "", "", "a: m2", ""],
    ]
    assert text.splitlines()[-1] == "toy: 7 of 9 samples checked, 4 errors, 1 warnings"
    assert report_table(REPORT).row_count == 3


def test_nothing_found() -> None:
    assert shown(LintReport("toy", 9, 9, ())) == "toy: 9 of 9 samples checked, nothing found\n"


def test_the_page_names_every_code_and_limit() -> None:
    page = (Path(__file__).parents[3] / "docs" / "lint.md").read_text()
    listed = re.findall(r"^\| `([a-z-]+)` \| (error|warning) \|", page, re.MULTILINE)
    assert listed == [(code, severity) for code, (severity, _) in CODES.items()]
    for limit in fields(LintLimits):
        assert f"| `lint.{limit.name}` | {limit.default:g} |" in page
