"""Errors in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from vipllava.files.pools import WorkerDied
from vipllava.inference.endpoint_client import ABOUT_THE_QUESTION, EndpointError
from vipllava.inference.protocol import EngineStopped, PromptTooLong, SamplingError
from vipllava.types import LONGEST_MESSAGE, VipLlavaError
from vipllava.visual_prompts.mark_places import MarkError

_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_FIELDS: Final = {"max_new_tokens": "max_tokens", "logprobs": "top_logprobs"}
"""What a client calls an option of ours."""
_CODES: Final = {404: "not_found", 405: "method_not_allowed"}
_log = logging.getLogger(__name__)


class ApiError(Exception):
    """What a client gets in place of an answer.

    Args:
        status: of HTTP.
        message: for people: the thing, its value and the remedy.
        param: the field that is wrong, e.g. ``regions[2].box``.
        code: for programs; one word for each cause.
        retry_after_s: when to ask again, for 429 and 503.
        close: whether the connection ends with it: its body was not read to the end.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        close: bool = False,
    ) -> None:
        if len(message) > LONGEST_MESSAGE:
            half = LONGEST_MESSAGE // 2
            message = f"{message[:half]} [...] {message[-half:]}"
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"
        if close:
            self.headers["Connection"] = "close"

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON values."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


def json_bytes(value: object) -> bytes:
    """Return JSON; what is no character, as a model of another server may say, becomes ``?``."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def json_response(
    value: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a response of JSON values."""
    return Response(json_bytes(value), status, dict(headers or {}), "application/json")


def of_fault(fault: VipLlavaError, param: str = "messages") -> ApiError:
    """Return what a client gets for a fault of marks, image, conversation or engine."""
    if isinstance(fault, MarkError):
        return ApiError(400, str(fault), param=fault.field, code="invalid_region")
    if isinstance(fault, SamplingError):
        name = _FIELDS.get(fault.option, fault.option)
        said = str(fault).replace(fault.option, name)
        return ApiError(400, said, param=name, code="invalid_value")
    if isinstance(fault, PromptTooLong):
        return ApiError(
            400, str(fault).replace("max_new_tokens", "max_tokens"),
            param="max_tokens" if fault.room else "messages", code="context_length_exceeded",
        )  # fmt: skip
    if isinstance(fault, EngineStopped):
        return ApiError(503, str(fault), code="engine_stopped", retry_after_s=10)
    if isinstance(fault, WorkerDied):
        return ApiError(503, str(fault), code="engine_died", retry_after_s=1)
    if isinstance(fault, EndpointError):
        return _of_endpoint(fault)
    return ApiError(400, str(fault), param=param, code="invalid_value")


def _of_endpoint(fault: EndpointError) -> ApiError:
    """Return what a client gets for an engine behind an address, which is nobody's business."""
    if fault.status in ABOUT_THE_QUESTION:
        return ApiError(400, str(fault), param="messages", code="engine_refused")
    status = fault.status if fault.status in (429, 503) else 502
    _log.warning("an engine behind an address does not answer: %s", fault)
    return ApiError(
        status,
        "the engine behind this server does not answer: ask again later",
        code="engine_busy" if status == 429 else "engine_unavailable",
        retry_after_s=fault.retry_after_s or 5,
    )


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    note = request.scope.get("state", {}).get("note")
    if note is not None:
        note.error = error.code
    return json_response(error.body, error.status, error.headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = str(error.detail)
    if said == HTTPStatus(error.status_code).phrase:  # the router's own
        said = f"{request.method} {request.url.path[:200]}: {said}"
    found = ApiError(
        error.status_code,
        said,
        code=_CODES.get(error.status_code),
    )
    found.headers.update(error.headers or {})
    return await _answer_api_error(request, found)


def answer_errors(app: FastAPI) -> None:
    """Have an app answer errors in OpenAI's form, its router's own included."""
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
