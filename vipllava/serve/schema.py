"""What a request may say: OpenAI's chat completions, and this server's own fields.

Fields of OpenAI that change nothing here are taken and left alone; those that would change the
answer are taken with the value that changes nothing; any other name is an error.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WithJsonSchema,
)

from vipllava.inference.protocol import (
    LARGEST_SEED,
    LONGEST_STOP,
    MOST_LOGPROBS,
    MOST_STOPS,
)
from vipllava.serve.errors import ApiError
from vipllava.serve.region_schema import REGIONS

MOST_MESSAGES: Final = 1024
MOST_PARTS: Final = 64
_TAG: Final = "tag:"
_REPR: Final = reprlib.Repr()  # bounded: values may hold megabytes
_REPR.maxstring = _REPR.maxother = 81
_INT31: Final = 2**31 - 1
_Nothing = Annotated[Any, Field(description="Taken, and changes nothing.")]


class Strict(BaseModel):
    """Refuses names that it does not know; JSON's types are taken as they are."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class TextPart(Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """Where an image is."""

    url: str = Field(
        min_length=1,
        description="`data:image/png;base64,...` (JPEG, PNG or WebP), or an address where the "
        "server allows them.",
    )
    detail: Literal["auto", "low", "high"] | None = Field(None, description="Changes nothing.")


class ImagePart(Strict):
    """An image; it stands in front of its message's text."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _tag_of_content(value: Any) -> str | None:
    return _TAG + ("text" if isinstance(value, str) else "parts") if value is not None else None


def _tag_by(name: str, known: Sequence[str]) -> Discriminator:
    def tag(value: Any) -> str | None:
        found = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
        return _TAG + found if isinstance(found, str) and found in known else None

    return Discriminator(
        tag,
        custom_error_type="unknown_kind",
        custom_error_message=f"expected an object whose `{name}` is one of {', '.join(known)}",
    )


Text = Annotated[str, Tag(_TAG + "text")]
_TEXT_OR_PARTS: Final = Discriminator(
    _tag_of_content,
    custom_error_type="unknown_kind",
    custom_error_message="expected a text or a list of parts",
)
TextParts = Annotated[
    list[TextPart], Field(min_length=1, max_length=MOST_PARTS, fail_fast=True), Tag(_TAG + "parts")
]
AnyPart = Annotated[
    Annotated[TextPart, Tag(_TAG + "text")] | Annotated[ImagePart, Tag(_TAG + "image_url")],
    _tag_by("type", ("text", "image_url")),
]
AnyParts = Annotated[
    list[AnyPart],
    Field(min_length=1, max_length=MOST_PARTS, fail_fast=True),
    Tag(_TAG + "parts"),
]


class SystemMessage(Strict):
    """What a model is to be; see `docs/serving.md` for what becomes of it."""

    role: Literal["system", "developer"]
    content: Annotated[Text | TextParts, _TEXT_OR_PARTS]
    name: str | None = None


class UserMessage(Strict):
    """What a person says; `{0}` in a text names the first region."""

    role: Literal["user"]
    content: Annotated[Text | AnyParts, _TEXT_OR_PARTS]
    name: str | None = None


class AssistantMessage(Strict):
    """What the model has said before; a message of a completion can be sent back as it came."""

    role: Literal["assistant"]
    content: Annotated[Text | TextParts, _TEXT_OR_PARTS]
    name: str | None = None
    refusal: None = None
    annotations: _Nothing = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    vipllava: _Nothing = None


Message = Annotated[
    Annotated[SystemMessage, Tag(_TAG + "system")]
    | Annotated[UserMessage, Tag(_TAG + "user")]
    | Annotated[AssistantMessage, Tag(_TAG + "assistant")],
    Discriminator(
        lambda value: _role_tag(value),
        custom_error_type="unknown_kind",
        custom_error_message="expected an object whose `role` is one of system, developer, user, "
        "assistant",
    ),
]


def _role_tag(value: Any) -> str | None:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    if role in ("system", "developer"):
        return _TAG + "system"
    return _TAG + role if role in ("user", "assistant") else None


class StreamOptions(Strict):
    """How a stream is sent."""

    include_usage: bool | None = Field(None, description="Whether a last chunk has the usage.")
    include_obfuscation: _Nothing = None


class TextFormat(Strict):
    """The only format of answers."""

    type: Literal["text"]


Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Stops = Annotated[
    Annotated[Stop, Tag(_TAG + "text")]
    | Annotated[list[Stop], Field(max_length=MOST_STOPS), Tag(_TAG + "parts")],
    Discriminator(
        _tag_of_content,
        custom_error_type="unknown_kind",
        custom_error_message="expected a text or a list of texts",
    ),
]
Zero = Annotated[float, Field(ge=0, le=0, allow_inf_nan=False)]
Regions = Annotated[Any, WithJsonSchema(REGIONS)]


class ChatRequest(Strict):
    """A chat completion: OpenAI's fields, and `regions`, `overlay`, `top_k` and `num_beams`."""

    model: str = Field(min_length=1, max_length=500)
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=_INT31)
    max_completion_tokens: int | None = Field(None, ge=1, le=_INT31)
    temperature: float | None = Field(None, ge=0, le=2, description="0, greedy, if not given.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=_INT31, description="0: all. Not in OpenAI's API.")
    num_beams: int | None = Field(None, ge=1, le=16, description="Not in OpenAI's API.")
    seed: int | None = Field(None, ge=-LARGEST_SEED - 1, le=LARGEST_SEED)
    stop: Stops | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    regions: Regions = None
    overlay: bool | None = Field(None, description="Whether the marked image comes back.")

    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None

    user: _Nothing = None
    metadata: _Nothing = None
    store: _Nothing = None
    service_tier: _Nothing = None
    safety_identifier: _Nothing = None
    prompt_cache_key: _Nothing = None
    prompt_cache_retention: _Nothing = None
    parallel_tool_calls: _Nothing = None


class PreviewRequest(Strict):
    """An image and marks to draw on it."""

    image: str = Field(min_length=1, description="As `image_url.url` of a chat's message.")
    regions: Regions = None
    format: Literal["png", "json"] | None = Field(
        None, description="`png` is the marked image; `json` has it and the marks' words."
    )


_ONLY: Final = {
    "n": "one answer is given; leave it out, or 1",
    "tools": "these models call no tools; leave it out",
    "tool_choice": "these models call no tools; leave it out",
    "response_format": "answers are plain text; leave it out",
    "modalities": "answers are plain text; leave it out",
    "logit_bias": "it is not done here; leave it out",
    "frequency_penalty": "it is not done here; leave it out, or 0",
    "presence_penalty": "it is not done here; leave it out, or 0",
}
"""Of fields that are taken with the value that changes nothing: why another is refused."""

Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], values: object) -> Body:
    """Return a request's body checked.

    Raises:
        ApiError: 400; names the field, and the nearest known one of a name that is not known.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        found: Any = error.errors(include_url=False, include_context=False)
        raise _refused(found, kind) from None


def _refused(problems: Sequence[Any], kind: type[BaseModel]) -> ApiError:
    def rank(problem: Any) -> tuple[bool, int]:  # an unknown name says the most, then depth
        return problem["type"] != "extra_forbidden", -len(problem["loc"])

    problem = min(problems, key=rank)
    param = path_of(problem["loc"])
    if problem["type"] == "extra_forbidden":
        name = str(problem["loc"][-1])
        near = difflib.get_close_matches(name[:100], _known_names(kind), n=1, cutoff=0.6)
        advice = f"did you mean `{near[0]}`?" if near else "leave it out"
        return ApiError(
            400, f"`{param}` is no field of this request: {advice}", param=param,
            code="unknown_field",
        )  # fmt: skip
    value = _REPR.repr(problem["input"])
    shown = value if len(value) <= 80 else f"{value[:80]}..."
    code = "missing_field" if problem["type"] == "missing" else "invalid_value"
    why = problem["msg"].replace("Input should be", "expected")
    if problem["type"] == "model_type":
        why = "expected an object"
    elif kind is ChatRequest:
        why = _ONLY.get(str(problem["loc"][0]), why) if problem["loc"] else why
    said = "is missing" if problem["type"] == "missing" else f"is {shown}: {why}"
    where = f"`{param}`" if param else "the body"
    return ApiError(400, f"{where} {said}", param=param or None, code=code)


def path_of(place: Sequence[str | int]) -> str:
    """Return the place of a field as a client would write it, e.g. ``messages[0].content``."""
    path = ""
    for step in place:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith(_TAG) and not step.startswith(("constrained-", "list[")):
            path += f".{step[:100]}" if path else step[:100]
    return path


def _known_names(kind: type[BaseModel]) -> list[str]:
    kinds: list[type[BaseModel]] = [kind]
    if kind is ChatRequest:
        kinds += [StreamOptions, ImageUrl, ImagePart, TextPart, *get_args_of_messages()]
    return sorted({name for each in kinds for name in each.model_fields})


def get_args_of_messages() -> tuple[type[BaseModel], ...]:
    """Return the kinds of messages."""
    union = get_args(Message)[0]
    return tuple(get_args(each)[0] for each in get_args(union))
