"""Print a digest of marked pictures and texts of every kind; run in processes of their own."""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np

from tests.records.random_records import KINDS
from tests.toy_data import encode_picture
from tests.visual_prompts.policy_files import load_policies
from vipllava.records import parse_record
from vipllava.records.image_decode import decode_image
from vipllava.stream.sample_encoder import marks_generator, plan_sample, words_generator
from vipllava.visual_prompts.render import render_plan

SIZE = (200, 150)


def digest(kind: str, epoch: int) -> str:
    """Return the digest of one sample's texts and pixels."""
    record = KINDS[kind](np.random.default_rng(5), SIZE)
    image = encode_picture(*SIZE, fmt="PNG")
    rng = words_generator(1, epoch, "d", "k")
    sample = parse_record(record, key="k", dataset="d", image=image, rng=rng)
    marks = marks_generator(1, epoch, "d", "k")
    plan, turns = plan_sample(sample, SIZE, load_policies(), marks)
    pixels = render_plan(decode_image(image, "k"), plan).tobytes()
    texts = json.dumps([turn.text for turn in turns]).encode()
    return hashlib.sha256(texts + pixels).hexdigest()


def digests(kinds: list[str]) -> list[list[str]]:
    """Return digests of two epochs per kind."""
    return [[digest(kind, epoch) for epoch in (0, 1)] for kind in kinds]


if __name__ == "__main__":
    json.dump(digests(sys.argv[1:]), sys.stdout)
