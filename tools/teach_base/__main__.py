r"""Make the shipped base weights of the tiny model anew: ``python -m tools.teach_base``.

Tower and language model are taught apart, as CLIP and Vicuna were, and stored as 16-bit
safetensors in ``vipllava/sample_world/base``. The shipped ones took about two hours on one core:

    python -m tools.teach_base --output first --tower-steps 4500
    python -m tools.teach_base --output second --parts vision_tower \
        --tower-start first/vision_tower --seed 1 --tower-steps 3000

The scenes got more photographs and light after the first course of the shipped tower: the
commands make weights of the same kind and quality, not the same bytes.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from tools.teach_base.language_model import teach_language_model
from tools.teach_base.vision_tower import teach_vision_tower
from vipllava.files.atomic import new_file, write_whole
from vipllava.sample_world import BASE, TINY_POLICIES
from vipllava.types import VipLlavaError

VISION_TOWER, LANGUAGE_MODEL = "vision_tower", "language_model"
_LARGEST_BASE_BYTES: Final = 12_000_000

_LOG = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Teach what is asked for and store it in half precision."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.teach_base",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = [VISION_TOWER, LANGUAGE_MODEL]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--output", type=Path, default=BASE)
    parser.add_argument("--tower-steps", type=int, default=4500)
    parser.add_argument("--tower-start", type=Path, help="tower to continue from (default: none)")
    parser.add_argument("--seed", type=int, default=0, help="another one for another course")
    parser.add_argument("--language-steps", type=int, default=3500)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    policies = TINY_POLICIES
    report: dict[str, Any] = {}
    if VISION_TOWER in options.parts:
        report[VISION_TOWER] = teach_vision_tower(
            options.output / VISION_TOWER,
            policies["refcocog"],
            steps=options.tower_steps,
            start=options.tower_start,
            seed=options.seed,
        )
    if LANGUAGE_MODEL in options.parts:
        report[LANGUAGE_MODEL] = teach_language_model(
            options.output / LANGUAGE_MODEL,
            policies,
            steps=options.language_steps,
            seed=options.seed,
        )
    for part in options.parts:
        store_half(options.output / part)
    _LOG.info("taught: %s", json.dumps(report, indent=1))
    size = sum(path.stat().st_size for path in options.output.rglob("*") if path.is_file())
    if size > _LARGEST_BASE_BYTES:
        raise VipLlavaError(
            f"{options.output} has {size} bytes, more than the {_LARGEST_BASE_BYTES} it may ship"
        )


def store_half(folder: Path) -> None:
    """Rewrite the weights of a Hugging Face folder as float16 safetensors.

    float16 rather than bfloat16: the weights are small, and its three more bits of mantissa keep
    the stored model closer to the taught one.
    """
    weights, config = folder / "model.safetensors", folder / "config.json"
    halves = {
        name: tensor.to(torch.float16) if tensor.is_floating_point() else tensor
        for name, tensor in load_file(weights).items()
    }
    if bad := [name for name, tensor in halves.items() if not torch.isfinite(tensor).all()]:
        raise VipLlavaError(f"{weights}: {bad} do not fit float16")
    with new_file(weights) as unfinished:
        save_file(halves, unfinished, metadata={"format": "pt"})
    settings = {**json.loads(config.read_text(encoding="utf-8")), "dtype": "float16"}
    write_whole(config, json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except VipLlavaError as error:
        sys.exit(str(error))
