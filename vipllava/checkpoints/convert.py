"""From one format to another, proven before it is kept.

The result is written beside its place, opened again as any user would, and given the same picture
and text as the source; only if both answer alike is it moved to where it was wanted.
"""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from vipllava.checkpoints import llava_format
from vipllava.checkpoints.adapter_format import stored_settings, write_llava_adapter
from vipllava.checkpoints.export_meta import write_meta
from vipllava.checkpoints.folders import check_replaceable, checkpoint_folder, write_json
from vipllava.checkpoints.hf_format import save_export
from vipllava.checkpoints.kinds import KINDS
from vipllava.checkpoints.loading import Source, open_source
from vipllava.checkpoints.model_card import CARD_NAME, model_card
from vipllava.checkpoints.names import hf_to_hf
from vipllava.models.adapters import merge_adapters
from vipllava.models.building import EMBEDDINGS, projector_shapes
from vipllava.models.hub_models import read_json
from vipllava.models.tensor_files import FLOATS, dtype_of, shape_of
from vipllava.models.towers import normalise_pixels, preprocessing_of
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


TOLERANCE = 1e-5
"""Greatest difference of logits, as a share of their spread, where weights are only copied: the
order of sums can differ between runs on some devices."""
MERGED_TOLERANCE = 1e-4
"""The same where an adapter has been added to the weights. Both sides are held in float32: rounding
to 16 bits alone moves logits by a quarter of their spread, which would hide a wrong sum."""
_MARK = "conversion.json"
"""Says what a folder is the conversion of: the same call replaces it, and no other does."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a comparison found."""

    difference: float  # greatest absolute difference of two logits
    spread: float  # standard deviation of the expected logits
    num_logits: int  # how many were compared


@dataclass(frozen=True, slots=True)
class Conversion:
    """What :func:`convert` did."""

    kind: str  # the source's format
    destination: Path  # the folder that was written
    format: Format  # its format
    dtype: str  # of the weights
    agreement: Agreement  # how near the logits of both are


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
        destination: folder to write; replaced if the same conversion wrote it, and nothing else is
            in it.
        format: of :data:`FORMATS`.
        vision_tower: see :func:`vipllava.checkpoints.loading.open_source`, as the next three.
        base: what the source is put on.
        chat_template: the template it was trained with.
        feature_layers: tower layers that the projector reads.
        dtype: of the written weights; ``auto`` keeps the language model's.
        device: where the logits are computed.
        on_step: told what is being done.

    Raises:
        CheckpointError: the source cannot be opened or has no such format, the destination is
            something else or has no room, or the result answers otherwise; nothing is changed then.
        ConfigError: unknown format or dtype.
    """
    destination = Path(destination).expanduser()
    if format not in FORMATS:
        raise ConfigError(f"format={format!r} is not one of {', '.join(FORMATS)}")
    if dtype != "auto" and dtype not in FLOATS:
        raise ConfigError(f"dtype={dtype!r} is not one of auto, {', '.join(FLOATS)}")
    _check_replaceable(destination, source, format)
    folder, target = Path(source).expanduser().resolve(), destination.resolve()
    if target.is_relative_to(folder) or folder.is_relative_to(target):
        raise CheckpointError(
            f"{destination} lies in {source}, or holds it: choose a folder beside it"
        )
    options: dict[str, Any] = {"chat_template": chat_template, "feature_layers": feature_layers}
    opened = open_source(source, base=base, vision_tower=vision_tower, **options)
    on_step(f"{source} is {KINDS[opened.kind]}")
    if format in ("lora-merged", "llava-lora") and opened.adapter is None:
        raise CheckpointError(
            f"{source} is {KINDS[opened.kind]}: it has no adapter; use format=hf or llava"
        )
    wanted = dtype_of(opened.tensors[EMBEDDINGS]) if dtype == "auto" else FLOATS[dtype]
    written = projector_shapes(opened.config) if format == "projector" else opened.tensors
    _check_space(destination, _num_bytes(opened, written, wanted))

    merges = opened.adapter is not None and format != "llava-lora"
    held = torch.float32 if merges else wanted
    on_step(f"reading {_gib(_num_bytes(opened, opened.tensors, held))} of weights")
    model: Any = opened.network(dtype=held, merge_adapter=False)
    model.to(device)
    # Ids of the language model's own vocabulary: those before the image token. Phi-3's free ids lie
    # inside its padded rows; what stands before them is its own all the same.
    num_rows = min(model.config.text_config.vocab_size, model.config.image_token_id)
    expected, merged = _probe_logits(model, num_rows), None
    if merges:
        merge_adapters(model)
        what = f"merging the adapter of {source}"
        merged = _compare(expected, _probe_logits(model, num_rows), what, MERGED_TOLERANCE)
        for parameter in model.parameters():  # buffers keep their precision
            parameter.data = parameter.data.to(wanted)
        expected = _probe_logits(model, num_rows)
    with checkpoint_folder(destination, "conversion", [_MARK]) as unfinished:
        on_step(f"writing {FORMATS[format]}")
        again = _write(model, opened, unfinished, format, vision_tower)
        names = sorted(path.name for path in unfinished.iterdir())
        write_json(unfinished / _MARK, {"source": source, "format": format, "files": names})
        del model
        gc.collect()
        on_step("opening the result and comparing its answers")
        result: Any = again.network(dtype=wanted, merge_adapter=False)
        found = _probe_logits(result.to(device), num_rows)
        agreement = _compare(expected, found, f"the conversion of {source}", TOLERANCE)
    name = str(wanted).removeprefix("torch.")
    return Conversion(opened.kind, destination, format, name, merged or agreement)


def _check_replaceable(destination: Path, source: str, format: Format) -> None:
    """Raise CheckpointError where a folder is there that not just this conversion has filled."""
    check_replaceable(destination, "conversion", [_MARK])
    if not (destination / _MARK).is_file():
        return
    before = read_json(destination / _MARK)
    if (before.get("source"), before.get("format")) != (source, format):
        raise CheckpointError(
            f"{destination} is the conversion of {before.get('source')} to format="
            f"{before.get('format')}: choose another folder, or move it away"
        )
    found = {path.name for path in destination.iterdir()}
    if more := sorted(found - {_MARK, *before.get("files", ())}):
        raise CheckpointError(
            f"{destination} holds what its conversion did not write ({', '.join(more[:5])}), which "
            "would be lost: move it elsewhere"
        )


def _write(
    model: Any, opened: Source, directory: Path, format: Format, vision_tower: str | None
) -> Source:
    """Write a network; return it opened again, projector and adapter on the source's own parts."""
    config, meta = opened.config, opened.meta
    if format in ("hf", "lora-merged"):
        save_export(model, opened.tokenizer, directory, meta)
        return open_source(str(directory))
    # What the original format has no place for; the released code does not look at it.
    write_meta(directory, replace(meta, vision_tower=vision_tower or meta.vision_tower))
    card = model_card(meta, "lora" if format == "llava-lora" else format, config)
    (directory / CARD_NAME).write_text(card, encoding="utf-8")
    if opened.adapter is not None and format == "llava-lora":
        settings = stored_settings(opened.adapter)
        write_llava_adapter(directory, model, settings, base=meta.language_model)
        rows, tokenizer = model.config.image_token_id, opened.tokenizer
        llava_format.write_config(
            directory, config, tokenizer, rows, model.dtype, meta.image_aspect
        )
        return replace(opened, adapter=directory)
    tensors = hf_to_hf(dict(model.state_dict()), opened.path)
    if format == "projector":
        llava_format.write_projector(
            directory, {name: tensors[name] for name in projector_shapes(config)}
        )
        return replace(opened, tensors={**opened.tensors, **llava_format.read_projector(directory)})
    llava_format.write_llava(directory, config, tensors, opened.tokenizer, meta.image_aspect)
    return open_source(str(directory), vision_tower=vision_tower)


def _check_space(destination: Path, needed: int) -> None:
    parent = next(folder for folder in destination.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError(
            f"{destination} needs {_gib(needed)}, and {parent} has {_gib(free)} free: make room or "
            "choose another folder; nothing was written"
        )


def _num_bytes(opened: Source, names: Iterable[str], dtype: torch.dtype) -> int:
    sizes = (torch.Size(shape_of(opened.tensors[name])).numel() for name in names)
    return sum(sizes) * dtype.itemsize


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


@torch.inference_mode()
def _probe_logits(network: Any, num_rows: int) -> torch.Tensor:
    """Return the logits of a fixed picture and text, float32 [positions, num_rows] on the CPU.

    Rows behind the language model's own are never targets and start differently in every format.
    """
    config, device = network.config, network.device
    image_token: int = config.image_token_id
    words = torch.linspace(3, num_rows - 1, 48).long()
    words[words == image_token] = 3
    image = torch.full((config.image_seq_length,), image_token, dtype=torch.long)
    ids = torch.cat([words[:8], image, words[8:]])[None]
    side: int = config.vision_config.image_size
    rows, columns = torch.arange(side)[:, None], torch.arange(side)[None]
    pixels = torch.stack([(rows * 7 + columns * 13 * (c + 1) + c * 29) % 256 for c in range(3)])
    pixels = pixels.to(torch.uint8)[None].to(device)
    normalised = normalise_pixels(pixels, network.dtype, preprocessing_of(config.vision_config))
    out = network(
        input_ids=ids.to(device), pixel_values=normalised, use_cache=False, logits_to_keep=0
    )
    return out.logits[0, :, :num_rows].float().cpu()


def _compare(expected: torch.Tensor, found: torch.Tensor, what: str, tolerance: float) -> Agreement:
    """Insist that the logits of a source and of what was made of it are the same."""
    difference = spread = float("inf")
    if expected.shape == found.shape and torch.isfinite(found).all():
        difference, spread = float((expected - found).abs().max()), float(expected.std())
        if difference <= tolerance * max(spread, 1e-3):
            return Agreement(difference, spread, found.numel())
    raise CheckpointError(
        f"{what} gives other answers than its source: logits differ by {difference:.3g} (spread "
        f"{spread:.3g}, allowed share {tolerance:g}); it was not kept. This is a defect: please "
        "report the command with the source's config.json"
    )
