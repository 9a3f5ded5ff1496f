"""What a spawned worker does with a record; imports nothing heavy."""

from __future__ import annotations

from typing import Any

from tests.toy_data import encode_picture
from vipllava.keyed_random import generator_for
from vipllava.records import kind_of, parse_record


def draft(record: dict[str, Any]) -> tuple[str, object]:
    """Return kind and first answer of a record."""
    image, rng = encode_picture(320, 240), generator_for("worker")
    sample = parse_record(record, key="k", dataset="d", image=image, rng=rng)
    return kind_of(record), sample.turns[1].parts[0]
