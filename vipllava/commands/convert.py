"""``vipllava convert SRC DST``: one checkpoint format to another, proven."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vipllava.commands.output import say


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.strip("[]").split(","))
    except ValueError:
        raise ValueError("expected whole numbers, such as -2,-5,-8,-11,6") from None


def _repository(text: str) -> str:
    if text.count("/") != 1:
        raise ValueError("expected OWNER/NAME of a repository on the hub")
    return text


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Folder, file or Hugging Face id: a VipLlava in the Hugging Face or the original "
            "format, mm_projector.bin, an adapter folder, a training checkpoint.",
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A new folder.")],
    format: Annotated[
        Literal["hf", "llava", "projector", "lora-merged", "llava-lora"],
        typer.Option(
            help="hf: Hugging Face; llava: the original; llava-lora: the original's adapter folder."
        ),
    ] = "hf",
    vision_tower: Annotated[
        str | None,
        typer.Option(
            help="CLIP folder or id where SRC lacks one.",
            show_default="openai/clip-vit-large-patch14-336",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Folder or id under SRC: the language model of a projector or an original LoRA, "
            "the VipLlava of an adapter folder or a training checkpoint."
        ),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="Where SRC does not say.", show_default="by its role tokens"),
    ] = None,
    feature_layers: Annotated[
        tuple | None,
        typer.Option(parser=_layers, metavar="N,N,...", help="Tower layers, if SRC does not say."),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Of the written weights; auto: as in SRC."),
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="Where answers are compared: cpu, auto, cuda, mps.")
    ] = "cpu",
    push_to_hub: Annotated[
        str | None,
        typer.Option(parser=_repository, metavar="OWNER/NAME", help="Upload the result, private."),
    ] = None,
) -> None:
    """Convert one checkpoint format to another.

    The result is opened again and must answer as SRC does, or it is not kept.
    """
    from vipllava.checkpoints import convert as conversion
    from vipllava.inference.devices import resolve_device
    from vipllava.models.hub_models import draw_bars_on_terminals_only

    draw_bars_on_terminals_only()
    done = conversion.convert(
        source,
        destination,
        format=format,
        vision_tower=vision_tower,
        base=base,
        chat_template=chat_template,
        feature_layers=feature_layers,
        dtype=dtype,
        device=resolve_device(device),
        on_step=say,
    )
    same = done.agreement
    say(
        f"{done.destination} ({done.format}, {done.dtype}): {same.num_logits} logits agree, "
        f"greatest difference {same.difference:.3g} of a spread of {same.spread:.3g}"
    )
    if push_to_hub:
        from vipllava.checkpoints.folders import upload

        say(f"uploaded to {upload(done.destination, push_to_hub)}")
