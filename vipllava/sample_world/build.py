"""Make the sample data on first use: shards for three stages, held-out questions, a ViP-Bench.

Deterministic, about half a minute, under 200 MB, kept under the data root. A folder under its
final name is always whole: it is built beside it and renamed.
"""

from __future__ import annotations

import errno
import json
import logging
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import numpy as np

from vipllava.files.atomic import new_folder
from vipllava.keyed_random import generator_for
from vipllava.sample_world.records import (
    FINETUNE_MIX,
    GPT4V_MIX,
    Record,
    RegionRecord,
    asked_record,
    caption_record,
    choice_record,
    phrase_record,
    text_record,
)
from vipllava.sample_world.scenes import Scene, Split, compose_scene
from vipllava.sample_world.vip_bench import write_vip_bench
from vipllava.shards.tars import write_shards
from vipllava.types import VipLlavaError

_LOG = logging.getLogger(__name__)

FOLDER: Final = "sample_world-v3"
"""Under the data root; the version changes with anything that changes the data."""

_SHARDS: Final[Mapping[str, tuple[Mapping[RegionRecord, float], Split, int]]] = {
    "pretrain": ({caption_record: 1.0}, "train", 4000),
    "finetune": (FINETUNE_MIX, "train", 8000),
    "gpt4v": (GPT4V_MIX, "train", 2000),
    "regions": ({asked_record: 1.0}, "heldout", 800),
}
"""Per folder the shares of its record kinds, whose scenes it shows, and its samples."""
_NUM_TRAIN_SCENES: Final = 5000
_CONTENTS: Final = "contents.json"


def ensure_sample_world(data_root: str | Path, *, scale: float = 1.0) -> Path:
    """Return the sample world's folder under the data root, making it if it is not there.

    ``scale`` is the share of the usual number of samples, for tests.

    Raises:
        VipLlavaError: the folder exists but is not whole, or cannot be written.
    """
    root = Path(data_root).expanduser()
    folder = root / FOLDER
    if not folder.exists():
        require_photographs()
        began = time.monotonic()
        _LOG.info("making the sample data in %s (once, about half a minute)", folder)
        try:
            with new_folder(folder) as unfinished:
                _build(unfinished, scale)
        except OSError as error:
            # Else another process was faster; both made the same bytes.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise VipLlavaError(
                    f"cannot write the sample data under {root}: {error.strerror}; "
                    "choose a writable folder with data_root=FOLDER"
                ) from error
        _LOG.info("sample data made in %.0f s", time.monotonic() - began)
    if not (folder / _CONTENTS).is_file():
        raise VipLlavaError(
            f"{folder} is not whole ({_CONTENTS} is missing); remove the folder and start again"
        )
    return folder


def require_photographs() -> None:
    """Raise VipLlavaError if the packages that carry photographs and digits are not installed."""
    if find_spec("sklearn") is None or find_spec("skimage") is None:
        raise VipLlavaError(
            "the sample data are made of pictures that scikit-learn and scikit-image carry, which "
            'are not installed: pip install "vipllava-lightning[sample]"'
        )


def _build(folder: Path, scale: float) -> None:
    counts = {name: max(8, round(count * scale)) for name, (*_, count) in _SHARDS.items()}
    scenes = {
        "train": _compose_scenes(max(8, round(_NUM_TRAIN_SCENES * scale)), "train"),
        "heldout": _compose_scenes(counts["regions"], "heldout"),
    }
    for name, (mix, split, _) in _SHARDS.items():
        samples = _mixed(name, mix, scenes[split], counts[name])
        # The images were encoded a moment ago: nothing to check.
        write_shards(samples, folder / name, check_images=False)
    write_vip_bench(folder / "ViP-Bench")
    contents = json.dumps({"num_samples": counts}, indent=2)
    (folder / _CONTENTS).write_text(contents + "\n", encoding="utf-8")


def _compose_scenes(count: int, split: Split) -> list[tuple[Scene, bytes]]:
    keys = (("sample_world", split, number) for number in range(count))
    scenes = (compose_scene(generator_for(*key), split) for key in keys)
    return [(scene, scene.jpeg()) for scene in scenes]


def _mixed(
    name: str, mix: Mapping[RegionRecord, float], scenes: list[tuple[Scene, bytes]], count: int
) -> Iterator[tuple[str, Record, bytes | None, str | None]]:
    """Yield ``count`` samples; scenes are reused in turn, as COCO images are in the real data."""
    for number in range(count):
        scene, jpeg = scenes[number % len(scenes)]
        rng = generator_for("sample_world", name, number)
        record, has_image = make_record(mix, scene, number, rng)
        yield record["id"], record, jpeg if has_image else None, "jpg" if has_image else None


def make_record(
    mix: Mapping[RegionRecord, float], scene: Scene, number: int, rng: np.random.Generator
) -> tuple[Record, bool]:
    """Return a record of a kind drawn from ``mix``, and whether it has an image.

    It is text only for what the shares leave of 1.
    """
    makers = [*mix, None]
    rates = np.array([*mix.values(), max(0.0, 1.0 - sum(mix.values()))])
    maker = makers[int(rng.choice(len(makers), p=rates / rates.sum()))]
    if maker is None:
        return text_record(number, rng), False
    if maker is choice_record and len(scene.objects) < 4:
        maker = phrase_record
    return maker(scene, number, rng), True
