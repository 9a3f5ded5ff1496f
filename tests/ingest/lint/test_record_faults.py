"""An injected-fault corpus in tars: each fault of a record is found, and nothing beside it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.ingest.lint.corpus import (
    BOX,
    BOX2,
    BOX3,
    HEIGHT,
    MARKED,
    RECORDS,
    RING,
    RING2,
    WIDTH,
    Members,
    found,
    lint,
    members_of,
    noise,
    picture,
    published_policies,
    record_of,
    sample_encoder,
    stored,
    write_tar,
)
from tests.toy_data import said
from vipllava.conversation.encode import ConversationEncoder
from vipllava.ingest.lint.findings import CODES, Finding

NAN = float("nan")
CLEAN = picture()
FLAT = [kind for kind in MARKED if kind not in ("flickr30k", "vcr")]
LONG = "word " * 500
BOW_TIE = [20, 20, 120, 110, 120, 20, 20, 110]


class Case(NamedTuple):
    key: str
    codes: set[str]
    record: dict[str, Any]
    image: bytes | None = CLEAN
    extension: str = "jpg"


def with_box(kind: str, box: Any) -> dict[str, Any]:
    """Return a record of ``kind`` with another first box."""
    record = record_of(kind)
    if kind == "flickr30k":
        record["bbox"][0][1] = box
    elif kind == "vcr":
        record["meta"]["boxes"][0] = [*box, 0.9] if isinstance(box, list) else box
    else:
        record["bboxes"][0] = box
    return record


def with_ring(kind: str, ring: Any) -> dict[str, Any]:
    """Return a record of ``kind`` with another first polygon."""
    record = record_of(kind)
    if kind == "vcr":
        record["meta"]["segms"][0][0] = list(map(list, zip(ring[::2], ring[1::2], strict=True)))
    else:
        record["segmentations"][0][0] = ring
    return record


def png_of_size(width: int, height: int) -> bytes:
    """Return the header of a PNG that claims a size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + data + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"


def pictures() -> Iterator[Case]:
    for kind in RECORDS:
        if kind != "text_only":
            yield Case(f"missing-{kind}", {"image-missing"}, record_of(kind), None)
            yield Case(f"garbage-{kind}", {"image-corrupt"}, record_of(kind), b"not a picture")
    png = stored(noise(2), "PNG")
    broken = {
        "half-jpeg": (CLEAN[: len(CLEAN) // 2], "jpg"),
        "end-of-jpeg": (CLEAN[:-200], "jpg"),
        "half-png": (png[: len(png) // 2], "png"),
        "half-webp": (stored(noise(2), "WEBP")[:2000], "webp"),
        "head-only": (CLEAN[:20], "jpg"),
        "empty": (b"", "jpg"),
        "float": (stored(noise(2).convert("F"), "TIFF"), "png"),
    }
    for name, (image, extension) in broken.items():
        yield Case(name, {"image-corrupt"}, record_of("v7w"), image, extension)
    for name, size in {"over": (10_001, 10_000), "bomb": (60_000, 60_000)}.items():
        yield Case(name, {"image-too-large"}, record_of("vg_rel"), png_of_size(*size), "png")
        yield Case(
            f"{name}-plain",
            {"image-too-large"},
            record_of("image_level"),
            png_of_size(*size),
            "png",
        )
    for name, fmt, extension in (
        ("png-as-jpg", "PNG", "jpg"),
        ("gif-as-jpg", "GIF", "jpg"),
        ("bmp-as-jpg", "BMP", "jpg"),
        ("webp-as-jpeg", "WEBP", "jpeg"),
        ("jpg-as-png", "JPEG", "png"),
        ("png-as-webp", "PNG", "webp"),
    ):
        image = stored(noise(3), fmt)
        yield Case(name, {"image-extension"}, record_of("image_level"), image, extension)
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    turned = stored(noise(6, HEIGHT, WIDTH), exif=exif)
    lying = {"width": HEIGHT, "height": WIDTH}
    for kind in ("v7w", "regions"):
        yield Case(f"lying-{kind}", {"image-orientation"}, record_of(kind, **lying), turned)
        yield Case(f"upright-{kind}", set(), record_of(kind, width=WIDTH, height=HEIGHT), turned)
        yield Case(f"other-size-{kind}", {"image-size"}, record_of(kind, width=640, height=480))
    clip = record_of("vcr")
    clip["meta"] |= {"width": 1920, "height": 1080}
    yield Case("other-size-vcr", {"image-size"}, clip)
    yield Case("no-boxes", set(), record_of("image_level", **lying), turned)
    strip = stored(noise(7, 1360, 80))
    yield Case("strip", {"image-aspect"}, record_of("image_level"), strip)
    yield Case("no-strip", set(), record_of("image_level"), stored(noise(7, 1280, 80)))
    night = np.random.default_rng(0).integers(0, 16, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    yield Case("night", {"image-uniform"}, record_of("image_level"), stored(Image.fromarray(night)))


def boxes() -> Iterator[Case]:
    bad: dict[str, tuple[str, list[Any]]] = {
        "nan": ("box-invalid", [20, NAN, 120, 110]),
        "inf": ("box-invalid", [20, 20, float("inf"), 110]),
        "text": ("box-invalid", [20, "20", 120, 110]),
        "short": ("box-invalid", [20, 20]),
        "nothing": ("box-invalid", []),
        "reversed-x": ("box-reversed", [120, 20, 20, 110]),
        "reversed-y": ("box-reversed", [20, 110, 120, 20]),
        "empty-x": ("box-empty", [20, 20, 20, 110]),
        "empty-y": ("box-empty", [20, 20.5, 120, 20.5]),
        "left": ("box-outside", [-90, 20, -10, 110]),
        "below": ("box-outside", [20, HEIGHT, 120, HEIGHT + 90]),
        "beyond": ("box-outside", [5000, 5000, 5100, 5090]),
        "over-right": ("box-clipped", [200, 20, WIDTH + 40, 110]),
        "over-top": ("box-clipped", [20, -5, 120, 110]),
    }
    for kind in MARKED:
        for name, (code, box) in bad.items():
            codes = set() if kind == "v7w" and code == "box-empty" else {code}
            yield Case(f"box-{name}-{kind}", codes, with_box(kind, box))
        yield Case(f"box-null-{kind}", {"box-invalid"}, with_box(kind, None))
    fractions = record_of("regions", bboxes=[[0.1, 0.2, 0.5, 0.9], [0, 0, 1, 1]])
    yield Case("box-fractions", {"box-fractions"}, fractions)
    bad_boxes = [[9, 9, 5, 5], [NAN] * 4, [50, 9, 50, 60]]
    talk = said("What are <bbox0>, <bbox1>, <bbox2>?", "Cups.")
    record = record_of("regions", bboxes=bad_boxes, segmentations=..., conversations=talk)
    yield Case("three-boxes", {"box-reversed", "box-invalid", "box-empty"}, record)
    record = record_of("vg_rel", bboxes=[[120, 20, 20, 110], [20, 20, 120]])
    yield Case("blind", {"image-missing", "box-reversed", "box-invalid"}, record, None)


def polygons() -> Iterator[Case]:
    bad: dict[str, tuple[str, list[Any]]] = {
        "nan": ("polygon-invalid", [*RING[:9], NAN]),
        "text": ("polygon-invalid", [*RING[:9], "100"]),
        "outside": ("polygon-outside", [400, 20, 500, 20, 500, 90, 400, 90]),
        "line": ("polygon-degenerate", [20, 20, 60, 60, 100, 100, 40, 40]),
        "dot": ("polygon-degenerate", [20, 20, 20, 20, 20, 20, 20, 20]),
        "speck": ("polygon-degenerate", [20, 20, 20.5, 20, 20.5, 20.5, 20, 20.5]),
        "bow-tie": ("polygon-self-crossing", BOW_TIE),
    }
    flat: dict[str, tuple[str, Any]] = {
        "two": ("polygon-invalid", [20, 20, 120, 110]),
        "none": ("polygon-invalid", []),
        "odd": ("polygon-invalid", RING[:9]),
        "rle": ("polygon-invalid", {"counts": "abc", "size": [9, 9]}),
        "null": ("polygon-invalid", None),
    }
    for kind in ("refcocog", "refcocog-gpt4v", "regions", "vcr"):
        for name, (code, ring) in (bad if kind == "vcr" else {**bad, **flat}).items():
            yield Case(f"ring-{name}-{kind}", {code}, with_ring(kind, ring))
    for kind in ("refcocog", "refcocog-gpt4v"):
        record = record_of(kind, segmentations=[None])
        yield Case(f"no-mask-{kind}", {"polygon-invalid"}, record)
    rings = [RING, BOW_TIE, [1, 1, 9, 9], RING2, [20, 20, 90, 20, 50, 20]]
    record = record_of("regions", segmentations=[rings, [[400, 20, 500, 20, 500, 90]]])
    some = {"polygon-self-crossing", "polygon-invalid", "polygon-degenerate", "polygon-outside"}
    yield Case("many-rings", some, record)


def run_lengths() -> Iterator[Case]:
    size = [252, 336]
    bad: dict[str, tuple[str, Any]] = {
        "overrun": ("mask-invalid", {"size": size, "counts": [84672, 1]}),
        "short": ("mask-invalid", {"size": size, "counts": "04"}),
        "letters": ("mask-invalid", {"size": size, "counts": "\u00e9"}),
        "empty": ("mask-invalid", {"size": size, "counts": [84672]}),
        "object": ("mask-invalid", {"counts": "04"}),
        "other": ("mask-size", {"size": [252, 300], "counts": [0, 75600]}),
        "turned": ("mask-size", {"size": [336, 252], "counts": [0, 84672]}),
    }
    for kind in ("refcocog", "refcocog-gpt4v", "regions", "vcr"):
        for name, (code, mask) in bad.items():
            record = record_of(kind)
            masks = record["meta"]["segms"] if kind == "vcr" else record["segmentations"]
            masks[0] = mask
            yield Case(f"{name}-{kind}", {code}, record)


def records() -> Iterator[Case]:
    broken: dict[str, dict[str, Any]] = {
        "image_level": {"conversations": ...},
        "text_only": {"conversations": said("only a question")},
        "refcocog": {"answer": "  "},
        "refcocog-gpt4v": {"conversations": [*said("<bbox>?", "a", "b"), {"from": "x"}]},
        "vg_rel": {"bboxes": [BOX]},
        "vg_rel-gpt4v": {"bboxes": ...},
        "flickr30k": {"grounding": "no phrase at all"},
        "vcr": {"answer_choices": [["a"], ["b"], ["c"]]},
        "v7w": {"bboxes": [BOX, BOX2, BOX3], "answer": BOX},
        "pointQA_twice": {"answer": 2.5},
        "regions": {"visual_prompts": [{"shape": "star"}, None]},
    }
    assert set(broken) == set(RECORDS)
    for kind, changes in broken.items():
        image = None if kind == "text_only" else CLEAN
        record = record_of(kind, **changes)
        yield Case(f"record-{kind}", {"record-invalid"}, record, image)
    more: dict[str, tuple[str, dict[str, Any]]] = {
        "no-such-person": ("vcr", {"question": ["Is", [7], "here", "?"]}),
        "no-person": ("vcr", {"rationale_choices": [["a"], ["b"], ["c"], [[-1], "smiles"]]}),
        "no-clip": ("vcr", {"meta": ...}),
        "label": ("vcr", {"answer_label": 4}),
        "other-answer": ("v7w", {"answer": [1, 2, 3, 4]}),
        "two-pictures": ("image_level", {"conversations": said("<image>", "a", "<image>", "b")}),
        "surrogate": ("image_level", {"conversations": said("<image>", "\ud800")}),
        "masks": ("regions", {"segmentations": [[RING]]}),
        "colour": ("regions", {"visual_prompts": [{"colour": "pink"}, None]}),
    }
    for name, (kind, changes) in more.items():
        yield Case(f"record-{name}", {"record-invalid"}, record_of(kind, **changes))
    for name in ("boxes", "segmentation"):  # told at the first only
        record = record_of("image_level", **{name: [BOX]})
        yield Case(f"unread-{name}", {"field-unread"}, record)
        yield Case(f"unread-{name}-again", set(), record)
    record = record_of("text_only", conversations=said("<image>\nWhat?", "A dog."))
    yield Case("lost-image", {"image-missing"}, record, None)
    record = record_of("regions", bboxes=[], segmentations=...)
    yield Case("boxless", {"placeholder-without-region"}, record)


def placeholders() -> Iterator[Case]:
    code = {"placeholder-without-region"}
    talk = said("<image>\nWho is <bbox0>?", "A man, not <bbox2>, not <bbox3>.")
    plain = said("<image>\nWho is <bbox0>?", "A man.")
    for name, record in {
        "regions": record_of("regions", conversations=talk),
        "refcocog-gpt4v": record_of("refcocog-gpt4v", conversations=talk),
        "vg_rel-gpt4v": record_of("vg_rel-gpt4v", conversations=talk),
        "flickr30k": record_of("flickr30k", grounding="two men <bbox0> hold it <bbox7> ."),
        "bare": record_of("vg_rel-gpt4v", conversations=said("Who is <bbox>?", "A man.")),
        "image_level": record_of("image_level", conversations=plain),
        "bare-image_level": record_of("image_level", conversations=said("Hi <bbox>", "A man.")),
        "refcocog": record_of("refcocog", answer="the cup <bbox0>"),
        "vg_rel": record_of("vg_rel", answer="man <bbox0>, riding, horse <bbox1>"),
        "v7w": record_of("v7w", question="Which is <bbox3>?"),
        "pointQA_twice": record_of("pointQA_twice", general_question="How many like <bbox>?"),
        "vcr": record_of("vcr", question=["Why", "is", [0], "near", "<bbox1>", "?"]),
    }.items():
        yield Case(f"place-{name}", code, record)
    for number, mark in enumerate(("<Image>", "<im_start>", "<img>", "<|image_1|>", "<image_0>")):
        record = record_of("image_level", conversations=said(f"{mark}\nWho is it?", "A man."))
        yield Case(f"foreign-{number}", {"image-placeholder"}, record)
    text = record_of("text_only", conversations=said("What does <img> say in HTML?", "An image."))
    yield Case("foreign-text_only", set(), text, None)
    text = record_of("text_only", conversations=said("Where is <bbox1>?", "There."))
    yield Case("place-text_only", code, text, None)
    for kind in ("regions", "vg_rel-gpt4v"):
        record = record_of(kind, conversations=plain, segmentations=...)
        yield Case(f"silent-{kind}", {"region-unmentioned"}, record)
    record = record_of("refcocog-gpt4v", conversations=said("Who is it?", "A man."))
    yield Case("silent-refcocog-gpt4v", {"region-unmentioned"}, record)
    left_out = said("Who is <bbox0>?", "A man.", "And <bbox1>?")
    yield Case(
        "silent-in-the-end", {"region-unmentioned"}, record_of("regions", conversations=left_out)
    )


def marks() -> Iterator[Case]:
    def fixed(*prompts: dict[str, Any], **changes: Any) -> dict[str, Any]:
        return record_of("regions", visual_prompts=list(prompts), **changes)

    red = {"shape": "arrow", "colour": "red"}
    blue = {"shape": "arrow", "colour": "blue"}
    rgb = {"shape": "arrow", "colour": [9, 99, 200], "alpha": 255}
    yield Case("words-fixed", {"same-words"}, fixed(red, red))
    yield Case("words-unnamed", {"same-words"}, fixed(rgb, {**rgb, "colour": [200, 99, 9]}))
    boxes = [[20 + n, 20, 120 + n, 110] for n in range(73)]
    talk = said("What are these: " + " ".join(f"<bbox{n}>" for n in range(73)) + "?", "Cups.")
    record = record_of("regions", bboxes=boxes, segmentations=..., conversations=talk)
    yield Case("words-palette", {"same-words"}, record)
    caption = " ".join(f"cup <bbox{n}>" for n in range(31))
    record = record_of("flickr30k", bbox=[[box] for box in boxes[:31]], grounding=caption)
    yield Case("words-flickr30k", {"same-words"}, record)

    tiny = [50, 50, 52, 52]
    for shape in ("rectangle", "mask"):
        small = {"shape": shape, "colour": "red", "width": 1, "alpha": 255}
        record = fixed(small, blue, bboxes=[tiny, BOX2], segmentations=...)
        yield Case(f"small-{shape}", {"mark-small"}, record)
    large = {"shape": "rectangle", "colour": "red", "width": 1, "alpha": 255}
    record = fixed(large, blue, bboxes=[[50, 50, 60, 60], BOX2], segmentations=...)
    wide = stored(noise(4, 2000, 1500), "PNG")
    yield Case("small-when-resized", {"mark-small"}, record, wide, "png")

    for shape in ("rectangle", "ellipse", "point", "triangle", "mask", "mask contour", "arrow"):
        faint = {"shape": shape, "colour": [255, 0, 0], "alpha": 8}
        yield Case(f"faint-{shape}", {"mark-contrast"}, fixed(faint, blue))
    grey = stored(Image.new("RGB", (WIDTH, HEIGHT), (128, 128, 128)))
    alike = {"shape": "mask", "colour": [120, 130, 125], "alpha": 255}
    yield Case("alike", {"mark-contrast", "image-uniform"}, fixed(alike, blue), grey)
    all_red = stored(Image.new("RGB", (WIDTH, HEIGHT), (255, 0, 0)))
    unseen = {"mark-contrast", "image-uniform"}
    yield Case("red-on-red", unseen, record_of("pointQA_twice"), all_red)

    lime = {"shape": "mask", "colour": "lime"}
    talk = said("What is there?", "The Lime thing <bbox0>.", "And <bbox1>?", "It is blue.")
    yield Case("leak", {"answer-names-colour"}, fixed(lime, blue, conversations=talk))
    talk = said("What is <bbox0>?", "It is near the blue one.", "And <bbox1>?", "It is blue.")
    yield Case("leak-too-early", {"answer-names-colour"}, fixed(lime, blue, conversations=talk))
    yield Case("leak-unnamed", {"answer-names-colour"}, record_of("pointQA_twice", answer="red"))
    talk = said("Is <bbox0> near <bbox1>?", "Lime, and blueish.", "Is it?", "blue, lime")
    yield Case("no-leak", set(), fixed(lime, blue, conversations=talk))


def lengths() -> Iterator[Case]:
    for kind in ("image_level", "refcocog-gpt4v", "vg_rel-gpt4v", "regions", "text_only"):
        image = None if kind == "text_only" else CLEAN
        first = {"refcocog-gpt4v": "<bbox>", "image_level": "", "text_only": ""}
        start = f"What is {first.get(kind, '<bbox0> and <bbox1>')}?"
        record = record_of(kind, conversations=said(start, LONG, "Why?", "It is."))
        yield Case(f"long-{kind}", {"too-long"}, record, image)
        record = record_of(kind, conversations=said(start, "It is.", "Why?", LONG, "So?", "Yes."))
        yield Case(f"cut-{kind}", {"truncated"}, record, image)
        record = record_of(kind, conversations=said(start, " \n"))
        yield Case(f"blank-{kind}", {"unsupervised"}, record, image)
        record = record_of(kind, conversations=said(start, "It is.", "Why?", ""))
        yield Case(f"empty-{kind}", {"unsupervised"}, record, image)
    for kind, name in (("refcocog", "answer"), ("vg_rel", "answer"), ("v7w", "question")):
        yield Case(f"long-{kind}", {"too-long"}, record_of(kind, **{name: LONG}))
    record = record_of("vcr", question=[LONG, [0], "?"])
    yield Case("long-vcr", {"too-long"}, record)
    record = record_of("flickr30k", grounding=f"{LONG} <bbox0> .")
    yield Case("long-flickr30k", {"too-long"}, record)
    record = record_of("pointQA_twice", general_question=LONG)
    yield Case("long-pointQA", {"too-long"}, record)


def several() -> Iterator[Case]:
    record = record_of(
        "regions",
        bboxes=[[120, 20, 20, 110], [150, 40, 400, 200]],
        segmentations=[[BOW_TIE], None],
        conversations=said("<image>\nWhat is <bbox0>?", "A cup."),
    )
    all_of = {"box-reversed", "box-clipped", "polygon-self-crossing", "region-unmentioned"}
    yield Case("several", all_of | {"image-extension"}, record, stored(noise(5), "PNG"))
    record = record_of("regions", conversations=said("<bbox0>, <bbox1>?", "a", "And?", LONG))
    yield Case("broken-and-cut", {"image-corrupt", "truncated"}, record, CLEAN[:-200])


GROUPS = (pictures, boxes, polygons, run_lengths, records, placeholders, marks, lengths, several)
SHARDED: dict[str, str] = {  # faults of other tests: of tars, of copies, and of the labels
    "shard-broken": "test_shard_faults.py",
    "index-missing": "test_shard_faults.py",
    "duplicate-key": "test_shard_faults.py",
    "duplicate-sample": "test_shard_faults.py",
    "label-proof": "test_entries.py",
    "box-form": "test_shard_faults.py",
}


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_each_fault_is_found_and_nothing_else(
    tmp_path: Path, encoder: ConversationEncoder, group: Any
) -> None:
    cases: list[Case] = list(group())
    tar: Members = []
    for number, case in enumerate(cases):
        record = {**case.record, "model": number}  # copies are another fault
        tar += members_of(case.key, record, case.image, case.extension)
    write_tar(tmp_path / "toy" / "faults.tar", tar)
    policies = published_policies()
    if group is polygons:  # a mask of no area makes a mark of no area
        policies = {k: replace(p, shapes=("rectangle",)) for k, p in policies.items()}
    report = lint(tmp_path, sample_encoder(encoder, policies))
    expected = {(case.key, code) for case in cases for code in case.codes}
    assert found(report) - expected == set()
    assert expected - found(report) == set()
    assert report.num_checked == len(cases)
    assert {(f.dataset, f.shard) for f in report.findings} == {("toy", "toy/faults.tar")}
    assert all(_readable(finding) for finding in report.findings)


def _readable(finding: Finding) -> bool:
    return len(finding.message) > 20 and not finding.message.startswith(("toy/", "/"))


def test_every_class_is_injected() -> None:
    injected = {code for group in GROUPS for case in group() for code in case.codes}
    assert injected | set(SHARDED) == set(CODES)
    assert not injected & set(SHARDED)
