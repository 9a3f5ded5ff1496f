"""From a request's messages, regions and options to turns, marks and sampling: checks, no work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, cast

from vipllava.conversation.templates import SYSTEM_TEXTS
from vipllava.inference.protocol import Sampling
from vipllava.serve.errors import ApiError, of_fault
from vipllava.serve.schema import ChatRequest, ImagePart, SystemMessage, TextPart, UserMessage
from vipllava.serve.settings import ServerSettings
from vipllava.types import Turn, VipLlavaError, VisualPromptPlan
from vipllava.visual_prompts.mark_fields import parse_marks
from vipllava.visual_prompts.marks import Mark, refer_text

_LETTERS_PER_TOKEN: Final = 64
"""More than any tokenizer packs into one on average: a longer text is refused unread."""
_MOST_LETTERS: Final = 1_000_000
_LEAST_LETTERS: Final = 20_000


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image of a request that nobody has looked at yet."""

    url: str
    param: str  # the field that has it


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is asked, checked as far as it can be without the image."""

    turns: tuple[Turn, ...]
    image: ImageSource | None
    marks: tuple[Mark, ...]


def read_conversation(
    request: ChatRequest, settings: ServerSettings, max_positions: int | None
) -> Conversation:
    """Return a request's turns, image and marks.

    Raises:
        ApiError: 400; names the field.
    """
    turns: list[Turn] = []
    image: ImageSource | None = None
    system = ""
    letters = 0
    for index, message in enumerate(request.messages):
        where = f"messages[{index}]"
        text, images = _read(message.content, f"{where}.content")
        letters += len(text)
        if isinstance(message, SystemMessage):
            system = _system(text, index, settings)
            continue
        expected = "user" if len(turns) % 2 == 0 else "assistant"
        if message.role != expected:
            raise ApiError(
                400,
                f"{where}.role is {message.role}; expected {expected}: the turns of user and "
                "assistant alternate, and the user begins",
                param=f"{where}.role",
                code="invalid_value",
            )
        if system and isinstance(message, UserMessage):
            text, system = f"{system}\n{text}", ""
        if images and image is not None:
            images = [image, *images]
        if len(images) > 1:
            raise ApiError(
                400,
                f"{images[1].param} is a second image: these models take one in a conversation",
                param=images[1].param,
                code="too_many_images",
            )
        if images:
            image = images[0]
        turns.append(Turn(message.role, text, has_image=bool(images)))
    if not turns or turns[-1].role != "user":
        last = len(request.messages) - 1
        raise ApiError(
            400,
            f"messages[{last}] is the last one; expected a message of the user, to be answered",
            param=f"messages[{last}].role",
            code="invalid_value",
        )
    most = _MOST_LETTERS
    if max_positions is not None:
        most = min(most, max(_LEAST_LETTERS, _LETTERS_PER_TOKEN * max_positions))
    if letters > most:
        raise ApiError(
            400,
            f"the messages have {letters} letters, and the model {max_positions} positions for "
            f"prompt and answer: more than {most} letters are not read",
            param="messages",
            code="context_length_exceeded",
        )
    marks = read_regions(request.regions)
    if image is None and (marks or request.overlay):
        name = "regions" if marks else "overlay"
        raise ApiError(
            400, f"`{name}` needs an image, and the messages have none", param=name,
            code="invalid_value",
        )  # fmt: skip
    if request.regions is not None and not marks:  # the client knows of marks, and gives none
        turns = [_without_marks(turn) for turn in turns]
    return Conversation(tuple(turns), image, marks)


def _without_marks(turn: Turn) -> Turn:
    if turn.role != "user":
        return turn
    try:
        return replace(turn, text=refer_text(turn.text, VisualPromptPlan((1, 1), ())))
    except VipLlavaError as fault:
        raise of_fault(fault) from None


def _read(content: object, where: str) -> tuple[str, list[ImageSource]]:
    if isinstance(content, str):
        return content, []
    texts: list[str] = []
    images: list[ImageSource] = []
    for index, part in enumerate(cast("Sequence[object]", content)):
        if isinstance(part, TextPart):
            texts.append(part.text)
        elif isinstance(part, ImagePart):
            images.append(ImageSource(part.image_url.url, f"{where}[{index}].image_url.url"))
    return "\n".join(texts), images


def _system(text: str, index: int, settings: ServerSettings) -> str:
    """Return what goes in front of the first question: our templates have their system text."""
    if not text.strip() or text.strip() in SYSTEM_TEXTS:
        return ""
    where = f"messages[{index}]"
    if index != 0:
        raise ApiError(
            400, f"{where} is a system message; expected at most one, the first", param=where,
            code="invalid_value",
        )  # fmt: skip
    if not settings.prepend_system:
        raise ApiError(
            400,
            f"{where} is a system message, and these models were trained with one fixed system "
            "text: put it into the first question, or start the server with --prepend-system, "
            "which does so",
            param=where,
            code="system_message",
        )
    return text


def read_regions(value: object) -> tuple[Mark, ...]:
    """Return the marks of a request's `regions`.

    Raises:
        ApiError: 400; names the field, e.g. ``regions[2].box``.
    """
    if value is None:
        return ()
    try:
        return tuple(parse_marks(value))
    except VipLlavaError as fault:
        raise of_fault(fault, "regions") from None


def read_sampling(
    request: ChatRequest, settings: ServerSettings, max_positions: int | None
) -> Sampling:
    """Return how the answer is chosen; greedy, where the request says nothing.

    Raises:
        ApiError: 400; names the field.
    """
    most = request.max_completion_tokens
    if most is None:
        most = request.max_tokens
    elif request.max_tokens not in (None, most):
        raise ApiError(
            400, f"max_tokens is {request.max_tokens} and max_completion_tokens {most}: give one",
            param="max_tokens", code="invalid_value",
        )  # fmt: skip
    if most is None:
        most = settings.max_tokens
        if max_positions is not None:  # leaves half of the positions to the question
            most = max(1, min(most, max_positions // 2))
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs `logprobs: true`", param="top_logprobs",
                       code="invalid_value")  # fmt: skip
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    try:
        return Sampling(
            max_new_tokens=most,
            temperature=request.temperature or 0.0,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=request.top_k or 0,
            seed=request.seed,
            stop=stop,
            num_beams=request.num_beams or 1,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        )
    except VipLlavaError as fault:
        raise of_fault(fault) from None
