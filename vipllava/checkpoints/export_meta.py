"""What a checkpoint says about itself, in ``vipllava.json`` beside its weights.

Other formats have no place for it: stage, chat template, picture geometry, origin.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import vipllava
from vipllava.models.hub_models import read_json
from vipllava.models.towers import feature_layers_of
from vipllava.stream.image_transform import ImageAspect
from vipllava.types import CheckpointError

FORMAT_VERSION = 1
META_NAME = "vipllava.json"


@dataclass(frozen=True, slots=True)
class ExportMeta:
    """What an export says about itself."""

    stage: str  # the training stage that wrote it
    chat_template: str  # name of the template it was trained with and answers in
    # how its pictures become square: ``square`` (short side, then crop), ``pad`` (pad to a square
    # first) or ``resize`` (regardless of aspect)
    image_aspect: ImageAspect
    image_size: int  # side of the square picture, pixels
    image_seq_length: int  # image tokens per picture
    feature_layers: tuple[int, ...]  # the tower's hidden states that the projector reads
    vision_tower: str  # source that the tower came from
    language_model: str  # source that the language model came from
    image_token: str = "<image>"  # the placeholder's token in the tokenizer
    data: tuple[str, ...] = ()  # data sets of the last stage, with their licences
    # how marks were sampled and named in training, as configured
    visual_prompts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    code: str = ""  # version of this package that wrote it, with its commit where known
    format_version: int = FORMAT_VERSION  # version of this file


def write_meta(directory: Path, meta: ExportMeta) -> None:
    """Write ``vipllava.json`` into a folder."""
    text = json.dumps(asdict(meta), indent=2) + "\n"
    (directory / META_NAME).write_text(text, encoding="utf-8")


def load_meta(directory: str | Path) -> ExportMeta:
    """Read ``vipllava.json``; CheckpointError if it is missing or breaks its schema."""
    path = Path(directory) / META_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{directory} is no export of a stage (it has no {META_NAME}): name the folder "
            "`export` in a run directory"
        )
    values = read_json(path)
    if (version := values.get("format_version")) != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version={version!r}, this release reads {FORMAT_VERSION}: "
            "write the export again with this release, or use the one that wrote it"
        )
    known, found = {each.name: each for each in fields(ExportMeta)}, set(values)
    required = {n for n, f in known.items() if f.default is f.default_factory is MISSING}
    lacking, unknown = sorted(required - found), sorted(found - set(known))
    if lacking or unknown:
        raise CheckpointError(
            f"{path} lacks {lacking} and has unknown {unknown}: write the export again"
        )
    for name in ("feature_layers", "data"):
        values[name] = tuple(values.get(name, ()))
    return ExportMeta(**values)


def check_meta(meta: ExportMeta, config: Any) -> None:
    """Raise CheckpointError where metadata contradict a config, or name no image aspect."""
    network = {
        "feature_layers": feature_layers_of(config),
        "image_size": config.vision_config.image_size,
        "image_seq_length": config.image_seq_length,
    }
    problems = [
        f"{name} is {said} in {META_NAME}, {found} in the network"
        for name, found in network.items()
        if (said := getattr(meta, name)) != found
    ]
    if meta.image_aspect not in get_args(ImageAspect):
        known = ", ".join(get_args(ImageAspect))
        problems.append(f"image_aspect is {meta.image_aspect!r}, not one of {known}")
    if problems:
        raise CheckpointError(
            "; ".join(problems) + ": the metadata is of another model; write the export again"
        )


def code_version() -> str:
    """Return this package's version, and the commit where it runs from a git checkout."""
    folder, version = Path(vipllava.__file__).resolve().parent.parent, vipllava.__version__
    command = ["git", "-C", str(folder), "describe", "--always", "--exclude=*", "--abbrev=12"]
    command.append("--dirty=, with changes")
    if not (folder / ".git").exists():
        return version
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version} ({done.stdout.strip()})"
