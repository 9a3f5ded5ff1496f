"""``vipllava convert SRC DST``: one checkpoint format to another, proven."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from vipllava.commands.settings import Setting, describe_settings, read_settings

if TYPE_CHECKING:
    from rich.console import Console

_FORMATS: Final = ("hf", "llava", "projector", "lora-merged", "llava-lora")


def _one_of(*names: str) -> Any:
    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"expected one of {', '.join(names)}")
        return text

    return read


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.strip("[]").split(","))
    except ValueError:
        raise ValueError("expected whole numbers, such as -2,-5,-8,-11,6") from None


def _repository(text: str) -> str:
    if text.count("/") != 1:
        raise ValueError("expected OWNER/NAME of a repository on the hub")
    return text


_SETTINGS: Final = (
    Setting(
        "format",
        _one_of(*_FORMATS),
        "hf",
        "hf (default), llava (the original), projector, lora-merged, or llava-lora (the "
        "original's adapter folder)",
    ),
    Setting(
        "vision_tower",
        str,
        None,
        "folder or id where SRC lacks one (default: openai/clip-vit-large-patch14-336)",
    ),
    Setting(
        "base",
        str,
        None,
        "folder or id under SRC: the language model of a projector or an original LoRA, "
        "the VipLlava of an adapter folder or a training checkpoint",
    ),
    Setting("chat_template", str, None, "where SRC does not say (default: by its role tokens)"),
    Setting("feature_layers", _layers, None, "tower layers, where SRC does not say"),
    Setting(
        "dtype",
        _one_of("auto", "float32", "bfloat16", "float16"),
        "auto",
        "of the written weights (default: as in SRC)",
    ),
    Setting("device", str, "cpu", "where the answers are compared: cpu (default), auto, cuda, mps"),
    Setting("push_to_hub", _repository, None, "OWNER/NAME to upload the result to (private)"),
)


def run(words: Sequence[str], console: Console | None = None) -> int:
    """Convert, prove, report, and upload if asked to.

    Args:
        words: the command line after ``convert``.
        console: where the report goes; the standard output if None.

    Raises:
        VipLlavaError: arguments, source or destination cannot be used; nothing was changed.
    """
    from rich.console import Console as MakeConsole

    console = console or MakeConsole()
    if not words or words[0] in ("-h", "--help", "help"):
        console.print(_help(), highlight=False, markup=False, soft_wrap=True)
        return 0
    values = read_settings(words, _SETTINGS, positional=("SRC", "DST"))
    from vipllava.checkpoints.convert import convert
    from vipllava.inference.devices import resolve_device
    from vipllava.models.hub_models import draw_bars_on_terminals_only

    draw_bars_on_terminals_only()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    done = convert(
        values["SRC"],
        values["DST"],
        format=values["format"],
        vision_tower=values["vision_tower"],
        base=values["base"],
        chat_template=values["chat_template"],
        feature_layers=values["feature_layers"],
        dtype=values["dtype"],
        device=resolve_device(values["device"]),
        on_step=say,
    )
    same = done.agreement
    say(
        f"{done.destination} ({done.format}, {done.dtype}): {same.num_logits} logits agree, "
        f"greatest difference {same.difference:.3g} of a spread of {same.spread:.3g}"
    )
    if values["push_to_hub"]:
        from vipllava.checkpoints.hub_upload import upload

        say(f"uploaded to {upload(done.destination, values['push_to_hub'])}")
    return 0


def _help() -> str:
    return (
        "usage: vipllava convert SRC DST [NAME=VALUE ...]\n\n"
        "SRC is a folder, a file or a Hugging Face id: a VipLlava in the Hugging Face or the\n"
        "original format, mm_projector.bin, an adapter folder, a training checkpoint. DST is a\n"
        "new folder. The result is opened again and must answer as SRC does, or it is not kept.\n"
        "\n" + describe_settings(_SETTINGS)
    )
