"""Building the shards of a data set from its annotation list and images.

The list is cut by position into stretches of a fixed number of records, one tar each; worker
processes make one tar at a time. Everything is put into ``OUTPUT.building``, and the folder gets
its name ``OUTPUT`` when the build is whole and good enough, so that a build that was killed or that
failed never passes for a data set. Run again, it keeps every tar whose report says that it was made
from the same stretch with the same settings, unless a file that a rejected record lacked has
changed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Final

from vipllava.files.atomic import move
from vipllava.files.locks import locked
from vipllava.files.pools import default_num_workers, run_jobs
from vipllava.ingest.building.annotations import AnnotationRange, iter_range, plan_ranges
from vipllava.ingest.building.build_report import (
    FORMAT,
    REJECTED_FILE,
    SUMMARY_FILE,
    BuildSummary,
    Rejected,
    ShardReport,
    write_rejected,
)
from vipllava.ingest.building.incoming import (
    UNREADABLE,
    Ingested,
    ingest,
    input_names,
    input_states,
    make_key,
)
from vipllava.records import with_kinds
from vipllava.records.version import RECORD_VERSION
from vipllava.shards.manifest import Manifest, is_remote
from vipllava.shards.tar_index import index_path, load_index
from vipllava.shards.tars import ShardError, write_shards
from vipllava.types import RecordError, VipLlavaError

log = logging.getLogger(__name__)

MAX_BAD_RATE: Final = 0.001
MAX_SAMPLES: Final = 1000
_WORK: Final = ".building"
_REPORTS: Final = ".reports"
_LOCK: Final = ".lock"
_SCRATCH: Final = ".part-"
_PREFIX: Final = "shard"
_NO_LIMIT: Final = 1 << 62


class BuildError(VipLlavaError):
    """The shards cannot be built, or too many records are bad."""


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """How far a build is.

    Attributes:
        phase: ``list`` (reading the annotation list, in bytes) or ``shards`` (in records).
        done, total: of the phase's unit.
        num_rejected: records so far that cannot be used.
    """

    phase: str
    done: int
    total: int
    num_rejected: int = 0


@dataclass(frozen=True, slots=True)
class ShardJob:
    """One tar to be made.

    Attributes:
        manifest: of the data set.
        data_root: folder that its paths are relative to, absolute.
        work: folder of the tar.
        name: of the tar, without ``.tar``.
        part: the stretch of the annotation list.
    """

    manifest: Manifest
    data_root: Path
    work: Path
    name: str
    part: AnnotationRange

    @property
    def annotation_file(self) -> Path:
        """The annotation list."""
        assert self.manifest.annotation_file is not None
        return self.data_root / self.manifest.annotation_file

    @property
    def report_path(self) -> Path:
        """Where the report goes."""
        return self.work / _REPORTS / f"{self.name}.json"

    @property
    def inputs(self) -> str:
        """Fingerprint of what the tar is made from."""
        return _fingerprint(self.manifest, self.name, self.part.digest)


def build_shards(
    manifest: Manifest,
    data_root: str | Path,
    *,
    output: str | Path | None = None,
    num_workers: int | None = None,
    max_samples: int = MAX_SAMPLES,
    max_bad_rate: float = MAX_BAD_RATE,
    on_progress: Callable[[BuildProgress], None] | None = None,
) -> BuildSummary:
    """Write a data set's tars, or finish a build that was interrupted.

    Args:
        manifest: names the annotation list and the image roots.
        data_root: folder that their paths are relative to.
        output: folder of the tars; without it the one of the manifest's shard pattern.
        num_workers: processes; 0 builds in this one, None takes one per core, at most 16.
        max_samples: records per tar.
        max_bad_rate: share of rejected records above which the build fails; 1 allows all.
        on_progress: told about the progress.

    Returns:
        The summary, which is in ``build.json`` beside the tars.

    Raises:
        BuildError: nothing to build from, an output that is something else, another build at work
            there, no space left, or too many rejected records.
        AnnotationError: the annotation list is missing or damaged.
        WorkerDied: a worker process was killed.
    """
    if not 0 <= max_bad_rate <= 1:
        raise BuildError(f"max_bad_rate is {max_bad_rate}; a rate lies in 0..1")
    if manifest.annotation_file is None:
        raise BuildError(
            f"manifest `{manifest.name}` has no annotation_file; name the JSON list of its records"
        )
    if is_remote(str(data_root)):
        raise BuildError(f"data_root is {data_root}; shards are built in a local folder")
    root = Path(data_root).expanduser().resolve()
    folder, prefix = build_target(manifest, root, output)
    _refuse_foreign(folder)

    def tell(progress: BuildProgress) -> None:
        if on_progress is not None:
            on_progress(progress)

    plan = plan_ranges(
        root / manifest.annotation_file,
        max_samples,
        select=manifest.has_record,
        on_progress=lambda done, total: tell(BuildProgress("list", done, total)),
    )
    summary = BuildSummary(
        dataset=manifest.name,
        annotation_file=manifest.annotation_file,
        inputs=_fingerprint(manifest, prefix, f"{max_samples}/{plan.digest}"),
        num_records=plan.num_records,
        num_selected=plan.num_selected,
        max_samples=max_samples,
    )
    if (finished := _finished(folder, summary)) is not None:
        return finished
    with _work_folder(folder) as work:
        if (finished := _finished(folder, summary)) is not None:  # by a build that ran meanwhile
            shutil.rmtree(work, ignore_errors=True)  # that build may have renamed it
            return finished
        names = [f"{prefix}-{part.number:06d}" for part in plan.ranges]
        jobs = [
            ShardJob(manifest, root, work, name, part)
            for name, part in zip(names, plan.ranges, strict=True)
        ]
        with _disk_errors(work):
            _drop_others(work, set(names))
        try:
            _build(jobs, summary, num_workers, max_bad_rate, tell)
        finally:
            with _disk_errors(work):
                write_rejected(work / REJECTED_FILE, _reports(jobs))
        with _disk_errors(folder):
            summary.save(work)
            move(work, folder)
            _drop_traces(folder)
    return summary


def manifest_lines(
    manifest: Manifest,
    data_root: str | Path,
    summary: BuildSummary,
    output: str | Path | None = None,
) -> list[str]:
    """Return the lines that make the manifest open a finished build and notice a lost tar.

    Args:
        manifest: that the build was made with, as are ``data_root`` and ``output``.
        summary: of the build.

    Returns:
        Lines of YAML for the manifest; none if it has them.
    """
    root = Path(data_root).expanduser().resolve()
    folder, prefix = target = build_target(manifest, root, output)
    lines: list[str] = []
    if not _opens(manifest, root, target):
        tars = f"{prefix}-*.tar"
        if folder.is_relative_to(root):
            lines.append(f"shards: {(folder / tars).relative_to(root).as_posix()}")
        else:
            lines.append(f"shards: {folder.name}/{tars} # with data_root={folder.parent}")
    if manifest.num_samples != summary.num_samples:
        lines.append(f"num_samples: {summary.num_samples}")
    return lines


def _opens(manifest: Manifest, data_root: Path, target: tuple[Path, str]) -> bool:
    try:
        return build_target(manifest, data_root) == target
    except BuildError:  # the pattern names no folder to build in
        return False


def _build(
    jobs: list[ShardJob],
    summary: BuildSummary,
    num_workers: int | None,
    max_bad_rate: float,
    tell: Callable[[BuildProgress], None],
) -> None:
    """Make all tars and count; stops as soon as it is certain that too many records are bad."""
    workers = default_num_workers() if num_workers is None else num_workers
    done, total = 0, summary.num_selected
    with closing(run_jobs(with_kinds(build_shard), jobs, min(workers, len(jobs)))) as reports:
        for report in reports:
            summary.add(report)
            done += report.num_samples + len(report.rejected)
            tell(BuildProgress("shards", done, total, summary.num_rejected))
            if summary.num_rejected > max_bad_rate * total or summary.num_rejected == total:
                raise _too_many(summary, done, max_bad_rate, jobs[0].work)


def build_shard(job: ShardJob) -> ShardReport:
    """Make one tar with its index, unless it is there already.

    Raises:
        AnnotationError: the list changed since it was cut.
        BuildError: the tar cannot be written.
    """
    report = ShardReport.load(job.report_path)
    if report is not None and _is_current(report, job):
        return report
    with _disk_errors(job.work):
        job.report_path.unlink(missing_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=job.work))
        try:
            report = _write_shard(job, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        report.save(job.report_path)
    return report


def _write_shard(job: ShardJob, scratch: Path) -> ShardReport:
    rejected: list[Rejected] = []
    kinds, changes = Counter[str](), Counter[str]()
    num_text_only = 0

    def stored() -> Iterator[Ingested]:
        nonlocal num_text_only
        for item in iter_range(job.annotation_file, job.part, job.manifest.has_record):
            try:
                sample = ingest(item, job.manifest, job.data_root)
            except RecordError as error:
                image = item.record.get("image") if item.record is not None else None
                names = input_names(item.record, job.data_root, job.manifest.image_roots)
                rejected.append(
                    Rejected(
                        position=item.position,
                        key=make_key(item.record, item.position),
                        image=image if isinstance(image, str) else None,
                        fault=error.fault,
                        reason=str(error),
                        inputs=input_states(names, job.data_root),
                    )
                )
                continue
            kinds[sample.kind] += 1
            changes.update([sample.change] if sample.change else [])
            num_text_only += sample.image is None
            yield sample

    samples = stored()
    tar = job.work / f"{job.name}.tar"
    size = 0
    if (first := next(samples, None)) is not None:
        paths = write_shards(
            ((s.key, s.record, s.image, s.extension) for s in chain([first], samples)),
            scratch,
            prefix=_PREFIX,
            max_samples=job.part.num_samples,
            max_bytes=_NO_LIMIT,
            check_images=False,  # decoded a moment ago
        )
        with paths[0].open("rb") as file:
            os.fsync(file.fileno())
        for path in scratch.iterdir():  # the tar and what belongs to it
            move(path, job.work / path.name.replace(paths[0].stem, job.name, 1))
        size = tar.stat().st_size
    return ShardReport(
        name=job.name,
        inputs=job.inputs,
        first=job.part.first,
        num_samples=sum(kinds.values()),
        num_text_only=num_text_only,
        tar_size=size,
        kinds=dict(kinds),
        changes=dict(changes),
        rejected=tuple(rejected),
    )


def _is_current(report: ShardReport, job: ShardJob) -> bool:
    """Whether a tar stands that would come out the same."""
    if report.inputs != job.inputs:
        return False
    tar = job.work / f"{job.name}.tar"
    if report.tar_size:
        try:
            if tar.stat().st_size != report.tar_size:
                return False
            load_index(index_path(tar), tar)
        except (OSError, ShardError):
            return False
    return all(
        row.fault != UNREADABLE and input_states(row.inputs, job.data_root) == row.inputs
        for row in report.rejected
    )


def build_target(
    manifest: Manifest, data_root: Path, output: str | Path | None = None
) -> tuple[Path, str]:
    """Return the folder of the tars and the first part of their names; see :func:`build_shards`.

    Raises:
        BuildError: there is no ``output``, and the manifest's shards name no folder to build in.
    """
    if output is not None:
        return Path(output).expanduser().resolve(), _PREFIX
    pattern = PurePosixPath(manifest.shards[0] if len(manifest.shards) == 1 else "")
    head, star, tail = pattern.name.partition("*")
    folder = pattern.parent
    local = folder != PurePosixPath() and not is_remote(str(pattern))
    if not (local and star and tail == ".tar") or set("*?[{") & set(f"{folder}{head}"):
        raise BuildError(
            f"`{manifest.name}` has shards {', '.join(manifest.shards) or 'none'}; a build needs "
            "one pattern FOLDER/*.tar or FOLDER/PREFIX-*.tar below the data root: pass "
            "output=FOLDER, or correct the manifest"
        )
    return (data_root / folder).resolve(), head.rstrip("-") or _PREFIX


def _refuse_foreign(folder: Path) -> None:
    """Refuse an output that holds something else, before the long work."""
    try:
        foreign = (
            folder.exists() and not (folder / SUMMARY_FILE).is_file() and any(folder.iterdir())
        )
    except OSError as error:
        raise BuildError(f"output {folder} is no folder that can be used: {error}") from error
    if foreign:
        raise BuildError(
            f"output {folder} holds files that no build made; tars get a folder of their own: "
            "correct the manifest's `shards`, or pass another output=FOLDER"
        )


def _finished(folder: Path, summary: BuildSummary) -> BuildSummary | None:
    """Return the summary of the build that stands in ``folder``, if there is one."""
    if not (folder / SUMMARY_FILE).is_file():
        return None
    present = BuildSummary.load(folder)
    if present is None or present.inputs != summary.inputs:
        raise BuildError(
            f"{folder} was built from another annotation list or with other settings; remove it "
            "to build it anew, or pass another output=FOLDER"
        )
    for shard in present.shards:
        tar = folder / f"{shard['name']}.tar"
        if shard["num_bytes"] and not (tar.is_file() and tar.stat().st_size == shard["num_bytes"]):
            raise BuildError(
                f"{tar} is gone or has another size than when it was built; get it back, or "
                f"remove {folder} to build it anew"
            )
    _drop_traces(folder)  # of a build that was killed when it was as good as done
    log.info("%s is built already", folder)
    if present.num_rejected:
        log.info(
            "%d records were rejected; if they are corrected, remove the folder to build it anew",
            present.num_rejected,
        )
    return present


@contextmanager
def _work_folder(folder: Path) -> Generator[Path]:
    """Make or find the folder of the unfinished build and keep others out of it."""
    work = folder.with_name(f"{folder.name}{_WORK}")
    with ExitStack() as stack:
        with _disk_errors(work):
            (work / _REPORTS).mkdir(parents=True, exist_ok=True)
            lock = locked(work / _LOCK, 0, without="do not run two builds there")
            free = stack.enter_context(lock)
        if not free:
            raise BuildError(
                f"another build is at work in {work}; wait for it, or pass another output=FOLDER"
            )
        yield work


def _drop_others(work: Path, names: set[str]) -> None:
    """Remove what an interrupted or an earlier, different build left."""
    for path in work.iterdir():
        if path.name.startswith(_SCRATCH):
            shutil.rmtree(path)
        elif not path.name.startswith(".") and path.name.split(".")[0] not in names:
            path.unlink()
    for path in (work / _REPORTS).iterdir():
        if path.suffix != ".json" or path.stem not in names:
            path.unlink()


def _drop_traces(folder: Path) -> None:
    shutil.rmtree(folder / _REPORTS, ignore_errors=True)
    (folder / _LOCK).unlink(missing_ok=True)


def _reports(jobs: Iterable[ShardJob]) -> Iterator[ShardReport]:
    """Read the reports one by one: the rejected records of all may be many."""
    return filter(None, (ShardReport.load(job.report_path) for job in jobs))


def _fingerprint(manifest: Manifest, name: str, digest: str) -> str:
    settings = [manifest.name, manifest.record_kind, manifest.image_roots]
    text = json.dumps([FORMAT, RECORD_VERSION, settings, name, digest])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _too_many(summary: BuildSummary, done: int, max_bad_rate: float, work: Path) -> BuildError:
    by_fault = Counter(summary.rejected_by_fault).most_common()
    faults = ", ".join(f"{fault} {number}" for fault, number in by_fault)
    if summary.num_rejected == summary.num_selected:
        verdict = "no sample is left"
    else:
        verdict = f"more than max_bad_rate={max_bad_rate:g} of {summary.num_selected} allows"
    return BuildError(
        f"`{summary.dataset}`: {summary.num_rejected} of {done} records read cannot be used "
        f"({faults}), {verdict}. They are listed in {work / REJECTED_FILE}. Get or fix the files "
        "and run the same command again (finished tars are kept), or pass a larger max_bad_rate "
        "(1 allows all) to build without these records"
    )


@contextmanager
def _disk_errors(where: Path) -> Generator[None]:
    """Say what to do about a folder that cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BuildError(
                f"no space left for {where} ({error.strerror}). Free some space there, or pass "
                "another output=FOLDER, and run the same command again: finished tars are kept"
            ) from error
        raise BuildError(f"cannot write {where}: {error}") from error
