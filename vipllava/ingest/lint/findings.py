"""What lint can find, how grave it is, the thresholds, and the report with its table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vipllava.types import ConfigError

REPORT_VERSION: Final = 1

Severity = Literal["error", "warning"]

CODES: Final[Mapping[str, tuple[Severity, str]]] = {
    "shard-broken": ("error", "a tar or its index is missing, damaged or not what it should be"),
    "index-missing": ("warning", "a tar without an index, which the next job has to make"),
    "duplicate-key": ("error", "a key that occurs more than once in the data set"),
    "image-missing": ("error", "a record of an image without one beside it"),
    "image-corrupt": ("error", "bytes that are no image, or that do not decode to their end"),
    "image-too-large": ("error", "an image of more than 100 megapixels"),
    "image-extension": ("warning", "an image of another format than its extension says"),
    "image-orientation": ("error", "boxes of an image that is turned by its EXIF block, or not"),
    "image-size": ("error", "an image of another size than its record says"),
    "image-aspect": ("warning", "an image so long that hardly anything of it is seen"),
    "image-uniform": ("warning", "an image that is nearly the same everywhere"),
    "field-unread": ("warning", "a field that records of this kind do not have; told once"),
    "box-fractions": ("error", "boxes within 0..1, which are read as pixels"),
    "box-form": ("warning", "boxes that look like per cent, fractions, or x, y, width, height"),
    "box-invalid": ("error", "a box that is not four finite numbers"),
    "box-reversed": ("error", "a box whose x2 < x1 or y2 < y1"),
    "box-empty": ("error", "a box without an area"),
    "box-outside": ("error", "a box wholly outside its image"),
    "box-clipped": ("warning", "a box partly outside its image"),
    "polygon-invalid": ("error", "a polygon of odd count, with no number, or under three points"),
    "polygon-outside": ("error", "a polygon wholly outside its image"),
    "polygon-degenerate": ("warning", "a polygon with hardly any area inside its image"),
    "polygon-self-crossing": ("warning", "a polygon whose outline crosses itself"),
    "mask-invalid": ("error", "run lengths that are no mask, or one without a pixel"),
    "mask-size": ("error", "run lengths of another size than their image"),
    "record-invalid": ("error", "a record that breaks its schema in another way"),
    "placeholder-without-region": ("error", "<bboxN> in a text, and no such region"),
    "image-placeholder": ("warning", "another project's placeholder of an image, learnt as text"),
    "region-unmentioned": ("warning", "a region that the dialogue never mentions"),
    "same-words": ("error", "regions of one image whose marks have the same words"),
    "mark-small": ("warning", "a mark of too few pixels in the network's input"),
    "mark-contrast": ("warning", "a mark that hardly differs from what it is drawn on"),
    "answer-names-colour": ("warning", "an answer names a mark's colour that no question named"),
    "too-long": ("error", "an image and first exchange over the length limit"),
    "truncated": ("warning", "a conversation shortened to respect the length limit"),
    "unsupervised": ("error", "nothing to learn: no supervised token, or a blank answer"),
    "label-proof": ("error", "labels that are not exactly the answers and their ends"),
    "duplicate-sample": ("warning", "the same image and record as an earlier sample"),
}
"""By code: severity and one line of description. ``error``: training stops at it, or learns
nonsense from it; ``warning``: worth a look."""


class Problem(NamedTuple):
    """What one check says of the record before it: a code and what a :class:`Finding` says."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem and its place."""

    code: str  # one of ``CODES``
    dataset: str
    shard: str  # the tar, relative to the data root in a report. Empty for the data set as a whole.
    key: str  # the record's key; empty for the shard as a whole
    message: str  # names field or turn, value and remedy

    @property
    def severity(self) -> Severity:
        """How grave the class is."""
        return CODES[self.code][0]


@dataclass(frozen=True, slots=True)
class LintLimits:
    """The thresholds; ConfigError lists every value that cannot be."""

    min_mark_pixels: float = 4.0  # longer side of what a mark paints, in the network's input
    # what a mark changes, in levels of 0..255: the median over its painted pixels of the largest
    # change among the three channels
    min_contrast: float = 12.0
    # how far a box may reach out of its stored image; annotations count the last pixel or do not
    max_outside_pixels: float = 1.0
    min_polygon_area: float = 1.0  # square pixels of the stored image
    max_image_aspect: float = 16.0  # longer side of an image by its shorter one
    # between the darkest and the brightest place of an image, in levels of 0..255: the largest
    # difference among the three channels
    min_image_contrast: float = 16.0

    def __post_init__(self) -> None:
        problems: list[str] = []
        for name, value in asdict(self).items():
            high = 255 if name.endswith("_contrast") else math.inf
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or not 0 <= value <= high:
                wanted = "a number from 0" + (f" to {high}" if high < math.inf else "")
                problems.append(f"{name} is {value!r}; expected {wanted}")
        if problems:
            raise ConfigError("\n".join(problems))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> LintLimits:
        """Return the limits that ``values`` name, the defaults elsewhere; or raise ConfigError."""
        known = [limit.name for limit in fields(cls)]
        if unknown := sorted(str(name) for name in values if name not in known):
            raise ConfigError(f"lint has no limit {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**values)


@dataclass(frozen=True, slots=True)
class LintReport:
    """The findings of one data set."""

    dataset: str  # the manifest's name
    num_samples: int  # samples in the tars that could be read
    num_checked: int  # how many of them were looked at
    findings: tuple[Finding, ...]  # in the order of the data

    @property
    def counts(self) -> dict[str, int]:
        """Findings by code, in the order of ``CODES``; codes without a finding are left out."""
        counted = Counter(finding.code for finding in self.findings)
        return {code: counted[code] for code in CODES if counted[code]}

    def num_of(self, severity: Severity) -> int:
        """Return how many findings are of one severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return what ``vipllava lint`` writes as JSON."""
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


def report_table(report: LintReport, max_keys: int = 3) -> Table:
    """Return counts by code with severity, meaning, a message and the first keys of each."""
    table = Table(
        "code", "severity", "count", "what it is", "first", title=f"lint {report.dataset}"
    )
    table.columns[2].justify = "right"
    for code, count in report.counts.items():
        severity, meaning = CODES[code]
        style = "red" if severity == "error" else "yellow"
        found = [finding for finding in report.findings if finding.code == code]
        places = [finding.key or finding.shard or finding.dataset for finding in found]
        first = Text("\n".join(list(dict.fromkeys(places))[:max_keys]))  # keys are no markup
        said = Text(f"{meaning}\n{places[0]}: {found[0].message}")
        table.add_row(Text(code, style), Text(severity, style), str(count), said, first)
    return table


def print_report(report: LintReport, console: Console, max_keys: int = 3) -> None:
    """Write the table and one line of totals to ``console``."""
    if report.findings:
        console.print(report_table(report, max_keys))
    errors, warnings = report.num_of("error"), report.num_of("warning")
    found = f"{errors} errors, {warnings} warnings" if report.findings else "nothing found"
    checked = f"{report.num_checked} of {report.num_samples} samples checked"
    console.print(Text(f"{report.dataset}: {checked}, {found}"))
