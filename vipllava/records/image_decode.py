"""Encoded images to upright 8-bit RGB. No torch here: records and shards need only sizes.

What "the stored image" means everywhere in this package: the image after its EXIF rotation, as
browsers and annotation tools show it. Boxes and polygons are in those pixels.

* CMYK, palette, grey, 1-bit: converted to RGB.
* 16-bit grey: the high byte is kept (16-bit RGB files are read so by Pillow itself).
* Transparency: composited over white, as a page shows it.
* Animations: the first frame.
* More than 100 megapixels: refused before decoding.
"""

from __future__ import annotations

import io
import struct
import warnings
from typing import Final

import numpy as np
from PIL import Image, UnidentifiedImageError

from vipllava.types import RecordError

try:
    import simplejpeg  # pyright: ignore[reportMissingTypeStubs]
except ImportError:  # optional: same pixels as Pillow, about three times faster
    simplejpeg = None

MAX_PIXELS: Final = 100_000_000
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_FIX: Final = "replace the file or remove the record"
_ORIENTATION: Final = 0x0112
_T: Final = Image.Transpose
_UPRIGHT: Final = {
    2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE,
    6: _T.ROTATE_270, 7: _T.TRANSVERSE, 8: _T.ROTATE_90,
}  # fmt: skip
_BROKEN: Final = (OSError, ValueError, SyntaxError, EOFError, struct.error, KeyError, IndexError)


def image_size(data: bytes, *, key: str) -> tuple[int, int]:
    """Return width and height of the upright image, from the header alone.

    Raises:
        RecordError: not an image, or more than 100 megapixels.
    """
    image = _open(data, key)
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)  # on its side


def decode_image(data: bytes, key: str) -> Image.Image:
    """Return the upright image, mode RGB, of JPEG, PNG, WebP, GIF or BMP bytes.

    The content decides, not the extension; ``key`` is the sample's, for messages.

    Raises:
        RecordError: the bytes are no image, are truncated, hold more than 100 megapixels, or
            are of a mode without a defined conversion.
    """
    image = _open(data, key)
    orientation = _orientation(image)
    rgb = _decode_jpeg(data, image)
    if rgb is None:
        try:
            image.load()
            rgb = _to_rgb(image, key)
        except (*_BROKEN, Image.DecompressionBombError) as error:
            raise _corrupt(f"{key}: the image cannot be decoded ({error})") from error
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _open(data: bytes, key: str) -> Image.Image:
    too_large = f"the limit is {MAX_PIXELS} pixels; {_FIX}"
    try:
        with warnings.catch_warnings():  # Pillow warns below our limit, which is checked here
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        width, height = image.size
    except Image.DecompressionBombError as error:
        raise RecordError(f"{key}: {error}; {too_large}", "image-too-large") from error
    except UnidentifiedImageError as error:
        raise _corrupt(
            f"{key}: {len(data)} bytes starting with {bytes(data[:8])!r} are no image; expected "
            f"{', '.join(_FORMATS)}"
        ) from error
    except _BROKEN as error:
        raise _corrupt(f"{key}: the image's header is broken ({error})") from error
    if width * height > MAX_PIXELS:
        raise RecordError(
            f"{key}: the image has {width} x {height} pixels; {too_large}", "image-too-large"
        )
    return image


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


def _to_rgb(image: Image.Image, key: str) -> Image.Image:
    mode = image.mode
    if mode.startswith("I"):  # I;16, I;16B, or I: 16-bit grey
        high = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(high.clip(0, 255).astype(np.uint8)).convert("RGB")
    if mode == "F":
        raise RecordError(
            f"{key}: the image has floating-point pixels (mode F), whose range is unknown; "
            "store it as 8-bit JPEG or PNG",
            "image-corrupt",
        )
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
