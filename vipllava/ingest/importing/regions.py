"""Regions of pictures made into records: outlines checked, texts filled in, regions grouped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from vipllava.ingest.importing.outlines import mask_bounds
from vipllava.ingest.importing.report import CODES, ImportReport
from vipllava.ingest.importing.source import Outline, Size, SourceRegion, is_writable
from vipllava.ingest.importing.templates import CATEGORY, Templates
from vipllava.records.box_form import box_signs
from vipllava.records.fields import IMAGE_PLACEHOLDER, REGION_PLACEHOLDER, Fields
from vipllava.records.kind import Outline as BoxOutline
from vipllava.types import BBox, Polygon, RecordError
from vipllava.visual_prompts.geometry import bounds_of
from vipllava.visual_prompts.mark_places import MarkError
from vipllava.visual_prompts.rle import check_rle, mask_of_rle

_SLACK: Final = 1.0
"""Pixels that a box may reach out of its picture unsaid: tools count the last one or do not."""
_DIGITS: Final = 3  # behind the point, of coordinates
_UNCHECKED: Final = b""  # stands for a picture of which only the size counts


@dataclass(frozen=True, slots=True)
class ReadyRegion:
    """A region that can be part of a record."""

    region: SourceRegion
    number: int  # in the export, so that questions take turns
    values: Mapping[str, str]  # for templates
    bbox: list[float]
    segmentation: Any  # polygons, run lengths, or None
    fixed: dict[str, Any] | None  # of its mark


@dataclass(slots=True)
class RegionChecker:
    """Makes regions ready, one after the other."""

    templates: Templates
    spaces: bool  # whether `_` of a category becomes a space
    report: ImportReport
    number: int = 0  # of the next region
    num_left_out: int = 0
    signs: Counter[str] = field(default_factory=Counter[str])  # of the forms of boxes
    categories: Counter[str] = field(default_factory=Counter[str])

    def check(self, region: SourceRegion, size: Size, place: str) -> ReadyRegion | None:
        """Return a region, or None for one that is reported.

        Args:
            region: as read.
            size: of its picture in the frame that it counts.
            place: of the picture in the export, for messages.
        """
        number, self.number = self.number, self.number + 1
        try:
            values = self._values(region, number)
            outline = region.outline(size)
            bbox, segmentation = _placed(outline, size)
        except RecordError as error:
            known = error.fault in CODES and error.fault != "record-invalid"
            code = error.fault if known else "region-invalid"
            self.report.add(code, f"{place}, {region.id}", str(error))
            self.num_left_out += 1
            return None
        if outline.note is not None:
            code, message = outline.note
            self.report.add(code, f"{place}, {region.id}", message)
        if (given := outline.bbox) is not None:
            beyond = max(abs(a - b) for a, b in zip(given, bbox, strict=True))
            if beyond > _SLACK:
                message = f"its box reaches {beyond:g} pixels out of its {size[0]} x {size[1]}"
                message += " picture, and was cut off there"
                self.report.add("box-clipped", f"{place}, {region.id}", message)
        self.signs += box_signs([BoxOutline("box", list(bbox), "bbox")], size)
        self.categories[values.get(CATEGORY, "")] += 1
        fixed = {"shape": outline.shape} if outline.shape is not None else None
        return ReadyRegion(region, number, values, list(map(tidy, bbox)), segmentation, fixed)

    def _values(self, region: SourceRegion, number: int) -> dict[str, str]:
        """Return what templates may name; what they do name has to be there."""
        values = dict(region.attributes)
        if region.category is not None:
            category = region.category
            values[CATEGORY] = category.replace("_", " ") if self.spaces else category
        else:
            values.pop(CATEGORY, None)
        for name in sorted(self.templates.needed(number)):
            if name not in values:
                is_category = name == CATEGORY
                why = region.why_no_category if is_category else f"it has no {name}"
                raise RecordError(why, "category-missing" if is_category else "attribute-missing")
            if not is_writable(values[name]):
                raise RecordError(f"its {name} has half of a character, a lone surrogate")
            if IMAGE_PLACEHOLDER in values[name] or REGION_PLACEHOLDER.search(values[name]):
                message = f"its {name} is {values[name]!r}, which texts of records use for a region"
                raise RecordError(f"{message} or the picture; rename it", "text-placeholder")
        return values


def records_of(
    regions: Sequence[ReadyRegion],
    templates: Templates,
    named: Mapping[str, str],
    size: Size,
    max_regions: int,
) -> Iterator[dict[str, Any]]:
    """Yield the records of a picture, an exchange per region.

    Args:
        regions: of the picture.
        templates: question and answer.
        named: ``id`` of the picture, to begin those of its records, and ``image``.
        size: of the picture in the frame that is counted.
        max_regions: of a record.
    """
    starts = range(0, len(regions), max_regions)
    parts = [regions[start : start + max_regions] for start in starts]
    for part, chosen in enumerate(parts, start=1):
        own = chosen[0].region.id if max_regions == 1 else f"part {part}"
        alone = len(parts) == 1 and max_regions > 1
        record: dict[str, Any] = {
            "id": _writable(named["id"] if alone else f"{named['id']}, {own}"),
            "image": named["image"],
            "width": size[0],
            "height": size[1],
            "bboxes": [ready.bbox for ready in chosen],
        }
        if any(ready.segmentation is not None for ready in chosen):
            record["segmentations"] = [ready.segmentation for ready in chosen]
        if any(ready.fixed is not None for ready in chosen):
            record["visual_prompts"] = [ready.fixed for ready in chosen]
        said: list[dict[str, str]] = []
        for region, ready in enumerate(chosen):
            question, answer = templates.fill(ready.number, region, ready.values)
            start = f"{IMAGE_PLACEHOLDER}\n" if region == 0 else ""
            said += [{"from": "human", "value": start + question}, {"from": "gpt", "value": answer}]
        record["conversations"] = said
        yield record


def tidy(value: float) -> float:
    """Return a coordinate that was checked, whole where it is."""
    rounded = _rounded(value)
    return int(rounded) if rounded == int(rounded) else rounded


def _rounded(value: float) -> float:
    """Return a number without the digits that floats add; it may be anything."""
    return round(value, _DIGITS)


def _placed(outline: Outline, size: Size) -> tuple[BBox, Any]:
    """Return box and segmentation in a picture; RecordError if they are none, or not in it."""
    bbox = outline.bbox
    if outline.rle is not None:
        bbox = _bounds_of_rle(outline.rle, size, bbox)
    elif bbox is None:
        bbox = bounds_of(outline.polygons)
    # Rounded before it is checked: a box of a millionth of a pixel has no area as it is stored.
    record: dict[str, Any] = {"bboxes": [[_rounded(number) for number in bbox]]}
    if outline.polygons:
        rings = [[_rounded(number) for number in _flat(ring)] for ring in outline.polygons]
        record["segmentations"] = [rings]
    fields = Fields(record, "region", "export", _UNCHECKED, size)
    try:
        (region,) = fields.regions()
    except RecordError as error:
        raise RecordError(str(error).removeprefix(f"{fields.where}: "), error.fault) from error
    if outline.rle is not None:
        return region.bbox_xyxy, dict(outline.rle)
    return region.bbox_xyxy, [list(map(tidy, _flat(ring))) for ring in region.polygons] or None


def _bounds_of_rle(rle: Mapping[str, Any], size: Size, bbox: BBox | None) -> BBox:
    try:
        checked = check_rle(rle, "its segmentation")
    except MarkError as error:
        raise RecordError(str(error), "mask-invalid") from error
    if checked.size != size[::-1]:
        height, width = checked.size
        raise RecordError(
            f"its run lengths are of {width} x {height} pixels, its picture has {size[0]} x "
            f"{size[1]}: they are of another picture, or of another size of it",
            "mask-size",
        )
    if bbox is not None:
        return bbox
    return mask_bounds(mask_of_rle(checked))


def _writable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _flat(ring: Polygon) -> list[float]:
    return [number for point in ring for number in point]
