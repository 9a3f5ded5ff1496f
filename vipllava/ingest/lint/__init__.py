"""Faults of a data set, found before training meets them.

``findings`` says what can be found, ``entries`` looks at one record (with ``images``,
``geometry``, ``texts`` and ``marks``), ``run`` at a whole data set, ``report`` holds what was found
and ``table`` shows it. Nothing is written and nothing is changed.
"""

from vipllava.ingest.lint.entries import lint_entry
from vipllava.ingest.lint.findings import CODES, Finding, LintLimits, Severity
from vipllava.ingest.lint.report import LintReport
from vipllava.ingest.lint.run import lint_shards
from vipllava.ingest.lint.table import print_report, report_table

__all__ = [
    "CODES",
    "Finding",
    "LintLimits",
    "LintReport",
    "Severity",
    "lint_entry",
    "lint_shards",
    "print_report",
    "report_table",
]
