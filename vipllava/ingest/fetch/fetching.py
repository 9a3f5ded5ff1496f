"""``data fetch``: the parts of a data set to where its manifest says they lie.

``downloads/SOURCE/`` under the data root holds archives while they are needed, and those that a
person has put there; ``.vipllava/fetched/`` a receipt for every archive and list that is done.
Everything may be broken off and run again; one process at a time works on a source.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from vipllava.files.atomic import write_json, write_whole
from vipllava.files.download import DiskError, DownloadError, disk_error, download
from vipllava.files.locks import locked
from vipllava.files.pools import run_threads
from vipllava.files.retries import PATIENT, Patience
from vipllava.ingest import Tell, tell_nobody
from vipllava.ingest.fetch.hub import HubFile, fetch_hub_file, list_hub_files
from vipllava.ingest.fetch.image_lists import fetch_images, make_jpegs
from vipllava.ingest.fetch.unpacking import DamagedArchiveError, unpack
from vipllava.shards.manifest import Manifest, is_remote
from vipllava.shards.sources import DataSource, ImageList, SourceFile
from vipllava.types import ConfigError, VipLlavaError

DOWNLOADS: Final = "downloads"
_STATE: Final = Path(".vipllava")
_RECEIPT_VERSION: Final = 1

Status = Literal["present", "fetched", "missing", "failed"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one part: a file, archive or list of a source."""

    source: str
    part: str
    place: str  # where it lies or belongs, relative to the data root
    # ``present`` before, ``fetched`` now, ``missing``: a person has to get it, or ``failed``
    status: Status
    detail: str = ""  # counts, or what to do

    @property
    def ok(self) -> bool:
        """Whether the part is there now."""
        return self.status in ("present", "fetched")


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """How to fetch."""

    keep_archives: bool = False  # leave them in ``downloads/`` once they are unpacked
    again: bool = False  # fetch archives and lists anew that were fetched before or lie there
    num_workers: int = 8  # downloads at a time, for images that come one by one
    patience: Patience = PATIENT  # bounds on each download


def fetch_data(
    manifest: Manifest,
    data_root: str | Path,
    options: FetchOptions = FetchOptions(),
    *,
    tell: Tell = tell_nobody,
) -> list[Outcome]:
    """Fetch what is public of a data set into a folder, and say what has to be asked for.

    One part that fails does not keep the others from being fetched.

    Raises:
        ConfigError: the data root is an address.
        DiskError: the data root cannot be written, or is full: nothing else could work either.
    """
    if is_remote(str(data_root)):
        raise ConfigError(f"data_root={data_root} is an address; images are fetched into a folder")
    root = Path(data_root)
    outcomes: list[Outcome] = []
    for source in manifest.sources:
        job = _SourceJob(source, root, options, tell)
        try:
            lock = root / _STATE / "locks" / f"{source.key}.lock"
            waiting = f"{source.name} is being fetched by another process; waiting for it"
            with locked(lock, waiting=waiting):
                outcomes += job.run()
        except OSError as error:
            raise disk_error(error, source.name, root) from error
    return outcomes


@dataclass
class _SourceJob:
    """The parts of one source."""

    source: DataSource
    root: Path
    options: FetchOptions
    tell: Tell

    def __post_init__(self) -> None:
        self.downloads = self.root / DOWNLOADS / self.source.key

    def run(self) -> list[Outcome]:
        source, images = self.source, self.source.image_list
        outcomes: list[Outcome] = []
        for file in source.files:
            place = (PurePosixPath(file.into) / file.name).as_posix()
            if file.unpack is not None:
                work, place = self._fetch_archive, file.into
            elif file.is_pattern and not self._is_by_hand(file):
                work, place = self._fetch_matching, file.into
            elif images is not None and place == images.file and self._is_by_hand(file):
                continue  # of use to the list only: `_fetch_list` asks for it if need be
            else:
                work = self._fetch_file
            outcomes.append(self._attempt(file.name, place, partial(work, file)))
        if images is not None:
            work = partial(self._fetch_list, images)
            outcomes.append(self._attempt("pictures one by one", images.into, work))
        if not outcomes:
            where = f" at {source.address}" if source.address else ""
            detail = f"the manifest has no address of files; get it by hand{where}"
            outcomes.append(Outcome(source.name, source.what, ".", "missing", detail))
        return outcomes

    def _attempt(self, part: str, place: str, work: Callable[[], tuple[Status, str]]) -> Outcome:
        try:
            status, detail = work()
        except DiskError:
            raise
        except VipLlavaError as error:
            status, detail = "failed", str(error)
        return Outcome(self.source.name, part, place, status, detail)

    def _is_by_hand(self, file: SourceFile) -> bool:
        return file.url is None and self.source.hub is None

    def _ask(self, place: Path, then: str = "") -> tuple[Status, str]:
        ways = {"form": "ask for it by the form at", "by_hand": "get it with a browser from"}
        way = ways.get(self.source.access, "get it from")
        return "missing", f"{way} {self.source.address} and put it at {place}{then}"

    def _fetch_file(self, file: SourceFile) -> tuple[Status, str]:
        """Fetch one file that is kept as it is, or ask for it."""
        path = self.root / file.into / file.name
        by_hand = self._is_by_hand(file)
        if path.is_file() and (by_hand or not self.options.again):
            size = path.stat().st_size
            if file.size not in (None, size):
                raise DownloadError(
                    f"{path} has {size} bytes, the manifest says {file.size}: it is not whole, or "
                    "another file. Remove it and run the same command again"
                )
            return "present", f"{size} bytes"
        if by_hand:
            return self._ask(path)
        self._get(file, path)
        return "fetched", f"{path.stat().st_size} bytes"

    def _fetch_matching(self, file: SourceFile) -> tuple[Status, str]:
        """Fetch the files of a hub repository that match a pattern."""
        into = self.root / file.into
        if (done := self._receipt(file, into)) is not None:
            return "present", f"{done['num_files']} files"
        listed = self._list(file)

        def fetch(item: HubFile) -> None:
            fetch_hub_file(item, into / item.path, patience=self.options.patience)

        fetched = run_threads(fetch, listed, self.options.num_workers)
        for number, _ in enumerate(fetched, start=1):
            self.tell(f"{self.source.name} {file.name}", "files", number, len(listed))
        self._write_receipt(file, len(listed))
        return "fetched", f"{len(listed)} files"

    def _fetch_archive(self, file: SourceFile) -> tuple[Status, str]:
        into, archive = self.root / file.into, self.downloads / file.name
        by_hand, again = self._is_by_hand(file), self.options.again
        if (present := self._unpacked(file, into)) is not None:
            return "present", present
        if by_hand and not archive.is_file():
            then = f", then run this command again; or unpack it yourself into {into}"
            return self._ask(archive, then)
        if not by_hand and (again or not archive.is_file()):
            self._get(file, archive)
        self._write_receipt(file, None)
        try:
            count = unpack(
                archive,
                into,
                folder=file.unpack or ".",
                overwrite=again,
                on_progress=partial(self.tell, f"unpack {file.name}", "files"),
            )
        except DamagedArchiveError as error:
            if by_hand:
                raise
            archive.unlink()
            raise DamagedArchiveError(
                f"{error}. It was deleted: run the same command again to download it anew"
            ) from error
        self._write_receipt(file, count)
        if not by_hand and not self.options.keep_archives:
            archive.unlink()
        less = file.num_files is not None and count < file.num_files
        return "fetched", f"{count} files" + (f"; {file.num_files} were expected" if less else "")

    def _unpacked(self, file: SourceFile, into: Path) -> str | None:
        """Say what an archive has left already, or None if there is something to do."""
        if self.options.again or not _has_any(into):
            return None
        if (receipt := self._receipt(file, into)) is not None:
            count = receipt["num_files"]
            return None if count is None else f"{count} files"  # None: broken off
        count = count_files(into)
        if file.num_files is not None and count < file.num_files:
            return None
        return f"{count} files, put there by somebody else; again=true fetches them"

    def _get(self, file: SourceFile, path: Path) -> None:
        """Download one file, whatever it is."""
        told = partial(self.tell, file.name, "bytes")
        how: Any = {"patience": self.options.patience, "on_progress": told}
        if file.url is None:
            fetch_hub_file(self._list(file)[0], path, **how)
        else:
            download(file.url, path, size=file.size, md5=file.md5, sha256=file.sha256, **how)

    def _list(self, file: SourceFile) -> list[HubFile]:
        hub, revision = self.source.hub, self.source.revision
        assert hub is not None
        return list_hub_files(hub, file.name, revision=revision, patience=self.options.patience)

    def _fetch_list(self, images: ImageList) -> tuple[Status, str]:
        """Fetch images one by one; what is there already becomes real JPEG in any case."""
        into, listed = self.root / images.into, self.root / images.file
        if (done := self._receipt(images, into)) is not None:
            return "present", done["note"]
        if not listed.is_file():
            if not _has_any(into):
                return self._ask(listed, ", then run this command again")
            converted, failures = make_jpegs(into)
            return "present", (
                f"{count_files(into)} files, {converted} of them made JPEG, {len(failures)} not "
                f"readable; without {listed} nobody knows whether any are missing"
            )
        outcome = fetch_images(
            images,
            self.root,
            num_workers=self.options.num_workers,
            on_progress=partial(self.tell, f"pictures of {self.source.name}", "files"),
        )
        failures, total = outcome.failures, outcome.num_listed
        count = total - len(failures)
        note = f"{count} of {total} pictures, {outcome.num_converted} of them made JPEG"
        path = self.downloads / "failures.jsonl"
        if failures:
            lines = (json.dumps(asdict(failure), ensure_ascii=False) for failure in failures)
            write_whole(path, "".join(f"{line}\n" for line in lines))
            note += f"; {len(failures)} could not be had (see {path}; again=true retries)"
        else:
            path.unlink(missing_ok=True)
        self._write_receipt(images, count, note)
        return "fetched", note

    # Receipts: one small JSON file for each part.

    def _receipt(self, part: SourceFile | ImageList, into: Path) -> dict[str, Any] | None:
        """Return the receipt of a part that need not be fetched again.

        None also where it is of another place or damaged.
        """
        if self.options.again or not _has_any(into):
            return None
        try:
            known: Any = json.loads(self._receipt_path(part).read_text(encoding="utf-8"))
            same = (known["schema_version"], known["into"]) == (_RECEIPT_VERSION, part.into)
            return {name: known[name] for name in ("num_files", "note")} if same else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write_receipt(
        self, part: SourceFile | ImageList, num_files: int | None, note: str = ""
    ) -> None:
        """Note what was unpacked or fetched: files in all, None while it is under way."""
        values = {"file": _name(part), "into": part.into, "num_files": num_files, "note": note}
        write_json(self._receipt_path(part), {"schema_version": _RECEIPT_VERSION, **values})

    def _receipt_path(self, part: SourceFile | ImageList) -> Path:
        name = re.sub(r"[^A-Za-z0-9.]+", "-", _name(part))
        return self.root / _STATE / "fetched" / self.source.key / f"{name}.json"


def _name(part: SourceFile | ImageList) -> str:
    return part.file if isinstance(part, ImageList) else part.name


def count_files(folder: Path) -> int:
    """Count the files of a folder and of those in it, hidden ones apart."""
    return sum(
        sum(not name.startswith(".") for name in files)
        for _, _, files in os.walk(folder, followlinks=True)
    )


def _has_any(folder: Path) -> bool:
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
