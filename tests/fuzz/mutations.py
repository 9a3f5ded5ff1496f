"""Good records, images and tars, and what becomes of them when somebody's data went wrong."""

from __future__ import annotations

import bz2
import copy
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, Final

from hypothesis import strategies as st
from PIL import Image

from tests.ingest.importing.exports import (
    KITCHEN,
    coco,
    label_studio,
    label_studio_min,
    labelme,
    labelme_mask,
    lvis,
    ring_mask,
    shape,
    via_2,
    via_3,
)
from tests.records.test_kinds import RECORDS
from tests.toy_data import encode_picture, said

DEEP: Final = "@DEEP@"
"""Stands in a record for lists within each other; ``json`` itself could not write them."""
_TEXTS: Final = [
    "", " ", "\0", "\ud83d", "\udc80", "a.jpg", "a" * 300, "é" * 200, "a/" * 2000, ".", "..",
    "../a.jpg", "/etc/passwd", "/9j/" + "4AAQ" * 2000, "iVBORw0KGgo" + "A/b" * 300,
    "data:image/jpeg;base64,AAAA", "<image>", "<image><image>", "<bbox>", "<bbox0>", "<bbox7>",
    "<bbox99999999999>", "human", "gpt", "user", "vcr-1", "refcocog-gpt4v", DEEP, "red", "arrow",
]  # fmt: skip
_NUMBERS: Final = [
    0, -1, 1, 3, 4, 255, 256, 2**31, 2**63, 10**400, -(10**400), 0.5, -0.0, 1e-320, 1e308, -1e308,
    float("inf"), float("-inf"), float("nan"), True, False, None,
]  # fmt: skip
_SHAPES: Final[list[Any]] = [
    [], {}, [[]], [{}], [None], [0, 0, 0, 0], [0.1, 0.1, 0.5, 0.5], [40, 40, 5, 5], [5, 5, 5],
    [[5, 5, 30, 40]] * 3, [1e308, 1e308, 1.5e308, 1.7e308], [float("nan")] * 4, [[1, 1] * 3],
    said("<image>\nHi", "Yes"), said("<image>", "<image>"), [{"from": "gpt", "value": "x"}],
    {"from": "human"}, {"shape": "arrow", "width": 10**9}, {"boxes": [], "segms": []},
    {"size": [48, 64], "counts": [100, 20, 2952]}, {"size": [48, 64], "counts": "T30T:"},
    {"size": [64, 48], "counts": [0, 3072]}, {"size": [48, 64], "counts": [3072, 0]},
]  # fmt: skip
LABELME_SHAPES: Final = (
    shape("cup", "circle", [(60, 60), (80, 60)]),
    shape("cup", "polygon", [(20, 20), (60, 20), (60, 60)], group_id=1),
    labelme_mask("cup", ring_mask(KITCHEN.size, (20, 30, 60, 80))) | {"group_id": 1},
    shape("fork", "point", [(9, 9)]),
    shape("fork", "linestrip", [(9, 9), (20, 40), (50, 60)]),
)
_FIELDS: Final = sorted({name for record in RECORDS.values() for name in record})
_VALUES: Final = st.one_of(
    st.sampled_from([*_TEXTS, *_NUMBERS, *_SHAPES]),
    st.integers(-100, 1000),
    st.floats(),
    st.text(st.characters(), max_size=8),
)
_HOW: Final = ("replace", "remove", "repeat", "wrap", "rename")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each list or object within a value with each of its indices or names."""
    names = value if isinstance(value, dict) else range(len(value))
    for name in names:
        yield value, name
        if isinstance(value[name], (dict, list)):
            yield from _places(value[name])


def _edit(record: dict[str, Any], number: int, how: str, value: Any) -> None:
    places = list(_places(record))
    if not places:
        record["id"] = value
        return
    holder, name = places[number % len(places)]
    if how == "remove":
        del holder[name]
    elif how == "wrap":
        holder[name] = [holder[name], copy.deepcopy(value)]
    elif how == "repeat" and isinstance(holder, list):
        holder.append(holder[name])
    elif how == "rename" and isinstance(holder, dict):
        holder[_FIELDS[number % len(_FIELDS)]] = holder.pop(name)
    else:
        holder[name] = copy.deepcopy(value)


@st.composite
def byte_edits(draw: st.DrawFn, data: bytes, *, least: int = 0) -> bytes:
    """Return bytes with some of them changed, lost, doubled or cut off."""
    extreme = st.sampled_from(
        [b"\0", b"\xff", b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80"]
    )
    for _ in range(draw(st.integers(least, 3))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.sampled_from([1, 2, 4, 16, 512]))
        how = draw(st.sampled_from(("flip", "overwrite", "lose", "double", "cut", "insert")))
        piece, after = data[start : start + length], data[start + length :]
        if how == "flip" and piece:
            flipped = bytes([piece[0] ^ (1 << draw(st.integers(0, 7)))])
            data = data[:start] + flipped + data[start + 1 :]
        elif how == "overwrite":
            new = draw(st.one_of(extreme, st.binary(min_size=1, max_size=4)))
            data = data[:start] + new + data[start + len(new) :]
        elif how == "insert":
            data = data[:start] + draw(st.binary(max_size=4)) + data[start:]
        elif how == "cut":
            data = data[:start]
        else:
            data = data[:start] + piece * (2 * (how == "double")) + after
    return data


@st.composite
def records(draw: st.DrawFn) -> tuple[str, bytes]:
    """Return a kind's name and the JSON of a record of it, edited."""
    kind = draw(st.sampled_from(sorted(RECORDS)))
    record = copy.deepcopy(RECORDS[kind])
    edits = st.tuples(st.integers(0, 499), st.sampled_from(_HOW), _VALUES)
    for number, how, value in draw(st.lists(edits, min_size=1, max_size=4)):
        _edit(record, number, how, value)
    text = json.dumps(record).encode()
    if DEEP.encode() in text:
        depth = draw(st.sampled_from([60, 70, 300, 900, 990, 100_000]))
        text = text.replace(f'"{DEEP}"'.encode(), b"[" * depth + b"]" * depth)
    if draw(st.integers(0, 9)) == 0:
        text = draw(byte_edits(text))
    return kind, text


_EXPORTS: Final = {
    "coco": coco, "lvis": lvis, "via": via_2, "via ": via_3, "label-studio": label_studio,
    "label-studio ": label_studio_min, "labelme": lambda: labelme(KITCHEN, *LABELME_SHAPES),
}  # fmt: skip


@st.composite
def exports(draw: st.DrawFn) -> tuple[str, bytes]:
    """Return a format's name and an export of it, edited; of YOLO the lines of a picture."""
    form = draw(st.sampled_from(["yolo", *_EXPORTS]))
    if form == "yolo":
        return form, draw(byte_edits(b"0 0.5 0.5 0.2 0.4\n1 0.1 0.1 0.5 0.1 0.5 0.6\n", least=1))
    export: Any = {"all": _EXPORTS[form]()}
    edits = st.tuples(st.integers(0, 2999), st.sampled_from(_HOW), _VALUES)
    for number, how, value in draw(st.lists(edits, min_size=1, max_size=4)):
        _edit(export, number, how, value)
    text = json.dumps(export.get("all")).encode()
    return form.strip(), draw(byte_edits(text)) if draw(st.integers(0, 9)) == 0 else text


def _images() -> list[bytes]:
    found = [encode_picture(24, 18, fmt) for fmt in ("JPEG", "PNG", "WEBP", "GIF", "BMP")]
    ramp = Image.linear_gradient("L").resize((24, 18))
    for mode, fmt in (("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("I;16", "PNG"),
                      ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "GIF"), ("1", "BMP")):  # fmt: skip
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        more = {"exif": exif} if fmt in ("PNG", "JPEG") else {}
        ramp.convert(mode).save(buffer, fmt, **more)
        found.append(buffer.getvalue())
    return found


images: Final = st.sampled_from(_images()).flatmap(lambda data: byte_edits(data, least=1))


def _tar(form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for key, kind in (("a", "image_level"), ("b" * 120, "text_only"), ("é", "regions")):
            members = {f"{key}.json": json.dumps(RECORDS[kind]).encode()}
            if kind != "text_only":
                members[f"{key}.jpg"] = encode_picture(24, 18)
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


_TARS: Final = [_tar(form) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
_HEADER_FIELDS: Final = {
    "name": (0, 100),
    "size": (124, 12),
    "type": (156, 1),
    "prefix": (345, 155),
}
_HEADER_VALUES: Final = {
    "name": [b"22.05.jpg", b"a.json", b"a.jpg", b".json", b"x", b"\xff\xfe.json", b"a.gif", b"d/"],
    "size": [b"7" * 11, b"0" * 11, b"1", b"-1", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"x", b"",
             b"\xff" * 10 + b"\xfe\x00", b"\x80" + b"\0" * 6 + b"\x7f" * 5, b"00000002000"],
    "type": [bytes([code]) for code in b"01234567LKxgSXDVM\0"],
    "prefix": [b"", b"a/b", b"a.b", b"\xff" * 155],
}  # fmt: skip
_PACKED: Final[list[Callable[[bytes], bytes]]] = [gzip.compress, bz2.compress, lzma.compress]


def _signed(header: bytes) -> bytes:
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


@st.composite
def tars(draw: st.DrawFn) -> bytes:
    """Return a tar of which headers (with right checksums), blocks or bytes are changed."""
    data = draw(st.sampled_from(_TARS))
    if draw(st.integers(0, 19)) == 0:
        return draw(byte_edits(draw(st.sampled_from(_PACKED))(data)))
    for _ in range(draw(st.integers(0, 3))):
        headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
        if not headers:
            break
        at = draw(st.sampled_from(headers))
        name = draw(st.sampled_from(sorted(_HEADER_FIELDS)))
        start, length = _HEADER_FIELDS[name]
        value = draw(st.sampled_from(_HEADER_VALUES[name]))
        header = data[at : at + 512]
        header = header[:start] + value.ljust(length, b"\0") + header[start + length :]
        data = data[:at] + _signed(header) + data[at + 512 :]
    return draw(byte_edits(data, least=0)) if draw(st.booleans()) else data
