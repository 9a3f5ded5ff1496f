from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.toy_data import encode_picture
from vipllava.records import image_decode
from vipllava.records.image_decode import decode_image, image_size, naming_in_memory_errors
from vipllava.types import RecordError, VipLlavaError


def encode(image: Image.Image, fmt: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """Return a PNG of named chunks."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, body in chunks:
        parts += [struct.pack(">I", len(body)), name, body]
        parts.append(struct.pack(">I", zlib.crc32(body, zlib.crc32(name))))
    return b"".join(parts)


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and holds no pixels."""
    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return png([(b"IHDR", ihdr), (b"IDAT", zlib.compress(b""))])


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


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
def test_published_pictures_stay_as_they_are_stored(fmt: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    lying = Image.new("RGB", (24, 16), (255, 0, 0))
    data = encode(lying, fmt, exif=exif)
    assert image_size(data, key="k") == decode_image(data, "k").size == (16, 24)
    assert image_size(data, key="k", upright=False) == (24, 16)
    assert decode_image(data, "k", upright=False).size == (24, 16)


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


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 7, 255], [0, 7, 255]),
        ([0, 4, 256, 1023], [0, 1, 64, 255]),
        ([0, 16, 1024, 4095], [0, 1, 64, 255]),
        ([0, 64, 4096, 16383], [0, 1, 64, 255]),
        ([0, 256, 4096, 16384], [0, 1, 16, 64]),
        ([0, 0, 0], [0, 0, 0]),
    ],
)
def test_greys_of_fewer_bits_than_their_file_are_scaled_by_what_is_there(
    values: list[int], expected: list[int]
) -> None:
    data = encode(Image.fromarray(np.array([values], dtype=np.uint16)), "PNG")
    assert [pixel[0] for pixel in colours(decode_image(data, "k"))] == expected


def sixteen_bit_colours(*values: int) -> bytes:
    """Return a PNG of 16 bits a channel, one pixel per value."""
    row = b"\0" + b"".join(struct.pack(">HHH", value, value, 0) for value in values)
    ihdr = struct.pack(">IIBBBBB", len(values), 1, 16, 2, 0, 0, 0)
    return png([(b"IHDR", ihdr), (b"IDAT", zlib.compress(row)), (b"IEND", b"")])


def test_sixteen_bit_colours_of_which_nothing_but_black_is_left_are_refused() -> None:
    assert colours(decode_image(sixteen_bit_colours(0, 0x1000), "k")) == [(0, 0, 0), (16, 16, 0)]
    with pytest.raises(RecordError, match=r"^d/k: the image has 16 bits a channel and uses 12"):
        decode_image(sixteen_bit_colours(0, 0x0FFF), "d/k")


TEXT = zlib.compress(bytes(2 << 20))  # inflates to twice what Pillow allows
NOTES = {
    "text": (b"tEXt", b"prompt\0" + b"x" * (3 << 20)),
    "zipped text": (b"zTXt", b"prompt\0\0" + TEXT),
    "international text": (b"iTXt", b"prompt\0\1\0\0\0" + TEXT),
    "colour profile": (b"iCCP", b"profile\0\0" + TEXT),
}


@pytest.mark.parametrize("count", [1, 70])
@pytest.mark.parametrize("place", [1, 2, 3])  # behind size, pixels, and the very end
@pytest.mark.parametrize("name", NOTES)
def test_large_texts_and_profiles_do_not_break_a_png(name: str, place: int, count: int) -> None:
    if count > 1 and name == "text":
        count = 22  # 66 MB: Pillow allows 64
    row = struct.pack("B3B3B", 0, 10, 200, 30, 40, 50, 60)
    ihdr = struct.pack(">IIBBBBB", 2, 1, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", ihdr), (b"IDAT", zlib.compress(row)), (b"IEND", b"")]
    data = png([*chunks[:place], *[NOTES[name]] * count, *chunks[place:]])
    assert image_size(data, key="k") == (2, 1)
    assert colours(decode_image(data, "k")) == [(10, 200, 30), (40, 50, 60)]


def test_a_png_that_ends_in_a_text_is_truncated() -> None:
    data = png([(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 8, 2, 0, 0, 0)), NOTES["text"]])
    for cut in (data, data[:-20]):
        with pytest.raises(RecordError, match=r"^d/k: .*replace the file or remove the record"):
            decode_image(cut, "d/k")


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
    assert image_size(png_header(1, 65_535), key="k") == (1, 65_535)


@pytest.mark.parametrize("size", [(65_536, 1), (1, 100_000_000)])
def test_a_side_that_no_jpeg_has_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(RecordError, match=r"^k: .*, and 65535 a side") as error:
        image_size(png_header(*size), key="k")
    assert error.value.fault == "image-too-large"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("HEIC", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
        ("HEIC", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic"),
        ("AVIF", b"\0\0\0\x1cftypavif\0\0\0\0avifmif1"),
        ("TIFF", encode(Image.new("RGB", (4, 4)), "TIFF")),
        ("TIFF", b"MM\0*\0\0\0\x08"),
        ("JPEG XL", b"\xff\x0a\xfa\x7f\x01\x90"),
        ("JPEG 2000", b"\0\0\0\x0cjP  \r\n\x87\n"),
    ],
)
def test_formats_that_are_not_read_are_named_with_a_way_to_convert_them(
    name: str, data: bytes
) -> None:
    expected = (
        f"d/k: the image is {name}, which is not read; expected JPEG, PNG, WEBP, GIF, BMP. Convert "
        "it, e.g. with ImageMagick: `magick IMAGE -auto-orient IMAGE.png`"
    )
    with pytest.raises(RecordError) as error:
        decode_image(data, "d/k")
    assert (str(error.value), error.value.fault) == (expected, "image-corrupt")


def test_a_lack_of_memory_names_its_sample() -> None:
    for allocate in (
        lambda: np.empty(1 << 60, dtype=np.uint8),
        lambda: torch.empty(1 << 60, dtype=torch.uint8),
    ):
        with (
            pytest.raises(VipLlavaError, match=r"^d/k: the memory does not suffice") as error,
            naming_in_memory_errors("d/k"),
        ):
            allocate()
        assert not isinstance(error.value, RecordError)  # another machine can read the sample
    with pytest.raises(RuntimeError, match=r"^other$"), naming_in_memory_errors("d/k"):
        raise RuntimeError("other")


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
