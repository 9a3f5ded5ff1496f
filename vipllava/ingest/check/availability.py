"""``data check``: which parts of a data set are there, which are missing, which cannot be used.

The annotation list is read from start to end, a sample of its images (or all) is decoded, shards
are opened as training opens them, which makes an index where none is.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal, NamedTuple

from vipllava.files.pools import run_threads
from vipllava.ingest import Tell, tell_nobody
from vipllava.ingest.building.annotations import AnnotationError, iter_annotations
from vipllava.ingest.building.incoming import FILE_FIELDS, input_paths
from vipllava.ingest.tar_listing import find_tars
from vipllava.keyed_random import generator_for
from vipllava.records import kind_of
from vipllava.records.image_decode import decode_image
from vipllava.records.json_values import parse_json
from vipllava.shards.manifest import Manifest, is_remote
from vipllava.shards.tar_index import ShardError
from vipllava.shards.tars import open_shards
from vipllava.types import ConfigError, RecordError

CHECK_VERSION: Final = 1
PARTS: Final = ("annotations", "images", "shards")
NUM_IMAGES: Final = 1000
_SPLITS: Final = ("bbox", "human")
_META_DATA: Final = "vip-bench-meta-data.json"
_TOLERANCE: Final = 0.05
_MOST_EXAMPLES: Final = 20

Status = Literal["ok", "missing", "damaged", "differs", "unchecked", "unused"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What is known of one part."""

    part: str  # a part, ``metadata``, ``layout`` or ``data root``
    name: str  # the file, folder or pattern, relative to the data root
    # something is not there, cannot be read, is more or less than expected, nobody looked, or no
    # record needs it
    status: Status
    detail: str  # counts and reasons
    remedy: str = ""  # what to do
    examples: tuple[str, ...] = ()  # some of what is missing or damaged, with reasons


@dataclass(frozen=True, slots=True)
class Availability:
    """All findings about a data set."""

    manifest: str  # its name
    data_root: str  # where was looked
    findings: tuple[Finding, ...]  # in the order of the data's way: list, images, shards

    @property
    def ok(self) -> bool:
        """Whether nothing is missing, damaged or different."""
        return all(f.status in ("ok", "unchecked", "unused") for f in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return what ``data check --json`` prints."""
        return {"schema_version": CHECK_VERSION, **asdict(self), "ok": self.ok}


def check_data(
    manifest: Manifest,
    data_root: str | Path,
    *,
    parts: Iterable[str] = PARTS,
    num_images: int | None = NUM_IMAGES,
    num_workers: int = 4,
    tell: Tell = tell_nobody,
) -> Availability:
    """Look for every part that a manifest names.

    Args:
        manifest: the data set.
        data_root: folder that its paths are relative to, or an address, which is not looked at.
        parts: some of ``PARTS``; a benchmark's folder counts as its shards.
        num_images: images to look at, drawn from the whole list and the same ones each time;
            None for all.
        num_workers: threads that decode images.
        tell: hears about progress: task, unit, done, total.

    Raises:
        ConfigError: ``parts`` or ``num_images`` make no sense.
    """
    parts = tuple(parts)
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ConfigError(f"parts has {', '.join(unknown)}; known: {', '.join(PARTS)}")
    if num_images is not None and num_images < 0:
        raise ConfigError(f"num_images is {num_images}; expected 0 or more, or all of them")
    root = Path(data_root)
    check = _Check(manifest, root, num_workers, tell)
    if is_remote(str(data_root)):
        remedy = f"vipllava shards verify {manifest.name} --data-root {data_root}"
        place = Finding("data root", str(data_root), "unchecked", "an address", remedy)
        return Availability(manifest.name, str(data_root), (place,))
    if not root.is_dir():
        found = [Finding("data root", str(root), "missing", "no such folder", check.remedy)]
    elif manifest.format == "vip_bench":
        found = check.layout() if "shards" in parts else []
    else:
        found = check.list_and_images(parts, num_images) if manifest.annotation_file else []
        found += [check.shards()] if "shards" in parts else []
    return Availability(manifest.name, str(root), tuple(found))


class _Wanted(NamedTuple):
    """A file that the record at ``position`` names in ``field``."""

    position: int
    name: str
    field: str = "image"
    folder: str = ""  # that it counts in; if empty, the image root that it lies in


@dataclass(slots=True)
class _Counted:
    """How many files or records have the same status, and the first few by position in the list."""

    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])

    def add(self, position: int, text: str) -> None:
        self.count += 1
        insort(self.first, (position, text))  # files come in any order
        del self.first[_MOST_EXAMPLES:]

    @property
    def examples(self) -> tuple[str, ...]:
        return tuple(text for _, text in self.first)


@dataclass
class _Check:
    manifest: Manifest
    root: Path
    num_workers: int
    tell: Tell
    bad_items: _Counted = field(default_factory=_Counted)
    kinds: Counter[str] = field(default_factory=Counter[str])  # of the data set's records
    num_others: int = 0
    num_images: int = 0  # that records name, and how many were looked at
    num_looked_at: int = 0

    def __post_init__(self) -> None:
        # By part, folder and status.
        self.looked_at: defaultdict[tuple[str, str, Status], _Counted] = defaultdict(_Counted)
        manifest = self.manifest
        asked = [f"{s.name}, {s.address}" for s in manifest.sources if s.access != "public"]
        by_hand = f", which says how to get {'; '.join(asked)}" if asked else ""
        self.remedy = (
            "vipllava sample-data makes it"
            if manifest.made_by == "sample_world"
            else f"vipllava data fetch {manifest.name}{by_hand}"
            if manifest.sources
            else "put it there"
        )

    def list_and_images(self, parts: tuple[str, ...], num_images: int | None) -> list[Finding]:
        """Check the annotation list and the files that it names."""
        if not {"annotations", "images"} & set(parts):
            return []
        name = self.manifest.annotation_file or ""
        path = self.root / name
        files = self._files(path)
        try:
            if "images" in parts and num_images is None:
                self._look(files, None)
            else:
                drawn = self._draw(files, (num_images or 0) if "images" in parts else 0)
                self._look(drawn, len(drawn))
            found = self._list_finding(name)
        except AnnotationError as error:
            found = Finding("annotations", name, "damaged", str(error), self.remedy)
            if not path.is_file():
                found = replace(found, status="missing", detail="no such file")
        findings = [found] if "annotations" in parts else []
        return findings + (self._folder_findings() if "images" in parts else [])

    def _files(self, path: Path) -> Iterator[_Wanted]:
        """Read the annotation list, yielding what its records name."""
        size = path.stat().st_size if path.is_file() else 0
        for item in iter_annotations(path):
            if item.position % 5000 == 0:
                self.tell(f"reading {path.name}", "bytes", item.start, size)
            if item.record is None:
                self.bad_items.add(item.position, f"item {item.position} {item.problem}")
            elif not self.manifest.has_record(item.record):
                self.num_others += 1
            else:
                self.kinds[kind_of(item.record)] += 1
                for name in FILE_FIELDS:
                    if isinstance(value := item.record.get(name), str):
                        self.num_images += name == "image"
                        yield _Wanted(item.position, value, name)
        self.tell(f"reading {path.name}", "bytes", size, size)

    def _list_finding(self, name: str) -> Finding:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        selected, expected = self.kinds.total(), self.manifest.approximate_samples
        detail = f"{selected} records" + (f" ({kinds})" if kinds else "")
        if self.num_others:
            detail += f"; {self.num_others} others belong to other data sets"
        status, remedy = "ok", ""
        if expected and abs(selected - expected) > _TOLERANCE * expected:
            status = "differs"
            detail += f"; about {expected} were expected"
            remedy = f"see that {name} is the published file and whole"
        if self.bad_items.count:
            status = "damaged"
            detail += f"; {self.bad_items.count} items are no records"
            remedy = f"correct {name}, or get it again"
        return Finding("annotations", name, status, detail, remedy, self.bad_items.examples)

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
        for number, (wanted, folder, status, reason) in enumerate(looked, start=1):
            part = "images" if wanted.field == "image" else "metadata"
            counted = self.looked_at[part, wanted.folder or folder, status]
            counted.add(wanted.position, reason)
            self.num_looked_at += part == "images"
            if number % 50 == 0 or number == total:
                self.tell("looking at pictures", "files", number, total)

    def _look_at(self, wanted: _Wanted) -> tuple[_Wanted, str, Status, str]:
        """Return the image root a file belongs to, and what is wrong with it."""
        name, roots = wanted.name, self.manifest.image_roots
        try:
            places = input_paths(name, self.root, roots, wanted.field)
        except RecordError as error:
            return wanted, roots[0] if roots else ".", "damaged", str(error)
        path = next((place for place in places if _is_file(place)), None)
        relative = PurePosixPath((path or places[0]).relative_to(self.root).as_posix())
        within = (root for root in roots if relative.is_relative_to(root))
        folder = next(within, relative.parent.as_posix())
        if path is None:
            return wanted, folder, "missing", f"{name}: missing"
        try:
            data = path.read_bytes()
            if wanted.field == "image":
                decode_image(data, name)
            else:
                parse_json(data)
        except (OSError, ValueError, RecordError) as error:
            reason = str(error)
            named = reason if reason.startswith(name) else f"{name}: {reason}"
            return wanted, folder, "damaged", named
        return wanted, folder, "ok", ""

    def _folder_findings(self) -> list[Finding]:
        """Return a finding for every image root, in the manifest's order, and for other folders."""
        roots = [("images", root) for root in self.manifest.image_roots]
        others = {(part, folder) for part, folder, _ in self.looked_at} - set(roots)
        return [self._folder_finding(*item) for item in (*roots, *sorted(others))]

    def _folder_finding(self, part: str, folder: str) -> Finding:
        good = self.looked_at[part, folder, "ok"].count
        missing = self.looked_at[part, folder, "missing"]
        damaged = self.looked_at[part, folder, "damaged"]
        total = good + missing.count + damaged.count
        status: Status = "missing" if missing.count else "damaged" if damaged.count else "ok"
        if not (self.root / folder).is_dir():
            status, detail = "missing", "no such folder"
        elif not total:
            detail = "there; no record that was looked at names a file in it"
            status = "unused" if self.num_looked_at or not self.num_images else "ok"
        else:
            detail = f"{good} of {total} files looked at are whole"
            detail += f", {missing.count} missing" if missing.count else ""
            detail += f", {damaged.count} unreadable" if damaged.count else ""
        examples = (damaged.examples + missing.examples)[:_MOST_EXAMPLES]
        remedy = "" if status == "ok" else self.remedy
        if status == "unused":
            remedy = "see that the records name their files in `image`, or drop the image root"
        return Finding(part, folder, status, detail, remedy, examples)

    def shards(self) -> Finding:
        """Check the tars: named ones are there, indices fit, the count is right."""
        manifest = self.manifest
        finding = partial(Finding, "shards", ", ".join(manifest.shards))
        remedy = self.remedy
        if manifest.annotation_file:
            remedy = f"vipllava shards build {manifest.name}"
        if any(is_remote(pattern) for pattern in manifest.shards):
            return finding("unchecked", "at an address", f"vipllava shards verify {manifest.name}")
        present, absent = find_tars(manifest, self.root)
        if not present:
            return finding("missing", "no tar is there", remedy)
        if absent:
            detail = f"{len(present)} of {len(present) + len(absent)} tars are there"
            examples = tuple(f"{tar}: missing" for tar in absent[:_MOST_EXAMPLES])
            return finding("missing", detail, remedy, examples)
        try:
            shards = open_shards(replace(manifest, num_samples=None), self.root)
        except ShardError as error:
            return finding("damaged", str(error))
        count = len(shards)
        shards.close()
        detail = f"{count} samples in {len(present)} tars"
        if manifest.num_samples not in (None, count):
            detail += f"; the manifest says {manifest.num_samples}"
            remedy = "complete the tars, or correct `num_samples` in the manifest"
            return finding("differs", detail, remedy)
        return finding("ok", detail)

    def layout(self) -> list[Finding]:
        """Check the folder of ViP-Bench: both splits, their images, the metadata."""
        folder = PurePosixPath(self.manifest.folder or ".")
        if not (self.root / folder).is_dir():
            return [Finding("layout", folder.as_posix(), "missing", "no such folder", self.remedy)]
        findings = [self._read(folder / _META_DATA, parse_json)[0]]
        for split in _SPLITS:
            images = (folder / split / "images").as_posix()
            finding, names = self._read(folder / split / "questions.jsonl", _questions)
            findings.append(finding)
            if finding.status not in ("missing", "damaged"):
                files = (_Wanted(n, f"{images}/{name}", "image", images) for n, name in names)
                self._look(files, len(names))
                findings.append(self._folder_finding("images", images))
        return findings

    def _read(
        self, path: PurePosixPath, parse: Callable[[str], Collection[Any]]
    ) -> tuple[Finding, Collection[Any]]:
        """Check a file with one item per question; return the items, too."""
        finding = partial(Finding, "layout", str(path))
        try:
            items = parse((self.root / path).read_text(encoding="utf-8"))
            count, expected = len(items), self.manifest.num_samples
        except FileNotFoundError:
            return finding("missing", "no such file", self.remedy), ()
        except (OSError, ValueError, TypeError) as error:
            return finding("damaged", f"cannot be read ({error})", self.remedy), ()
        if expected in (None, count):
            return finding("ok", f"{count} questions"), items
        detail = f"{count} questions, the manifest says {expected}"
        return finding("differs", detail, self.remedy), items


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that this file system cannot have
        return False


def _questions(text: str) -> list[tuple[int, str]]:
    """Return line number and image of each question."""
    questions: list[tuple[int, str]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            if line.strip():
                questions.append((number, "" + parse_json(line)["image"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number}: {error!r}") from error
    return questions
