"""``vipllava compare A B [C ...]``: evaluations of the same items, each against the first."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vipllava.commands.options import Json
from vipllava.commands.output import print_json, print_table, rows_table, say

if TYPE_CHECKING:
    from vipllava.evaluation.comparison import Compared, Comparison, Row

_NOT_SHOWN: Final = "no difference that these items can show"
_SMALLEST_P: Final = 0.001  # below it only this is said


def print_comparison(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER", help="Of two or more evaluations: runs/eval/NAME/BENCH."),
    ],
    common: Annotated[
        bool, typer.Option("--common", help="Compare the items that both have.")
    ] = False,
    different_judges: Annotated[
        bool, typer.Option("--different-judges", help="Compare scores of different judges, too.")
    ] = False,
    score: Annotated[str, typer.Option(help="Field of predictions.jsonl.")] = "score",
    seed: Annotated[int, typer.Option(help="Of the resampling.")] = 0,
    as_json: Json = False,
) -> None:
    """Compare evaluations of the same items.

    Each folder is compared with the first one: which differences its items can show.
    """
    from vipllava.evaluation.comparison import compare, read_evaluation

    evaluations = [read_evaluation(folder, score) for folder in folders]
    compared = compare(
        evaluations, common=common, allow_different_judges=different_judges, seed=seed
    )
    if as_json:
        print_json(_as_json(compared))
        return
    labels = [ascii_uppercase[at] if at < 26 else str(at + 1) for at in range(len(folders))]
    say(f"{compared.bench}, scores in %")
    for label, folder in zip(labels, folders, strict=True):
        say(f"{label}: {folder}")
    if compared.settings:
        rows = [(name, *map(str, values)) for name, values in compared.settings.items()]
        print_table(rows_table("", ("different settings", *labels), rows))
    for label, each in zip(labels[1:], compared.comparisons, strict=True):
        _print_one(label, each, compared.is_share)


def _print_one(label: str, each: Comparison, is_share: bool) -> None:
    difference, shown = f"{label} - A", f"{label} is"
    fell, rose = ("lost", "gained") if is_share else ("lower", "higher")
    changed = f"{fell}, {rose}"
    headers = ("", "items", "images", "A", label, difference, "p", changed, shown)
    rows = [_row(name, row) for name, row in (*each.groups.items(), ("all", each.total))]
    spare = ("images", changed, "items", "A", label)
    say("")
    print_table(rows_table("", headers, rows, right=headers[1:-1], whole=headers[1:], spare=spare))
    counts = {
        "without a score in A": each.num_unscored_first,
        f"without a score in {label}": each.num_unscored_other,
        "only in A": each.num_only_first,
        f"only in {label}": each.num_only_other,
    }
    if named := [f"{number} {where}" for where, number in counts.items() if number]:
        say(f"items left out: {', '.join(named)}")
    of = each.total.difference
    fell, rose = ("from right to wrong", "from wrong to right") if is_share else (fell, rose)
    say(
        f"{of.num_lower + of.num_higher} of {of.estimate.num_items} items changed: "
        f"{of.num_lower} {fell}, {of.num_higher} {rose}"
    )
    if of.estimate.why_no_interval:
        say(f"no interval can be given: {of.estimate.why_no_interval}")
    verdict = f"{label} is {each.total.shown}" if each.total.shown else _NOT_SHOWN
    say(f"{difference}: {of.estimate.text(signed=True)}, p {_p(each.total.p_corrected)}: {verdict}")


def _row(name: str, row: Row) -> tuple[str, ...]:
    of = row.difference
    return (
        name,
        str(row.first.num_items),
        str(row.first.num_images),
        row.first.text(),
        row.other.text(),
        of.estimate.text(signed=True),
        _p(row.p_corrected),
        f"{of.num_lower}, {of.num_higher}",
        row.shown or "-",
    )


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return f"< {_SMALLEST_P}" if value < _SMALLEST_P else f"{value:.3f}"


def _as_json(compared: Compared) -> dict[str, Any]:
    found = asdict(compared)
    for raw, each in zip(found["comparisons"], compared.comparisons, strict=True):
        raw["total"]["shown"] = each.total.shown
        for name, row in each.groups.items():
            raw["groups"][name]["shown"] = row.shown
    return found
