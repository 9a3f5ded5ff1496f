"""A trained model as a Hugging Face folder that transformers opens without this package.

The folder holds weights and config, tokenizer, the processor (so that other engines prepare
pictures as training did) and ``vipllava.json``: what those formats have no place for. The chat
template belongs to the checkpoint and is read from there, never guessed from a path.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

from transformers import (
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VipLlavaForConditionalGeneration,
)

from vipllava.models.opening import feature_layers_of
from vipllava.types import CheckpointError

logger = logging.getLogger(__name__)

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
    format_version: int = FORMAT_VERSION


def save_export(
    model: VipLlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    directory: str | Path,
    meta: ExportMeta,
) -> Path:
    """Write the folder: first beside its place, then renamed, so that no half export is found.

    A folder that is there already is replaced if it is an export, and left alone otherwise.

    Args:
        model: the network; its parameters keep their dtype.
        tokenizer: with image and padding token.
        directory: the folder to write.
        meta: see :class:`ExportMeta`.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder exists and holds something else, ``meta`` contradicts the
            network, or writing failed.
    """
    directory = Path(directory)
    network: Any = model
    check_meta(meta, model.config)
    if directory.exists() and not (directory / META_NAME).is_file() and _is_used(directory):
        raise CheckpointError(
            f"{directory} exists and is no export of a stage (it has no {META_NAME}): choose "
            "another folder, or move it away"
        )
    unfinished = directory.with_name(f".{directory.name}.unfinished-{os.getpid()}")
    replaced = directory.with_name(f".{directory.name}.replaced-{os.getpid()}")
    try:
        _remove(unfinished)
        unfinished.mkdir(parents=True)
        network.save_pretrained(unfinished)
        _name_feature_layers_twice(unfinished / "config.json", meta.feature_layers)
        processor: Any = _build_processor(tokenizer, model, meta)
        processor.save_pretrained(unfinished)
        # The processor's file holds the image processor, too; older readers look for its own.
        processor.image_processor.save_pretrained(unfinished)
        text = json.dumps(asdict(meta), indent=2) + "\n"
        (unfinished / META_NAME).write_text(text, encoding="utf-8")
        if directory.exists():
            directory.rename(replaced)
        unfinished.rename(directory)
        _remove(replaced)
    except OSError as error:
        if replaced.exists() and not directory.exists():
            replaced.rename(directory)
        raise CheckpointError(
            f"the export to {directory} could not be written ({error}): free some space or choose "
            "another folder; nothing there was changed"
        ) from error
    finally:
        _remove(unfinished)
    return directory


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
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): write the export again") from error
    known = {field.name for field in fields(ExportMeta)}
    found = set(cast("dict[str, Any]", raw)) if isinstance(raw, dict) else set[str]()
    version = cast("dict[str, Any]", raw).get("format_version") if found else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version={version!r}, this release reads {FORMAT_VERSION}: "
            "write the export again with this release, or use the one that wrote it"
        )
    if found != known:
        raise CheckpointError(
            f"{path} lacks {sorted(known - found)} and has unknown {sorted(found - known)}: "
            "write the export again"
        )
    values = cast("dict[str, Any]", raw)
    values["feature_layers"] = tuple(values["feature_layers"])
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


def _name_feature_layers_twice(path: Path, feature_layers: tuple[int, ...]) -> None:
    """Write the feature layers under both names that releases of transformers read.

    A release that does not know the name takes its default layers without a word.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("vision_feature_layer", "vision_feature_layers"):
        config[name] = list(feature_layers)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _build_processor(
    tokenizer: PreTrainedTokenizerFast, model: VipLlavaForConditionalGeneration, meta: ExportMeta
) -> LlavaProcessor:
    """Make the processor that prepares pictures as training did.

    VipLlava has none of its own in transformers; LLaVA's serves it. Its image processor can pad
    to a square with the mean colour, which CLIP's cannot.
    """
    # The Pillow one; the class without suffix needs torchvision.
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    side = meta.image_size
    square = {"height": side, "width": side}
    config: Any = model.config
    image_processor: Any = LlavaImageProcessorPil(
        do_pad=meta.image_aspect == "pad",
        do_center_crop=meta.image_aspect == "square",
        size={"shortest_edge": side} if meta.image_aspect == "square" else square,
        crop_size=square,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        # Patches and the class token, of which "default" drops the class token again.
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        image_token=meta.image_token,
    )


def _is_used(directory: Path) -> bool:
    return not directory.is_dir() or any(directory.iterdir())


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
