"""``data check``: which parts of a data set are there, which are missing, which cannot be used.

Nothing is downloaded or repaired. The annotation list is read from start to end; of its images a
sample is looked at (or all), each decoded whole; shards are opened as training opens them, which
makes an index where none is.
"""

from __future__ import annotations

import json
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal, cast

from vipllava.files.pools import run_threads
from vipllava.ingest.building.annotations import AnnotationError, iter_annotations
from vipllava.ingest.building.incoming import image_paths, metadata_paths
from vipllava.keyed_random import generator_for
from vipllava.records import kind_of
from vipllava.records.image_decode import decode_image
from vipllava.shards.manifest import Manifest, is_remote
from vipllava.shards.patterns import match_patterns
from vipllava.shards.tar_index import ShardError
from vipllava.shards.tars import open_shards
from vipllava.types import ConfigError, RecordError

CHECK_VERSION: Final = 1
PARTS: Final = ("annotations", "pictures", "shards")
NUM_PICTURES: Final = 1000
_SPLITS: Final = ("bbox", "human")
_META_DATA: Final = "vip-bench-meta-data.json"
_TOLERANCE: Final = 0.05
_MOST_EXAMPLES: Final = 20

Status = Literal["ok", "missing", "damaged", "differs", "unchecked"]
Tell = Callable[[str, str, int, "int | None"], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """What is known of one part.

    Attributes:
        part: ``annotations``, ``pictures``, ``metadata``, ``shards``, ``layout`` or ``data root``.
        name: the file, folder or pattern, relative to the data root.
        status: ``ok``; ``missing``: something is not there; ``damaged``: something cannot be read;
            ``differs``: there is more or less than expected; ``unchecked``: nobody looked.
        detail: counts and reasons.
        remedy: what to do.
        examples: some of what is missing or damaged, with reasons.
    """

    part: str
    name: str
    status: Status
    detail: str
    remedy: str = ""
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Availability:
    """All findings about a data set.

    Attributes:
        manifest: its name.
        data_root: where was looked.
        findings: in the order of the data's way: list, pictures, shards.
    """

    manifest: str
    data_root: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is missing, damaged or different."""
        return all(finding.status in ("ok", "unchecked") for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return what ``data check --json`` prints."""
        return {"schema_version": CHECK_VERSION, **asdict(self), "ok": self.ok}


def check_data(
    manifest: Manifest,
    data_root: str | Path,
    *,
    parts: Iterable[str] = PARTS,
    num_pictures: int | None = NUM_PICTURES,
    num_workers: int = 4,
    tell: Tell | None = None,
) -> Availability:
    """Look for every part that a manifest names.

    Args:
        manifest: the data set.
        data_root: folder that its paths are relative to, or an address.
        parts: some of ``PARTS``; a benchmark's folder counts as its shards.
        num_pictures: images to look at, drawn from the whole list and the same ones each time;
            None for all.
        num_workers: threads that decode images.
        tell: hears about progress: task, unit, done, total.

    Raises:
        ConfigError: ``parts`` or ``num_pictures`` make no sense.
    """
    parts = tuple(parts)
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ConfigError(f"parts has {', '.join(unknown)}; known: {', '.join(PARTS)}")
    if num_pictures is not None and num_pictures < 0:
        raise ConfigError(f"num_pictures is {num_pictures}; expected 0 or more, or all of them")
    root = Path(data_root)
    check = _Check(manifest, root, num_workers, tell or (lambda task, unit, done, total: None))
    if is_remote(str(data_root)):
        remedy = f"vipllava shards verify {manifest.name} --data-root {data_root}"
        place = Finding("data root", str(data_root), "unchecked", "an address", remedy)
        return Availability(manifest.name, str(data_root), (place,))
    if not root.is_dir():
        found = [Finding("data root", str(root), "missing", "no such folder", check.remedy)]
    elif manifest.format == "vip_bench":
        found = check.layout() if "shards" in parts else []
    else:
        found = check.list_and_images(parts, num_pictures) if manifest.annotation_file else []
        found += check.shards() if "shards" in parts else []
    return Availability(manifest.name, str(root), tuple(found))


def find_tars(manifest: Manifest, data_root: Path) -> tuple[list[str], list[str]]:
    """Return the tars that are there, and the names or patterns that nothing answers to.

    All are relative to the data root. Tars at an address are neither.
    """
    present: list[str] = []
    absent: list[str] = []
    local = [pattern for pattern in manifest.shards if not is_remote(pattern)]
    for _, name, tars in match_patterns(local, data_root):
        present += [path.relative_to(data_root).as_posix() for path in tars]
        absent += [] if tars else [name]
    return present, absent


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A file that a record names, and where that counts; the image root that it is in if empty."""

    position: int
    name: str
    part: str = "pictures"
    folder: str = ""


@dataclass(slots=True)
class _Faults:
    """How many files have a fault, and the first few of them by position in the list."""

    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])

    def add(self, position: int, text: str) -> None:
        self.count += 1
        insort(self.first, (position, text))  # files come in any order
        del self.first[_MOST_EXAMPLES:]

    def examples(self) -> tuple[str, ...]:
        return tuple(text for _, text in self.first)


@dataclass(slots=True)
class _Tally:
    """Files of one folder that were looked at."""

    looked_at: int = 0
    missing: _Faults = field(default_factory=_Faults)
    damaged: _Faults = field(default_factory=_Faults)


class _List:
    """The annotation list while it is read: counts, and the files that it names."""

    def __init__(self, manifest: Manifest, data_root: Path, tell: Tell) -> None:
        self.manifest = manifest
        self.path = data_root / (manifest.annotation_file or "")
        self.tell = tell
        self.kinds: Counter[str] = Counter()
        self.bad = _Faults()
        self.num_others = 0
        self.num_selected = 0

    def files(self) -> Iterator[_Wanted]:
        """Read the list, yielding what its records name."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        for item in iter_annotations(self.path):
            if item.position % 5000 == 0:
                self.tell(f"reading {self.path.name}", "bytes", item.start, size)
            if item.record is None:
                self.bad.add(item.position, f"item {item.position} {item.problem}")
            elif not self.manifest.has_record(item.record):
                self.num_others += 1
            else:
                self.num_selected += 1
                self.kinds[kind_of(item.record)] += 1
                yield from _files_of(item.position, item.record)
        self.tell(f"reading {self.path.name}", "bytes", size, size)

    def finding(self) -> Finding:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        detail = f"{self.num_selected} records" + (f" ({kinds})" if kinds else "")
        if self.num_others:
            detail += f"; {self.num_others} others belong to other data sets"
        status: Status = "ok"
        remedy = ""
        expected = self.manifest.approximate_samples
        if expected and abs(self.num_selected - expected) > _TOLERANCE * expected:
            status = "differs"
            detail += f"; about {expected} were expected"
            remedy = f"see that {self.path.name} is the published file and whole"
        if self.bad.count:
            status = "damaged"
            detail += f"; {self.bad.count} items are no records"
            remedy = f"correct {self.path.name}, or get it again"
        name = self.manifest.annotation_file or ""
        return Finding("annotations", name, status, detail, remedy, self.bad.examples())


class _Check:
    def __init__(self, manifest: Manifest, data_root: Path, num_workers: int, tell: Tell) -> None:
        self.manifest = manifest
        self.root = data_root
        self.num_workers = num_workers
        self.tell = tell
        self.tallies: dict[tuple[str, str], _Tally] = defaultdict(_Tally)  # by part and folder
        self.remedy = (
            "vipllava sample-data makes it"
            if manifest.made_by == "sample_world"
            else f"vipllava data fetch {manifest.name}"
            if manifest.sources
            else "put it there"
        )

    def list_and_images(self, parts: tuple[str, ...], num_images: int | None) -> list[Finding]:
        """Check the annotation list and the files that it names."""
        if not {"annotations", "pictures"} & set(parts):
            return []
        listed = _List(self.manifest, self.root, self.tell)
        if "pictures" not in parts:
            num_images = 0
        try:
            if num_images is None:
                self._look(listed.files(), None)
            else:
                drawn = self._draw(listed.files(), num_images)
                self._look(drawn, len(drawn))
            found = listed.finding()
        except AnnotationError as error:
            name = self.manifest.annotation_file or ""
            there = listed.path.is_file()
            status: Status = "damaged" if there else "missing"
            detail = str(error) if there else "no such file"
            found = Finding("annotations", name, status, detail, self.remedy)
        findings = [found] if "annotations" in parts else []
        return findings + (self._roots() if "pictures" in parts else [])

    def _draw(self, files: Iterable[_Wanted], count: int) -> list[_Wanted]:
        """Draw evenly from a list of unknown length, the same ones each time."""
        rng = generator_for("data check", self.manifest.name)
        drawn: list[_Wanted] = []
        for number, wanted in enumerate(files):
            if number < count:
                drawn.append(wanted)
            elif count and (place := int(rng.integers(number + 1))) < count:
                drawn[place] = wanted
        return sorted(drawn, key=lambda wanted: wanted.position)

    def _look(self, files: Iterable[_Wanted], total: int | None) -> None:
        looked = run_threads(self._look_at, files, self.num_workers)
        for number, (wanted, folder, fault, reason) in enumerate(looked, start=1):
            tally = self.tallies[wanted.part, wanted.folder or folder]
            tally.looked_at += 1
            if fault != "ok":
                faults = tally.missing if fault == "missing" else tally.damaged
                faults.add(wanted.position, reason)
            if number % 50 == 0 or number == total:
                self.tell("looking at pictures", "files", number, total)

    def _look_at(self, wanted: _Wanted) -> tuple[_Wanted, str, Status, str]:
        """Return the image root a file belongs to, and what is wrong with it."""
        name, roots = wanted.name, self.manifest.image_roots
        is_meta = wanted.part == "metadata"
        try:
            places = (metadata_paths if is_meta else image_paths)(name, self.root, roots)
        except RecordError as error:
            return wanted, roots[0] if roots else ".", "damaged", str(error)
        path = next((place for place in places if place.is_file()), None)
        folder = self._folder_of(path or places[0])
        if path is None:
            return wanted, folder, "missing", f"{name}: missing"
        try:
            data = path.read_bytes()
            if is_meta:
                json.loads(data)
            else:
                decode_image(data, name)
        except (OSError, ValueError, RecordError) as error:
            reason = str(error)
            named = reason if reason.startswith(name) else f"{name}: {reason}"
            return wanted, folder, "damaged", named
        return wanted, folder, "ok", ""

    def _folder_of(self, path: Path) -> str:
        relative = PurePosixPath(path.relative_to(self.root).as_posix())
        for root in self.manifest.image_roots:
            if relative.is_relative_to(root):
                return root
        return relative.parent.as_posix()

    def _roots(self) -> list[Finding]:
        """Return a finding for every image root, in the manifest's order, and other folders."""
        roots = self.manifest.image_roots
        wanted = {("pictures", root) for root in roots} | set(self.tallies)

        def place(item: tuple[str, str]) -> tuple[int, str, bool]:
            part, folder = item
            order = roots.index(folder) if folder in roots else len(roots)
            return order, folder, part != "pictures"

        return [self._looked(part, folder) for part, folder in sorted(wanted, key=place)]

    def _looked(self, part: str, folder: str) -> Finding:
        """Return what was found of the files of one folder."""
        tally = self.tallies[part, folder]
        missing, damaged = tally.missing.count, tally.damaged.count
        status: Status = "missing" if missing else "damaged" if damaged else "ok"
        if not (self.root / folder).is_dir():
            status, detail = "missing", "no such folder"
        elif not tally.looked_at:
            detail = "there; no record that was looked at names a file in it"
        else:
            good = tally.looked_at - missing - damaged
            detail = f"{good} of {tally.looked_at} that were looked at are good"
            detail += f", {missing} missing" if missing else ""
            detail += f", {damaged} unreadable" if damaged else ""
        examples = tally.damaged.examples() + tally.missing.examples()
        remedy = "" if status == "ok" else self.remedy
        return Finding(part, folder, status, detail, remedy, examples[:_MOST_EXAMPLES])

    def shards(self) -> list[Finding]:
        """Check the tars: named ones are there, indices fit, the count is right."""
        manifest = self.manifest
        name = ", ".join(manifest.shards)
        build = f"vipllava shards build {manifest.name}"
        remedy = build if manifest.annotation_file else self.remedy
        if any(is_remote(pattern) for pattern in manifest.shards):
            verify = f"vipllava shards verify {manifest.name}"
            return [Finding("shards", name, "unchecked", "at an address", verify)]
        present, absent = find_tars(manifest, self.root)
        if not present:
            return [Finding("shards", name, "missing", "no tar is there", remedy)]
        if absent:
            detail = f"{len(present)} of {len(present) + len(absent)} tars are there"
            examples = tuple(f"{tar}: missing" for tar in absent[:_MOST_EXAMPLES])
            return [Finding("shards", name, "missing", detail, remedy, examples)]
        try:
            shards = open_shards(replace(manifest, num_samples=None), self.root)
        except ShardError as error:
            return [Finding("shards", name, "damaged", str(error))]
        count = len(shards)
        shards.close()
        detail = f"{count} samples in {len(present)} tars"
        if manifest.num_samples not in (None, count):
            detail += f"; the manifest says {manifest.num_samples}"
            remedy = "complete the tars, or correct `num_samples` in the manifest"
            return [Finding("shards", name, "differs", detail, remedy)]
        return [Finding("shards", name, "ok", detail)]

    def layout(self) -> list[Finding]:
        """Check the folder of ViP-Bench: both splits, their images, the metadata."""
        folder = PurePosixPath(self.manifest.folder or ".")
        if not (self.root / folder).is_dir():
            return [Finding("layout", folder.as_posix(), "missing", "no such folder", self.remedy)]
        findings = [self._metadata(folder / _META_DATA)]
        for split in _SPLITS:
            findings += self._split(folder / split)
        return findings

    def _metadata(self, path: PurePosixPath) -> Finding:
        content = self._read(path)
        if isinstance(content, Finding):
            return content
        try:
            raw: Any = json.loads(content)
        except ValueError as error:
            return Finding("layout", str(path), "damaged", f"not JSON ({error})", self.remedy)
        if not isinstance(raw, dict):
            return Finding("layout", str(path), "damaged", "expected a JSON object", self.remedy)
        return self._counted(path, len(cast("dict[str, Any]", raw)))

    def _split(self, folder: PurePosixPath) -> list[Finding]:
        path, images = folder / "questions.jsonl", (folder / "images").as_posix()
        content = self._read(path)
        if isinstance(content, Finding):
            return [content]
        wanted: list[_Wanted] = []
        try:
            for line in filter(str.strip, content.splitlines()):
                name = (PurePosixPath(images) / json.loads(line)["image"]).as_posix()
                wanted.append(_Wanted(len(wanted), name, folder=images))
        except (ValueError, KeyError, TypeError) as error:
            detail = f"line {len(wanted) + 1} is no question ({error!r})"
            return [Finding("layout", str(path), "damaged", detail, self.remedy)]
        self._look(wanted, len(wanted))
        return [self._counted(path, len(wanted)), self._looked("pictures", images)]

    def _read(self, path: PurePosixPath) -> str | Finding:
        try:
            return (self.root / path).read_text(encoding="utf-8")
        except FileNotFoundError:
            return Finding("layout", str(path), "missing", "no such file", self.remedy)
        except (OSError, UnicodeDecodeError) as error:
            return Finding("layout", str(path), "damaged", str(error), self.remedy)

    def _counted(self, path: PurePosixPath, count: int) -> Finding:
        expected = self.manifest.num_samples
        if expected in (None, count):
            return Finding("layout", str(path), "ok", f"{count} questions")
        detail = f"{count} questions, the manifest says {expected}"
        return Finding("layout", str(path), "differs", detail, self.remedy)


def _files_of(position: int, record: Mapping[str, Any]) -> Iterator[_Wanted]:
    for name, part in (("image", "pictures"), ("meta_dir", "metadata")):
        value = record.get(name)
        if isinstance(value, str):
            yield _Wanted(position, value, part)
