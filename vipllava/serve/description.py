"""What ``/openapi.json`` says of the routes, exactly enough for programs that read it."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

from vipllava.serve.schema import ChatRequest, PreviewRequest

Responses = dict[int | str, dict[str, Any]]


class ErrorFields(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = Field(description="The field that is wrong, e.g. `regions[2].box`.")
    code: str | None = Field(description="One word for each cause, for programs.")


class ErrorBody(BaseModel):
    """An error, as OpenAI writes it."""

    error: ErrorFields


class ModelFields(BaseModel):
    """One model."""

    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int | None = Field(description="Positions for a prompt and its answer.")


class ModelList(BaseModel):
    """The models of this server."""

    object: str
    data: list[ModelFields]


class MessageExtra(BaseModel):
    """What a request with regions gets besides the text."""

    words: list[str] = Field(description="By which words the question named each region.")
    overlay: str | None = Field(description="The marked image, `data:image/png;base64,...`.")


class AnswerMessage(BaseModel):
    """The answer."""

    role: str
    content: str
    refusal: None
    vipllava: MessageExtra | None = None


class TokenFields(BaseModel):
    """A token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]


class PlacedToken(TokenFields):
    """A token of an answer, and the likeliest ones at its place."""

    top_logprobs: list[TokenFields]


class Logprobs(BaseModel):
    """The tokens of an answer."""

    content: list[PlacedToken]
    refusal: None


class Choice(BaseModel):
    """The only choice."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: str = Field(description="`stop` or `length`.")


class UsageFields(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """An answer."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[Choice]
    usage: UsageFields | None


class Preview(BaseModel):
    """A marked image and what its marks are called."""

    words: list[str]
    overlay: str
    width: int
    height: int


class Health(BaseModel):
    """That the process lives."""

    status: str


class Ready(BaseModel):
    """Whether the models answer."""

    status: str
    models: dict[str, str] | None = None


_BODIES: Final = (
    *(ErrorBody, ModelFields, ModelList, Completion, Preview, Health, Ready),
    *(ChatRequest, PreviewRequest),
)
_WHY: Final = {
    400: "A field is wrong; `param` names it.",
    401: "The key is missing or wrong.",
    404: "There is no such model.",
    405: "Another method is expected.",
    408: "The body came too slowly.",
    413: "The body or its image is too large.",
    415: "The body is no `application/json`.",
    421: "The server is not known by this `Host`.",
    429: "Too many requests; `Retry-After` says when to ask again.",
    500: "A defect of the server.",
    502: "The engine behind this server did not answer.",
    503: "The server is ending, or the engine has stopped.",
    504: "The deadline is over.",
}


def _ref(kind: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _json(kind: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(kind)}}


def _responses(found: dict[str, Any], *errors: int) -> Responses:
    said: Responses = {200: {"description": "As asked.", "content": found}}
    for status in errors:
        said[status] = {"description": _WHY[status], "content": _json(ErrorBody)}
        if status in (429, 503):
            said[status]["headers"] = {
                "Retry-After": {"description": "Seconds.", "schema": {"type": "string"}}
            }
    return said


def _body(kind: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": _json(kind)}}


_TEXT: Final = {"schema": {"type": "string"}}
_PNG: Final = {"schema": {"type": "string", "format": "binary"}}
_OF_BODIES: Final = (400, 401, 408, 413, 415, 421, 429, 500, 503, 504)
HEALTH: Final = _responses(_json(Health), 421)
READY: Final = _responses(_json(Ready), 421)
READY[503] = {"description": "Some do not.", "content": _json(Ready)}
METRICS: Final = _responses({"text/plain": _TEXT}, 401, 421)
MODELS: Final = _responses(_json(ModelList), 401, 421)
MODEL: Final = _responses(_json(ModelFields), 401, 404, 421)
CHAT: Final = _responses({**_json(Completion), "text/event-stream": _TEXT}, 404, 502, *_OF_BODIES)
CHAT_BODY: Final = _body(ChatRequest)
PREVIEW: Final = _responses({"image/png": _PNG, **_json(Preview)}, *_OF_BODIES)
PREVIEW_BODY: Final = _body(PreviewRequest)


def describe(app: FastAPI, *, needs_key: bool) -> None:
    """Have the app's description name the bodies, which its routes read themselves."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = make()
            _, schemas = models_json_schema(
                [(body, "validation") for body in _BODIES],
                ref_template="#/components/schemas/{model}",
            )
            components = found.setdefault("components", {})
            components.setdefault("schemas", {}).update(schemas["$defs"])
            for name in ("HTTPValidationError", "ValidationError"):
                components["schemas"].pop(name, None)
            for methods in found["paths"].values():
                for operation in methods.values():
                    operation["responses"].pop("422", None)
            if needs_key:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                for path, methods in found["paths"].items():
                    if path not in ("/health", "/ready"):
                        for operation in methods.values():
                            operation["security"] = [{"key": []}]
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = openapi
