"""What each check says of a record: of its shapes, its texts and its marks.

The verdict on a single box or mask is the parser's (:class:`vipllava.records.fields.Fields`);
here all of them are asked, and what a parser lets pass is looked at as well.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops

from vipllava.ingest.lint.findings import LintLimits, Problem
from vipllava.records import RecordKind
from vipllava.records.fields import (
    IMAGE_PLACEHOLDER,
    REGION_PLACEHOLDER,
    Fields,
    is_rle,
    kept_turns,
)
from vipllava.records.kind import Outline, list_or_empty
from vipllava.stream.image_transform import ImageTransform
from vipllava.types import Mention, RecordError, Sample, Turn, VisualPromptPlan
from vipllava.visual_prompts.render import mark_opacity
from vipllava.visual_prompts.shapes import PALETTE, prompt_words, shape_words

_TOUCH: Final = 1e-3
"""Pixels within which a vertex lies on an edge: coordinates have two decimals at best."""
_FAR: Final = 1e9
"""Coordinates beyond it count as this far out: their products stay finite."""
_EDGES_AT_ONCE: Final = 512
_Vertices = npt.NDArray[np.float64]
_FOREIGN_PLACEHOLDER: Final = re.compile(
    r"</?\|?(?:image|img|im_start|im_end|im_patch|image_pad|vision_start|vision_end)[_ ]?\d*\|?>",
    re.IGNORECASE,
)
_COLOUR_NAMES: Final = {rgb: name for name, rgb in PALETTE.items()}


def geometry_problems(fields: Fields, kind: RecordKind, limits: LintLimits) -> Iterator[Problem]:
    """Yield the problems of all boxes, polygons and run lengths that a record of ``kind`` uses.

    Without a readable image only what needs no image size is found.
    """
    for outline in kind.outlines(fields.record):
        yield from _asked(_CHECKS[outline.form](fields, outline, limits))


def _asked(problems: Iterator[Problem]) -> Iterator[Problem]:
    """Yield the problems of one shape, or the parser's complaint about it."""
    try:
        yield from problems
    except RecordError as error:
        # An image that is missing or broken has a check of its own.
        if error.fault.startswith(("box-", "polygon-", "mask-")):
            yield Problem(error.fault, str(error))


def _box(fields: Fields, box: Outline, limits: LintLimits) -> Iterator[Problem]:
    fields.bbox(box.value, box.name, box.extra, may_be_empty=box.may_be_empty)
    x1, y1, x2, y2 = (float(number) for number in box.value[:4])
    width, height = fields.size
    outside = max(-x1, -y1, x2 - width, y2 - height)
    if outside > limits.max_outside_pixels:
        yield Problem(
            "box-clipped",
            f"field `{box.name}` is {box.value}; it reaches {outside:g} pixels out of the {width} "
            f"x {height} image and is cut there: check whether box and image belong together",
        )


def _mask(fields: Fields, mask: Outline, limits: LintLimits) -> Iterator[Problem]:
    def flat_problems(flat: object, name: str) -> Iterator[Problem]:
        yield from _ring(fields, Outline("ring", fields.points(flat, name), name), limits)

    if is_rle(mask.value):
        fields.run_lengths(mask.value, mask.name)
        return
    for name, flat in fields.flats(mask.value, mask.name):
        yield from _asked(flat_problems(flat, name))


def _ring(fields: Fields, ring: Outline, limits: LintLimits) -> Iterator[Problem]:
    points = ring.value
    inside = np.array(fields.polygon(points, ring.name))
    shown = f"field `{ring.name}`, {len(points)} points,"
    thin = bounding_area(inside) < limits.min_polygon_area
    if not thin and crosses_itself(np.array(points, dtype=np.float64)):
        yield Problem(
            "polygon-self-crossing",
            f"{shown} has an outline that crosses itself; put its points in order, or split it",
        )
    elif thin or ring_area(inside) < limits.min_polygon_area:
        yield Problem(
            "polygon-degenerate",
            f"{shown} has an area of {ring_area(inside):.3g} square pixels inside the image; "
            "leave it out or correct it",
        )


_CHECKS: Final = {"box": _box, "mask": _mask, "ring": _ring}


def ring_area(ring: _Vertices) -> float:
    """Return the area enclosed by ``ring`` [n, 2], square pixels (shoelace formula)."""
    x, y = (ring - ring[0]).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def bounding_area(ring: _Vertices) -> float:
    """Return the area of the box around ``ring`` [n, 2] along its principal axes.

    Next to nothing for points on a line, whichever way the ring goes along it.
    """
    centred = ring - ring.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    along = centred @ axes.T
    return float((along.max(axis=0) - along.min(axis=0)).prod())


def crosses_itself(ring: _Vertices) -> bool:
    """Tell whether the closed outline of ``ring`` [n, 2] crosses itself.

    Touching is not crossing: not at a vertex that two parts of the outline share, not with a
    vertex on an edge, not along overlapping edges. A part that passes through an edge with a
    vertex right on it does cross.
    """
    ring = ring.clip(-_FAR, _FAR)
    ring = ring[np.linalg.norm(ring - np.roll(ring, 1, axis=0), axis=1) > _TOUCH]
    if len(ring) < 4:
        return False
    ends = np.roll(ring, -1, axis=0)
    along = ends - ring
    lengths = np.linalg.norm(along, axis=1)
    side = np.empty((len(ring), len(ring)), dtype=np.int8)
    for first in range(0, len(ring), _EDGES_AT_ONCE):
        block = slice(first, first + _EDGES_AT_ONCE)
        away = ring[None] - ring[block, None]  # [edges, vertices, 2]
        cross = along[block, None, 0] * away[..., 1] - along[block, None, 1] * away[..., 0]
        distance = cross / lengths[block, None]
        side[block] = np.sign(distance) * (np.abs(distance) > _TOUCH)
        onto = (along[block, None] * away).sum(axis=2) / lengths[block, None]
        within = (onto > _TOUCH) & (onto < lengths[block, None] - _TOUCH)
        # A vertex on the inside of an edge, its neighbours on the two sides of it.
        passing = np.roll(side[block], 1, axis=1) * np.roll(side[block], -1, axis=1) < 0
        if bool((within & (side[block] == 0) & passing).any()):
            return True
    # Edge i parts the ends of edge j, and edge j those of edge i.
    parted = side * np.roll(side, -1, axis=1) < 0
    return bool((parted & parted.T).any())


def placeholder_problems(record: Mapping[str, Any], kind: RecordKind) -> Iterator[Problem]:
    """Yield placeholders without a region, and regions that a dialogue never mentions.

    What a kind leaves as text where it reads no placeholders, :func:`leftover_problems` tells.
    """
    field, listed = kind.mentions or (None, None)
    count = len(list_or_empty(record.get(listed))) if listed else 0
    if field is None or (listed and not count):
        return  # no regions in the list are the parser's to refuse
    texts, complete = _texts(record, field)
    unmentioned = set(range(count))
    for where, text in texts:
        for match in REGION_PLACEHOLDER.finditer(text):
            bare = not match.group(1)
            region = int(match.group(1) or 0)
            if region < count and (count == 1 or not bare):
                unmentioned.discard(region)
                continue
            complete = False  # a wrong number explains why another region is never mentioned
            known = "one region, <bbox0>" if count == 1 else f"{count} regions"
            known += f", <bbox0> to <bbox{count - 1}>" if count > 1 else ""
            remedy = f"correct the number, or add the box to `{listed}`" if listed else "remove it"
            yield Problem(
                "placeholder-without-region",
                f"{where} has {match.group()}; this record has {known}: {remedy}",
            )
    if complete and unmentioned:
        named = ", ".join(f"<bbox{region}>" for region in sorted(unmentioned))
        yield Problem(
            "region-unmentioned",
            f"no text that is learnt mentions {named}; the mark is drawn all the same: mention "
            "it, or remove the box",
        )


def _texts(record: Mapping[str, Any], field: str) -> tuple[list[tuple[str, str]], bool]:
    """Return place and text of what is kept, and whether it is a dialogue that could be read."""
    value = record.get(field)
    if isinstance(value, str):
        return [(f"field `{field}`", value)], False
    given = list_or_empty(value)
    turns: list[tuple[str, Any, str]] = []
    for number, item in enumerate(given):
        if isinstance(item, Mapping):
            turn = cast("Mapping[str, Any]", item)
            if isinstance(text := turn.get("value"), str):
                turns.append((f"{field}[{number}]", turn.get("from"), text))
    complete = 0 < len(given) == len(turns)
    return [(where, text) for where, _, text in kept_turns(turns)], complete


def leftover_problems(sample: Sample) -> Iterator[Problem]:
    """Yield placeholders that the record's kind did not read: they would be learnt as text."""
    for number, turn in enumerate(sample.turns):
        for part in turn.parts:
            for match in REGION_PLACEHOLDER.finditer(part) if isinstance(part, str) else ():
                yield Problem(
                    "placeholder-without-region",
                    f"turn {number + 1} ({turn.role}) keeps {match.group()} as text: this kind of "
                    "record has no placeholder there; remove it",
                )


def image_placeholder_problems(sample: Sample) -> Iterator[Problem]:
    """Yield what other projects write for an image, in texts of a sample that has one."""
    for number, turn in enumerate(sample.turns if sample.image is not None else ()):
        text = "".join(part for part in turn.parts if isinstance(part, str))
        if match := _FOREIGN_PLACEHOLDER.search(text):
            yield Problem(
                "image-placeholder",
                f"turn {number + 1} ({turn.role}) keeps {match.group()} as text; the image's place "
                f"is {IMAGE_PLACEHOLDER}, in a question: remove what stands for it elsewhere",
            )


def same_words_problems(sample: Sample, plan: VisualPromptPlan) -> Iterator[Problem]:
    """Yield groups of marks that nobody can tell apart by their words.

    The article makes no difference, and marks that share a style on purpose count once.
    """
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for prompt in plan.prompts:
        if sample.regions[prompt.region].style_of is None:
            groups[shape_words(prompt.shape, prompt.colour_name)].append(prompt.region)
    for words, regions in groups.items():
        if len(regions) > 1:
            yield Problem(
                "same-words",
                f"regions {', '.join(map(str, regions))} are all marked `{words}`; give them "
                "different shapes or palette colours, or use fewer regions",
            )


def colour_problems(
    sample: Sample, plan: VisualPromptPlan, turns: Sequence[Turn]
) -> Iterator[Problem]:
    """Yield answers whose own words name a mark's colour before any question does.

    Answers are searched without their mentions, the questions of the finished ``turns`` with them.
    """
    # An unnamed colour of the palette counts, too.
    colours = [prompt.colour_name or _COLOUR_NAMES.get(prompt.rgb) for prompt in plan.prompts]
    asked = ""
    named: set[str] = set()
    for number, (draft, turn) in enumerate(zip(sample.turns, turns, strict=True)):
        if turn.role == "user":
            asked += f"\n{turn.text}"
            continue
        # What stands on the two sides of a mention is not one word.
        answer = "\n".join("" if isinstance(part, Mention) else part for part in draft.parts)
        for colour in dict.fromkeys(name for name in colours if name):
            says = partial(re.search, rf"\b{colour}\b", flags=re.IGNORECASE)
            if colour not in named and says(answer) and not says(asked):
                named.add(colour)
                yield Problem(
                    "answer-names-colour",
                    f"turn {number + 1} (assistant) says `{colour}`, the colour of a mark that no "
                    "question named so far; if it means the mark, write its placeholder",
                )


def blank_problems(turns: Sequence[Turn]) -> Iterator[Problem]:
    """Yield the answers without a visible character."""
    blank = [
        str(number)
        for number, turn in enumerate(turns, 1)
        if turn.role == "assistant" and not turn.text.strip()
    ]
    if blank:
        message = f"the answer of turn {', '.join(blank)} is blank; remove the turn"
        yield Problem("unsupervised", message)


def mark_problems(
    plan: VisualPromptPlan,
    image: Image.Image | None,
    transform: ImageTransform,
    limits: LintLimits,
) -> Iterator[Problem]:
    """Yield marks that are too small, or too like what they are drawn on.

    ``image`` is the unmarked, upright one, RGB; None skips what needs its pixels.
    """
    for prompt in plan.prompts:
        name = f"region {prompt.region}, marked `{prompt_words(prompt)}`"
        painted = mark_opacity(prompt, plan.size)
        bounds = None if painted is None else painted[0].getbbox()
        pixels = 0.0
        if painted is not None and bounds is not None:
            left, top = painted[1]
            box = (bounds[0] + left, bounds[1] + top, bounds[2] + left, bounds[3] + top)
            x1, y1, x2, y2 = np.clip(transform.map_box(box, plan.size), 0, transform.size)
            pixels = float(max(x2 - x1, y2 - y1)) if x2 > x1 and y2 > y1 else 0.0
        if pixels < limits.min_mark_pixels:
            yield Problem(
                "mark-small",
                f"{name}: the mark is {pixels:.1f} pixels long in the input of {transform.size} "
                f"(min_mark_pixels={limits.min_mark_pixels:g}); mark a larger region, draw it "
                "bolder, or leave the record out",
            )
        if painted is None or bounds is None or image is None:
            continue
        opacity, (left, top) = painted
        plain = image.crop((left, top, left + opacity.width, top + opacity.height))
        marked = plain.copy()
        marked.paste(prompt.rgb, (0, 0), opacity)
        change = np.asarray(ImageChops.difference(plain, marked)).max(axis=2)
        contrast = float(np.median(change[np.asarray(opacity) > 0]))
        if contrast < limits.min_contrast:
            yield Problem(
                "mark-contrast",
                f"{name}: rgb {prompt.rgb} at opacity {prompt.alpha} changes the image by "
                f"{contrast:g} levels (min_contrast={limits.min_contrast:g}); use another colour "
                "or more opacity",
            )
