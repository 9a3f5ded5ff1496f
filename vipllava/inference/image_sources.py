"""An image from wherever a person has it: upright, RGB, and bounded before it is decoded."""

from __future__ import annotations

import base64
import binascii
import os
import re
from pathlib import Path
from typing import IO, Any, Final, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from vipllava.files.public_fetch import fetch_public
from vipllava.records.image_decode import (
    MAX_PIXELS,
    decode_image,
    image_size,
    not_of_a_record,
    opened_image,
)
from vipllava.types import RecordError, VipLlavaError

Encoded: TypeAlias = bytes | bytearray | memoryview | IO[bytes]
ImageSource: TypeAlias = str | os.PathLike[str] | Encoded | Image.Image | npt.NDArray[Any]

MOST_BYTES: Final = 256 * 2**20
_DATA_URI: Final = re.compile(
    r"data:(image/[\w.+-]{1,40})(?:;[\w-]{1,40}=[^;,]{0,40})*;base64,", re.I
)
_LONGEST_START: Final = 300
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_SOURCES: Final = "a path, bytes, an opened file, a PIL image, an array, a data URI or a URL"


def open_image(
    source: ImageSource,
    *,
    allow_urls: bool = False,
    max_bytes: int = MOST_BYTES,
    max_pixels: int = MAX_PIXELS,
    key: str = "image",
) -> Image.Image:
    """Return an image, upright as its EXIF block says, mode RGB; transparency is over white.

    Args:
        source: a path; the bytes of a JPEG, PNG, WebP, GIF or BMP file; a file opened in binary
            mode; a PIL image; an array of uint8 [height, width], [height, width, 3] (red, green,
            blue) or [height, width, 4]; a ``data:image/...;base64,`` URI; or, if allowed, an http
            or https address.
        allow_urls: whether addresses are fetched, public ones only
            (:mod:`vipllava.files.public_fetch`).
        max_bytes: of the encoded image.
        max_pixels: width times height, known before any pixel is decoded.
        key: names the image in errors.

    Raises:
        RecordError: it is no image or too large.
        VipLlavaError: it cannot be read, or ``source`` is something else.
    """
    if isinstance(source, Image.Image):
        _check_pixels(source.size, max_pixels, key)
        with not_of_a_record():
            return opened_image(source, key)
    if isinstance(source, np.ndarray):
        _check_array(source, key)
        _check_pixels((source.shape[1], source.shape[0]), max_pixels, key)
        return opened_image(Image.fromarray(source), key)
    data = _read(source, allow_urls, max_bytes, key)
    with not_of_a_record():
        width, height = image_size(data, key=key)
        _check_pixels((width, height), max_pixels, key)
        return decode_image(data, key)


def image_from_data_uri(
    uri: str, *, max_bytes: int = MOST_BYTES, max_pixels: int = MAX_PIXELS, key: str = "image"
) -> Image.Image:
    """Return the image of a data URI; for the arguments and errors see :func:`open_image`."""
    data = bytes_of_data_uri(uri, max_bytes=max_bytes, key=key)
    return open_image(data, max_bytes=max_bytes, max_pixels=max_pixels, key=key)


def bytes_of_data_uri(uri: str, *, max_bytes: int = MOST_BYTES, key: str = "image") -> bytes:
    """Return the bytes of ``data:image/...;base64,...``, whose padding may be left out.

    Raises:
        RecordError: it is none of an image, is not base64 (per cent signs are not read), or has
            more than ``max_bytes``, which is known before any is decoded.
    """
    start = _DATA_URI.match(uri[:_LONGEST_START])
    if start is None:
        shown = repr(uri if len(uri) <= 40 else f"{uri[:40]}...")
        raise _no_image(f"{key} is {shown}; expected data:image/png;base64,... (or jpeg, webp)")
    letters = len(uri) - start.end()
    _check_bytes(letters * 3 // 4 - 2, max_bytes, key)  # of which two may be padding
    encoded = uri[start.end() :].rstrip("=")
    padding = letters - len(encoded)
    if padding > 2 or (padding and letters % 4):
        raise _no_image(f"{key}: its base64 ends in {padding} signs of padding, too many or few")
    try:
        data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: letters beyond ASCII
        raise _no_image(f"{key}: no base64 is behind the comma ({error})") from error
    _check_bytes(len(data), max_bytes, key)
    return data


def _read(source: object, allow_urls: bool, max_bytes: int, key: str) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif isinstance(source, str) and source[:5].lower() == "data:":
        data = bytes_of_data_uri(source, max_bytes=max_bytes, key=key)
    elif isinstance(source, str) and (scheme := _SCHEME.match(source)):
        if scheme[0].lower() not in ("http://", "https://"):
            raise VipLlavaError(f"{key} is {source[:200]!r}; expected {_SOURCES} of http or https")
        if not allow_urls:
            raise VipLlavaError(
                f"{key} is the address {source[:200]!r}, and addresses are not fetched unless "
                "asked to: pass allow_urls=True, or download it first"
            )
        data = fetch_public(source, max_bytes)
    elif isinstance(source, (str, os.PathLike)):
        data = _read_file(Path(source), max_bytes, key)
    elif hasattr(source, "read"):
        found: Any = cast("IO[bytes]", source).read(max_bytes + 1)
        if not isinstance(found, bytes):
            raise VipLlavaError(
                f"{key} is a file of texts: open it in binary mode, open(path, 'rb')"
            )
        data = found
    else:
        kind = f"{type(source).__module__}.{type(source).__qualname__}".removeprefix("builtins.")
        remedy = ""
        if hasattr(source, "permute"):  # torch's
            remedy = "; a tensor [3, height, width] of uint8: tensor.permute(1, 2, 0).cpu().numpy()"
        raise VipLlavaError(f"{key} is of type {kind}; expected {_SOURCES}{remedy}")
    _check_bytes(len(data), max_bytes, key)
    return data


def _read_file(path: Path, max_bytes: int, key: str) -> bytes:
    try:
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "no regular file"
            raise VipLlavaError(f"{key} is {str(path)!r}, which is {what}; expected {_SOURCES}")
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise VipLlavaError(f"{key}: {str(path)[:300]!r} cannot be read: {reason}") from error


def _check_array(array: npt.NDArray[Any], key: str) -> None:
    shape, remedy = list(array.shape), ""
    is_image = array.ndim == 2 or (array.ndim == 3 and shape[2] in (3, 4))
    if array.dtype != np.uint8:
        remedy = "convert it, e.g. (255 * array).round().astype('uint8') if it has 0 to 1"
    elif not is_image and array.ndim == 3 and shape[0] in (3, 4):
        remedy = "put the channels last, array.transpose(1, 2, 0)"
    elif not is_image and array.ndim == 4:
        remedy = "give one image, e.g. array[0]"
    elif not is_image:
        remedy = "give grey, red-green-blue or red-green-blue-alpha"
    elif not array.size:
        remedy = "give one with pixels"
    if remedy:
        raise VipLlavaError(
            f"{key} is an array of {array.dtype}, {shape}; expected uint8 [height, width], "
            f"[height, width, 3] or [height, width, 4]: {remedy}"
        )


def _check_bytes(num_bytes: int, max_bytes: int, key: str) -> None:
    if num_bytes > max_bytes:
        raise RecordError(
            f"{key}: the image has more than {max_bytes} bytes, the limit; give a smaller one",
            "image-too-large",
        )


def _check_pixels(size: tuple[int, int], max_pixels: int, key: str) -> None:
    if size[0] * size[1] > max_pixels:
        raise RecordError(
            f"{key}: the image has {size[0]} x {size[1]} pixels, the limit is {max_pixels}; give a "
            "smaller one",
            "image-too-large",
        )


def _no_image(message: str) -> RecordError:
    return RecordError(message, "image-corrupt")
