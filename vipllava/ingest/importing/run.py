"""An export imported: records, a manifest and a lint report in one new folder, or nothing.

The folder lies in the data root (or its parent becomes one); pictures stay where they are. A folder
of pictures out of the data root is linked, pictures that an export holds are unpacked.
"""

from __future__ import annotations

import errno
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vipllava.files.atomic import new_folder, write_json, write_yaml
from vipllava.ingest import Tell, tell_nobody
from vipllava.ingest.importing import FORMATS, find_format, import_command, recognise
from vipllava.ingest.importing.pictures import (
    OpenedImage,
    absolute,
    common_folder,
    decide_frame,
    frame_size,
    open_images,
)
from vipllava.ingest.importing.regions import ReadyRegion, RegionChecker, records_of
from vipllava.ingest.importing.report import CODES, REPORT_VERSION, ImportReport, shorter
from vipllava.ingest.importing.source import (
    Export,
    Frame,
    ImportFormat,
    ImportingError,
    ImportOptions,
    Size,
)
from vipllava.ingest.importing.templates import Templates
from vipllava.ingest.lint.findings import Severity
from vipllava.records.box_form import box_form
from vipllava.shards.manifest import MANIFEST_VERSION, parse_manifest
from vipllava.types import RecordError
from vipllava.visual_prompts.shapes import PALETTE

MAX_REGIONS: Final = 8
"""Of a record, unless the user says: so many marks of a picture can be told apart at a glance."""
RECORDS_FILE: Final = "records.jsonl"
REPORT_FILE: Final = "lint.json"
_LINK: Final = "images"
_EMBEDDED: Final = "embedded"
_SHOWN: Final = 10
_LINE: Final = 400  # letters
LICENCE: Final = "Say under which terms pictures and texts may be used."
_NAME: Final = re.compile(r"\w[\w.-]*")
_GLOB: Final = frozenset("*?[{")


@dataclass(slots=True)
class ImportSummary:
    """What was imported."""

    dataset: str  # the manifest's name
    form: ImportFormat
    source: Path
    manifest: Path  # in the folder that was written
    data_root: Path  # that the manifest's paths are relative to
    frame: Frame
    why_frame: str
    report: ImportReport
    num_images: int = 0  # with a region
    num_empty: int = 0  # pictures without one, of which no record is made
    num_regions: int = 0
    num_records: int = 0
    num_left_out: int = 0  # regions
    categories: Counter[str] = field(default_factory=Counter[str])
    facts: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def found(self) -> dict[str, tuple[Severity, str]]:
        """Severity and meaning of what was found, by code."""
        return {code: known for code, known in CODES.items() if self.report.counts[code]}

    def to_json(self) -> dict[str, Any]:
        """Return what ``lint.json`` has."""
        return {
            "schema_version": REPORT_VERSION,
            "dataset": self.dataset,
            "format": self.form.name,
            "source": str(self.source),
            "num_images": self.num_images,
            "num_images_without_regions": self.num_empty,
            "num_regions": self.num_regions,
            "num_records": self.num_records,
            "num_left_out": self.num_left_out,
            "frame": self.frame,
            "why_frame": self.why_frame,
            "facts": self.facts,
            "categories": dict(self.categories.most_common()),
            **self.report.to_json(),
        }


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an import is written, and how its manifest calls that."""

    output: Path  # absolute, as are all
    data_root: Path
    within: str  # the output, relative to the data root

    @classmethod
    def of(cls, output: Path, data_root: Path) -> _Place:
        folder, root = absolute(output), absolute(data_root)
        if folder == root:
            raise ImportingError(
                f"output={output} is the data root itself; pass a folder in it, {root / 'NAME'}"
            )
        root = root if folder.is_relative_to(root) else folder.parent
        within = folder.relative_to(root).as_posix()
        if set(within) & _GLOB:
            raise ImportingError(f"output={output} has one of * ? [ {{ in its path; rename it")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ImportingError(
                f"output={output} is there already; remove it, or pass another one"
            )
        return cls(folder, root, within)


def import_annotations(
    format_name: str,
    source: Path,
    output: Path,
    *,
    name: str | None = None,
    data_root: Path = Path("data"),
    templates: Templates | None = None,
    options: ImportOptions | None = None,
    max_regions: int = MAX_REGIONS,
    exif: Frame | None = None,
    spaces: bool = False,
    max_bad_rate: float = 0.0,
    licence: str = LICENCE,
    tell: Tell = tell_nobody,
) -> ImportSummary:
    """Read an export and write records, a manifest and a lint report into a new folder.

    Args:
        format_name: one of :data:`vipllava.ingest.importing.FORMATS`.
        source: the export, a file or a folder.
        output: a folder that is new or empty; nothing is written unless all is well.
        name: of the data set; the folder's without it.
        data_root: of all data sets. A folder out of it makes its parent the data root.
        templates: questions and answer.
        options: what else the user says of the export.
        max_regions: of a record.
        exif: which pixels are counted; None decides by the export.
        spaces: whether ``_`` of categories becomes a space.
        max_bad_rate: share of unusable regions above which nothing is imported; 1 allows all.
        licence: of pictures and texts, in words.
        tell: hears about progress.

    Raises:
        ImportingError: anything about the export that cannot be imported, by file and id.
    """
    form = find_format(format_name)
    options, templates = options or ImportOptions(), templates or Templates()
    _check_arguments(form, options, max_regions, max_bad_rate)
    place = _Place.of(output, data_root)
    dataset = name or place.output.name
    if not _NAME.fullmatch(dataset):
        raise ImportingError(f"name={dataset}; expected letters, digits, `_`, `-` and `.`")
    _check_source(source, form)
    manifest = place.output / f"{dataset}.yaml"
    raw = _manifest(dataset, place, licence, f"Imported from {source} ({form.title}).")
    parse_manifest(raw, where=str(manifest), stem=dataset)

    report = ImportReport()
    lost: Counter[str] = Counter()  # regions that a reader could not read

    def fault(code: str, where: str, message: str) -> None:
        before = report.num_errors
        report.add(code, where, message)
        lost["regions"] += report.num_errors - before

    export = Export(source, options, fault)
    images = list(form.read(export))
    named = list(dict.fromkeys(n for i in images for r in i.regions for n in r.attributes))
    templates.check(named, alone=max_regions == 1)
    wanted = [image for image in images if image.regions]
    finding = open_images(
        wanted,
        options.images,
        report.add,
        lambda count: tell("reading the pictures' sizes", "pictures", count, len(wanted)),
    )
    opened = list(finding)
    num_listed = sum(len(image.regions) for image in wanted)
    num_missing = num_listed - sum(len(each.image.regions) for each in opened)
    frame, why = decide_frame(opened, form, exif)
    checker = RegionChecker(templates, spaces, report, num_left_out=lost["regions"] + num_missing)
    ready = list(_ready(opened, frame, checker, report))
    _refuse_forms(checker, source, report)
    num_regions = sum(len(regions) for _, _, regions in ready)
    _refuse_faults(report, checker.num_left_out, num_regions, max_bad_rate, source)
    summary = ImportSummary(
        dataset, form, source, manifest, place.data_root, frame, why, report,
        num_images=len(ready), num_empty=len(images) - len(wanted), num_regions=num_regions,
        num_left_out=checker.num_left_out, categories=checker.categories, facts=export.facts,
    )  # fmt: skip
    raw["apply_exif_orientation"] = frame == "upright"
    folder = common_folder([each for each, _, _ in ready], options.images)
    try:
        with new_folder(place.output) as unfinished:
            pictures = _Pictures(folder, place, unfinished)
            with (unfinished / RECORDS_FILE).open("w", encoding="utf-8", newline="\n") as file:
                for each, size, regions in ready:
                    named = {"id": each.image.id, "image": pictures.name(each)}
                    for record in records_of(regions, templates, named, size, max_regions):
                        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
                        summary.num_records += 1
            raw["image_roots"] = pictures.roots
            write_yaml(unfinished / manifest.name, raw)
            write_json(unfinished / REPORT_FILE, summary.to_json())
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise ImportingError(f"output={output} was made meanwhile; pass another one") from error
        raise ImportingError(f"output={output} cannot be written: {error}") from error
    return summary


def _check_arguments(
    form: ImportFormat, options: ImportOptions, max_regions: int, max_bad_rate: float
) -> None:
    default = ImportOptions()
    for name in ("category", "split", "box_form", "crowds"):
        if getattr(options, name) != getattr(default, name) and name not in form.options:
            fitting = [other.name for other in FORMATS.values() if name in other.options]
            raise ImportingError(
                f"{name}={getattr(options, name)} means nothing for {form.title}; it is for "
                f"{', '.join(fitting)}"
            )
    if not 1 <= max_regions <= len(PALETTE):
        raise ImportingError(
            f"max_regions={max_regions}; expected 1 to {len(PALETTE)}: so many colours have names"
        )
    if not 0 <= max_bad_rate <= 1:
        raise ImportingError(f"max_bad_rate={max_bad_rate}; a rate lies in 0..1")
    if options.images is not None and not options.images.is_dir():
        raise ImportingError(f"images={options.images} is no folder")


def _check_source(source: Path, form: ImportFormat) -> None:
    """Refuse what is not there, and what is plainly of another format."""
    if not source.exists():
        raise ImportingError(f"{source} does not exist")
    if form.is_folder is None and source.is_dir():
        raise ImportingError(f"{source} is a folder; expected the {form.title} file itself")
    found = recognise(source)
    if found is not None and found is not form:
        raise ImportingError(
            f"{source} is of {found.title}, not of {form.title}: `{import_command(found, source)}`"
        )


def _ready(
    opened: Sequence[OpenedImage], frame: Frame, checker: RegionChecker, report: ImportReport
) -> Iterator[tuple[OpenedImage, Size, list[ReadyRegion]]]:
    """Yield pictures with regions that are ready."""
    for each in opened:
        try:
            size = frame_size(each, frame)
        except RecordError as error:
            report.add(error.fault, each.place, str(error))
            checker.num_left_out += len(each.image.regions)
            continue
        found = [checker.check(region, size, each.place) for region in each.image.regions]
        if regions := [region for region in found if region is not None]:
            yield each, size, regions


def _refuse_forms(checker: RegionChecker, source: Path, report: ImportReport) -> None:
    """Refuse boxes that are fractions of their pictures after all, name what looks odd."""
    count = checker.signs["boxes"]
    if count and checker.signs["within_1"] == count:
        raise ImportingError(
            f"{source}: all {count} boxes lie within 0..1 pixels: they look like fractions of the "
            "picture; multiply x by the picture's width and y by its height"
        )
    if (odd := box_form(checker.signs)) is not None:
        report.add("box-form", source.name, odd)


def _refuse_faults(
    report: ImportReport, num_left_out: int, num_regions: int, max_bad_rate: float, source: Path
) -> None:
    """Refuse an export of which too much cannot be used, or from which nothing is left."""
    total = num_left_out + num_regions
    errors = [f"{found.place}: {found.message}" for found in report.errors[:_SHOWN]]
    listed = "".join(f"\n- {shorter(text, _LINE)}" for text in errors)
    if report.num_errors > _SHOWN:
        listed += f"\n- and {report.num_errors - _SHOWN} more"
    if num_regions == 0:
        what = f"{source}: no region can be imported" if total else f"{source} has no region"
        raise ImportingError(f"{what}{':' if listed else ''}{listed}")
    if report.num_errors and num_left_out > max_bad_rate * total:
        counts = ", ".join(
            f"{code} {count}"
            for code, count in report.counts.most_common()
            if any(found.code == code for found in report.errors)
        )
        raise ImportingError(
            f"{num_left_out} of {total} regions cannot be imported ({counts}), and nothing was "
            f"written:{listed}\nCorrect them in the export, or pass max_bad_rate (a share, now "
            f"{max_bad_rate:g}) to import the rest"
        )


def _manifest(dataset: str, place: _Place, licence: str, notes: str) -> dict[str, Any]:
    return {
        "schema_version": MANIFEST_VERSION,
        "name": dataset,
        "stage": "task",
        "licence": licence,
        "record_kind": "regions",
        "apply_exif_orientation": True,
        "shards": f"{place.within}/shards/*.tar",
        "annotation_file": f"{place.within}/{RECORDS_FILE}",
        "image_roots": [],
        "notes": notes,
    }


@dataclass(slots=True)
class _Pictures:
    """How records name their pictures, and the folders that the manifest has to name for it."""

    folder: Path | None  # that all but embedded ones lie in
    place: _Place
    unfinished: Path  # the folder that is being filled
    num_embedded: int = 0
    roots: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        """Link the folder, if it is out of the data root."""
        if self.folder is None:
            return
        if self.folder.is_relative_to(root := self.place.data_root) and self.folder != root:
            self.roots.append(self.folder.relative_to(root).as_posix())
        else:
            (self.unfinished / _LINK).symlink_to(self.folder, target_is_directory=True)
            self.roots.append(f"{self.place.within}/{_LINK}")

    def name(self, each: OpenedImage) -> str:
        """Return the name of a picture; one that the export holds is written."""
        if each.path is not None and self.folder is not None:
            return each.path.relative_to(self.folder).as_posix()
        if (root := f"{self.place.within}/{_EMBEDDED}") not in self.roots:
            self.roots.append(root)
        name = f"{self.num_embedded:06d}.{each.extension}"
        self.num_embedded += 1
        (self.unfinished / _EMBEDDED).mkdir(exist_ok=True)
        (self.unfinished / _EMBEDDED / name).write_bytes(each.data())
        return f"{root}/{name}"
