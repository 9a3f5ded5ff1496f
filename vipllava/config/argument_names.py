"""Configuration keys in place of the argument names that messages of library classes give.

A library class is used without any configuration, too, so its messages say ``max_length=512``. A
user of ``train.py`` has to change ``stage.max_length``: the entry points put that in its place.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from omegaconf import DictConfig

from vipllava.types import VipLlavaError

KEYS: Final = {
    "adapter": "tuning.adapter",
    "batching": "data.batching",
    "cache_dir": "paths.cache",
    "cache_gb": "data.cache_gb",
    "checkpoint": "stage.checkpoint",
    "data_root": "paths.data_root",
    "devices": "trainer.devices",
    "global_batch_size": "stage.global_batch_size",
    "max_fault_rate": "data.max_fault_rate",
    "max_images": "data.max_images_per_pack",
    "max_length": "stage.max_length",
    "max_outside_pixels": "lint.max_outside_pixels",
    "max_skipped": "guard.max_skipped",
    "micro_batch_size": "machine.micro_batch_size",
    "min_contrast": "lint.min_contrast",
    "min_mark_pixels": "lint.min_mark_pixels",
    "min_polygon_area": "lint.min_polygon_area",
    "num_nodes": "trainer.num_nodes",
    "on_fault": "data.on_fault",
    "on_nonfinite": "guard.on_nonfinite",
    "on_spike": "guard.on_spike",
    "pack_length": "data.pack_length",
    "samples_per_epoch": "data.samples_per_epoch",
    "spike_factor": "guard.spike_factor",
    "spike_floor": "guard.spike_floor",
    "the mix": "data.mix",
    "trainable": "stage.trainable",
    "window": "guard.window",
    "window_samples": "data.window_samples",
}
"""Arguments of library classes that ``conf/train.yaml`` sets, and the key that does."""

# A word that could be English counts only where a value follows, the others anywhere but in a path
# or a longer key.
_ARGUMENT: Final = re.compile(
    r"(?<![\w./-])(?:{})(?![\w/-]|\.\w)".format(
        "|".join(name if {"_", " "} & set(name) else f"{name}(?==)" for name in KEYS)
    )
)


def with_keys(message: str, cfg: DictConfig) -> str:
    """Return a library's message with configuration keys for arguments.

    Args:
        message: of an error.
        cfg: the job; an argument that none of its sections sets keeps its name.
    """

    def key(found: re.Match[str]) -> str:
        name = KEYS[found[0]]
        return name if name.partition(".")[0] in cfg else found[0]

    return _ARGUMENT.sub(key, message)


@contextmanager
def naming_keys(cfg: DictConfig) -> Generator[None]:
    """Let a :class:`VipLlavaError` from inside name the keys of a job."""
    try:
        yield
    except VipLlavaError as error:
        error.args = (with_keys(str(error), cfg), *error.args[1:])
        raise
