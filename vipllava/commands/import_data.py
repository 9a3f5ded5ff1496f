"""``vipllava import``: what annotation tools export, as records with a manifest and a report."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from vipllava.commands.options import DataRoot, Json
from vipllava.commands.output import facts_table, print_json, print_table, progress_bars, say

if TYPE_CHECKING:
    from vipllava.ingest.importing.run import ImportSummary

FORMATS: Final = ("coco", "labelme", "via", "label-studio", "yolo", "lvis")
_SHOWN: Final = 8


def import_data(
    format: Annotated[
        str,
        typer.Argument(help=", ".join(FORMATS), autocompletion=lambda: list(FORMATS)),
    ],
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The export: a file or a folder.")],
    output: Annotated[Path, typer.Option(help="A new folder; in the data root, best.")],
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of the pictures.", show_default="beside the export"),
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(
            help="{region} is its mark's words; several take turns.",
            show_default='"What is {region}?"',
        ),
    ] = None,
    answer: Annotated[
        str, typer.Option(help="{category}, or an attribute's name in braces.")
    ] = "{category}",
    name: Annotated[
        str | None, typer.Option(help="Of the data set.", show_default="the folder's")
    ] = None,
    data_root: DataRoot = "data",
    per_annotation: Annotated[
        bool,
        typer.Option(
            "--per-annotation/--per-image",
            help="A record per region, or per picture with an exchange per region.",
        ),
    ] = False,
    max_regions: Annotated[
        int, typer.Option(min=1, help="Of a record: a picture of more gets several records.")
    ] = 8,
    category: Annotated[
        str | None,
        typer.Option(
            metavar="ATTRIBUTE",
            help="VIA: the attribute that {category} is.",
            show_default="the only one",
        ),
    ] = None,
    spaces: Annotated[
        bool, typer.Option("--spaces", help="Write categories with spaces for `_`.")
    ] = False,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME|all", help="YOLO: which part.", show_default="train"),
    ] = None,
    box_form: Annotated[
        str | None,
        typer.Option(
            metavar="xywh|xyxy",
            help="COCO, LVIS: how boxes are written, if not as they should.",
            show_default="xywh, if it fits",
        ),
    ] = None,
    crowds: Annotated[
        bool, typer.Option("--crowds/--no-crowds", help="COCO: regions of many objects, too.")
    ] = True,
    exif: Annotated[
        str | None,
        typer.Option(
            metavar="upright|stored",
            help="Which pixels boxes count in pictures that their EXIF blocks turn.",
            show_default="as the export or its tool says",
        ),
    ] = None,
    max_bad_rate: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of unusable regions above which it fails."),
    ] = 0.0,
    licence: Annotated[
        str | None, typer.Option(help="Terms of pictures and texts, for the manifest.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make records of what an annotation tool exports.

    Nothing is written unless all of it can be: vipllava import coco instances.json --output
    data/mine --images photos --question "What is {region}?" --answer "{category}"
    """
    from vipllava.ingest.importing.coco import BOX_FORMS
    from vipllava.ingest.importing.run import LICENCE, import_annotations
    from vipllava.ingest.importing.source import ImportOptions
    from vipllava.ingest.importing.templates import QUESTION, Templates

    _check("exif", exif, ("upright", "stored"))
    _check("box-form", box_form, tuple(BOX_FORMS))
    with progress_bars() as bars:
        summary = import_annotations(
            format,
            source,
            output,
            name=name,
            data_root=Path(data_root),
            templates=Templates(tuple(question or (QUESTION,)), answer),
            options=ImportOptions(images, category, split, box_form, crowds),
            max_regions=1 if per_annotation else max_regions,
            exif="upright" if exif == "upright" else "stored" if exif else None,
            spaces=spaces,
            max_bad_rate=max_bad_rate,
            licence=licence or LICENCE,
            tell=bars,
        )
    if as_json:
        print_json(summary.to_json())
        return
    _print(summary)


def _check(name: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise typer.BadParameter(
            f"'{value}' is not one of {', '.join(known)}.", param_hint=f"--{name}"
        )


def _print(summary: ImportSummary) -> None:
    report = summary.report
    categories = summary.categories.most_common(_SHOWN)
    listed = ", ".join(f"{name} {count:,}" for name, count in categories)
    rest = len(summary.categories) - len(categories)
    empty = f", {summary.num_empty:,} without a region left out" if summary.num_empty else ""
    facts = {
        "data set": summary.dataset,
        "records": f"{summary.num_records:,} of {summary.num_regions:,} regions",
        "pictures": f"{summary.num_images:,}{empty}",
        "categories": listed + (f", and {rest} more" if rest else ""),
        "pixels": f"{summary.frame}: {summary.why_frame}",
        **summary.facts,
        "left out": f"{summary.num_left_out:,} regions" if summary.num_left_out else "",
        "written": str(summary.manifest.parent),
    }
    print_table(facts_table(facts.items()))
    for code, (severity, meaning) in summary.found.items():
        first = next(found for found in report.findings if found.code == code)
        what = f"{severity} {code} ({report.counts[code]:,}): {meaning}"
        say(f"{what}. {first.place}: {first.message}")
    if report.counts:
        say(f"all are listed in {summary.manifest.parent / 'lint.json'}")
    default = Path(os.environ.get("VIPLLAVA_DATA") or "data").absolute()
    root = [] if default == summary.data_root else [str(summary.data_root)]
    here, shown = Path.cwd(), summary.manifest
    shown = str(shown.relative_to(here) if shown.is_relative_to(here) else shown)
    build = ["vipllava", "shards", "build", shown, *(["--data-root", *root] if root else [])]
    look = ["vipllava", "inspect", "--data", shown, *(f"paths.data_root={each}" for each in root)]
    say(f"next:\n{shlex.join(build)}\n{shlex.join(look)}")
