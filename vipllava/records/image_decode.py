"""Encoded images to 8-bit RGB. No torch here: records and shards need only sizes.

What "the stored image" means everywhere in this package: the image whose pixels boxes and polygons
count. For users' data it is the upright one, turned as its EXIF block says: browsers and annotation
tools show that. The published annotations were drawn on the pixels as they lie in the file; their
manifests say so, and ``upright=False`` leaves the EXIF block alone.

* CMYK, palette, grey, 1-bit: converted to RGB.
* 16-bit grey: the upper eight of as many bits as the brightest pixel needs (8, 10, 12, 14 or 16):
  cameras and scanners store fewer than 16. 16-bit colours: the high byte; refused if all is black.
* Transparency: composited over white, as a page shows it.
* Animations: the first frame.
* More than 100 megapixels, or a side of more than 65535 pixels: refused before decoding.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from vipllava.types import RecordError, VipLlavaError, first_line

try:
    import simplejpeg  # pyright: ignore[reportMissingTypeStubs]
except ImportError:  # optional: same pixels as Pillow, about three times faster
    simplejpeg = None

MAX_PIXELS: Final = 100_000_000
MAX_SIDE: Final = 65535  # a JPEG's; what is made of an image grows with its longer side
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_FIX: Final = "replace the file or remove the record"
_LIMITS: Final = f"the limit is {MAX_PIXELS} pixels, and {MAX_SIDE} a side; {_FIX}"
_ORIENTATION: Final = 0x0112
_T: Final = Image.Transpose
_UPRIGHT: Final = {
    2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE,
    6: _T.ROTATE_270, 7: _T.TRANSVERSE, 8: _T.ROTATE_90,
}  # fmt: skip
_FOREIGN: Final = {
    "HEIC": rb".{4}ftyp(hei|hev|mif1|msf1)",
    "AVIF": rb".{4}ftypavi[fs]",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
}
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_PNG_NOTES: Final = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_PNG_DEPTH: Final = 24  # byte of a PNG that says how many bits a channel has
_BLACK: Final = 16  # levels of 255 that 12 bits reach where 16 are read
_BROKEN: Final = (OSError, ValueError, SyntaxError, EOFError, struct.error, KeyError, IndexError)


class Frames(NamedTuple):
    """Width and height of an image, pixels, in the two frames that boxes may count."""

    stored: tuple[int, int]  # as the pixels lie in the file
    upright: tuple[int, int]  # turned as the EXIF block says
    is_turned: bool  # whether the EXIF block says to turn or mirror it


def image_frames(data: bytes, *, key: str) -> Frames:
    """Return both sizes of an image, from the header alone.

    Raises:
        RecordError: not an image, or too large.
    """
    image = _open(data, key)
    width, height = image.size
    orientation = _orientation(image)
    upright = (height, width) if orientation >= 5 else (width, height)
    return Frames((width, height), upright, orientation != 1)


def image_size(data: bytes, *, key: str, upright: bool = True) -> tuple[int, int]:
    """Return width and height of the image, from the header alone.

    ``key`` is the sample's, for messages; ``upright``: turned as the EXIF block says.

    Raises:
        RecordError: not an image, or too large.
    """
    image = _open(data, key)
    width, height = image.size
    on_its_side = upright and _orientation(image) >= 5
    return (height, width) if on_its_side else (width, height)


def decode_image(data: bytes, key: str, *, upright: bool = True) -> Image.Image:
    """Return the image, mode RGB, of JPEG, PNG, WebP, GIF or BMP bytes.

    The content decides, not the extension. For the arguments see :func:`image_size`.

    Raises:
        RecordError: the bytes are no image, are truncated, hold more than 100 megapixels, or
            are of a mode without a defined conversion.
        VipLlavaError: there is not enough memory.
    """
    image = _open(data, key)
    orientation = _orientation(image) if upright else 1
    with naming_in_memory_errors(key):
        rgb = _decode_jpeg(data, image)
        if rgb is None:
            try:
                image.load()
                rgb = _to_rgb(image, key, deep=image.format == "PNG" and data[_PNG_DEPTH] == 16)
            except (*_BROKEN, Image.DecompressionBombError) as error:
                raise _corrupt(f"{key}: the image cannot be decoded ({error})") from error
        return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def opened_image(image: Image.Image, key: str) -> Image.Image:
    """Return an image that Pillow has opened or made, upright, mode RGB, as :func:`decode_image`.

    Raises:
        RecordError: it is truncated, too large, or of a mode without a defined conversion.
        VipLlavaError: there is not enough memory.
    """
    _check_pixels(image.size, key)
    with naming_in_memory_errors(key):
        try:
            image.load()
            orientation = _orientation(image)
            rgb = _to_rgb(image, key, deep=False)
        except (*_BROKEN, Image.DecompressionBombError) as error:
            raise _corrupt(f"{key}: the image cannot be decoded ({error})") from error
        return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


@contextmanager
def naming_in_memory_errors(key: str) -> Generator[None]:
    """Say of which sample the image was for which the memory did not suffice.

    Raises:
        VipLlavaError: in place of Python's or torch's error; it is no fault of the sample, which
            another machine can read.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise VipLlavaError(
            f"{key}: the memory does not suffice for the image and what is made of it "
            f"({first_line(error)}); use fewer processes (num_workers), or more memory"
        ) from error


@contextmanager
def not_of_a_record() -> Generator[None]:
    """Leave out of errors what can be done about a record's image: this one is a person's."""
    try:
        yield
    except RecordError as error:
        error.args = (str(error).replace(f"; {_FIX}", ""), *error.args[1:])
        raise


def _open(data: bytes, key: str) -> Image.Image:
    try:
        with warnings.catch_warnings():  # Pillow warns below our limit, which is checked here
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(_without_notes(data)), formats=_FORMATS)
        size = image.size
    except Image.DecompressionBombError as error:
        raise RecordError(f"{key}: {error}; {_LIMITS}", "image-too-large") from error
    except UnidentifiedImageError as error:
        raise _no_image(data, key) from error
    except _BROKEN as error:
        raise _corrupt(f"{key}: the image's header is broken ({error})") from error
    _check_pixels(size, key)
    return image


def _check_pixels(size: tuple[int, int], key: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise RecordError(
            f"{key}: the image has {width} x {height} pixels; {_LIMITS}", "image-too-large"
        )


def _without_notes(data: bytes) -> bytes:
    """Leave out texts and colour profile of a PNG: Pillow refuses large ones, no pixel needs them.

    A kilobyte of them may inflate to a gigabyte, so its limits stay as they are.
    """
    if not data.startswith(_PNG):
        return data
    parts: list[bytes] = []
    start, place = 0, len(_PNG)
    while place + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length  # size, name and checksum are four bytes each
        if name in _PNG_NOTES and end <= len(data):
            parts.append(data[start:place])
            start = end
        place = end
    return b"".join([*parts, data[start:]]) if parts else data


def _no_image(data: bytes, key: str) -> RecordError:
    expected = ", ".join(_FORMATS)
    name = next((name for name, start in _FOREIGN.items() if re.match(start, data, re.S)), None)
    if name is not None:
        return RecordError(
            f"{key}: the image is {name}, which is not read; expected {expected}. Convert it, e.g. "
            "with ImageMagick: `magick IMAGE -auto-orient IMAGE.png`",
            "image-corrupt",
        )
    found = f"{len(data)} bytes starting with {bytes(data[:8])!r} are no image"
    return _corrupt(f"{key}: {found}; expected {expected}")


def _corrupt(what: str) -> RecordError:
    return RecordError(f"{what}; {_FIX}", "image-corrupt")


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the whole image to look for a block behind the pixels
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _BROKEN:  # a broken EXIF block leaves the pixels as stored, like every viewer does
        return 1
    return value if value in _UPRIGHT else 1


def _decode_jpeg(data: bytes, image: Image.Image) -> Image.Image | None:
    """Decode a plain JPEG with libjpeg-turbo directly; None leaves it to Pillow.

    Accurate DCT and fancy upsampling are what Pillow uses too: the pixels are equal.
    """
    if simplejpeg is None or image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    except ValueError:  # damaged: Pillow's verdict and message count
        return None
    return Image.fromarray(pixels)


def _to_rgb(image: Image.Image, key: str, *, deep: bool) -> Image.Image:
    """Convert a loaded image; ``deep``: its channels have 16 bits in the file."""
    mode = image.mode
    if mode.startswith("I"):  # I;16, I;16B, or I: 16-bit grey
        values = np.asarray(image).clip(0, 0xFFFF).astype(np.uint16)
        bits = int(values.max()).bit_length()
        values >>= max(0, bits + bits % 2 - 8)
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    extrema: Any = image.getextrema() if deep else ()
    if deep and max(brightest for _, brightest in extrema) < _BLACK:
        raise RecordError(
            f"{key}: the image has 16 bits a channel and uses 12 of them at most, of which nothing "
            "but black would be left; store it with 8 bits a channel",
            "image-corrupt",
        )
    if mode == "F":
        raise RecordError(
            f"{key}: the image has floating-point pixels (mode F), whose range is unknown; "
            "store it as 8-bit JPEG or PNG",
            "image-corrupt",
        )
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image if mode == "RGBA" else image.convert("RGBA")
        over = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
        return over.convert("RGB")
    return image.convert("RGB")
