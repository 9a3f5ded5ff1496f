"""A lint report as a table in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vipllava.ingest.lint.findings import CODES, Finding
from vipllava.ingest.lint.report import LintReport


def report_table(report: LintReport, max_keys: int = 3) -> Table:
    """Return counts by code with severity, meaning and the first keys of each."""
    table = Table("code", "severity", "count", "meaning", "first", title=f"lint {report.dataset}")
    table.columns[2].justify = "right"
    for code, count in report.counts.items():
        severity, meaning = CODES[code]
        style = "red" if severity == "error" else "yellow"
        places = [_place(finding) for finding in report.findings if finding.code == code]
        first = list(dict.fromkeys(places))[:max_keys]
        table.add_row(
            Text(code, style),
            Text(severity, style),
            str(count),
            meaning,
            Text("\n".join(first)),  # keys are no markup
        )
    return table


def print_report(report: LintReport, console: Console, max_keys: int = 3) -> None:
    """Write the table and one line of totals to ``console``."""
    if report.findings:
        console.print(report_table(report, max_keys))
    errors, warnings = report.num_of("error"), report.num_of("warning")
    found = f"{errors} errors, {warnings} warnings" if report.findings else "nothing found"
    checked = f"{report.num_checked} of {report.num_samples} samples checked"
    console.print(Text(f"{report.dataset}: {checked}, {found}"))


def _place(finding: Finding) -> str:
    return finding.key or finding.shard or finding.dataset
