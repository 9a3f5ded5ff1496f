"""Markup from templates and values, in which what a model answered can never become markup.

A page is one file: images are data URIs, styles are inline, and there is no script.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from PIL import Image

_DOCUMENT: Final = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"/>'
    '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
    '<meta name="color-scheme" content="light dark"/>'
    "<title>{title}</title><style>{style}</style></head><body>{body}</body></html>\n"
)


class Html(str):
    """Markup that needs no more escaping."""

    __slots__ = ()


Child = Html | str | float | Iterable["Child"] | None


def escape(value: Child) -> Html:
    """Return markup as it is, text and numbers escaped, iterables joined, None as nothing."""
    if isinstance(value, Html):
        return value
    if value is None:
        return Html()
    if isinstance(value, str | int | float):
        return Html(html.escape(str(value)))
    return Html("".join(map(escape, value)))


def markup(template: str, /, *values: Child, **named: Child) -> Html:
    """Fill the fields ``{}`` and ``{name}`` of a template; the values are escaped.

    Args:
        template: trusted markup, e.g. of :func:`read_templates`. Attributes are quoted in it.
        values: of the fields without a name, see :func:`escape`.
        named: of the others.
    """
    escaped = {name: escape(value) for name, value in named.items()}
    return Html(template.format(*map(escape, values), **escaped))


def read_asset(name: str) -> str:
    """Return the text of a file of this folder."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


@functools.cache
def read_templates(name: str) -> dict[str, str]:
    """Return the ``<template>`` elements of a file of this folder by their id.

    A line break beside a tag or a field is the file's layout and falls away; others are a space.
    """
    text = re.sub(r"(?<=[>}])\s*\n\s*|\s*\n\s*(?=[<{])", "", read_asset(name))
    return dict(
        re.findall(r'<template id="(\w+)">(.*?)</template>', re.sub(r"\s*\n\s*", " ", text))
    )


def table(head: Sequence[Child], rows: Sequence[Sequence[Child]], total: Sequence[Child]) -> Html:
    """Build a table whose first column is text and whose others are numbers.

    Args:
        head: column titles.
        rows: cells.
        total: cells of the last row, which sums up the others and is set apart.
    """

    def row(cells: Sequence[Child], attributes: str = "") -> Html:
        first = markup('<th scope="row">{}</th>', cells[0])
        others = [markup("<td>{}</td>", cell) for cell in cells[1:]]
        return markup("<tr{}>{}{}</tr>", Html(attributes), first, others)

    return markup(
        '<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>{}{}</tbody></table></div>',
        [markup('<th scope="col">{}</th>', title) for title in head],
        map(row, rows),
        row(total, ' class="total"'),
    )


def embed_image(
    image: Image.Image, alt: str, attributes: str = "", *, lossless: bool = False, quality: int = 88
) -> Html:
    """Embed an image as JPEG, or as PNG if ``lossless``; ``attributes`` are more of its markup.

    From quality 90 on colours keep the full resolution: a thin red line stays thin and red.
    """
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, format="PNG", optimize=True)
    else:
        subsampling = "4:4:4" if quality >= 90 else "4:2:0"
        rgb = image.convert("RGB")
        rgb.save(buffer, format="JPEG", quality=quality, subsampling=subsampling)
    code = base64.b64encode(buffer.getvalue()).decode()
    source = f"data:image/{'png' if lossless else 'jpeg'};base64,{code}"
    shown = '<img src="{}" alt="{}" width="{}" height="{}"{}/>'
    return markup(shown, source, alt, image.width, image.height, Html(attributes))


def page(title: str, body: Html, *styles: str) -> str:
    """Build the whole document; ``styles`` are style sheets of this folder."""
    return markup(_DOCUMENT, title=title, style=Html("".join(map(read_asset, styles))), body=body)
