"""``vipllava shards``: build a data set's tars, index them, look at every sample, describe them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
)
from vipllava.types import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vipllava.commands.progress_bars import ProgressBars
    from vipllava.files.cache import ShardCache
    from vipllava.ingest.building.build_report import BuildSummary
    from vipllava.ingest.check.stats import ShardStats, Spread
    from vipllava.ingest.check.verify import Verdict
    from vipllava.shards.manifest import Manifest

EXIT_DAMAGED: Final = 1
_SHOWN: Final = 20


def run(words: Sequence[str], console: Console | None = None) -> int:
    """Run ``build``, ``index``, ``verify`` or ``stats``.

    Args:
        words: the command line after ``shards``.
        console: where tables go; the standard output if None.

    Returns:
        0, or 1 if a tar is damaged or could not be indexed.

    Raises:
        VipLlavaError: arguments, manifest or inputs cannot be used, or too many records are bad.
    """
    from rich.console import Console as MakeConsole

    console = console or MakeConsole()
    if not words or words[0] in ("-h", "--help", "help"):
        console.print(_help(), highlight=False, markup=False, soft_wrap=True)
        return 0
    if words[0] not in _ACTIONS:
        raise ConfigError(f"shards {words[0]}: no such command; known: {', '.join(_ACTIONS)}")
    action, settings = _ACTIONS[words[0]]
    rest = list(words[1:])
    if {"-h", "--help"} & set(rest):
        console.print(_help(words[0]), highlight=False, markup=False, soft_wrap=True)
        return 0
    paths = [word for word in rest if "=" not in word] if words[0] == "index" else []
    values = read_settings([word for word in rest if word not in paths], settings())
    return action({**values, "paths": paths}, console)


def _help(only: str | None = None) -> str:
    abouts = {
        "build": "write the tars of a data set from its annotation list and pictures; run again "
        "after a break",
        "index": "write the index beside each tar: PATH is a tar or a folder of tars",
        "verify": "read every sample and compare it with its checksums; exit code 1 for damage",
        "stats": "lengths, pictures, tars and record kinds of a data set",
    }
    lines: list[str] = []
    for name, (_, settings) in _ACTIONS.items():
        if only in (None, name):
            paths = " PATH ..." if name == "index" else ""
            lines += [f"vipllava shards {name}{paths} [NAME=VALUE ...]\n  {abouts[name]}"]
            lines += [describe_settings(settings()), ""]
    return "\n".join(lines).rstrip()


# Build.


def _build(values: dict[str, Any], console: Console) -> int:
    from vipllava.ingest.building.shard_build import BuildProgress, build_shards, manifest_lines

    manifest = _load(values)
    rate: float = values["max_bad_rate"]
    if values["allow"]:
        rate = 1.0
    with _bars() as bars:

        def tell(progress: BuildProgress) -> None:
            if progress.phase == "list":
                bars("reading the annotation list", "bytes", progress.done, progress.total)
            else:
                bad = f" ({progress.num_rejected} rejected)" if progress.num_rejected else ""
                bars("building shards", f"records{bad}", progress.done, progress.total)

        summary = build_shards(
            manifest,
            values["data_root"],
            output=values["output"],
            num_workers=values["num_workers"],
            max_samples=values["max_samples"],
            max_bad_rate=rate,
            on_progress=tell,
        )
    lines = manifest_lines(manifest, values["data_root"], summary, values["output"])
    _print_build(summary, lines, console)
    return 0


def _print_build(summary: BuildSummary, lines: Sequence[str], console: Console) -> None:
    table = _facts()
    tars = sum(row["num_bytes"] > 0 for row in summary.shards)
    table.add_row("data set", summary.dataset)
    table.add_row("samples", f"{summary.num_samples:,} of {summary.num_selected:,} records")
    table.add_row("text only", f"{summary.num_text_only:,}")
    table.add_row("tars", f"{tars:,}, {_size(summary.num_bytes)}")
    table.add_row("kinds", _counts(summary.kinds))
    if summary.changes:
        table.add_row("pictures changed", _counts(summary.changes))
    if summary.num_rejected:
        rejected = f"{summary.num_rejected:,}: {_counts(summary.rejected_by_fault)}"
        table.add_row("rejected", f"{rejected}; listed in rejected.jsonl beside the tars")
    console.print(table)
    if lines:
        console.print("lines for the manifest:")
        for line in lines:
            console.print(_plain(line), soft_wrap=True)


# Index.


def _index(values: dict[str, Any], console: Console) -> int:
    from vipllava.ingest.check.verify import Indexed, index_shards

    if not values["paths"]:
        raise ConfigError("shards index: name tars or folders of tars")
    tars: list[Path] = []
    for name in values["paths"]:
        path = Path(name).expanduser()
        found = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        if not found:
            raise ConfigError(f"{path} holds no *.tar")
        tars += found
    results: list[Indexed] = []
    with _bars() as bars:
        for result in index_shards(tars, values["num_workers"]):
            results.append(result)
            bars("indexing", "tars", len(results), len(tars))
    failed = [result for result in results if result.reason is not None]
    good = len(results) - len(failed)
    samples = sum(result.num_samples for result in results)
    console.print(f"{good} tars indexed, {samples:,} samples", highlight=False)
    for result in sorted(failed, key=lambda result: str(result.path)):
        console.print(_plain(f"- {result.reason}"), soft_wrap=True)
    return EXIT_DAMAGED if failed else 0


# Verify.


def _verify(values: dict[str, Any], console: Console) -> int:
    from vipllava.ingest.check.verify import verify_shards

    manifest = _load(values)
    with _bars() as bars:
        verdict = verify_shards(
            manifest,
            values["data_root"],
            num_workers=values["num_workers"],
            decode=values["decode"],
            cache=_cache(values, manifest),
            on_progress=lambda done, total: bars("reading", "tars", done, total),
        )
    if not _write_json(values["json"], verdict.to_json()):
        _print_verdict(verdict, console)
    return 0 if verdict.ok else EXIT_DAMAGED


def _print_verdict(verdict: Verdict, console: Console) -> None:
    from rich.table import Table

    table = _facts()
    table.add_row("data set", verdict.dataset)
    table.add_row("tars", f"{verdict.num_shards:,}")
    table.add_row("whole samples", f"{verdict.num_samples:,}")
    if verdict.num_unindexed:
        said = f"{verdict.num_unindexed:,}: nothing to compare with; `vipllava shards index`"
        table.add_row("without index", said)
    table.add_row("damage", f"{len(verdict.damages):,}" if verdict.damages else "none")
    console.print(table)
    if not verdict.damages:
        return
    damage = Table("tar", "sample", "damage")
    for row in verdict.damages[:_SHOWN]:
        damage.add_row(_plain(row.shard), _plain(row.key or "-"), _plain(row.reason))
    console.print(damage)
    if len(verdict.damages) > _SHOWN:
        console.print(f"and {len(verdict.damages) - _SHOWN} more: json=FILE lists them all")


# Stats.


def _stats(values: dict[str, Any], console: Console) -> int:
    from vipllava.ingest.check.stats import shard_stats
    from vipllava.shards.tars import open_shards

    manifest = replace(_load(values), num_samples=None)  # a wrong count can be described, too
    shards = open_shards(manifest, values["data_root"], cache=_cache(values, manifest))
    with _bars() as bars:
        stats = shard_stats(
            shards,
            manifest.record_kind,
            num_records=values["records"],
            on_progress=lambda done, total: bars("reading records", "records", done, total),
        )
    if not _write_json(values["json"], stats.to_json()):
        _print_stats(stats, console)
    return 0


def _print_stats(stats: ShardStats, console: Console) -> None:
    from rich.table import Table

    table = _facts()
    text_only = f"{stats.num_text_only:,} text only ({100 * stats.text_only_share:.1f} %)"
    table.add_row("data set", stats.dataset)
    table.add_row("samples", f"{stats.num_samples:,}, {text_only}")
    table.add_row("tars", f"{stats.num_shards:,}")
    how = {"sample": f" (estimated from {stats.num_records_read:,} records; records=all counts)"}
    table.add_row("kinds", _counts(stats.kinds) + how.get(stats.kinds_from, ""))
    table.add_row("picture shapes", _counts(stats.picture_shapes))
    console.print(table)
    spreads = Table("", "mean", "min", "median", "95 %", "max")
    rows: list[tuple[str, Spread | None, Callable[[float], str]]] = [
        ("text tokens (estimate)", stats.text_tokens, _number),
        ("picture width", stats.picture_width, _number),
        ("picture height", stats.picture_height, _number),
        ("samples in a tar", stats.shard_samples, _number),
        ("size of a tar", stats.shard_bytes, _size),
    ]
    for name, spread, show in rows:
        if spread is not None:
            cells = (spread.mean, spread.minimum, spread.median, spread.p95, spread.maximum)
            spreads.add_row(name, *map(show, cells))
    console.print(spreads)
    most = max(stats.text_tokens_histogram.values(), default=0) or 1
    lengths = Table("text tokens", "samples", "")
    for label, number in stats.text_tokens_histogram.items():
        lengths.add_row(label, f"{number:,}", "#" * round(40 * number / most))
    console.print(lengths)


# Shared.


def _bars() -> ProgressBars:
    """Return bars that are drawn on a terminal only: a log file is no place for them."""
    from rich.console import Console as MakeConsole

    from vipllava.commands.progress_bars import ProgressBars

    console = MakeConsole(stderr=True)
    console.quiet = not console.is_terminal
    return ProgressBars(console)


def _facts() -> Table:
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _size(num_bytes: float) -> str:
    from rich.filesize import decimal

    return decimal(round(num_bytes))


def _counts(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {number:,}" for name, number in ordered if number) or "none"


def _plain(text: str) -> Text:
    from rich.text import Text

    return Text(text)  # brackets in paths are no markup


def _load(values: dict[str, Any]) -> Manifest:
    from vipllava.shards.manifest import load_manifest

    if values["manifest"] is None:
        raise ConfigError("manifest is missing; pass manifest=NAME or manifest=FILE.yaml")
    return load_manifest(values["manifest"], values["manifests"])


def _cache(values: dict[str, Any], manifest: Manifest) -> ShardCache | None:
    """Return where tars from addresses are kept; None if there are none."""
    from vipllava.shards.manifest import is_remote

    if not any(map(is_remote, (values["data_root"], *manifest.shards))):
        return None
    from vipllava.files.cache import ShardCache

    return ShardCache(Path(values["cache"]).expanduser(), int(values["cache_gb"] * 10**9))


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


# Settings.


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ValueError("expected a share from 0 to 1")
    return value


def _all(text: str) -> bool:
    if text != "all":
        raise ValueError("expected all")
    return True


def _positive(text: str) -> int:
    if count(text) < 1:
        raise ValueError("expected a number from 1")
    return int(text)


def _gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ValueError("expected gigabytes, more than 0")
    return value


def _common() -> list[Setting]:
    manifest = Setting("manifest", str, None, "name of the data set, or the path of a manifest")
    return [manifest, data_root_setting(), manifests_setting()]


def _workers() -> Setting:
    text = "processes; 0: none but this one (default: one per core, at most 16)"
    return Setting("num_workers", count, None, text)


def _json() -> Setting:
    text = "file for the same as JSON; - writes it instead of the table"
    return Setting("json", str, None, text)


def _remote() -> list[Setting]:
    default = os.environ.get("VIPLLAVA_CACHE", "~/.cache/vipllava/shards")
    where = f"folder that keeps tars from addresses (default: {default})"
    return [
        Setting("cache", str, default, where),
        Setting("cache_gb", _gigabytes, 100.0, "its bound, gigabytes (default: 100)"),
    ]


def _build_settings() -> list[Setting]:
    from vipllava.ingest.building.shard_build import MAX_BAD_RATE, MAX_SAMPLES

    return [
        *_common(),
        Setting("output", str, None, "folder of the tars (default: as the manifest's shards say)"),
        _workers(),
        Setting("max_samples", _positive, MAX_SAMPLES, f"records per tar (default: {MAX_SAMPLES})"),
        Setting(
            "max_bad_rate",
            _rate,
            MAX_BAD_RATE,
            f"share of unusable records above which it fails (default: {MAX_BAD_RATE})",
        ),
        Setting("allow", _all, False, "allow=all: build without the unusable, however many"),
    ]


def _index_settings() -> list[Setting]:
    return [_workers()]


def _verify_settings() -> list[Setting]:
    decode = Setting("decode", switch, False, "decode every picture, too (default: false)")
    return [*_common(), _workers(), decode, _json(), *_remote()]


def _stats_settings() -> list[Setting]:
    from vipllava.ingest.check.stats import NUM_RECORDS

    text = (
        "how many to read, or all, where the record kinds are not known otherwise "
        f"(default: {NUM_RECORDS})"
    )
    records = Setting("records", count_or_all, NUM_RECORDS, text)
    return [*_common(), records, _json(), *_remote()]


_Action = tuple[Callable[[dict[str, Any], "Console"], int], Callable[[], list[Setting]]]
_ACTIONS: Final[dict[str, _Action]] = {
    "build": (_build, _build_settings),
    "index": (_index, _index_settings),
    "verify": (_verify, _verify_settings),
    "stats": (_stats, _stats_settings),
}
