"""``vipllava data``: what data sets there are, what of them is here, and getting the rest."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vipllava.commands.settings import (
    Setting,
    count,
    count_or_all,
    data_root_setting,
    describe_settings,
    manifests_setting,
    read_settings,
    switch,
    words_of,
)
from vipllava.types import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vipllava.ingest.check.availability import Availability
    from vipllava.ingest.fetch.fetching import Outcome
    from vipllava.shards.manifest import Manifest
    from vipllava.shards.sources import Source

EXIT_INCOMPLETE: Final = 1
_COLOURS: Final = {
    "ok": "green",
    "present": "green",
    "fetched": "green",
    "unchecked": "yellow",
    "differs": "yellow",
    "missing": "red",
    "damaged": "red",
    "failed": "red",
}


def run(words: Sequence[str], console: Console | None = None) -> int:
    """Run ``list``, ``show``, ``check`` or ``fetch``.

    Args:
        words: the command line after ``data``.
        console: where tables go; the standard output if None.

    Returns:
        0, or 1 if something is missing, damaged or could not be fetched.

    Raises:
        VipLlavaError: arguments, manifest or data root cannot be used.
    """
    from rich.console import Console as MakeConsole

    console = console or MakeConsole()
    if not words or words[0] in ("-h", "--help", "help"):
        console.print(_help(), highlight=False, markup=False, soft_wrap=True)
        return 0
    if words[0] not in _ACTIONS:
        raise ConfigError(f"data {words[0]}: no such command; known: {', '.join(_ACTIONS)}")
    action, settings, positional = _ACTIONS[words[0]]
    if {"-h", "--help"} & set(words[1:]):
        console.print(_help(words[0]), highlight=False, markup=False, soft_wrap=True)
        return 0
    return action(read_settings(words[1:], settings(), positional=positional), console)


def _help(only: str | None = None) -> str:
    abouts = {
        "list": "the data sets and benchmarks, and which are here",
        "show": "what a manifest says: parts, sources, licences",
        "check": "what of a data set is here, missing or unreadable (exit code 1)",
        "fetch": "download what is public, resumable; says what must be asked for by a form",
    }
    lines: list[str] = []
    for name, (_, settings, positional) in _ACTIONS.items():
        if only in (None, name):
            words = " ".join(("vipllava data", name, *positional, "[NAME=VALUE ...]"))
            lines += [f"{words}\n  {abouts[name]}", describe_settings(settings()), ""]
    return "\n".join(lines).rstrip()


def _list(values: dict[str, Any], console: Console) -> int:
    from vipllava.shards.manifest import ManifestError, list_manifests, load_manifest

    folder, root = values["manifests"], values["data_root"]
    rows: list[dict[str, str]] = []
    problems: list[str] = []
    for name in list_manifests(folder):
        try:
            manifest = load_manifest(name, folder)
        except ManifestError as error:  # one bad file does not hide the others
            problems.append(str(error))
        else:
            rows.append({**_summary(manifest), "here": _here(manifest, root)})
    if not rows and not problems:
        raise ConfigError(f"manifests={folder} holds no manifests; name their folder")
    if not _write_json(values["json"], {"data_root": root, "manifests": rows}):
        headers = ("name", "stage", "records", "samples", f"in {root}")
        console.print(_table("", headers, [tuple(row.values()) for row in rows]))
    if problems:
        raise ManifestError("\n".join(problems))
    return 0


def _summary(manifest: Manifest) -> dict[str, str]:
    samples = "" if manifest.num_samples is None else f"{manifest.num_samples:,}"
    if not samples and manifest.approximate_samples:
        samples = f"about {manifest.approximate_samples:,}"
    kind = manifest.format if manifest.format != "shards" else manifest.record_kind
    return {
        "name": manifest.name,
        "stage": manifest.stage,
        "records": "by their id" if kind == "auto" else kind,
        "samples": samples,
    }


def _here(manifest: Manifest, data_root: str) -> str:
    """Say in a word what is there; ``check`` looks closer."""
    from vipllava.ingest.check.availability import find_tars
    from vipllava.shards.manifest import is_remote

    if is_remote(data_root) or any(map(is_remote, manifest.patterns)):
        return "at an address"
    if manifest.folder is not None:
        return "folder" if (Path(data_root) / manifest.folder).is_dir() else "-"
    present, absent = find_tars(manifest, Path(data_root))
    some = f"{len(present)} of {len(present) + len(absent)} tars" if absent else ""
    return "-" if not present else some or f"{len(present)} tars"


def _show(values: dict[str, Any], console: Console) -> int:
    from rich.table import Table

    manifest = _load(values)
    if _write_json(values["json"], asdict(manifest)):
        return 0
    blocks = [(manifest.name, _facts(manifest))]
    blocks += [(f"from {source.name}", _source_facts(source)) for source in manifest.sources]
    for title, facts in blocks:
        console.print(_plain(title, style="bold"))
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in facts:
            table.add_row(name, _plain(value))
        console.print(table)
    return 0


def _source_facts(source: Source) -> list[tuple[str, str]]:
    ways = {"public": "vipllava data fetch", "form": "ask by a form", "by_hand": "with a browser"}
    places = dict.fromkeys(file.into for file in source.files)
    if source.picture_list is not None:
        places[source.picture_list.into] = None
    size = sum(file.size or 0 for file in source.files)
    facts = [
        ("what", source.what),
        ("how to get it", ways[source.access]),
        ("address", source.address or ""),
        ("download", f"{size / 1e9:.1f} GB" if size else ""),
        ("goes to", "\n".join("the data root" if p == "." else p for p in places)),
        ("licence", source.licence or ""),
    ]
    return [(name, value) for name, value in facts if value]


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    summary = _summary(manifest)
    facts = [
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
    return [(name, value) for name, value in facts if value]


def _check(values: dict[str, Any], console: Console) -> int:
    from vipllava.commands.progress_bars import ProgressBars
    from vipllava.ingest.check.availability import check_data

    manifest = _load(values)
    with ProgressBars() as bars:
        found = check_data(
            manifest,
            values["data_root"],
            parts=values["parts"],
            num_pictures=values["pictures"],
            num_workers=values["num_workers"],
            tell=bars,
        )
    if not _write_json(values["json"], found.to_json()):
        _print_availability(found, console)
    return 0 if found.ok else EXIT_INCOMPLETE


def _print_availability(found: Availability, console: Console) -> None:
    rows: list[tuple[str, ...]] = []
    for finding in found.findings:
        lines = [finding.detail, *(f"- {example}" for example in finding.examples[:5])]
        if len(finding.examples) > 5:
            lines.append("- and more: json=FILE lists them")
        rows.append((finding.part, finding.name, finding.status, "\n".join(lines)))
    title = f"{found.manifest} in {found.data_root}"
    console.print(_table(title, ("part", "name", "status", "found"), rows))
    for remedy in dict.fromkeys(finding.remedy for finding in found.findings if finding.remedy):
        console.print(_plain(f"-> {remedy}"))


def _fetch(values: dict[str, Any], console: Console) -> int:
    from vipllava.commands.progress_bars import ProgressBars
    from vipllava.ingest.fetch.fetching import FetchOptions, fetch_data

    manifest = _load(values)
    if manifest.made_by == "sample_world":
        from vipllava.sample_world.build import ensure_sample_world

        place = ensure_sample_world(Path(values["data_root"]))
        console.print(_plain(f"{manifest.name} is made, not fetched: {place}"))
        return 0
    if not manifest.sources:
        raise ConfigError(f"`{manifest.name}` names no sources; add them to its manifest")
    options = FetchOptions(values["keep_archives"], values["again"], values["num_workers"])
    with ProgressBars() as bars:
        outcomes = fetch_data(manifest, values["data_root"], options, tell=bars)
    ok = all(outcome.ok for outcome in outcomes)
    report = {
        "schema_version": 1,
        "manifest": manifest.name,
        "data_root": values["data_root"],
        "outcomes": [asdict(outcome) for outcome in outcomes],
        "ok": ok,
    }
    if not _write_json(values["json"], report):
        _print_outcomes(manifest, outcomes, console)
    return 0 if ok else EXIT_INCOMPLETE


def _print_outcomes(manifest: Manifest, outcomes: Sequence[Outcome], console: Console) -> None:
    rows = [(o.source, o.part, o.place, o.status, o.detail if o.ok else "") for o in outcomes]
    headers = ("source", "part", "place", "status", "found")
    console.print(_table(manifest.name, headers, rows))
    for outcome in outcomes:
        if not outcome.ok:
            console.print(_plain(f"{outcome.source}, {outcome.part}: {outcome.detail}"))
    console.print(_plain(f"licence: {manifest.licence}"))


def _table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table

    table = Table(title=title or None)
    for header in headers:
        table.add_column(header, overflow="fold", no_wrap=header in ("name", "status"))
    for row in rows:
        table.add_row(
            *(
                _plain(cell, style=_COLOURS[cell] if header == "status" else "")
                for header, cell in zip(headers, row, strict=True)
            )
        )
    return table


def _plain(text: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(text, style=style)  # a text in brackets is no markup


def _load(values: dict[str, Any]) -> Manifest:
    from vipllava.shards.manifest import load_manifest

    return load_manifest(values["NAME"], values["manifests"])


def _write_json(place: str | None, content: object) -> bool:
    """Write what a table would show; returns whether that replaces the table."""
    if place is None:
        return False
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    if place == "-":
        sys.stdout.write(text)
        return True
    try:
        Path(place).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"json={place} cannot be written: {error.strerror or error}") from error
    return False


def _common() -> list[Setting]:
    json_setting = Setting(
        "json", str, None, "file for the same as JSON; - writes it instead of the table"
    )
    return [data_root_setting(), manifests_setting(), json_setting]


def _check_settings() -> list[Setting]:
    from vipllava.ingest.check.availability import NUM_PICTURES, PARTS

    return [
        *_common(),
        Setting("parts", words_of, PARTS, f"any of {','.join(PARTS)} (default: all)"),
        Setting(
            "pictures",
            count_or_all,
            NUM_PICTURES,
            f"how many to look at and decode, or all (default: {NUM_PICTURES})",
        ),
        Setting("num_workers", count, 4, "threads (default: 4)"),
    ]


def _fetch_settings() -> list[Setting]:
    return [
        *_common(),
        Setting("keep_archives", switch, False, "leave archives in downloads/ (default: false)"),
        Setting("again", switch, False, "fetch anew what is there (default: false)"),
        Setting("num_workers", count, 8, "downloads of single pictures at a time (default: 8)"),
    ]


_Action = tuple[
    Callable[[dict[str, Any], "Console"], int], Callable[[], list[Setting]], tuple[str, ...]
]
_ACTIONS: Final[dict[str, _Action]] = {
    "list": (_list, _common, ()),
    "show": (_show, _common, ("NAME",)),
    "check": (_check, _check_settings, ("NAME",)),
    "fetch": (_fetch, _fetch_settings, ("NAME",)),
}
