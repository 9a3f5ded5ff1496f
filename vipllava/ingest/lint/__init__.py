"""Faults of a data set, found before training meets them; nothing is written or changed.

``findings`` says what can be found and holds the report, ``entries`` looks at one record (with
``images``, ``geometry`` and ``texts``), ``run`` at a whole data set.
"""

from vipllava.ingest.lint.entries import lint_entry
from vipllava.ingest.lint.findings import (
    CODES,
    Finding,
    LintLimits,
    LintReport,
    print_report,
    report_table,
)
from vipllava.ingest.lint.run import lint_shards

__all__ = [
    "CODES",
    "Finding",
    "LintLimits",
    "LintReport",
    "lint_entry",
    "lint_shards",
    "print_report",
    "report_table",
]
