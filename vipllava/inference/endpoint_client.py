"""What every use of an OpenAI-compatible endpoint has in common: client, messages, errors.

The official client does attempts, pauses and what the server says about them (``Retry-After``).
"""

from __future__ import annotations

import base64
import importlib.util
import io
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from PIL import Image

from vipllava.types import ConfigError, Request, VipLlavaError, first_line

Message = Mapping[str, Any]
"""One message in the form of OpenAI's chat completions."""

ABOUT_THE_QUESTION: Final = frozenset({400, 413, 415, 422})
"""Statuses that refuse a question; others say that the endpoint cannot answer now."""
NOBODY_THERE: Final = frozenset({401, 404, 405})
"""Statuses that no question will change."""
_LONGEST_REASON: Final = 300
_MOST_TOKENS: Final = 2**31 - 1
_LONGEST_WAIT_S: Final = 86400.0
_BROKEN_OFF: Final = ("abort", "error")


class EndpointError(VipLlavaError):
    """An endpoint does not answer a question, or answers none at all.

    Args:
        message: what it said, or what there was instead.
        status: of its reply; None if there was none.
        retry_after_s: seconds after which it asks to be asked again, where it says so.
    """

    def __init__(
        self, message: str, status: int | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """Where an endpoint is and how it is asked; recorded beside what it answers."""

    base_url: str  # up to and with ``/v1``, e.g. http://localhost:8000/v1
    model: str  # as the endpoint calls it
    # The environment variable that holds the key. None sends none: what is in OPENAI_API_KEY is
    # not for every server.
    api_key_env: str | None = None
    revision: str | None = None  # of the model, where its name does not say it; not sent
    temperature: float | None = 0.0  # None leaves it to the endpoint, as the next two
    top_p: float | None = None
    seed: int | None = 0
    # newer models at OpenAI take the limit by its other name only
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra_body: Mapping[str, Any] = field(default_factory=dict)  # further fields of every request
    concurrency: int = 8  # requests at once
    max_retries: int = 5  # attempts after the first one
    timeout_s: float = 300.0  # of one attempt, between two bytes
    total_s: float = 900.0  # of all attempts at one question, pauses included
    check_images: bool = True  # whether to make sure that images reach the model, see `answers`

    def __post_init__(self) -> None:
        problems: list[str] = []
        url = urlsplit(str(self.base_url))
        if url.scheme not in ("http", "https") or not url.hostname:
            problems.append(f"base_url={self.base_url}: expected e.g. http://localhost:8000/v1")
        elif url.username or url.password or url.query:
            problems.append("base_url holds a name, password or query; name api_key_env instead")
        if not self.model:
            problems.append("model is empty; name it as the endpoint does")
        if self.concurrency < 1 or self.max_retries < 0:
            problems.append(
                f"concurrency={self.concurrency} must be at least 1 and "
                f"max_retries={self.max_retries} at least 0"
            )
        if not all(0 < seconds < math.inf for seconds in (self.timeout_s, self.total_s)):
            problems.append(
                f"timeout_s={self.timeout_s} and total_s={self.total_s} must be above 0 and finite"
            )
        if self.limit_name not in ("max_tokens", "max_completion_tokens"):
            problems.append(
                f"limit_name={self.limit_name}: expected max_tokens or max_completion_tokens"
            )
        if problems:
            raise ConfigError("; ".join(problems))

    def recorded(self) -> dict[str, Any]:
        """Return what an answer depends on, as plain values."""
        names = ("base_url", "model", "revision", "temperature", "top_p", "seed", "extra_body")
        values = asdict(self)
        return {name: values[name] for name in names} | {
            "base_url": self.base_url.rstrip("/"), "extra_body": dict(self.extra_body),
        }  # fmt: skip


class EndpointClient:
    """The official client of one event loop, with its key, and what its errors mean.

    Raises:
        ConfigError: the key's variable is not set, or the client is not installed.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        if importlib.util.find_spec("openai") is None:
            raise ConfigError(
                "an endpoint needs the official client, which is not installed: "
                'pip install "vipllava-lightning[endpoint]"'
            )
        self.settings = settings
        self._opened: Any = None
        self._key = ""
        if settings.api_key_env is not None:
            self._key = os.environ.get(settings.api_key_env, "").strip()
            if not self._key or not self._key.isascii():
                raise ConfigError(
                    f"api_key_env={settings.api_key_env}: this environment variable holds no key"
                )

    def opened(self) -> Any:
        """Return the client; its first use opens it for the running event loop."""
        if self._opened is None:
            import httpx2
            import openai

            from vipllava.inference.endpoint_bytes import bound, is_stream

            # A line per request, at the level of what people should read.
            logging.getLogger("httpx2").setLevel(logging.WARNING)
            timeout = openai.Timeout(
                self.settings.timeout_s, connect=min(10.0, self.settings.timeout_s)
            )

            async def check(response: httpx2.Response) -> None:
                # Inside an attempt: what is raised here is tried again by the client.
                await bound(response)
                if is_stream(response):
                    return
                await response.aread()
                asked = response.request.url.path.endswith("/chat/completions")
                if asked and response.is_success and (fault := _fault_of(response)):
                    raise httpx2.RemoteProtocolError(fault, request=response.request)

            self._opened = openai.AsyncOpenAI(
                base_url=self.settings.base_url,
                api_key=self._key or "none",
                timeout=timeout,
                max_retries=self.settings.max_retries,
                default_headers={"Accept-Encoding": "identity"},
                http_client=openai.DefaultAsyncHttpxClient(
                    timeout=timeout, event_hooks={"response": [check]}
                ),
            )
        return self._opened

    async def close(self) -> None:
        """Close what is open."""
        if self._opened is not None:
            await self._opened.close()
            self._opened = None

    def reason(self, error: Any, num_attempts: int | None = None) -> str:
        """Say in a line what the client's error is about; a key that it repeats is hidden."""
        import openai

        num_attempts = num_attempts or self.settings.max_retries + 1
        tried = f" ({num_attempts} attempts)" * (num_attempts > 1)
        if isinstance(error, openai.APIStatusError):
            body: Any = error.body
            said = (body.get("message") or body) if isinstance(body, dict) else body
            text = f"HTTP {error.status_code}: {short(said or error.response.reason_phrase)}"
        elif isinstance(error, openai.APITimeoutError):
            text = f"no answer within timeout_s={self.settings.timeout_s:g}{tried}"
        else:
            text = short(first_line(error.__cause__ or error)) + tried
        return text.replace(self._key, "***") if self._key else text

    def nobody_there(self, error: Any) -> EndpointError:
        """Return what to say where no question will be answered: the key or model is wrong."""
        asked = self.settings
        return EndpointError(
            f"{asked.base_url}: {self.reason(error)}; see that base_url ends as the endpoint's "
            f"documentation says (mostly /v1), model={asked.model} is one of its models "
            f"and api_key_env={asked.api_key_env} names the variable with its key",
            error.status_code,
        )


def messages_of(request: Request) -> list[Message]:
    """Return a request's conversation as messages, its images in front of the turn that has them.

    Raises:
        VipLlavaError: image and turns contradict each other.
    """
    num_images = sum(turn.has_image for turn in request.turns)
    if num_images != (request.image is not None):
        raise VipLlavaError(
            f"request {request.key!r} has {'no' if request.image is None else 'an'} image, but "
            f"{num_images} of its turns say has_image: mark the first user turn, or leave the "
            "image out"
        )
    return [
        user_message(turn.text, request.image, *request.more_images)
        if turn.has_image
        else {"role": turn.role, "content": turn.text}
        for turn in request.turns
    ]


def user_message(text: str, *images: Image.Image | None) -> Message:
    """Return a user's turn, its images in front; None among them is left out."""
    parts = [
        {"type": "image_url", "image_url": {"url": _as_url(image)}}
        for image in images
        if image is not None
    ]
    content = [*parts, {"type": "text", "text": text}] if parts else text
    return {"role": "user", "content": content}


def _as_url(image: Image.Image) -> str:
    encoded = io.BytesIO()
    # Lossless at any level; the first is several times faster than the default.
    image.convert("RGB").save(encoded, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def _fault_of(response: Any) -> str | None:
    """Return why the body of a response that calls itself a success is no completion."""
    try:
        body: Any = response.json()
    except (ValueError, RecursionError):
        return f"the reply is no JSON: {short(response.text) or '(empty)'}"
    if not isinstance(body, dict):
        return f"the reply is no object: {short(body)}"
    if error := body.get("error"):
        return f"the reply is an error: {short(error)}"
    try:
        choice = body["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        text = message.get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        return f"the reply is no chat completion: {short(body)}"
    if reason in _BROKEN_OFF:
        return f"the answer was broken off (finish_reason {reason})"
    if isinstance(text, str) or (text is None and (reason or message.get("refusal"))):
        return None
    return f"the reply has no text: {short(body)}"


def text_field(said: object, name: str) -> str | None:
    """Return a field that a server may leave out or fill with anything."""
    value: Any = getattr(said, name, None)
    return value if isinstance(value, str) else None


def count_field(said: object, name: str) -> int | None:
    """Return a count of tokens that a server may leave out or fill with anything."""
    value: Any = getattr(said, name, None)
    return value if type(value) is int and 0 <= value <= _MOST_TOKENS else None


def waiting_time(header: str) -> float | None:
    """Return the seconds that a ``Retry-After`` says; None for a date, and for what means nothing.

    More than a day counts as a day.
    """
    return min(float(header), _LONGEST_WAIT_S) if header.isdecimal() else None


def whole_characters(text: str) -> str:
    """Replace half characters, of which JSON can tell: they fit into no file."""
    return text.encode("utf-8", "replace").decode()


def short(said: object) -> str:
    """Return what somebody said in one line of bounded length, which no terminal obeys."""
    text = " ".join(str(said).split())
    text = "".join(each if each.isprintable() else "\ufffd" for each in text[: _LONGEST_REASON + 1])
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} ..."
