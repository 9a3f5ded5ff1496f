"""What an import finds: its classes, and the lint report that is written beside the records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from vipllava.ingest.lint.findings import CODES as LINT_CODES
from vipllava.ingest.lint.findings import Severity

REPORT_VERSION: Final = 1
_MOST_LISTED: Final = 1000
"""Findings of one class that are listed; all are counted."""

_OWN: Final[Mapping[str, tuple[Severity, str]]] = {
    "region-invalid": ("error", "a region that is not written as its format says"),
    "category-missing": ("error", "a region without a category, or of one that is not listed"),
    "attribute-missing": ("error", "a region without what a template names"),
    "text-placeholder": ("error", "a category or attribute with <image> or <bboxN> in it"),
    "shape-unknown": ("error", "a shape that regions cannot have"),
    "mask-invalid": ("error", "run lengths that are no mask, or one without a pixel"),
    "mask-size": ("error", "run lengths of another size than their picture"),
    "image-unknown": ("error", "a region of a picture that the export does not list"),
    "image-ambiguous": ("error", "two names of which the same file was found"),
    "corners-reversed": ("warning", "corners given in another order, now put in order"),
    "shape-boxed": ("warning", "a line, of which the box around it became the region"),
    "image-by-name": ("warning", "a picture found by the end of its path only"),
    "annotations-several": ("warning", "a picture annotated more than once; the last time counts"),
    "file-ignored": ("warning", "a file of another format beside those of this one"),
}
CODES: Final[Mapping[str, tuple[Severity, str]]] = {**LINT_CODES, **_OWN}
"""By code: severity and one line of description. What lint finds in records, too, has its code."""


class ImportFinding(NamedTuple):
    """One thing found, and where in the export."""

    code: str  # one of ``CODES``
    place: str  # file and id, as a reader of the export finds them
    message: str

    @property
    def severity(self) -> Severity:
        """How grave it is: what has an ``error`` cannot become part of a record."""
        return CODES[self.code][0]


def shorter(text: str, most: int) -> str:
    """Return a text without its middle, if it has more than so many letters."""
    return text if len(text) <= most else f"{text[: most // 2]} [...] {text[-most // 2 :]}"


@dataclass(slots=True)
class ImportReport:
    """Counts of an import, and the first findings of each class."""

    findings: list[ImportFinding] = field(default_factory=list[ImportFinding])
    counts: Counter[str] = field(default_factory=Counter[str])

    def add(self, code: str, place: str, message: str) -> None:
        """Note a finding; what it quotes may be long."""
        self.counts[code] += 1
        if self.counts[code] <= _MOST_LISTED:
            self.findings.append(ImportFinding(code, shorter(place, 200), shorter(message, 600)))

    @property
    def num_errors(self) -> int:
        """How many errors were found."""
        return sum(count for code, count in self.counts.items() if CODES[code][0] == "error")

    @property
    def errors(self) -> list[ImportFinding]:
        """Return the errors that are listed."""
        return [finding for finding in self.findings if finding.severity == "error"]

    def to_json(self) -> dict[str, Any]:
        """Return counts and findings as ``lint.json`` has them."""
        return {
            "num_errors": self.num_errors,
            "num_warnings": self.counts.total() - self.num_errors,
            "counts": {code: self.counts[code] for code in CODES if self.counts[code]},
            "findings": [
                {"code": found.code, "severity": found.severity, **found._asdict()}
                for found in self.findings
            ],
        }
