"""What lint found in a data set."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Final

from vipllava.ingest.lint.findings import CODES, Finding, Severity

REPORT_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class LintReport:
    """The findings of one data set.

    Attributes:
        dataset: the manifest's name.
        num_samples: samples in the tars that could be read.
        num_checked: how many of them were looked at.
        findings: in the order of the data.
    """

    dataset: str
    num_samples: int
    num_checked: int
    findings: tuple[Finding, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Findings by code, in the order of ``CODES``; codes without a finding are left out."""
        counted = Counter(finding.code for finding in self.findings)
        return {code: counted[code] for code in CODES if counted[code]}

    def num_of(self, severity: Severity) -> int:
        """Return how many findings are of one severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values for ``json.dumps``.

        ``{"schema_version": 1, "dataset", "num_samples", "num_checked", "num_errors",
        "num_warnings", "counts": {code: number}, "findings": [{"code", "severity", "dataset",
        "shard", "key", "message"}]}``
        """
        return {
            "schema_version": REPORT_VERSION,
            "dataset": self.dataset,
            "num_samples": self.num_samples,
            "num_checked": self.num_checked,
            "num_errors": self.num_of("error"),
            "num_warnings": self.num_of("warning"),
            "counts": self.counts,
            "findings": [
                {"code": finding.code, "severity": finding.severity, **asdict(finding)}
                for finding in self.findings
            ],
        }
