"""What the tiny model starts from: its shipped weights, and how its visual prompts are sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from vipllava.types import VipLlavaError
from vipllava.visual_prompts.policies import VisualPromptPolicy, build_policies

BASE: Final = Path(__file__).parent / "base"
"""Holds ``vision_tower`` and ``language_model``; ``tools/teach_base`` makes them."""
_CONF: Final = Path(__file__).parents[2] / "conf" / "visual_prompts"


def load_tiny_policies(conf: Path = _CONF) -> dict[str, VisualPromptPolicy]:
    """Read the tiny model's visual-prompt policies from their configuration files.

    Args:
        conf: folder of ``published.yaml`` and ``tiny.yaml``.

    Raises:
        VipLlavaError: a file cannot be read.
    """

    def read(name: str) -> dict[str, Any]:
        try:
            return yaml.safe_load((conf / name).read_text(encoding="utf-8"))
        except OSError as error:
            raise VipLlavaError(
                f"cannot read {conf / name}: {error.strerror}; run this from a checkout"
            ) from error

    published, tiny = read("published.yaml"), read("tiny.yaml")
    return build_policies(published["policies"], {**published["ranges"], **tiny["ranges"]})
