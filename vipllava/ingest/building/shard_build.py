"""Building the shards of a data set from its annotation list and images.

The list is cut into stretches, one tar each; processes make one tar at a time in
``OUTPUT.building``, which is called ``OUTPUT`` once it is whole and good enough. Run again, a build
keeps each tar that was made from the same stretch with the same settings, unless a file that a
rejected record lacked has changed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Final

from vipllava.files.atomic import move, sync
from vipllava.files.locks import locked
from vipllava.files.pools import run_jobs
from vipllava.ingest import Tell, tell_nobody
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
    ROOT,
    UNREAD,
    UNREADABLE,
    Ingested,
    ingest,
    input_names,
    input_states,
    make_key,
)
from vipllava.records import with_kinds
from vipllava.records.box_form import box_form
from vipllava.records.fields import RECORD_VERSION
from vipllava.shards.manifest import Manifest, is_remote
from vipllava.shards.tar_index import index_path, load_index
from vipllava.shards.tars import ShardError, write_shards
from vipllava.types import LONGEST_MESSAGE, RecordError, VipLlavaError

log = logging.getLogger(__name__)

MAX_BAD_RATE: Final = 0.001
MAX_SAMPLES: Final = 1000
_WORK: Final = ".building"
_REPORTS: Final = ".reports"
_LOCK: Final = ".lock"
_SCRATCH: Final = ".part-"
_PREFIX: Final = "shard"
_NO_LIMIT: Final = 1 << 62
_MOST_FIELDS: Final = 20


class BuildError(VipLlavaError):
    """The shards cannot be built, or too many records are bad."""


@dataclass(frozen=True, slots=True)
class ShardJob:
    """The tar ``NAME.tar`` to be made in the folder ``work`` of a stretch of the list."""

    manifest: Manifest
    data_root: Path
    work: Path
    name: str
    part: AnnotationRange
    inputs: str  # fingerprint of what the tar is made from

    @property
    def report_path(self) -> Path:
        """Where the report goes."""
        return self.work / _REPORTS / f"{self.name}.json"


def build_shards(
    manifest: Manifest,
    data_root: str | Path,
    *,
    output: str | Path | None = None,
    num_workers: int | None = None,
    max_samples: int = MAX_SAMPLES,
    max_bad_rate: float = MAX_BAD_RATE,
    tell: Tell = tell_nobody,
) -> BuildSummary:
    """Write a data set's tars and their summary, or finish a build that was interrupted.

    Args:
        output: folder of the tars; without it the one of the manifest's shard pattern.
        num_workers: processes; 0 builds in this one, None takes one per core, at most 16.
        max_samples: records per tar.
        max_bad_rate: share of rejected records above which the build fails; 1 allows all.
        tell: hears about progress.

    Raises:
        BuildError: there is nothing to build from, the output cannot be used, or too many records
            are bad.
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
    reading = partial(tell, "reading the annotation list", "bytes")
    annotation_file = root / manifest.annotation_file
    plan = plan_ranges(
        annotation_file, max_samples, select=manifest.has_record, on_progress=reading
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
        jobs: list[ShardJob] = []
        for number, part in enumerate(plan.ranges):
            name = f"{prefix}-{number:06d}"
            inputs = _fingerprint(manifest, name, part.digest)
            jobs.append(ShardJob(manifest, root, work, name, part, inputs))
        _drop_others(work, {job.name for job in jobs})
        noted: Counter[str] = Counter()
        done, total = 0, plan.num_selected
        max_rejected = min(max_bad_rate * total, total - 1)
        try:
            with closing(run_jobs(with_kinds(build_shard), jobs, num_workers)) as made:
                for report in made:
                    summary.add(report)
                    noted.update(report.noted)
                    done += report.num_samples + len(report.rejected)
                    bad = f" ({summary.num_rejected} rejected)" if summary.num_rejected else ""
                    tell("building shards", f"records{bad}", done, total)
                    if summary.num_rejected > max_rejected:  # it is certain from now on
                        hints = [f"Such as: {row.reason}." for row in report.rejected[:1]]
                        hints += [f"Of those read, {form}" for form in (box_form(noted),) if form]
                        raise _too_many(summary, done, max_bad_rate, work, " ".join(hints))
        finally:  # one by one: the rejected records of all may be many
            reports = (ShardReport.load(job.report_path) for job in jobs)
            write_rejected(work / REJECTED_FILE, filter(None, reports))
        summary.remarks = _remarks(noted, manifest)
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
    """Return the lines of YAML that the manifest lacks to open a build and to notice a lost tar."""
    root = Path(data_root).expanduser().resolve()
    folder, prefix = target = build_target(manifest, root, output)
    lines: list[str] = []
    try:
        opens = build_target(manifest, root) == target
    except BuildError:  # the pattern names no folder to build in
        opens = False
    if not opens and folder.is_relative_to(root):
        lines.append(f"shards: {(folder.relative_to(root) / prefix).as_posix()}-*.tar")
    elif not opens:
        lines.append(f"shards: {folder.name}/{prefix}-*.tar # with data_root={folder.parent}")
    if manifest.num_samples != summary.num_samples:
        lines.append(f"num_samples: {summary.num_samples}")
    return lines


def build_shard(job: ShardJob) -> ShardReport:
    """Make one tar with its index, unless it is there already."""
    report = ShardReport.load(job.report_path)
    if report is not None and _is_current(report, job):
        return report
    job.report_path.unlink(missing_ok=True)
    report = ShardReport(job.name, job.inputs, job.part.first)
    samples = _ingested(job, report)
    if (first := next(samples, None)) is not None:
        with TemporaryDirectory(
            prefix=_SCRATCH, dir=job.work, ignore_cleanup_errors=True
        ) as scratch:
            (made,) = write_shards(
                ((s.key, s.record, s.image, s.extension) for s in chain([first], samples)),
                Path(scratch),
                prefix=_PREFIX,
                max_samples=job.part.num_samples,
                max_bytes=_NO_LIMIT,
                check_images=False,  # decoded a moment ago
            )
            sync(made)
            report.tar_size = made.stat().st_size
            for path in Path(scratch).iterdir():  # the tar and what belongs to it
                move(path, job.work / path.name.replace(made.stem, job.name, 1))
    report.save(job.report_path)
    return report


def _ingested(job: ShardJob, report: ShardReport) -> Iterator[Ingested]:
    """Yield the samples of a stretch, counting in its report what they are and what is none."""
    annotation_file = job.data_root / (job.manifest.annotation_file or "")
    for item in iter_range(annotation_file, job.part, job.manifest.has_record):
        try:
            sample = ingest(item, job.manifest, job.data_root, report.noted)
        except RecordError as error:
            image = (item.record or {}).get("image")
            names = input_names(item.record, job.data_root, job.manifest.image_roots)
            image = image[:LONGEST_MESSAGE] if isinstance(image, str) else None
            key, inputs = make_key(item.record, item.position), input_states(names, job.data_root)
            rejected = Rejected(item.position, key, image, error.fault, str(error), inputs)
            report.rejected.append(rejected)
            continue
        report.num_samples += 1
        report.num_text_only += sample.image is None
        report.kinds[sample.kind] += 1
        if sample.change:
            report.changes[sample.change] += 1
        yield sample


def _is_current(report: ShardReport, job: ShardJob) -> bool:
    """Whether a tar stands that would come out the same."""
    if report.inputs != job.inputs:
        return False
    tar = job.work / f"{job.name}.tar"
    try:
        if report.tar_size and load_index(index_path(tar), tar).tar_size != report.tar_size:
            return False
    except ShardError:
        return False
    return all(
        row.fault != UNREADABLE and input_states(row.inputs, job.data_root) == row.inputs
        for row in report.rejected
    )


def build_target(
    manifest: Manifest, data_root: Path, output: str | Path | None = None
) -> tuple[Path, str]:
    """Return the folder of the tars and the first part of their names; see :func:`build_shards`."""
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


def _finished(folder: Path, summary: BuildSummary) -> BuildSummary | None:
    """Return the summary of the build that stands in ``folder``; refuse anything else there."""
    if not (folder / SUMMARY_FILE).is_file():
        try:
            foreign = folder.exists() and any(folder.iterdir())
        except OSError as error:
            raise BuildError(f"output={folder} is no folder that can be used: {error}") from error
        if foreign:
            raise BuildError(
                f"output={folder} holds files that no build made; tars get a folder of their own: "
                "correct the manifest's `shards`, or pass another output=FOLDER"
            )
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
    log.info(
        "%s is built already. %d records were rejected; if they are corrected, remove the folder "
        "to build it anew",
        folder, present.num_rejected,
    )  # fmt: skip
    return present


@contextmanager
def _work_folder(folder: Path) -> Generator[Path]:
    """Make or find the folder of the unfinished build and keep others out of it."""
    work = folder.with_name(f"{folder.name}{_WORK}")
    try:
        (work / _REPORTS).mkdir(parents=True, exist_ok=True)
        with locked(work / _LOCK, 0, without="do not run two builds there") as is_free:
            if not is_free:
                raise BuildError(
                    f"another build is at work in {work}; wait for it, or pass another "
                    "output=FOLDER"
                )
            yield work
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BuildError(
                f"no space left for {work} ({error.strerror}). Free some space there, or pass "
                "another output=FOLDER, and run the same command again: finished tars are kept"
            ) from error
        raise BuildError(f"cannot write {work}: {error}") from error


def _drop_others(work: Path, names: set[str]) -> None:
    """Remove what an interrupted or an earlier, different build left."""
    for path in work.glob(f"{_SCRATCH}*"):
        shutil.rmtree(path)
    for path in (*work.glob("[!.]*"), *(work / _REPORTS).iterdir()):
        if path.name.split(".")[0] not in names:
            path.unlink()


def _drop_traces(folder: Path) -> None:
    shutil.rmtree(folder / _REPORTS, ignore_errors=True)
    (folder / _LOCK).unlink(missing_ok=True)


def _fingerprint(manifest: Manifest, name: str, digest: str) -> str:
    settings = [manifest.name, manifest.record_kind, manifest.image_roots]
    text = json.dumps([FORMAT, RECORD_VERSION, settings, name, digest])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _remarks(noted: Counter[str], manifest: Manifest) -> list[str]:
    """Return what to look at in a data set whose records were all read."""
    unread = [item for item in noted.items() if item[0].startswith(UNREAD)]
    lines = [
        f"{message.removeprefix(UNREAD)} (records with it: {count})"
        for message, count in sorted(unread, key=lambda item: (-item[1], item[0]))[:_MOST_FIELDS]
    ]
    lines += filter(None, [box_form(noted)])
    unused = [root for root in manifest.image_roots if not noted[f"{ROOT}{root}"]]
    return lines + [f"image root {root}: no record has an image in it" for root in unused]


def _too_many(
    summary: BuildSummary, done: int, max_bad_rate: float, work: Path, hint: str
) -> BuildError:
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
        "(1 allows all) to build without these records. " + hint
    )
