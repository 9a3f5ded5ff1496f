"""Nothing is found in what is right."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.ingest.lint.corpus import (
    HEIGHT,
    RECORDS,
    WIDTH,
    lint,
    lint_one,
    members_of,
    noise,
    picture,
    record_of,
    sample_encoder,
    stored,
    write_tar,
)
from vipllava.conversation.encode import ConversationEncoder
from vipllava.records import KINDS


def test_every_kind_is_here() -> None:
    assert set(RECORDS) == set(KINDS)


@pytest.mark.parametrize("seed", range(3))
def test_a_clean_corpus(tmp_path: Path, encoder: ConversationEncoder, seed: int) -> None:
    for number, kind in enumerate(RECORDS):
        image = None if kind == "text_only" else picture(10 * seed + number)
        write_tar(tmp_path / "toy" / f"{number:02d}.tar", members_of(kind, RECORDS[kind], image))
    for epoch in range(4):
        report = lint(tmp_path, sample_encoder(encoder, seed=seed), seed=seed, epoch=epoch)
        assert report.findings == ()
        assert (report.num_samples, report.num_checked, report.counts) == (11, 11, {})


def test_boxes_that_count_the_last_pixel_otherwise(encoder: ConversationEncoder) -> None:
    boxes = [[-1, -0.5, 120, 110], [150, 40, WIDTH + 1, HEIGHT + 0.5]]
    record = record_of("regions", bboxes=boxes, segmentations=...)
    assert lint_one(record, sample_encoder(encoder), image=picture()) == []


def _sixteen_bit() -> bytes:
    grey = np.asarray(noise(1).convert("L")).astype(np.uint16) << 8
    return stored(Image.fromarray(grey), "PNG")


def _turned() -> bytes:
    """A picture that lies on its side and says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return stored(noise(1, HEIGHT, WIDTH), "JPEG", exif=exif)


@pytest.mark.parametrize(
    ("image", "extension"),
    [
        (stored(noise(1), "PNG"), "png"),
        (stored(noise(1), "WEBP"), "webp"),
        (stored(noise(1)), "jpeg"),
        (stored(noise(1).convert("CMYK")), "jpg"),
        (stored(noise(1).convert("L")), "jpg"),
        (stored(noise(1).convert("P"), "PNG"), "png"),
        (stored(noise(1).convert("RGBA"), "PNG"), "png"),
        (_sixteen_bit(), "png"),
        (_turned(), "jpg"),
    ],
    ids=["png", "webp", "jpeg", "cmyk", "grey", "palette", "alpha", "16 bit", "exif"],
)
def test_unusual_pictures(encoder: ConversationEncoder, image: bytes, extension: str) -> None:
    assert Image.open(io.BytesIO(image)).size in ((WIDTH, HEIGHT), (HEIGHT, WIDTH))
    samples = sample_encoder(encoder)
    for epoch in range(4):
        record = record_of("v7w")
        assert lint_one(record, samples, image=image, extension=extension, epoch=epoch) == []
