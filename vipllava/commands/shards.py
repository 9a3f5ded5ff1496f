"""``vipllava shards``: build a data set's tars, index them, look at every sample, describe them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from vipllava.commands.options import (
    Cache,
    CacheSize,
    DataRoot,
    Json,
    Manifests,
    Name,
    Processes,
    as_typed,
    count_or_all,
)
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
    from vipllava.files.cache import ShardCache
    from vipllava.shards.manifest import Manifest

_SHOWN: Final = 20

app = typer.Typer(no_args_is_help=True)


@app.command()
def build(
    name: Name,
    manifests: Manifests,
    data_root: DataRoot = "data",
    output: Annotated[
        str | None,
        typer.Option(help="Folder of the tars.", show_default="as the manifest's shards say"),
    ] = None,
    num_workers: Processes = None,
    max_samples: Annotated[int, typer.Option(min=1, help="Records per tar.")] = 1000,
    max_bad_rate: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Share of unusable records above which it fails; 1 allows all."
        ),
    ] = 0.001,
) -> None:
    """Write tars from an annotation list and its pictures.

    Run it again to go on after a break.
    """
    from vipllava.ingest.building.shard_build import build_shards, manifest_lines
    from vipllava.shards.manifest import load_manifest

    manifest = load_manifest(name, manifests)
    with progress_bars() as bars:
        summary = build_shards(
            manifest,
            data_root,
            output=output,
            num_workers=num_workers,
            max_samples=max_samples,
            max_bad_rate=max_bad_rate,
            tell=bars,
        )
    tars = sum(row["num_bytes"] > 0 for row in summary.shards)
    rejected = f"{summary.num_rejected:,}: {_counts(summary.rejected_by_fault)}; listed in "
    facts = {
        "data set": summary.dataset,
        "samples": f"{summary.num_samples:,} of {summary.num_selected:,} records",
        "text only": f"{summary.num_text_only:,}",
        "tars": f"{tars:,}, {_size(summary.num_bytes)}",
        "kinds": _counts(summary.kinds),
        "by record_kind: auto": _reasons(summary.kinds) if manifest.record_kind == "auto" else "",
        "pictures changed": _counts(summary.changes) if summary.changes else "",
        "rejected": f"{rejected}rejected.jsonl beside the tars" if summary.num_rejected else "",
    }
    print_table(facts_table(facts.items()))
    for remark in summary.remarks:
        say(f"look at this: {remark}")
    if lines := manifest_lines(manifest, data_root, summary, output):
        lines = [as_typed(line, ["data_root"]) for line in lines]
        say("\n".join(("lines for the manifest:", *lines)))


@app.command()
def index(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Tars, folders of tars.")],
    num_workers: Processes = None,
) -> int:
    """Write the index beside each tar."""
    from vipllava.ingest.check.verify import Indexed, index_shards

    tars: list[Path] = []
    for path in map(Path.expanduser, paths):
        found = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        if not found:
            raise ConfigError(f"{path} holds no *.tar")
        tars += found
    results: list[Indexed] = []
    with progress_bars() as bars:
        for result in index_shards(tars, num_workers):
            results.append(result)
            bars("indexing", "tars", len(results), len(tars))
    failed = [result for result in results if result.reason is not None]
    samples = sum(result.num_samples for result in results)
    say(f"{len(results) - len(failed)} tars indexed, {samples:,} samples")
    for result in sorted(failed, key=lambda result: str(result.path)):
        say(f"- {result.reason}")
    return int(bool(failed))


@app.command()
def verify(
    name: Name,
    manifests: Manifests,
    cache: Cache = Path("~/.cache/vipllava/shards"),
    cache_gb: CacheSize = 100.0,
    data_root: DataRoot = "data",
    as_json: Json = False,
    num_workers: Processes = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every picture, too.")] = False,
) -> int:
    """Read every sample and compare it with its checksums.

    Exit code 1 for damage.
    """
    from vipllava.ingest.check.verify import verify_shards
    from vipllava.shards.manifest import load_manifest

    manifest = load_manifest(name, manifests)
    with progress_bars() as bars:
        verdict = verify_shards(
            manifest,
            data_root,
            num_workers=num_workers,
            decode=decode,
            cache=_open_cache(manifest, data_root, cache, cache_gb),
            on_progress=lambda done, total: bars("reading", "tars", done, total),
        )
    if as_json:
        print_json(verdict.to_json())
        return int(not verdict.ok)
    unindexed = f"{verdict.num_unindexed:,}: nothing to compare with; `vipllava shards index`"
    facts = {
        "data set": verdict.dataset,
        "tars": f"{verdict.num_shards:,}",
        "whole samples": f"{verdict.num_samples:,}",
        "without index": unindexed if verdict.num_unindexed else "",
        "members not read": _counts(verdict.ignored) if verdict.ignored else "",
        "damage": f"{len(verdict.damages):,}" if verdict.damages else "none",
    }
    print_table(facts_table(facts.items()))
    if verdict.damages:
        shown = [(row.shard, row.key or "-", row.reason) for row in verdict.damages[:_SHOWN]]
        print_table(rows_table("", ("tar", "sample", "damage"), shown))
    if len(verdict.damages) > _SHOWN:
        say(f"and {len(verdict.damages) - _SHOWN} more: --json lists them all")
    return int(not verdict.ok)


@app.command()
def stats(
    name: Name,
    manifests: Manifests,
    cache: Cache = Path("~/.cache/vipllava/shards"),
    cache_gb: CacheSize = 100.0,
    data_root: DataRoot = "data",
    as_json: Json = False,
    records: Annotated[
        int | None,
        typer.Option(
            parser=count_or_all,
            metavar="N|all",
            help="How many to read where the record kinds are not known otherwise.",
        ),
    ] = 2000,
) -> None:
    """Describe a data set: lengths, pictures, tars, kinds."""
    from vipllava.ingest.check.stats import shard_stats
    from vipllava.shards.manifest import load_manifest
    from vipllava.shards.tars import open_shards

    # A data set whose count is wrong can be described, too.
    manifest = replace(load_manifest(name, manifests), num_samples=None)
    opened = _open_cache(manifest, data_root, cache, cache_gb)
    with progress_bars() as bars:
        found = shard_stats(
            open_shards(manifest, data_root, cache=opened),
            manifest.record_kind,
            num_records=records,
            on_progress=lambda done, total: bars("reading records", "records", done, total),
        )
    if as_json:
        print_json(found.to_json())
        return
    text_only = f"{found.num_text_only:,} text only ({100 * found.text_only_share:.1f} %)"
    estimated = f" (estimated from {found.num_records_read:,} records; --records all counts)"
    facts = {
        "data set": found.dataset,
        "samples": f"{found.num_samples:,}, {text_only}",
        "tars": f"{found.num_shards:,}",
        "kinds": _counts(found.kinds) + (estimated if found.kinds_from == "sample" else ""),
        "picture shapes": _counts(found.image_shapes),
    }
    print_table(facts_table(facts.items()))
    spreads = {
        "text tokens (estimate)": found.text_tokens,
        "picture width": found.image_width,
        "picture height": found.image_height,
        "samples in a tar": found.shard_samples,
        "size of a tar": found.shard_bytes,
    }
    rows: list[list[str]] = []
    for name, spread in spreads.items():
        if spread is not None:
            spell = _size if name == "size of a tar" else "{:,.0f}".format
            cells = (spread.mean, spread.minimum, spread.median, spread.p95, spread.maximum)
            rows.append([name, *map(spell, cells)])
    print_table(rows_table("", ("", "mean", "min", "median", "95 %", "max"), rows))
    lengths = found.text_tokens_histogram
    most = max(lengths.values(), default=0) or 1
    rows = [[label, f"{n:,}", "#" * round(40 * n / most)] for label, n in lengths.items()]
    print_table(rows_table("", ("text tokens", "samples", ""), rows))


def _open_cache(
    manifest: Manifest, data_root: str, folder: Path, gigabytes: float
) -> ShardCache | None:
    """Return where tars from addresses are kept; None if there are none."""
    from vipllava.shards.manifest import is_remote

    if not any(map(is_remote, (data_root, *manifest.shards))):
        return None
    from vipllava.files.cache import ShardCache

    return ShardCache(folder.expanduser(), int(gigabytes * 10**9))


def _reasons(kinds: Mapping[str, int]) -> str:
    """Say why records were taken for their kinds; other kinds are named in the manifest."""
    from vipllava.records import KINDS, why_kind

    return "; ".join(f"{name}: {why_kind(KINDS[name])}" for name in kinds if name in KINDS)


def _size(num_bytes: float) -> str:
    from rich.filesize import decimal

    return decimal(round(num_bytes))


def _counts(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {number:,}" for name, number in ordered if number) or "none"
