"""What is wrong with the image of a record, and with the record as one of that image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, cast

import numpy as np
from PIL import Image

from vipllava.ingest.image_format import format_of, same_format
from vipllava.ingest.lint.findings import LintLimits, Problem
from vipllava.records import RecordKind
from vipllava.records.fields import Fields
from vipllava.records.image_decode import decode_image, image_size
from vipllava.types import RecordError

_LOOK: Final = (64, 64)
"""Size at which an image is looked at as a whole: single pixels and noise are averaged away."""


def read_image(fields: Fields, kind: RecordKind) -> tuple[Image.Image | None, RecordError | None]:
    """Decode the whole image; return it, or what is wrong with it (None twice: text only)."""
    try:
        if kind.has_image:
            fields.require_image()
        if fields.image is None:
            return None, None
        return decode_image(fields.image, fields.where, upright=fields.upright), None
    except RecordError as error:
        return None, error


def image_problems(
    fields: Fields,
    kind: RecordKind,
    image: Image.Image | None,
    extension: str | None,
    limits: LintLimits,
) -> Iterator[Problem]:
    """Yield what is suspicious about an image beside a record of ``kind``.

    ``image`` is what it decodes to, None if it does not; ``extension`` is its name's in the tar.
    """
    if fields.image is not None:
        yield from _extension_problems(fields.image, extension)
    if image is not None:
        if any(True for _ in kind.outlines(fields.record)):
            yield from _size_problems(fields)
        yield from _look_problems(image, limits)


def _extension_problems(data: bytes, extension: str | None) -> Iterator[Problem]:
    found = format_of(data)
    if extension is not None and found is not None and not same_format(extension, found):
        yield Problem(
            "image-extension",
            f"the image is called .{extension} and is a .{found}; it is read as what it is, other "
            f"programs may not: rename it, or store it as .{extension}",
        )


def _size_problems(fields: Fields) -> Iterator[Problem]:
    """Compare ``width`` and ``height`` of a record, or of VCR's metadata in it, with the image."""
    width, height = fields.size
    for name, holder in (("", fields.record), ("meta.", fields.record.get("meta"))):
        said = cast("dict[str, Any]", holder) if isinstance(holder, dict) else {}
        claimed: tuple[Any, Any] = said.get("width"), said.get("height")
        if None in claimed or claimed == fields.size:
            continue
        message = (
            f"fields `{name}width` and `{name}height` are {claimed[0]!r} and {claimed[1]!r}, the "
            f"image has {width} x {height} pixels"
        )
        other = image_size(fields.require_image(), key=fields.where, upright=not fields.upright)
        if claimed == other:
            frame = "as it lies in the file" if fields.upright else "turned as its EXIF block says"
            yield Problem(
                "image-orientation",
                f"{message}: boxes are in the pixels of the image {frame}; set "
                f"apply_exif_orientation: {str(not fields.upright).lower()} in the manifest",
            )
        else:
            yield Problem(
                "image-size",
                f"{message}: its boxes are of an image of another size; get that one, or scale "
                "them to this one",
            )


def _look_problems(image: Image.Image, limits: LintLimits) -> Iterator[Problem]:
    aspect = max(image.size) / min(image.size)
    if aspect > limits.max_image_aspect:
        yield Problem(
            "image-aspect",
            f"the image has {image.width} x {image.height} pixels, one side {aspect:.0f} times the "
            f"other (max_image_aspect={limits.max_image_aspect:g}): a square input shows hardly "
            "anything of it; cut it into pieces",
        )
    small = np.asarray(image.resize(_LOOK, Image.Resampling.BOX, reducing_gap=2.0))
    contrast = int(np.ptp(small, axis=(0, 1)).max())
    if contrast < limits.min_image_contrast:
        red, green, blue = small.mean(axis=(0, 1)).round().astype(int).tolist()
        yield Problem(
            "image-uniform",
            f"the image is nearly the same everywhere, around rgb ({red}, {green}, {blue}) with "
            f"{contrast} levels of 255 between darkest and brightest "
            f"(min_image_contrast={limits.min_image_contrast:g}): a placeholder, or pixels of a "
            "depth that is not read",
        )
