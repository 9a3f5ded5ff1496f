"""The processor of an export: other engines prepare pictures and text with it.

Our :class:`~vipllava.conversation.ConversationEncoder` is what a model is trained with. A processor
gets one string and one tokenizer call, so its ids can differ around the picture and at the start:
spellings of the chat template are tried until they do not, and what remains is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final

from PIL import Image
from transformers import LlavaProcessor, PreTrainedTokenizerFast, VipLlavaConfig

from vipllava.checkpoints.export_meta import ExportMeta
from vipllava.conversation import ConversationEncoder
from vipllava.conversation.templates import ChatTemplate, get_template, jinja_template
from vipllava.models.towers import preprocessing_of, tower_of
from vipllava.types import Turn

_ASKED: Final = Turn(
    "user", "What is the person marked with the red scribble holding?", has_image=True
)
_SAID: Final = Turn("assistant", "A cup of coffee, I think.")
_STEAM: Final = Turn("assistant", "It is white, and there is steam.")
_PROBES: Final[dict[str, tuple[Turn, ...]]] = {
    "a question about a picture": (_ASKED,),
    "a question without a picture": (Turn("user", "What is the capital of France?"),),
    "a second question": (_ASKED, _SAID, Turn("user", "Are you sure?\nAnswer yes or no.")),
    "a picture in the second question": (
        Turn("user", "Can you see?"), Turn("assistant", "Yes."), _ASKED
    ),
    "a whole conversation": (_ASKED, _SAID, Turn("user", "Why?"), _STEAM),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class IdAgreement:
    """How far a processor gives the ids that our encoder gives."""

    equal: tuple[str, ...]  # kinds of conversation with equal ids
    different: dict[str, str]  # the other kinds, each with the first place where they differ


def build_processor(
    tokenizer: PreTrainedTokenizerFast, config: VipLlavaConfig, meta: ExportMeta
) -> tuple[LlavaProcessor, IdAgreement]:
    """Make the processor that prepares pictures and conversations as training did.

    VipLlava has none of its own in transformers; LLaVA's serves it. Its image processor can pad
    to a square with the mean colour, which CLIP's and SigLIP's cannot. A copy of the tokenizer,
    with image and padding token, goes into it.

    Returns:
        The processor with its chat template, and how far its ids are those of training.
    """
    # The Pillow one; the class without suffix needs torchvision.
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    network: Any = config
    vision = network.vision_config
    pixels = preprocessing_of(vision)
    square = {"height": meta.image_size, "width": meta.image_size}
    crops = meta.image_aspect == "square"
    image_processor: Any = LlavaImageProcessorPil(
        do_pad=meta.image_aspect == "pad",
        do_center_crop=crops,
        size={"shortest_edge": meta.image_size} if crops else square,
        crop_size=square,
        resample=Image.Resampling[pixels.resampling.upper()],
        image_mean=list(pixels.mean),
        image_std=list(pixels.std),
    )
    # Of CLIP's patches and class token "default" drops the class token again.
    one_dropped = tower_of(vision).num_prefix_tokens == 1
    processor: Any = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=deepcopy(tokenizer),
        patch_size=vision.patch_size,
        num_additional_image_tokens=int(one_dropped),
        vision_feature_select_strategy="default" if one_dropped else "full",
        image_token=meta.image_token,
    )
    encoder = ConversationEncoder(
        tokenizer,
        meta.chat_template,
        int(network.image_token_id),
        meta.image_seq_length,
        max_length=meta.image_seq_length + 4096,
    )
    best, chosen = IdAgreement((), {}), ""
    for candidate in _spellings(tokenizer, get_template(meta.chat_template)):
        processor.chat_template = candidate
        agreement = compare_ids(processor, encoder)
        if not chosen or len(agreement.equal) > len(best.equal):
            best, chosen = agreement, candidate
        if not agreement.different:
            break
    # The tokenizer alone, too: engines read it for conversations without a picture.
    processor.chat_template = processor.tokenizer.chat_template = chosen
    return processor, best


def compare_ids(processor: Any, encoder: ConversationEncoder) -> IdAgreement:
    """Give the same conversations to a processor's chat template and to our encoder."""
    equal: list[str] = []
    different: dict[str, str] = {}
    for kind, turns in _PROBES.items():
        asked = turns[-1].role == "user"
        ids = encoder.encode_generation_prompt(turns) if asked else encoder.encode(turns).input_ids
        ours: list[int] = ids.tolist()
        theirs = processor_ids(processor, turns, add_generation_prompt=asked)
        if ours == theirs:
            equal.append(kind)
            continue
        place = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
        )
        different[kind] = (
            f"{len(theirs)} ids instead of {len(ours)}; from position {place}: "
            f"{_few(theirs[place:])} instead of {_few(ours[place:])}"
        )
    return IdAgreement(tuple(equal), different)


def processor_ids(
    processor: Any, turns: Sequence[Turn], *, add_generation_prompt: bool = True
) -> list[int]:
    """Return the ids that ``apply_chat_template`` gives a conversation, or a question."""
    image = Image.new("RGB", (32, 32))
    messages: list[dict[str, Any]] = []
    for turn in turns:
        content: list[dict[str, Any]] = [{"type": "text", "text": turn.text}]
        if turn.has_image:
            content.insert(0, {"type": "image", "image": image})
        messages.append({"role": turn.role, "content": content})
    batch = processor.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
    )
    ids = batch["input_ids"]
    return [int(token_id) for token_id in (ids[0] if isinstance(ids[0], list) else ids)]


def _spellings(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> Iterator[str]:
    """Yield the ways to write a template down, the plainest first.

    A beginning that the tokenizer adds is spelled, because engines tokenize a rendered chat
    without adding it. Behind a spelled one some tokenizers begin no new word: the space makes them.
    """
    call: Any = tokenizer
    bos = str(call.bos_token or "")
    adds_bos = bool(bos) and call("").input_ids[:1] == [call.bos_token_id]
    # "" stays as the last resort where a beginning has to be said.
    for start in (bos, f"{bos} ", "") if adds_bos and not template.bos else ("",):
        for after_image in ("", " "):
            yield jinja_template(template, bos=start, after_image=after_image)


def _few(ids: list[int]) -> str:
    return f"{ids[:4]}".replace("]", ", ...]") if len(ids) > 4 else f"{ids}"
