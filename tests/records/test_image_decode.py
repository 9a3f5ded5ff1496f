from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.toy_data import encode_picture
from vipllava.records import image_decode
from vipllava.records.image_decode import decode_image, image_size
from vipllava.types import RecordError


def encode(image: Image.Image, fmt: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and holds no pixels."""
    data = b"\x89PNG\r\n\x1a\n"
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for body in (ihdr, b"IDAT" + zlib.compress(b"")):
        data += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data


def colours(image: Image.Image) -> list[tuple[int, ...]]:
    assert image.mode == "RGB"
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_the_content_decides_about_the_format(fmt: str) -> None:
    data = encode_picture(40, 30, fmt)
    image = decode_image(data, "k")
    assert (image.mode, image.size, image_size(data, key="k")) == ("RGB", (40, 30), (40, 30))


@pytest.mark.parametrize(
    ("width", "height", "subsampling"), [(64, 48, 2), (63, 47, 2), (33, 17, 1), (50, 41, 0)]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
def test_the_fast_jpeg_path_equals_pillow(
    width: int,
    height: int,
    subsampling: int,
    mode: str,
    progressive: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("simplejpeg")
    image = Image.open(io.BytesIO(encode_picture(width, height, "PNG"))).convert(mode)
    data = encode(image, "JPEG", quality=87, subsampling=subsampling, progressive=progressive)
    fast = np.asarray(decode_image(data, "k"))
    monkeypatch.setattr(image_decode, "simplejpeg", None)
    np.testing.assert_array_equal(fast, np.asarray(decode_image(data, "k")))


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(fmt: str, orientation: int) -> None:
    upright = Image.new("RGB", (24, 16), (255, 0, 0))
    upright.paste((0, 0, 255), (0, 0, 8, 8))  # blue top-left corner
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    turned = upright if stored is None else upright.transpose(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(turned, fmt, exif=exif)
    image = decode_image(data, "k")
    assert image.size == image_size(data, key="k") == (24, 16)
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(upright).astype(int))
    assert np.median(difference) <= 2


def test_a_broken_exif_block_leaves_the_picture_as_stored() -> None:
    data = encode(Image.new("RGB", (8, 4)), "JPEG", exif=b"Exif\x00\x00garbage")
    assert image_size(data, key="k") == (8, 4)


def test_cmyk() -> None:
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    red, green, blue = colours(decode_image(data, "k"))[0]
    assert red > 240
    assert max(green, blue) < 15


def test_sixteen_bits_keep_the_high_byte() -> None:
    values = np.array([[0, 255, 256, 0x8080, 0xFFFF]], dtype=np.uint16)
    data = encode(Image.fromarray(values), "PNG")
    assert [pixel[0] for pixel in colours(decode_image(data, "k"))] == [0, 0, 1, 0x80, 255]


def test_palette_and_one_bit() -> None:
    palette = Image.new("RGB", (2, 1), (10, 200, 30)).quantize(4)
    assert colours(decode_image(encode(palette, "PNG"), "k")) == [(10, 200, 30)] * 2
    bits = Image.new("1", (2, 1), 1)
    assert colours(decode_image(encode(bits, "PNG"), "k")) == [(255, 255, 255)] * 2


def test_transparency_lies_over_white() -> None:
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 128))
    expected = [(255, 255, 255), (255, 0, 0), (127, 127, 127)]
    assert colours(decode_image(encode(image, "PNG"), "k")) == expected
    grey = Image.new("LA", (1, 1), (0, 0))
    assert colours(decode_image(encode(grey, "PNG"), "k")) == [(255, 255, 255)]
    palette = Image.new("P", (1, 1), 0)
    data = encode(palette, "PNG", transparency=0)
    assert colours(decode_image(data, "k")) == [(255, 255, 255)]


@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (40_000, 5_000), (60_000, 60_000)])
def test_an_image_bomb_is_refused_before_decoding(width: int, height: int) -> None:
    with pytest.raises(RecordError, match=r"^k: .*the limit is 100000000"):
        image_size(png_header(width, height), key="k")


def test_just_below_the_limit_is_no_bomb() -> None:
    assert image_size(png_header(10_000, 10_000), key="k") == (10_000, 10_000)


@pytest.mark.parametrize(
    "data", [b"", b"oops", b"GIF89a", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", png_header(5, 5)]
)
def test_what_is_no_picture(data: bytes) -> None:
    with pytest.raises(RecordError, match=r"^d/k: .*replace the file or remove the record"):
        decode_image(data, "d/k")


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("keep", [0.05, 0.5, 0.9])
def test_truncated_pictures(fmt: str, keep: float) -> None:
    data = encode_picture(fmt=fmt)
    with pytest.raises(RecordError, match=r"^d/k: "):
        decode_image(data[: int(len(data) * keep)], "d/k")
