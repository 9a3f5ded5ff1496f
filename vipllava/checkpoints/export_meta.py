"""What a checkpoint says about itself, in ``vipllava.json`` beside its weights.

Other formats have no place for it: stage, chat template, picture geometry, origin.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import vipllava
from vipllava.models.hub_models import read_json
from vipllava.models.opening import feature_layers_of
from vipllava.types import CheckpointError

FORMAT_VERSION = 1
META_NAME = "vipllava.json"
IMAGE_ASPECTS = ("square", "pad", "resize")


@dataclass(frozen=True, slots=True)
class ExportMeta:
    """What an export says about itself.

    Attributes:
        stage: the training stage that wrote it.
        chat_template: name of the template it was trained with and answers in.
        image_aspect: how its pictures become square: ``square`` (short side, then crop), ``pad``
            (pad to a square first) or ``resize`` (regardless of aspect).
        image_size: side of the square picture, pixels.
        image_seq_length: image tokens per picture.
        feature_layers: the tower's hidden states that the projector reads.
        vision_tower: source that the tower came from.
        language_model: source that the language model came from.
        image_token: the placeholder's token in the tokenizer.
        data: data sets of the last stage, with their licences.
        visual_prompts: how marks were sampled and named in training, as configured.
        code: version of this package that wrote it, with its commit where known.
        format_version: version of this file.
    """

    stage: str
    chat_template: str
    image_aspect: str
    image_size: int
    image_seq_length: int
    feature_layers: tuple[int, ...]
    vision_tower: str
    language_model: str
    image_token: str = "<image>"
    data: tuple[str, ...] = ()
    visual_prompts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    code: str = ""
    format_version: int = FORMAT_VERSION


def load_meta(directory: str | Path) -> ExportMeta:
    """Read ``vipllava.json``.

    Raises:
        CheckpointError: the folder is missing or no export, or the file breaks its schema.
    """
    directory = Path(directory)
    path = directory / META_NAME
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist: name the export folder of a stage")
    if not path.is_file():
        raise CheckpointError(
            f"{directory} is no export of a stage (it has no {META_NAME}): name the folder "
            "`export` in a run directory"
        )
    values = read_json(path)
    known = {field.name for field in fields(ExportMeta)}
    required = {
        f.name for f in fields(ExportMeta) if f.default is MISSING and f.default_factory is MISSING
    }
    found, version = set(values), values.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version={version!r}, this release reads {FORMAT_VERSION}: "
            "write the export again with this release, or use the one that wrote it"
        )
    if found - known or required - found:
        raise CheckpointError(
            f"{path} lacks {sorted(required - found)} and has unknown {sorted(found - known)}: "
            "write the export again"
        )
    for name in ("feature_layers", "data"):
        values[name] = tuple(values.get(name, ()))
    return ExportMeta(**values)


def check_meta(meta: ExportMeta, config: Any) -> None:
    """Insist that the metadata are of a network.

    Raises:
        CheckpointError: they contradict its config, or name an unknown image aspect.
    """
    pairs: dict[str, tuple[object, object]] = {
        "feature_layers": (meta.feature_layers, feature_layers_of(config)),
        "image_size": (meta.image_size, config.vision_config.image_size),
        "image_seq_length": (meta.image_seq_length, config.image_seq_length),
    }
    problems = [
        f"{name} is {said} in {META_NAME}, {found} in the network"
        for name, (said, found) in pairs.items()
        if said != found
    ]
    if meta.image_aspect not in IMAGE_ASPECTS:
        known = ", ".join(IMAGE_ASPECTS)
        problems.append(f"image_aspect is {meta.image_aspect!r}, not one of {known}")
    if problems:
        raise CheckpointError(
            "; ".join(problems) + ": the metadata is of another model; write the export again"
        )


def code_version() -> str:
    """Return this package's version, and the commit where it runs from a git checkout."""
    folder = Path(vipllava.__file__).resolve().parent.parent
    version = vipllava.__version__
    if not (folder / ".git").exists():
        return version
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = ", with changes" if _git(folder, "status", "--porcelain", "-uno") else ""
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version} ({commit}{changed})"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    return done.stdout.strip()
