"""From one format to another, proven before it is kept.

The result is written beside its place, opened again as any user would, and given the same picture
and text as the source; only if both answer alike is it moved to where it was wanted.
"""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import VipLlavaForConditionalGeneration

from vipllava.checkpoints.adapter_format import stored_settings, write_llava_adapter
from vipllava.checkpoints.export_meta import META_NAME
from vipllava.checkpoints.hf_format import save_export
from vipllava.checkpoints.llava_format import (
    read_projector,
    write_config,
    write_llava,
    write_projector,
)
from vipllava.checkpoints.loading import open_source
from vipllava.checkpoints.model_card import CARD_NAME, model_card
from vipllava.checkpoints.names import hf_to_hf
from vipllava.checkpoints.source import KINDS, Source
from vipllava.checkpoints.verify import Agreement, compare, insist, probe_logits
from vipllava.files.atomic import new_folder
from vipllava.models.adapters import merge_adapters
from vipllava.models.building import EMBEDDINGS, projector_shapes
from vipllava.models.tensor_files import FLOATS, dtype_of, shape_of
from vipllava.types import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

Format = Literal["hf", "llava", "projector", "lora-merged", "llava-lora"]
FORMATS: dict[Format, str] = {
    "hf": "the Hugging Face format: opens in transformers and vLLM",
    "llava": "the original format: opens in the released code",
    "projector": "the projector alone (mm_projector.bin), to start stage 2 from",
    "lora-merged": "an adapter folder and its base as one model in the Hugging Face format",
    "llava-lora": "an adapter folder as the original's LoRA runs leave it",
}
_ADAPTERS = ("lora", "llava_lora")


@dataclass(frozen=True, slots=True)
class Conversion:
    """What :func:`convert` did.

    Attributes:
        source: as it was named.
        kind: its format.
        destination: the folder that was written.
        format: its format.
        dtype: of the weights.
        agreement: how near the logits of both are.
    """

    source: str
    kind: str
    destination: Path
    format: Format
    dtype: str
    agreement: Agreement


def convert(
    source: str,
    destination: str | Path,
    *,
    format: Format = "hf",
    vision_tower: str | None = None,
    base: str | None = None,
    chat_template: str | None = None,
    feature_layers: tuple[int, ...] | None = None,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    on_step: Callable[[str], None] = logger.info,
) -> Conversion:
    """Convert a checkpoint of any format and prove the result.

    Args:
        source: folder, file or Hugging Face id.
        destination: folder to write; replaced if a conversion or an export wrote it.
        format: of :data:`FORMATS`.
        vision_tower: see :func:`vipllava.checkpoints.loading.open_source`, as the next three.
        base: what the source is put on.
        chat_template: the template it was trained with.
        feature_layers: tower layers that the projector reads.
        dtype: of the written weights; ``auto`` keeps the language model's.
        device: where the logits are computed.
        on_step: told what is being done.

    Raises:
        CheckpointError: the source cannot be opened or is of a kind that has no such format, the
            destination is something else or has no room, or the result answers otherwise. The
            destination is untouched then.
        ConfigError: unknown format or dtype.
    """
    destination = Path(destination).expanduser()
    if format not in FORMATS:
        raise ConfigError(f"format={format!r} is not one of {', '.join(FORMATS)}")
    if dtype != "auto" and dtype not in FLOATS:
        raise ConfigError(f"dtype={dtype!r} is not one of auto, {', '.join(FLOATS)}")
    _check_destination(destination)
    options: dict[str, Any] = {
        "vision_tower": vision_tower,
        "chat_template": chat_template,
        "feature_layers": feature_layers,
    }
    opened = open_source(source, base=base, **options)
    on_step(f"{source} is {KINDS[opened.kind]}")
    if format in ("lora-merged", "llava-lora") and opened.adapter is None:
        raise CheckpointError(
            f"{source} is {KINDS[opened.kind]}: it has no adapter; use format=hf or llava"
        )
    wanted = dtype_of(opened.tensors[EMBEDDINGS]) if dtype == "auto" else FLOATS[dtype]
    _check_space(destination, opened, format, wanted)

    on_step(f"reading {_gib(_num_bytes(opened, wanted))} of weights")
    model = _network(opened, wanted, device, merge_adapter=False)
    num_rows = _own_rows(opened)
    expected = probe_logits(model, num_rows)
    if opened.adapter is not None and format != "llava-lora":
        merge_adapters(model)
    try:
        with new_folder(destination, replace=True) as unfinished:
            on_step(f"writing {FORMATS[format]}")
            _write(model, opened, unfinished, format)
            del model
            gc.collect()
            on_step("opening the result and comparing its answers")
            again = _reopen(unfinished, opened, format, options)
            merge = format != "llava-lora"
            found = probe_logits(_network(again, wanted, device, merge_adapter=merge), num_rows)
            agreement = compare(expected, found, dtype=wanted, merged=opened.adapter is not None)
            insist(agreement, f"the conversion of {source}")
    except OSError as error:
        raise CheckpointError(
            f"{destination} could not be written ({error}): free some space or choose another "
            "folder; nothing there was changed"
        ) from error
    name = str(wanted).removeprefix("torch.")
    return Conversion(source, opened.kind, destination, format, name, agreement)


def _network(
    opened: Source, dtype: torch.dtype, device: torch.device | str, **options: Any
) -> VipLlavaForConditionalGeneration:
    model: Any = opened.network(dtype=dtype, **options)
    return model.to(device)


def _write(
    model: VipLlavaForConditionalGeneration, opened: Source, directory: Path, format: Format
) -> None:
    if format in ("hf", "lora-merged"):
        save_export(model, opened.tokenizer, directory, opened.meta)
        return
    card = model_card(opened.meta, "lora" if format == "llava-lora" else format, opened.config)
    (directory / CARD_NAME).write_text(card, encoding="utf-8")
    if format == "llava-lora":
        assert opened.adapter is not None
        settings = stored_settings(opened.adapter)
        write_llava_adapter(directory, model, settings, base=opened.meta.language_model)
        rows = int(opened.config.image_token_id)
        write_config(directory, opened.config, num_rows=rows, dtype=model.dtype)
        saved: Any = opened.tokenizer
        saved.save_pretrained(directory)
        return
    tensors = hf_to_hf(dict(model.state_dict()), opened.path)
    if format == "projector":
        names = projector_shapes(opened.config)
        write_projector(directory / "mm_projector.bin", {n: tensors[n] for n in names})
        return
    write_llava(
        directory, opened.config, tensors, opened.tokenizer, image_aspect=opened.meta.image_aspect
    )


def _reopen(directory: Path, opened: Source, format: Format, options: dict[str, Any]) -> Source:
    """Open what was written as a user would; projector and adapter on the source's own parts."""
    if format == "projector":
        return replace(
            opened, tensors={**opened.tensors, **read_projector(directory / "mm_projector.bin")}
        )
    if format == "llava-lora":
        return replace(opened, adapter=directory)
    if format == "llava":
        options = {**options, "vision_tower": options["vision_tower"] or opened.meta.vision_tower}
    return open_source(str(directory), **options)


def _own_rows(opened: Source) -> int:
    """Return the ids of the language model's own vocabulary: those before the image token."""
    config: Any = opened.config
    # Phi-3's free ids lie inside its padded rows; what stands before them is its own all the same.
    return min(config.text_config.vocab_size, config.image_token_id)


def _check_destination(destination: Path) -> None:
    if destination.is_file():
        raise CheckpointError(f"{destination} is a file: name a folder to write")
    if destination.is_dir() and any(destination.iterdir()):
        if (destination / META_NAME).is_file() or (destination / "mm_projector.bin").is_file():
            return
        raise CheckpointError(
            f"{destination} exists and is no conversion (it has no {META_NAME}): choose another "
            "folder, or move it away"
        )


def _check_space(destination: Path, opened: Source, format: Format, dtype: torch.dtype) -> None:
    parent = destination.absolute().parent
    while not parent.exists():
        parent = parent.parent
    needed = _num_bytes(opened, dtype, projector_only=format == "projector")
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError(
            f"{destination} needs {_gib(needed)}, and {parent} has {_gib(free)} free: make room or "
            "choose another folder; nothing was written"
        )


def _num_bytes(opened: Source, dtype: torch.dtype, *, projector_only: bool = False) -> int:
    names = projector_shapes(opened.config) if projector_only else opened.tensors
    count = sum(torch.Size(shape_of(opened.tensors[name])).numel() for name in names)
    return count * dtype.itemsize


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
