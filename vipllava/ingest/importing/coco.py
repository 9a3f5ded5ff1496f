"""COCO: one JSON object of ``images``, ``annotations`` and ``categories``.

A ``bbox`` is x, y, width, height in pixels from the upper left corner; a ``segmentation`` a list of
flat polygons, or run lengths (``counts`` as a list or packed), as crowds (``iscrowd`` 1) have them.
Many tools write this format, so which pixels they count is not known; and some files that are
called COCO have other boxes, which shows in where these would lie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

from vipllava.ingest.importing.source import (
    Export,
    ImportFormat,
    ImportingError,
    Outline,
    Size,
    SourceImage,
    SourceRegion,
    attributes_of,
    flat_points,
    load_json,
    numbers,
    object_or_empty,
    shown,
    stated_size,
)
from vipllava.records.fields import is_number, list_or_empty
from vipllava.types import BBox, RecordError
from vipllava.visual_prompts.geometry import bounds_of

BOX_FORMS: Final = {"xywh": "x, y, width, height", "xyxy": "x1, y1, x2, y2"}
_SLACK: Final = 1.0  # pixels; annotations count the last one or do not
_NEAR: Final = 2.0  # pixels between a box and its polygons
_LEAST_WRONG: Final = 0.1
"""Share of boxes that reach out of their pictures, from which on another form is believed."""
_LEAST_PER_CENT: Final = 20
"""A few boxes in pixels may well lie within 100 pixels of the corner; all of many do not."""
_LEAST_SIDE: Final = 150  # pixels: in smaller pictures they may
_LISTS: Final = ("images", "annotations", "categories")


class Layout(NamedTuple):
    """What differs between COCO and what is derived from it."""

    title: str
    names: tuple[str, ...] = ("file_name", "coco_url")  # of the picture's, the first that is there
    attributes: tuple[tuple[str, str], ...] = (("supercategory", "supercategory"),)


def read_coco(export: Export, layout: Layout) -> Iterator[SourceImage]:
    """Yield the pictures of a file, those without regions included."""
    given = object_or_empty(load_json(export.source))
    _check_layout(given, export.source, layout)
    categories = {
        item["id"]: item
        for item in map(object_or_empty, list_or_empty(given["categories"]))
        if _is_id(item.get("id"))
    }
    images = {
        item["id"]: item
        for item in map(object_or_empty, list_or_empty(given["images"]))
        if _is_id(item.get("id"))
    }
    by_image: dict[Any, list[Mapping[str, Any]]] = {}
    signs: Counter[str] = Counter()
    num_crowds = 0
    for position, value in enumerate(list_or_empty(given["annotations"])):
        item = object_or_empty(value)
        where = f"{export.source.name}, annotation {item.get('id', f'at position {position}')}"
        if not item:
            export.fault("region-invalid", where, f"it is {shown(value)}; expected an object")
            continue
        image = images.get(item["image_id"]) if _is_id(item.get("image_id")) else None
        if image is None:
            message = f"its image_id is {shown(item.get('image_id'))}, which `images` does not list"
            export.fault("image-unknown", where, message)
            continue
        if item.get("iscrowd"):
            num_crowds += 1
            if not export.options.crowds:
                continue
        signs += box_signs(item, stated_size(image.get("width"), image.get("height")))
        by_image.setdefault(item["image_id"], []).append(item)
    if num_crowds:
        kept = "they are regions like others" if export.options.crowds else "left out"
        export.facts["crowds"] = f"{num_crowds:,}: {kept}"
    form = decide_box_form(signs, export.options.box_form, layout.title)
    export.facts["boxes"] = describe_boxes(signs, form)
    folders = image_folders(export.source)
    for id, image in images.items():
        name = next((image[n] for n in layout.names if isinstance(image.get(n), str)), None)
        if not name:
            where = f"{export.source.name}, image {id}"
            export.fault("image-missing", where, f"it has no {' or '.join(layout.names)}")
            continue
        yield SourceImage(
            f"image {id}",
            export.source.name,
            name,
            tuple(_region(item, categories, form, layout) for item in by_image.get(id, ())),
            stated_size(image.get("width"), image.get("height")),
            folders=folders,
        )


def image_folders(source: Path) -> tuple[Path, ...]:
    """Return where pictures lie beside a file ``annotations/instances_SPLIT.json`` or like it."""
    here, above = source.parent, source.parent.parent
    split = source.stem.rpartition("_")[2]
    places = [here, here / "images", here / split, above, above / split, above / "images"]
    return (*places, above / "images" / split)


def _check_layout(given: Mapping[str, Any], source: Path, layout: Layout) -> None:
    if lists := [name for name in _LISTS if not isinstance(given.get(name), list)]:
        what = f"has no list `{lists[0]}`" if given else "is no JSON object"
        if isinstance(given.get("annotations"), list) and "categories" in lists:
            what += ": captions, for example, have neither boxes nor categories"
        raise ImportingError(
            f"{source} {what}; a {layout.title} file of regions has {', '.join(_LISTS)}"
        )
    first = list_or_empty(given["annotations"])[:1]
    if any("segments_info" in object_or_empty(item) for item in first):
        raise ImportingError(
            f"{source} is a panoptic file, whose masks are in pictures; import the instances file"
        )


def _region(
    item: Mapping[str, Any], categories: Mapping[Any, dict[str, Any]], form: str, layout: Layout
) -> SourceRegion:
    known = _is_id(item.get("category_id"))
    category = object_or_empty(categories.get(item["category_id"]) if known else None)
    name = category.get("name")
    why = "it has no category_id"
    if item.get("category_id") is not None:
        why = f"its category_id is {shown(item['category_id'])}, of which `categories` has no name"
    attributes = {ours: category.get(theirs) for theirs, ours in layout.attributes}
    attributes |= object_or_empty(item.get("attributes"))
    return SourceRegion(
        f"annotation {item.get('id', 'without id')}",
        name if isinstance(name, str) and name.strip() else None,
        partial(_outline, item.get("bbox"), item.get("segmentation"), form),
        attributes_of(attributes),
        why,
    )


def _outline(bbox: object, segmentation: object, form: str, size: Size) -> Outline:
    box: BBox | None = None
    if bbox is not None and bbox != []:
        a, b, c, d = numbers(bbox, 4, "its bbox")
        if form == "xywh" and (c < 0 or d < 0):
            message = f"its bbox {bbox} has a width or height below 0: it is reversed"
            raise RecordError(message, "box-reversed")
        box = (a, b, a + c, b + d) if form == "xywh" else (a, b, c, d)
    if isinstance(segmentation, dict):
        rle = object_or_empty(cast("object", segmentation))
        return Outline(box, rle={name: rle[name] for name in ("size", "counts") if name in rle})
    rings = tuple(
        tuple(flat_points(ring, f"its segmentation[{number}]"))
        for number, ring in enumerate(list_or_empty(segmentation))
    )
    if box is None and not rings:
        raise RecordError("it has neither bbox nor segmentation", "box-invalid")
    return Outline(box, rings)


# In which form boxes are written.


def box_signs(item: Mapping[str, Any], size: Size | None) -> Counter[str]:
    """Count what the box of an annotation looks like."""
    signs: Counter[str] = Counter()
    box = list_or_empty(item.get("bbox"))
    if size is None or len(box) != 4 or not all(map(is_number, box)):
        return signs
    a, b, c, d = cast("list[float]", box)
    width, height = size[0] + _SLACK, size[1] + _SLACK
    fits = min(a, b) >= -_SLACK
    signs["boxes"] = 1
    signs["xywh"] = fits and min(c, d) > 0 and a + c <= width and b + d <= height
    signs["xyxy"] = fits and c > a and d > b and c <= width and d <= height
    signs["within_1"] = min(box) >= 0 and max(box) <= 1
    signs["within_100"] = min(box) >= 0 and max(box) <= 100 and min(size) >= _LEAST_SIDE
    signs["near_100"] = max(box) > 80
    rings = [ring for ring in list_or_empty(item.get("segmentation")) if _is_ring(ring)]
    if rings:
        x1, y1, x2, y2 = bounds_of(
            [tuple(zip(ring[::2], ring[1::2], strict=True)) for ring in rings]
        )
        signs["with_polygons"] = 1
        for form, ends in (("xywh", (a, b, a + c, b + d)), ("xyxy", (a, b, c, d))):
            away = max(abs(p - q) for p, q in zip(ends, (x1, y1, x2, y2), strict=True))
            signs[f"{form}_agrees"] = away <= _NEAR
    return signs


def decide_box_form(signs: Counter[str], given: str | None, title: str) -> str:
    """Return in which form boxes are read.

    Raises:
        ImportingError: they look like another one than the format's, and the user names none.
    """
    if given is not None:
        return given
    count = signs["boxes"]
    pixels = f"a {title} file has x, y, width, height in pixels"
    if count and signs["within_1"] == count:
        raise ImportingError(
            f"all {count} boxes lie within 0..1: they look like fractions of the picture, and "
            f"{pixels}. Multiply x and width by the picture's width, y and height by its height"
        )
    if count >= _LEAST_PER_CENT and signs["within_100"] == count and signs["near_100"]:
        raise ImportingError(
            f"all {count} boxes lie within 0..100, in larger pictures: they look like per cent, "
            f"and {pixels}. Multiply by the picture's width and height, divided by 100; if they "
            "are in pixels all the same, pass box_form=xywh"
        )
    corners = signs["xyxy"] == count and count - signs["xywh"] >= max(1, _LEAST_WRONG * count)
    if signs["with_polygons"]:
        corners = signs["xyxy_agrees"] > signs["xywh_agrees"]
    if count and corners:
        raise ImportingError(
            f"the boxes look like x1, y1, x2, y2, and {pixels}: {describe_boxes(signs)}. Pass "
            "box_form=xyxy if they are, else box_form=xywh"
        )
    return "xywh"


def describe_boxes(signs: Counter[str], form: str | None = None) -> str:
    """Say what speaks for a form of boxes."""
    text = f"read as {BOX_FORMS[form]}. " if form else ""
    text += (
        f"As x, y, width, height {signs['xywh']} of {signs['boxes']} lie in their pictures, as x1, "
        f"y1, x2, y2 {signs['xyxy']}"
    )
    if signs["with_polygons"]:
        text += (
            f"; of {signs['with_polygons']} with polygons {signs['xywh_agrees']} and "
            f"{signs['xyxy_agrees']} are the box around them"
        )
    return text


def _is_ring(value: object) -> bool:
    ring = list_or_empty(value)
    return len(ring) >= 6 and len(ring) % 2 == 0 and all(map(is_number, ring))


def _is_id(value: object) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def is_coco(head: str) -> bool:
    """Whether a file begins like COCO's."""
    if not head.startswith("{"):
        return False
    images = '"images"' in head and ('"file_name"' in head or '"coco_url"' in head)
    return images or ('"annotations"' in head and '"image_id"' in head)


COCO = ImportFormat(
    "coco",
    "COCO",
    partial(read_coco, layout=Layout("COCO")),
    lambda head: is_coco(head) and not is_lvis(head),
    None,
    "",
    options=("box_form", "crowds"),
)


def is_lvis(head: str) -> bool:
    """Whether a file that begins like COCO's is one of LVIS."""
    return any(f'"{name}"' in head for name in ("neg_category_ids", "not_exhaustive_category_ids"))
