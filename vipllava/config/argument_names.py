"""Configuration keys in place of the arguments that messages of library classes name.

Those say ``max_length=512``; a user of ``train.py`` has to change ``stage.max_length``.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from omegaconf import DictConfig

from vipllava.types import VipLlavaError

_SAME_NAME: Final = {
    "data": "batching cache_gb max_fault_rate num_workers on_fault pack_length samples_per_epoch "
    "window_samples",
    "guard": "max_skipped on_nonfinite on_spike spike_factor spike_floor window",
    "lint": "max_image_aspect max_outside_pixels min_contrast min_image_contrast min_mark_pixels "
    "min_polygon_area",
    "machine": "micro_batch_size",
    "paths": "data_root",
    "stage": "checkpoint global_batch_size max_length too_long trainable",
    "trainer": "devices num_nodes",
    "tuning": "adapter",
}
KEYS: Final = {
    "cache_dir": "paths.cache",
    "max_images": "data.max_images_per_pack",
    "the mix": "data.mix",
    **{name: f"{part}.{name}" for part, names in _SAME_NAME.items() for name in names.split()},
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
    """Return an error's message with keys for arguments that a section of the job sets."""

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
