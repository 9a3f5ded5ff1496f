"""``vipllava data``: what data sets there are, what of them is here, and getting the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from vipllava.commands.options import DataRoot, Json, Manifests, Name, as_typed, count_or_all
from vipllava.commands.output import (
    facts_table,
    print_json,
    print_table,
    progress_bars,
    rows_table,
    say,
)
from vipllava.types import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from vipllava.shards.manifest import Manifest
    from vipllava.shards.sources import DataSource

_COLOURS: Final = {
    "ok": "green", "present": "green", "fetched": "green", "unchecked": "yellow",
    "unused": "yellow", "differs": "yellow", "missing": "red", "damaged": "red", "failed": "red",
}  # fmt: skip


class Part(StrEnum):
    """What ``check`` looks at: ``availability.PARTS``, which is slow to import."""

    ANNOTATIONS = "annotations"
    IMAGES = "images"
    SHARDS = "shards"


app = typer.Typer(no_args_is_help=True)


@app.command("list")
def list_data(manifests: Manifests, data_root: DataRoot = "data", as_json: Json = False) -> None:
    """List data sets and benchmarks, and which of them are here."""
    from vipllava.shards.manifest import ManifestError, list_manifests, load_manifest

    rows: list[dict[str, str]] = []
    problems: list[str] = []
    for name in list_manifests(manifests):
        try:
            manifest = load_manifest(name, manifests)
        except ManifestError as error:  # one bad file does not hide the others
            problems.append(str(error))
        else:
            rows.append({**_summary(manifest), "here": _here(manifest, data_root)})
    if not rows and not problems:
        raise ConfigError(f"--manifests {manifests} holds no manifests; name their folder")
    if as_json:
        print_json({"data_root": data_root, "manifests": rows})
    else:
        headers = ("name", "stage", "records", "samples", f"in {data_root}")
        cells = [tuple(row.values()) for row in rows]
        print_table(_table("", headers, cells, ("records", "stage", "samples")))
    if problems:
        raise ManifestError("\n".join(problems))


@app.command()
def show(name: Name, manifests: Manifests, as_json: Json = False) -> None:
    """Show what a manifest says: parts, sources, licences."""
    from vipllava.shards.manifest import load_manifest

    manifest = load_manifest(name, manifests)
    if as_json:
        print_json(asdict(manifest))
        return
    print_table(facts_table(_facts(manifest), manifest.name, indent=2))
    for source in manifest.sources:
        print_table(facts_table(_source_facts(source), f"from {source.name}", indent=2))


@app.command()
def check(
    name: Name,
    manifests: Manifests,
    data_root: DataRoot = "data",
    as_json: Json = False,
    parts: Annotated[
        list[Part] | None, typer.Option("--part", help="Only this one; may be repeated.")
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            parser=count_or_all, metavar="N|all", help="How many images to look at and decode."
        ),
    ] = 1000,
    num_workers: Annotated[int, typer.Option(min=1, help="Threads.")] = 4,
) -> int:
    """Check what is here, missing or unreadable.

    Exit code 1 if not all is well.
    """
    from vipllava.ingest.check.availability import PARTS, check_data
    from vipllava.shards.manifest import load_manifest

    with progress_bars() as bars:
        found = check_data(
            load_manifest(name, manifests),
            data_root,
            parts=parts or PARTS,
            num_images=images,
            num_workers=num_workers,
            tell=bars,
        )
    if as_json:
        print_json(found.to_json())
    else:
        cells = [(f.part, f.name, f.status, _found(f.detail, f.examples)) for f in found.findings]
        title = f"{found.manifest} in {found.data_root}"
        print_table(_table(title, ("part", "name", "status", "found"), cells))
        for remedy in dict.fromkeys(finding.remedy for finding in found.findings):
            if remedy:
                say(f"-> {remedy}")
    return int(not found.ok)


@app.command()
def fetch(
    name: Name,
    manifests: Manifests,
    data_root: DataRoot = "data",
    as_json: Json = False,
    keep_archives: Annotated[
        bool, typer.Option("--keep-archives", help="Leave archives in downloads/.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Fetch what is here, too.")] = False,
    num_workers: Annotated[
        int, typer.Option(min=1, help="Downloads of single pictures at a time.")
    ] = 8,
) -> int:
    """Download what is public; say what must be asked for.

    Run it again to go on after a break.
    """
    from vipllava.ingest.fetch.fetching import FetchOptions, fetch_data
    from vipllava.shards.manifest import load_manifest

    manifest = load_manifest(name, manifests)
    if manifest.made_by == "sample_world":
        from vipllava.sample_world.build import ensure_sample_world

        say(f"{manifest.name} is made, not fetched: {ensure_sample_world(Path(data_root))}")
        return 0
    if not manifest.sources:
        raise ConfigError(f"`{manifest.name}` names no sources; add them to its manifest")
    options = FetchOptions(keep_archives, again, num_workers)
    with progress_bars() as bars:
        outcomes = fetch_data(manifest, data_root, options, tell=bars)
    outcomes = [replace(o, detail=as_typed(o.detail, ["again"])) for o in outcomes]
    ok = all(outcome.ok for outcome in outcomes)
    if as_json:
        report = {"schema_version": 1, "manifest": manifest.name, "data_root": data_root}
        print_json({**report, "outcomes": [asdict(outcome) for outcome in outcomes], "ok": ok})
    else:
        cells = [(o.source, o.part, o.place, o.status, o.detail if o.ok else "") for o in outcomes]
        headers = ("source", "part", "place", "status", "found")
        print_table(_table(manifest.name, headers, cells, ("place", "part")))
        for outcome in outcomes:
            if not outcome.ok:
                say(f"{outcome.source}, {outcome.part}: {outcome.detail}")
        say(f"licence: {manifest.licence}")
    return int(not ok)


def _summary(manifest: Manifest) -> dict[str, str]:
    samples = f"about {manifest.approximate_samples:,}" if manifest.approximate_samples else ""
    if manifest.num_samples is not None:
        samples = f"{manifest.num_samples:,}"
    kind = manifest.format if manifest.format != "shards" else manifest.record_kind
    return {
        "name": manifest.name,
        "stage": manifest.stage,
        "records": "by their id" if kind == "auto" else kind,
        "samples": samples,
    }


def _here(manifest: Manifest, data_root: str) -> str:
    """Say in a word what is there; ``check`` looks closer."""
    from vipllava.ingest.tar_listing import find_tars
    from vipllava.shards.manifest import is_remote

    if is_remote(data_root) or any(map(is_remote, manifest.patterns)):
        return "at an address"
    if manifest.folder is not None:
        return "folder" if (Path(data_root) / manifest.folder).is_dir() else "-"
    present, absent = find_tars(manifest, Path(data_root))
    some = f"{len(present)} of {len(present) + len(absent)} tars" if absent else ""
    return "-" if not present else some or f"{len(present)} tars"


def _source_facts(source: DataSource) -> list[tuple[str, str]]:
    ways = {"public": "vipllava data fetch", "form": "ask by a form", "by_hand": "with a browser"}
    places = dict.fromkeys(file.into for file in source.files)
    if source.image_list is not None:
        places[source.image_list.into] = None
    size = sum(file.size or 0 for file in source.files)
    return [
        ("what", source.what),
        ("how to get it", ways[source.access]),
        ("address", source.address or ""),
        ("download", f"{size / 1e9:.1f} GB" if size else ""),
        ("goes to", "\n".join("the data root" if p == "." else p for p in places)),
        ("licence", source.licence or ""),
    ]


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    summary = _summary(manifest)
    return [
        ("stage", manifest.stage),
        ("records", summary["records"]),
        ("samples", summary["samples"] or "not known beforehand"),
        ("policy", "of each record's kind" if manifest.policy == "auto" else manifest.policy),
        ("folder" if manifest.folder else "shards", "\n".join(manifest.patterns)),
        ("annotations", manifest.annotation_file or ""),
        ("of the kinds", ", ".join(manifest.annotation_kinds)),
        ("image roots", "\n".join(manifest.image_roots)),
        ("made by", manifest.made_by or ""),
        ("licence", manifest.licence),
        ("notes", manifest.notes.strip()),
    ]


def _found(detail: str, examples: Sequence[str]) -> str:
    more = ["- and more: --json lists them"] if len(examples) > 5 else []
    return "\n".join([detail, *(f"- {example}" for example in examples[:5]), *more])


def _table(
    title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], spare: Sequence[str] = ()
) -> Table:
    from rich.text import Text

    coloured = [
        [
            Text(cell, _COLOURS[cell]) if header == "status" else cell
            for header, cell in zip(headers, row, strict=True)
        ]
        for row in rows
    ]
    return rows_table(title, headers, coloured, whole=("name", "status"), spare=spare)
