"""A self-contained page: escaped text, images as data URIs, styles inline, no script.

Markup is built from :class:`Html` values. Any other value given to :func:`element` is text and is
escaped, so what a model answered can never become markup.
"""

from __future__ import annotations

import base64
import functools
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from PIL import Image

_VOID: Final = frozenset({"img", "input", "meta", "path", "line", "rect", "circle", "polyline"})


class Html(str):
    """Markup that needs no more escaping."""

    __slots__ = ()


Child = Html | str | float | None


def element(name: str, /, *children: Child | Iterable[Child], **attributes: object) -> Html:
    """Build one element.

    Args:
        name: tag name.
        children: markup, text, numbers, or iterables of them; None is left out.
        attributes: a trailing underscore is dropped (``class_``) and other underscores become
            hyphens; None leaves the attribute out.
    """
    spelled = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        if children:
            raise ValueError(f"<{name}> takes no children, got {len(children)}")
        return Html(f"<{name}{spelled}/>")
    return Html(f"<{name}{spelled}>{join(children)}</{name}>")


def join(children: Iterable[Child | Iterable[Child]]) -> Html:
    """Concatenate markup and text, escaping the text."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, (str, int, float)):
            parts.append(html.escape(str(child)))
        else:
            parts.append(join(child))
    return Html("".join(parts))


def soft(*children: Child | Iterable[Child], tag: str = "p") -> Html:
    """Build a paragraph, or another element, of secondary text."""
    return element(tag, *children, class_="soft")


def section(title: str, introduction: str, *content: Child) -> Html:
    """Build a section of the page under its heading."""
    return element("section", element("h2", title), soft(introduction), *content)


def items(
    entries: Iterable[Child | Sequence[Child]], tag: str = "ul", **attributes: object
) -> Html:
    """Build a list; each entry is what its item holds."""
    return element(tag, [element("li", entry) for entry in entries], **attributes)


def terms(entries: Mapping[str, Child]) -> list[Html]:
    """Build the content of a ``dl``: each name and what it stands for."""
    return [join([element("dt", name), element("dd", text)]) for name, text in entries.items()]


def table(
    head: Sequence[Child], rows: Sequence[Sequence[Child]], *, num_total_rows: int = 0
) -> Html:
    """Build a table whose first column is text and whose others are numbers.

    Args:
        head: column titles.
        rows: cells.
        num_total_rows: rows at the end that sum up the others; set apart.
    """
    first_total = len(rows) - num_total_rows
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            [element("td", cell) for cell in row[1:]],
            class_="total" if index >= first_total else None,
        )
        for index, row in enumerate(rows)
    ]
    return element(
        "div",
        element(
            "table",
            element("thead", element("tr", [element("th", title, scope="col") for title in head])),
            element("tbody", body),
        ),
        class_="scroll",
    )


def embed_image(
    image: Image.Image,
    alt: str,
    *,
    lossless: bool = False,
    quality: int = 88,
    **attributes: object,
) -> Html:
    """Embed an image as JPEG, or as PNG if ``lossless``.

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
    return element("img", src=source, alt=alt, width=image.width, height=image.height, **attributes)


@functools.cache
def load_style(name: str) -> str:
    """Return a style sheet of this folder."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def page(title: str, style: str, *body: Child | Iterable[Child]) -> str:
    """Build the whole document; ``style`` is trusted CSS."""
    head = join(
        [
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("title", title),
            Html(f"<style>{style}</style>"),
        ]
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{join(body)}</body></html>\n'
