"""A trained model as a Hugging Face folder that transformers opens without this package.

The folder holds weights and config, tokenizer, the processor (so that other engines prepare
pictures as training did) and ``vipllava.json``: what those formats have no place for. The chat
template belongs to the checkpoint and is read from there, never guessed from a path.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, VipLlavaForConditionalGeneration

from vipllava.checkpoints.export_meta import META_NAME, ExportMeta, check_meta
from vipllava.checkpoints.model_card import CARD_NAME, model_card
from vipllava.checkpoints.names import hf_to_hf
from vipllava.checkpoints.processor import build_processor
from vipllava.files.atomic import new_folder
from vipllava.models import modeling_vipllava_patches
from vipllava.models.building import network_class
from vipllava.models.tensor_files import write_tensors
from vipllava.models.towers import CLIP
from vipllava.types import CheckpointError


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
    check_meta(meta, model.config)
    if directory.exists() and not (directory / META_NAME).is_file() and _is_used(directory):
        raise CheckpointError(
            f"{directory} exists and is no export of a stage (it has no {META_NAME}): choose "
            "another folder, or move it away"
        )
    try:
        with new_folder(directory, replace=True) as unfinished:
            _write_network(model, unfinished)
            _complete_config(unfinished, model.config, meta.feature_layers)
            made, agreement = build_processor(tokenizer, model.config, meta)
            processor: Any = made
            processor.save_pretrained(unfinished)
            # The processor's file holds the image processor, too; older readers look for its own.
            processor.image_processor.save_pretrained(unfinished)
            text = json.dumps(asdict(meta), indent=2) + "\n"
            (unfinished / META_NAME).write_text(text, encoding="utf-8")
            card = model_card(meta, "hf", model.config, agreement)
            (unfinished / CARD_NAME).write_text(card, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"the export to {directory} could not be written ({error}): free some space or choose "
            "another folder; nothing there was changed"
        ) from error
    return directory


def _write_network(model: VipLlavaForConditionalGeneration, folder: Path) -> None:
    """Write config and weights as ``save_pretrained`` does, by the names of published checkpoints.

    transformers itself takes the names that a network was loaded from, or where it was built in
    another way those of its release, which older releases and other engines do not know. Published
    checkpoints have CLIP towers: with another one, weights have their names in memory.
    """
    config: Any = model.config
    config.architectures = [network_class(config).__name__]
    config.dtype = model.dtype
    config.save_pretrained(folder)
    generation: Any = model.generation_config
    if generation is not None:
        generation.save_pretrained(folder)
    # Each weight once: a tied head is the embeddings.
    named: dict[str, Any] = dict(model.named_parameters())
    if config.vision_config.model_type == CLIP.model_type:
        named = hf_to_hf(named, "this network")
    write_tensors(folder, ((name, weight.detach()) for name, weight in named.items()))


def _complete_config(folder: Path, config: Any, feature_layers: tuple[int, ...]) -> None:
    """Write the feature layers under both names that releases of transformers read.

    A release that does not know the name takes its default layers without a word. A network that
    transformers does not have has its code in the folder, which the config names.
    """
    path = folder / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    for name in ("vision_feature_layer", "vision_feature_layers"):
        written[name] = list(feature_layers)
    cls = network_class(config)
    if cls is not VipLlavaForConditionalGeneration:
        code = Path(modeling_vipllava_patches.__file__)
        shutil.copyfile(code, folder / code.name)
        written["auto_map"] = {"AutoModelForImageTextToText": f"{code.stem}.{cls.__name__}"}
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_used(directory: Path) -> bool:
    return not directory.is_dir() or any(directory.iterdir())
