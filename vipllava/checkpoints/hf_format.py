"""A trained model as a Hugging Face folder that transformers opens without this package.

It holds weights, config, tokenizer, the processor (so that other engines prepare pictures as
training did), and ``vipllava.json`` with what those have no place for.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, VipLlavaForConditionalGeneration

from vipllava.checkpoints.export_meta import META_NAME, ExportMeta, check_meta, write_meta
from vipllava.checkpoints.folders import checkpoint_folder, write_json
from vipllava.checkpoints.model_card import CARD_NAME, model_card
from vipllava.checkpoints.names import hf_to_hf
from vipllava.checkpoints.older_releases import add_rope, rename_tokenizer
from vipllava.checkpoints.processor import build_processor
from vipllava.models import modeling_vipllava_patches
from vipllava.models.building import network_class
from vipllava.models.hub_models import read_json
from vipllava.models.tensor_files import write_tensors
from vipllava.models.towers import CLIP


def save_export(
    model: VipLlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    directory: str | Path,
    meta: ExportMeta,
) -> Path:
    """Write the folder, or write it again, and return it; parameters keep their dtype.

    The tokenizer has image and padding token. A folder of something else is left alone.

    Raises:
        CheckpointError: the folder holds something else, ``meta`` contradicts the network, or
            writing failed.
    """
    directory = Path(directory)
    check_meta(meta, model.config)
    with checkpoint_folder(directory, "export of a stage", [META_NAME]) as unfinished:
        _write_network(model, unfinished)
        _complete_config(unfinished, model.config, meta.feature_layers)
        made, agreement = build_processor(tokenizer, model.config, meta)
        processor: Any = made
        processor.save_pretrained(unfinished)
        rename_tokenizer(unfinished)
        # The processor's file holds the image processor, too; older readers look for its own.
        processor.image_processor.save_pretrained(unfinished)
        write_meta(unfinished, meta)
        card = model_card(meta, "hf", model.config, agreement)
        (unfinished / CARD_NAME).write_text(card, encoding="utf-8")
    return directory


def _write_network(model: VipLlavaForConditionalGeneration, folder: Path) -> None:
    """Write config and weights as ``save_pretrained`` does, by the names of published checkpoints.

    transformers itself takes the names that a network was loaded from, or those of its release,
    which older ones and other engines do not know. Published checkpoints have CLIP towers: with
    another one, weights have their names in memory.
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
    """Write feature layers and rotary embedding under the names that releases of transformers read.

    A release that does not know a name takes its default without a word. A network that
    transformers does not have has its code in the folder, which the config names.
    """
    path = folder / "config.json"
    written = read_json(path)
    for name in ("vision_feature_layer", "vision_feature_layers"):
        written[name] = list(feature_layers)
    add_rope(written["text_config"])
    cls = network_class(config)
    if cls is not VipLlavaForConditionalGeneration:
        code = Path(modeling_vipllava_patches.__file__)
        shutil.copyfile(code, folder / code.name)
        written["auto_map"] = {"AutoModelForImageTextToText": f"{code.stem}.{cls.__name__}"}
    write_json(path, written)
