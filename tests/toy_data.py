"""Tiny pictures, records and manifests for the tests of this folder."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from vipllava.shards.manifest import Manifest, parse_manifest

Stored = tuple[str, dict[str, Any], bytes | None, str | None]

IMAGE_TOKEN_ID = 400
IMAGE_SEQ_LENGTH = 4
SIDE = 28


def encode_picture(
    width: int = 64, height: int = 48, fmt: str = "JPEG", seed: int = 0, *, orientation: int = 0
) -> bytes:
    """Return a picture of smooth noise, of that size as stored, with an EXIF orientation if any."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer, options = io.BytesIO(), {}
    if orientation:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    Image.fromarray(noise).resize((width, height)).save(buffer, fmt, **options)
    return buffer.getvalue()


def lying_sample(upright: bool) -> tuple[Stored, tuple[int, int]]:
    """Return a sample whose box is inside of its picture in one frame only, and its size in that.

    The picture is stored on its side.
    """
    box, size = ([5, 50, 40, 60], (48, 64)) if upright else ([50, 5, 60, 40], (64, 48))
    record = {"bboxes": [box], "conversations": said("<image>\nWhat is <bbox0>?", "yes")}
    return ("k", record, encode_picture(orientation=6), "jpg"), size


def make_manifest(name: str = "toy", **changes: Any) -> Manifest:
    """Return a valid manifest over ``NAME/*.tar``."""
    raw = {
        "schema_version": 2,
        "name": name,
        "stage": "finetune",
        "licence": "none",
        "shards": f"{name}/*.tar",
        **changes,
    }
    return parse_manifest(raw, where="test")


def said(*texts: str) -> list[dict[str, str]]:
    """Return LLaVA's conversation list, human first."""
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def toy_samples(count: int) -> list[Stored]:
    """Return region, image-level and text-only records in turn."""
    samples: list[Stored] = []
    for number in range(count):
        key, answer = f"s{number:03d}", "yes" * (1 + number % 4)
        if number % 5 == 4:
            samples.append((key, {"id": key, "conversations": said("Hi", answer)}, None, None))
            continue
        record: dict[str, Any] = {"id": key, "image": f"{key}.jpg"}
        if number % 2:
            record["conversations"] = said("<image>\nWhat?", answer)
        else:
            record["bboxes"] = [[5, 5, 40, 30]]
            record["conversations"] = said("<image>\nWhat is <bbox0>?", answer)
        samples.append((key, record, encode_picture(seed=number), "jpg"))
    return samples
