"""The README.md beside a checkpoint's weights: where they come from and how to use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import yaml
from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

from vipllava.checkpoints.export_meta import ExportMeta
from vipllava.conversation.templates import get_template
from vipllava.models.building import network_class
from vipllava.types import Turn

if TYPE_CHECKING:
    from vipllava.checkpoints.processor import IdAgreement

CARD_NAME: Final = "README.md"
CardFormat = Literal["hf", "llava", "projector", "lora"]
_LLAMA_2: Final = "Llama 2 Community License"
LICENCES: Final = {
    "openai/clip-vit-large-patch14-336": "MIT (OpenAI's CLIP)",
    "lmsys/vicuna-7b-v1.5": _LLAMA_2,
    "lmsys/vicuna-13b-v1.5": _LLAMA_2,
    "meta-llama/meta-llama-3-8b-instruct": "Meta Llama 3 Community License",
    "microsoft/phi-3-mini-4k-instruct": "MIT",
    "huggingfacetb/smollm2-135m-instruct": "Apache-2.0",
    "llava-hf/vip-llava-7b-hf": f"{_LLAMA_2}; trained on data for research only (CC BY-NC 4.0)",
}
_OF_MUCAI: Final = "research only: the terms of its language model, and of its data (CC BY-NC 4.0)"
_UNKNOWN: Final = "not known to the program that wrote this card: see its source"
_ASPECTS: Final = {
    "square": "short side resized, then cropped at the centre",
    "pad": "padded to a square with the mean colour, then resized",
    "resize": "resized to a square regardless of aspect",
}
_TITLES: Final[dict[CardFormat, str]] = {
    "hf": "A ViP-LLaVA model",
    "llava": "A ViP-LLaVA model in the original (LLaVA) format",
    "projector": "The projector of a ViP-LLaVA model",
    "lora": "A LoRA adapter of a ViP-LLaVA model, with its projector",
}


def model_card(
    meta: ExportMeta,
    format: CardFormat,
    config: VipLlavaConfig,
    agreement: IdAgreement | None = None,
    *,
    base: str = "",
) -> str:
    """Return the card as Markdown with the front matter that the hub reads.

    Args:
        meta: origin, stage, template and picture geometry.
        format: of the weights beside the card.
        config: of the network.
        agreement: how far the exported processor gives the ids of training, if one is beside it.
        base: what an adapter belongs on.
    """
    sections = [
        _front_matter(meta, format, base),
        f"# {_TITLES[format]}",
        "It answers questions about what is marked in a picture: boxes, ellipses, points, "
        "triangles, arrows, scribbles, masks and contours.",
        _origin(meta, config, base),
        _licence(meta, base),
        _usage(config, format, base),
        _conversation(meta),
    ]
    if agreement is not None:
        sections.append(_agreement(agreement))
    sections.append(_visual_prompts(meta))
    return "\n\n".join(sections) + "\n"


def licence_of(source: str) -> str:
    """Return the terms of a model in words: known ones, or what its folder's own card says."""
    card = Path(source).expanduser() / CARD_NAME
    if card.is_file():
        stated = _stated_licence(card.read_text(encoding="utf-8"))
        if stated:
            return stated
    if source.lower().startswith("mucai/"):
        return _OF_MUCAI
    return LICENCES.get(source.lower(), _UNKNOWN)


def _stated_licence(card: str) -> str | None:
    """Read the licence in a card's front matter; ``other`` says nothing."""
    parts = card.split("---", 2)
    if parts[0] or len(parts) < 3:
        return None
    try:
        values = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    stated = cast("dict[str, Any]", values).get("license") if isinstance(values, dict) else None
    return str(stated) if stated and stated != "other" else None


def _front_matter(meta: ExportMeta, format: CardFormat, base: str) -> str:
    sources = [base] if base else [meta.language_model, meta.vision_tower]
    values: dict[str, Any] = {
        "license": "other",
        "pipeline_tag": "image-text-to-text",
        "library_name": "peft" if format == "lora" else "transformers",
        "tags": ["vip-llava", "visual-prompts"],
    }
    if ids := [source for source in sources if _is_hub_id(source)]:
        values["base_model"] = ids
    if format in ("llava", "projector"):
        del values["library_name"]
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _origin(meta: ExportMeta, config: VipLlavaConfig, base: str) -> str:
    network_config: Any = config
    text_config = network_config.text_config
    rows = [
        ("Vision tower", _named(meta.vision_tower)),
        (
            "Language model",
            f"{_named(meta.language_model)} ({text_config.model_type}, "
            f"{text_config.num_hidden_layers} layers of width {text_config.hidden_size})",
        ),
        *([("Base of the adapter", _named(base))] if base else []),
        ("Stage", meta.stage),
        ("Data", "; ".join(meta.data) or "not recorded"),
        ("Written by", f"vipllava-lightning {meta.code}" if meta.code else "vipllava-lightning"),
        (
            "Picture",
            f"{meta.image_size} x {meta.image_size} pixels, "
            f"{_ASPECTS.get(meta.image_aspect, meta.image_aspect)}; {meta.image_seq_length} tokens",
        ),
        ("Feature layers", ", ".join(map(str, meta.feature_layers))),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"## Origin\n\n| | |\n| --- | --- |\n{table}"


def _licence(meta: ExportMeta, base: str) -> str:
    named = [base] if base else []
    sources: dict[str, None] = dict.fromkeys([*named, meta.language_model, meta.vision_tower])
    lines = [f"- {_named(source)}: {licence_of(source)}" for source in sources]
    lines += [f"- data {text}" for text in meta.data]
    listed = "\n".join(lines)
    return f"## Licence\n\nThe terms of all that went into the weights hold together:\n\n{listed}"


def _usage(config: VipLlavaConfig, format: CardFormat, base: str) -> str:
    model_class, trust, limit = "VipLlavaForConditionalGeneration", "", ""
    if network_class(config) is not VipLlavaForConditionalGeneration:
        model_class, trust = "AutoModelForImageTextToText", ", trust_remote_code=True"
        limit = (
            "\n\n`VipLlavaForConditionalGeneration` drops the first position that the vision tower "
            "gives, a class token, which this tower does not have. It ends with an error at the "
            "first image, as do engines that have built it in: the code in this folder reads all "
            "patches."
        )
    if format == "hf":
        code = (
            "```python\n"
            f"from transformers import AutoProcessor, {model_class}\n\n"
            'processor = AutoProcessor.from_pretrained("FOLDER")\n'
            f'model = {model_class}.from_pretrained("FOLDER"{trust})\n'
            'question = [{"type": "image", "url": "marked.jpg"}, {"type": "text", "text": '
            '"What is within the red box?"}]\n'
            "inputs = processor.apply_chat_template(\n"
            '    [{"role": "user", "content": question}], add_generation_prompt=True,\n'
            '    tokenize=True, return_dict=True, return_tensors="pt")\n'
            "answer = model.generate(**inputs, max_new_tokens=64)\n"
            "print(processor.decode(answer[0, inputs.input_ids.shape[1]:], "
            "skip_special_tokens=True))\n"
            "```"
            "\n\nA rendered chat holds its beginning-of-sequence token already: to tokenize one "
            "yourself, pass `add_special_tokens=False`."
        )
    elif format == "lora":
        code = (
            "```python\n"
            "from peft import PeftModel\n"
            f"from transformers import {model_class}\n\n"
            f'base = {model_class}.from_pretrained("{_named(base)}"{trust})\n'
            'model = PeftModel.from_pretrained(base, "FOLDER")\n'
            "```\n\nAs one model: `vipllava convert FOLDER MERGED --format lora-merged`."
        )
    elif format == "projector":
        code = "To train from it: `python train.py stage=finetune stage.checkpoint=FOLDER`."
    else:
        code = (
            "It opens in the released LLaVA-style code. In transformers after "
            "`vipllava convert FOLDER HF_FOLDER`."
        )
    return f"## Use\n\n{code}" + limit * (format in ("hf", "lora"))


def _conversation(meta: ExportMeta) -> str:
    turns = [
        Turn("user", "What is within the red box?", has_image=True),
        Turn("assistant", "A dog."),
        Turn("user", "What colour is it?"),
    ]
    text = get_template(meta.chat_template).render(turns, generation_prompt=True)
    return (
        f"## Chat template `{meta.chat_template}`\n\n"
        f"It was trained with these strings, and answers well only in them:\n\n```text\n{text}\n```"
    )


def _agreement(agreement: IdAgreement) -> str:
    text = "## Ids of the processor\n\n`processor.apply_chat_template` "
    if not agreement.different:
        return text + (
            "gives the ids of training, compared on: "
            f"{', '.join(agreement.equal)}. Special tokens that a user types are text in training "
            "and tokens there."
        )
    lines = "\n".join(f"- {kind}: {place}" for kind, place in agreement.different.items())
    return text + (
        "does not give the ids of training everywhere; `vipllava.inference.engine.Engine` does. "
        f"They differ in:\n\n{lines}"
        + (f"\n\nThey are equal in: {', '.join(agreement.equal)}." if agreement.equal else "")
    )


def _visual_prompts(meta: ExportMeta) -> str:
    if not meta.visual_prompts:
        return "## Visual prompts\n\nHow marks were drawn in training is not recorded."
    settings = yaml.safe_dump(
        json.loads(json.dumps(dict(meta.visual_prompts))), sort_keys=False, default_flow_style=None
    )
    return f"## Visual prompts\n\nMarks were drawn with:\n\n```yaml\n{settings}```"


def _is_hub_id(source: str) -> bool:
    return (
        source.count("/") == 1
        and not source.startswith((".", "/", "~"))
        and not (Path(source).exists())
    )


def _named(source: str) -> str:
    """Return a hub id as it is, and of a local path its last part: the rest is nobody's matter."""
    return source if _is_hub_id(source) else f"`{Path(source).name}` (a local folder)"
