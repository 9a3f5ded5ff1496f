"""An image is the same wherever it comes from, and what is none is refused before any work."""

from __future__ import annotations

import base64
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vipllava.inference import image_sources
from vipllava.inference.image_sources import bytes_of_data_uri, image_from_data_uri, open_image
from vipllava.records.image_decode import decode_image
from vipllava.types import RecordError, VipLlavaError

PHOTO = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def encoded(kind: str = "PNG", pixels: np.ndarray = PHOTO, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def test_one_image_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = encoded()
    path = tmp_path / "photo.jpg"  # the content decides
    path.write_bytes(data)
    monkeypatch.setattr(image_sources, "fetch_public", lambda url, max_bytes: data)
    sources: list[Any] = [
        path, str(path), os.fspath(path), data, bytearray(data), memoryview(data),
        io.BytesIO(data), path.open("rb"), Image.open(path), Image.fromarray(PHOTO), PHOTO,
        PHOTO.copy(order="F"), uri(data), uri(data).rstrip("="),
        "DATA:image/PNG;BASE64" + uri(data)[21:],
        uri(data, "image/jpeg;charset=utf-8"), "https://a.example/photo.png",
    ]  # fmt: skip
    for source in sources:
        image = open_image(source, allow_urls=True)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), PHOTO), source
        if hasattr(source, "close"):
            source.close()


def test_it_is_another_image_than_the_given_one():
    given_image = Image.fromarray(PHOTO)
    open_image(given_image).paste((0, 0, 0), (0, 0, 9, 6))
    assert np.array_equal(np.asarray(given_image), PHOTO)


def test_grey_and_transparency():
    grey = PHOTO[..., 0]
    assert np.array_equal(np.asarray(open_image(grey)), np.repeat(grey[..., None], 3, axis=2))
    alpha = np.concatenate([PHOTO, np.zeros((6, 9, 1), np.uint8)], axis=2)
    for source in (alpha, encoded(pixels=alpha), Image.fromarray(alpha)):
        assert np.asarray(open_image(source)).min() == 255  # over white
    deep = Image.fromarray(grey.astype(np.uint16) * 256)
    assert np.array_equal(np.asarray(open_image(deep))[..., 0], grey)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_it_stands_upright(orientation: int, kind: str):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(kind, exif=exif)
    expected = decode_image(data, "photo")
    assert expected.size == ((6, 9) if orientation >= 5 else (9, 6))
    assert open_image(data).tobytes() == expected.tobytes()
    with Image.open(io.BytesIO(data)) as opened:
        assert open_image(opened).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://a.example/x.png", "image is the address 'https://a.example/x.png', and address"),
        ("HTTP://a.example/x.png", "pass allow_urls=True, or download it first"),
        ("s3://bucket/x.png", "image is 's3://bucket/x.png'; expected a path, bytes, an opened"),
        ("file:///etc/passwd", "image is 'file:///etc/passwd'; expected a path"),
        ("no-such.png", "image: 'no-such.png' cannot be read: No such file or directory"),
        ("a\0b", "cannot be read: embedded null byte"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("/", "image is '/', which is a folder"),
        ("/dev/null", "image is '/dev/null', which is no regular file"),
        (b"", "image: 0 bytes starting with b'' are no image"),
        (b"GIF89a", "image: "),
        (io.StringIO("x"), "image is a file of texts: open it in binary mode"),
        (None, "image is of type NoneType; expected a path, bytes, an opened file"),
        (7, "image is of type int"),
        ([PHOTO], "image is of type list"),
        (torch.zeros(3, 6, 9), "image is of type torch.Tensor; expected .*; a tensor [3, height,"),
        (PHOTO / 255, "image is an array of float64, [6, 9, 3]; expected uint8 [height, width], ["),
        (PHOTO / 255, "convert it, e.g. (255 * array).round().astype('uint8') if it has 0 to 1"),
        (PHOTO > 7, "image is an array of bool, [6, 9, 3]"),
        (PHOTO.transpose(2, 0, 1), "put the channels last, array.transpose(1, 2, 0)"),
        (PHOTO[None], "give one image, e.g. array[0]"),
        (PHOTO[..., :2], "give grey, red-green-blue or red-green-blue-alpha"),
        (PHOTO[0, 0], "give grey, red-green-blue"),
        (PHOTO[:0], "give one with pixels"),
        (Image.new("F", (4, 4)), "image: the image has floating-point pixels (mode F)"),
        ("data:text/html;base64,aaaa", "image is 'data:text/html;base64,aaaa'; expected data:ima"),
        ("data:,x", "image is 'data:,x'; expected data:image/png;base64,..."),
        ("data:image/png,%89PNG", "image is 'data:image/png,%89PNG'; expected data:image/png;bas"),
        ("data:image/png;base64,%89PNG", "image: no base64 is behind the comma"),
        ("data:image/png;base64,\u00e4", "image: no base64 is behind the comma"),
        ("data:image/png;base64,aaa-_a==", "image: no base64 is behind the comma"),
        ("data:image/png;base64,aa aa", "image: no base64 is behind the comma"),
        ("data:image/png;base64,a", "image: no base64 is behind the comma"),
        ("data:image/png;base64,a===", "its base64 ends in 3 signs of padding, too many or few"),
        ("data:image/png;base64,aaa==", "its base64 ends in 2 signs of padding, too many or few"),
        ("data:image/png;base64,", "image: 0 bytes starting with b'' are no image"),
        ("data:image/png" + ";a=b" * 9999, "image is 'data:image/png;a=b;a=b"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused(source: Any, message: str):
    pattern = re.escape(message).replace(re.escape(".*"), ".*")
    with pytest.raises(VipLlavaError, match=pattern):
        open_image(source)


def test_bytes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = encoded()
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    asked: list[int] = []
    monkeypatch.setattr(
        image_sources, "fetch_public", lambda url, max_bytes: asked.append(max_bytes) or data
    )
    for source in (data, path, io.BytesIO(data), uri(data), "http://a.example/"):
        open_image(source, max_bytes=len(data), allow_urls=True)
        if isinstance(source, io.BytesIO):
            source.seek(0)
        with pytest.raises(
            RecordError, match=f"photo: the image has more than {len(data) - 1} byt"
        ) as e:
            open_image(source, max_bytes=len(data) - 1, allow_urls=True, key="photo")
        assert e.value.fault == "image-too-large"
    assert asked == [len(data), len(data) - 1]


def test_a_large_data_uri_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base64, "b64decode", None)
    with pytest.raises(RecordError, match="the image has more than 10 bytes, the limit"):
        bytes_of_data_uri("data:image/png;base64," + "A" * 100, max_bytes=10)


def test_pixels_are_bounded_before_any_is_decoded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(image_sources, "decode_image", None)
    monkeypatch.setattr(image_sources, "opened_image", None)
    sources: list[Any] = [encoded(), uri(encoded()), PHOTO, Image.fromarray(PHOTO)]
    for source in sources:
        with pytest.raises(RecordError, match="photo: the image has 9 x 6 pixels, the limit is 53"):
            open_image(source, max_pixels=53, key="photo")
    with pytest.raises(RecordError, match="the limit is 53"):
        image_from_data_uri(uri(encoded()), max_pixels=53)
    monkeypatch.undo()
    assert open_image(PHOTO, max_pixels=54).size == (9, 6)
    broad = Image.new("1", (65_536, 1))
    with pytest.raises(RecordError, match="the image has 65536 x 1 pixels; the limit is"):
        open_image(broad)


@given(st.binary(max_size=40))
def test_padding_may_be_left_out(data: bytes):
    whole = base64.b64encode(data).decode()
    for text in (whole, whole.rstrip("=")):
        assert bytes_of_data_uri(f"data:image/png;base64,{text}") == data


@given(st.text(max_size=60) | st.text("ABab01+/=%-_ ", max_size=9))
def test_any_text_is_bytes_or_a_record_error(text: str):
    for start in ("", "data:image/png;base64,", "data:image/"):
        try:
            found = bytes_of_data_uri(start + text)
        except RecordError:
            continue
        assert isinstance(found, bytes)
