"""The README.md beside a checkpoint's weights: where they come from and how to use them.

Its words are in ``model_card.md.jinja``.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import huggingface_hub
import jinja2
import yaml
from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

from vipllava.checkpoints.export_meta import ExportMeta
from vipllava.conversation.templates import get_template
from vipllava.models.building import network_class
from vipllava.models.hub_models import is_hub_id
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
_CONVERSATION: Final = (
    Turn("user", "What is within the red box?", has_image=True),
    Turn("assistant", "A dog."),
    Turn("user", "What colour is it?"),
)


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
        agreement: of the exported processor, if one is beside it.
        base: what an adapter belongs on.
    """
    network: Any = config
    sources = [meta.language_model, meta.vision_tower]
    settings = json.loads(json.dumps(dict(meta.visual_prompts)))
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    cast("Any", environment).filters["named"] = _named
    text = Path(__file__).with_name("model_card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        meta=meta,
        format=format,
        base=base,
        agreement=agreement,
        hub_ids=[each for each in ([base] if base else sources) if _is_hub_id(each)],
        text=network.text_config,
        licences={each: licence_of(each) for each in [base] * bool(base) + sources},
        has_own_code=network_class(config) is not VipLlavaForConditionalGeneration,
        conversation=get_template(meta.chat_template).render(_CONVERSATION, generation_prompt=True),
        visual_prompts=yaml.safe_dump(settings, sort_keys=False, default_flow_style=None),
    )


def licence_of(source: str) -> str:
    """Return the terms of a model in words: known ones, or what its folder's own card says."""
    stated: Any = None
    card = Path(source).expanduser() / CARD_NAME
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # no card, or none of the hub's
        hub = cast("Any", huggingface_hub)
        stated = (hub.metadata_load(card) or dict[str, Any]()).get("license")
    if stated and stated != "other":
        return str(stated)
    if source.lower().startswith("mucai/"):
        return _OF_MUCAI
    return LICENCES.get(source.lower(), _UNKNOWN)


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and is_hub_id(source)


def _named(source: str) -> str:
    """Return a hub id as it is, and of a local path its last part: the rest is nobody's matter."""
    return source if _is_hub_id(source) else f"`{Path(source).name}` (a local folder)"
