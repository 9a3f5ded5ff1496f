r"""``vipllava teach-base``: make the shipped base weights of the tiny model anew.

Tower and language model are taught apart, as CLIP and Vicuna were, and stored as 16-bit
safetensors in ``vipllava/sample_world/base``. The shipped ones took about two hours on one core:

    vipllava teach-base --output first --tower-steps 4500
    vipllava teach-base --output second --parts vision_tower --tower-start first/vision_tower \
        --seed 1 --tower-steps 3000

The scenes got more photographs and light after the first course of the shipped tower: the
commands make weights of the same kind and quality, not the same bytes.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from vipllava.files.atomic import new_file
from vipllava.types import VipLlavaError
from vipllava.visual_prompts.policies import VisualPromptPolicy, build_policies

BASE: Final = Path(__file__).parent / "base"
VISION_TOWER, LANGUAGE_MODEL = "vision_tower", "language_model"
_LARGEST_BASE_BYTES: Final = 12_000_000
_CONF: Final = Path(__file__).parents[2] / "conf" / "visual_prompts"

_LOG = logging.getLogger(__name__)


def load_tiny_policies(conf: Path = _CONF) -> dict[str, VisualPromptPolicy]:
    """Read the tiny model's visual-prompt policies from their configuration files."""
    files: list[Mapping[str, Any]] = []
    for name in ("published.yaml", "tiny.yaml"):
        try:
            files.append(yaml.safe_load((conf / name).read_text(encoding="utf-8")))
        except OSError as error:
            raise VipLlavaError(
                f"cannot read {conf / name}: {error.strerror}; run this from a checkout, or name "
                "its folder with --visual-prompts"
            ) from error
    published, tiny = files
    return build_policies(published["policies"], {**published["ranges"], **tiny["ranges"]})


def main(arguments: Sequence[str] | None = None) -> int:
    """Teach what is asked for and store it in half precision."""
    parser = argparse.ArgumentParser(prog="vipllava teach-base", description=__doc__)
    parser.add_argument("--parts", nargs="+", default=[VISION_TOWER, LANGUAGE_MODEL])
    parser.add_argument("--output", type=Path, default=BASE)
    parser.add_argument("--visual-prompts", type=Path, default=_CONF)
    parser.add_argument("--tower-steps", type=int, default=4500)
    parser.add_argument("--tower-start", type=Path, help="tower to continue from (default: none)")
    parser.add_argument("--seed", type=int, default=0, help="another one for another course")
    parser.add_argument("--language-steps", type=int, default=3500)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - {VISION_TOWER, LANGUAGE_MODEL}:
        parser.error(f"unknown parts {sorted(unknown)}; known: {VISION_TOWER}, {LANGUAGE_MODEL}")
    policies = load_tiny_policies(options.visual_prompts)
    import torch  # late: --help answers at once

    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {}
    if VISION_TOWER in options.parts:
        from vipllava.sample_world.teach_vision_tower import teach_vision_tower

        output = options.output / VISION_TOWER
        report[VISION_TOWER] = teach_vision_tower(
            output,
            policies["refcocog"],
            steps=options.tower_steps,
            start=options.tower_start,
            seed=options.seed,
        )
        store_half(output)
    if LANGUAGE_MODEL in options.parts:
        from vipllava.sample_world.teach_language_model import teach_language_model

        output = options.output / LANGUAGE_MODEL
        report[LANGUAGE_MODEL] = {
            "loss": teach_language_model(
                output, policies, steps=options.language_steps, seed=options.seed
            )
        }
        store_half(output)
    _LOG.info("taught: %s", json.dumps(report, indent=1))
    size = sum(path.stat().st_size for path in options.output.rglob("*") if path.is_file())
    if size > _LARGEST_BASE_BYTES:
        raise VipLlavaError(
            f"{options.output} has {size} bytes, more than the {_LARGEST_BASE_BYTES} it may ship"
        )
    return 0


def store_half(folder: Path) -> None:
    """Rewrite the weights of a Hugging Face folder as float16 safetensors.

    float16 rather than bfloat16: the weights are small, and its three more bits of mantissa keep
    the stored model closer to the taught one.
    """
    import torch
    from safetensors.torch import load_file, save_file

    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    halves = {
        name: tensor.to(torch.float16) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    if bad := [name for name, tensor in halves.items() if not torch.isfinite(tensor).all()]:
        raise VipLlavaError(f"{weights}: {bad} do not fit float16")
    with new_file(weights) as unfinished:
        save_file(halves, unfinished, metadata={"format": "pt"})
    config = folder / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["dtype"] = "float16"
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for leftover in folder.glob("*.pt"):
        leftover.unlink()
    shutil.rmtree(folder / ".cache", ignore_errors=True)
