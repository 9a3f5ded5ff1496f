"""Any OpenAI-compatible endpoint: conversations out, replies or recorded failures back.

The official client does attempts, pauses and what the server says about them (``Retry-After``).
Added here: a reply that is no reply counts as a failed attempt, all attempts together have one
time, and an endpoint that is of no use at all is an error instead of a failure per question.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import io
import logging
import math
import os
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from PIL import Image

from vipllava.files.pools import run_tasks
from vipllava.types import ConfigError, Failure, Request, VipLlavaError, first_line

Message = Mapping[str, Any]
"""One message in the form of OpenAI's chat completions."""

_ABOUT_THE_QUESTION: Final = frozenset({400, 413, 415, 422})
"""Statuses that refuse a question; others say that the endpoint cannot answer now."""
_NOBODY_THERE: Final = frozenset({401, 404, 405})
"""Statuses that no question will change."""
_MOST_IN_A_ROW: Final = 32
_LONGEST_REASON: Final = 300
_BROKEN_OFF: Final = ("abort", "error")


class EndpointError(VipLlavaError):
    """An endpoint answers no question at all, or none with an image."""


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


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model said."""

    text: str
    finish_reason: str | None  # ``length`` if it was cut at the limit of tokens
    model: str | None  # as the endpoint reports it
    system_fingerprint: str | None  # of model and server, where the endpoint reports one


class Endpoint:
    """Answers questions by the models behind an address.

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
        self._key = ""
        if settings.api_key_env is not None:
            self._key = os.environ.get(settings.api_key_env, "").strip()
            if not self._key or not self._key.isascii():
                raise ConfigError(
                    f"api_key_env={settings.api_key_env}: this environment variable holds no key"
                )

    def answers(
        self, requests: Iterable[Request], *, max_new_tokens: int = 64
    ) -> Generator[tuple[int, Reply | Failure]]:
        """Yield the answers as they come, each with the number of its request, from 0.

        Requests are read when one can be sent, so no more than ``concurrency`` images are held.
        Images travel as PNG: marks arrive as they were drawn. Before the first image two small
        questions find out whether images reach the model.

        Args:
            requests: the questions.
            max_new_tokens: longest answer, tokens.

        Raises:
            EndpointError: nobody answers, the key or model is wrong, or it takes no images. What
                was answered by then has been yielded.
            VipLlavaError: a request's image and turns contradict each other.
        """

        async def work(
            connection: Connection, job: tuple[int, list[Message], bool]
        ) -> tuple[int, Reply | Failure]:
            index, messages, has_image = job
            if has_image and self.settings.check_images:
                await connection.check_images()
            seed = self.settings.seed
            reply = await connection.ask(messages, max_tokens=max_new_tokens, seed=seed)
            if isinstance(reply, Reply):  # without blanks at its ends, as the engine's texts
                reply = replace(reply, text=reply.text.strip())
            return index, reply

        jobs = (
            (index, messages_of(request), request.image is not None)
            for index, request in enumerate(requests)
        )
        yield from run_tasks(self.connect(), work, jobs, self.settings.concurrency)

    @asynccontextmanager
    async def connect(self) -> AsyncGenerator[Connection]:
        """Give a connection to the tasks of one event loop; the first question opens it."""
        connection = Connection(self.settings, self._key)
        try:
            yield connection
        finally:
            await connection.close()


class Connection:
    """Asks for the tasks of one event loop; made by :meth:`Endpoint.connect`."""

    def __init__(self, settings: EndpointSettings, key: str) -> None:
        self.settings = settings
        self._key = key
        self._opened: Any = None
        self._failed_in_a_row = 0
        self._has_answered = False
        self._images_checked: asyncio.Task[None] | None = None

    async def ask(
        self, messages: Sequence[Message], *, max_tokens: int, seed: int | None
    ) -> Reply | Failure:
        """Return what the model says to a conversation, or why there is nothing.

        Raises:
            EndpointError: the key or model is wrong, or nothing is answered any more.
        """
        completion = await self._complete(messages, max_tokens, seed)
        if isinstance(completion, Failure):
            return completion
        choice = completion.choices[0]
        text, reason = choice.message.content, _text_of(choice, "finish_reason")
        if refusal := getattr(choice.message, "refusal", None):
            return Failure(f"the model refuses: {_short(refusal)}")
        if reason == "content_filter":
            return Failure("the endpoint's filter withheld the answer")
        if not text and reason == "length":
            return Failure(f"the answer has no text within {max_tokens} tokens, the limit")
        if text is None:
            return Failure(f"the answer has no text (finish_reason {reason})")
        # Half characters, of which JSON can tell, fit into no file.
        text = text.encode("utf-8", "replace").decode()
        reported = _text_of(completion, "model"), _text_of(completion, "system_fingerprint")
        return Reply(text, reason, *reported)

    async def check_images(self) -> None:
        """Make sure, once, that an image reaches the model.

        Raises:
            EndpointError: images are refused, or take part in no answer.
        """
        if self._images_checked is None:
            self._images_checked = asyncio.ensure_future(self._check_images())
        await asyncio.shield(self._images_checked)

    async def close(self) -> None:
        """Close what is open."""
        if self._opened is not None:
            await self._opened.close()

    async def _check_images(self) -> None:
        what = f"`{self.settings.model}` at {self.settings.base_url}"
        num_tokens: list[int | None] = []
        for image in (None, Image.new("RGB", (64, 64), "white")):
            turn = _user_message("Is this image white?", image)
            try:
                found = await self._complete([turn], 16, self.settings.seed)
            except EndpointError as error:
                if image is None:
                    raise
                found = Failure(str(error))  # some say that there is no model for images
            if isinstance(found, Failure):
                does = "does not answer" if image is None else "takes no images"
                raise EndpointError(f"{what} {does}: {found.reason}")
            num_tokens.append(getattr(getattr(found, "usage", None), "prompt_tokens", None))
        without, with_image = num_tokens
        if without and with_image and with_image <= without:
            raise EndpointError(
                f"{what} takes no images: it leaves them out, for a question has {without} tokens "
                f"without one and {with_image} with one; use a model that sees (or, if it does, "
                "check_images=false)"
            )

    async def _complete(
        self, messages: Sequence[Message], max_tokens: int, seed: int | None
    ) -> Any:
        """Return the client's completion or a Failure."""
        import openai

        asked = self.settings
        optional = {"temperature": asked.temperature, "top_p": asked.top_p, "seed": seed}
        try:
            async with asyncio.timeout(asked.total_s):
                completion = await self._client().chat.completions.create(
                    model=asked.model,
                    messages=messages,
                    **{asked.limit_name: max_tokens},
                    **{name: value for name, value in optional.items() if value is not None},
                    extra_body=dict(asked.extra_body) or None,
                )
        except openai.APIStatusError as error:
            status, said = error.status_code, self._reason(error)
            if status in _NOBODY_THERE:
                raise EndpointError(
                    f"{asked.base_url}: {said}; see that base_url ends as the endpoint's "
                    f"documentation says (mostly /v1), model={asked.model} is one of its models "
                    f"and api_key_env={asked.api_key_env} names the variable with its key"
                ) from error
            if status in _ABOUT_THE_QUESTION and self._has_answered:
                self._failed_in_a_row = 0
                return Failure(said)
            return self._unanswered(said)
        except TimeoutError:
            return self._unanswered(f"not answered within total_s={asked.total_s:g}")
        except openai.OpenAIError as error:
            return self._unanswered(self._reason(error))
        except UnicodeEncodeError as error:
            return Failure(f"the question has characters that cannot be sent: {error.reason}")
        self._failed_in_a_row = 0
        self._has_answered = True
        return completion

    def _unanswered(self, reason: str) -> Failure:
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= _MOST_IN_A_ROW:
            raise EndpointError(
                f"{self.settings.base_url}: {_MOST_IN_A_ROW} questions in a row are not answered; "
                f"the last one: {reason}. What was answered before is kept: see that base_url is a "
                f"server that runs and has the model {self.settings.model}, then start again"
            )
        return Failure(reason)

    def _reason(self, error: Any) -> str:
        """Say in a line what the client's error is about; a key that it repeats is hidden."""
        import openai

        tried = f" ({self.settings.max_retries + 1} attempts)" * (self.settings.max_retries > 0)
        if isinstance(error, openai.APIStatusError):
            body: Any = error.body
            said = (body.get("message") or body) if isinstance(body, dict) else body
            text = f"HTTP {error.status_code}: {_short(said or error.response.reason_phrase)}"
        elif isinstance(error, openai.APITimeoutError):
            text = f"no answer within timeout_s={self.settings.timeout_s:g}{tried}"
        else:
            text = _short(first_line(error.__cause__ or error)) + tried
        return text.replace(self._key, "***") if self._key else text

    def _client(self) -> Any:
        if self._opened is None:
            import httpx2
            import openai

            # A line per request, at the level of what people should read.
            logging.getLogger("httpx2").setLevel(logging.WARNING)
            timeout = openai.Timeout(
                self.settings.timeout_s, connect=min(10.0, self.settings.timeout_s)
            )

            async def check(response: httpx2.Response) -> None:
                # Inside an attempt: what is raised here is tried again by the client.
                await response.aread()
                if response.is_success and (fault := _fault_of(response)):
                    raise httpx2.RemoteProtocolError(fault, request=response.request)

            self._opened = openai.AsyncOpenAI(
                base_url=self.settings.base_url,
                api_key=self._key or "none",
                timeout=timeout,
                max_retries=self.settings.max_retries,
                http_client=openai.DefaultAsyncHttpxClient(
                    timeout=timeout, event_hooks={"response": [check]}
                ),
            )
        return self._opened


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
        _user_message(turn.text, request.image, *request.more_images)
        if turn.has_image
        else {"role": turn.role, "content": turn.text}
        for turn in request.turns
    ]


def _user_message(text: str, *images: Image.Image | None) -> Message:
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
        return f"the reply is no JSON: {_short(response.text) or '(empty)'}"
    if not isinstance(body, dict):
        return f"the reply is no object: {_short(body)}"
    if error := body.get("error"):
        return f"the reply is an error: {_short(error)}"
    try:
        choice = body["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        text = message.get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        return f"the reply is no chat completion: {_short(body)}"
    if reason in _BROKEN_OFF:
        return f"the answer was broken off (finish_reason {reason})"
    if isinstance(text, str) or (text is None and (reason or message.get("refusal"))):
        return None
    return f"the reply has no text: {_short(body)}"


def _text_of(said: object, name: str) -> str | None:
    """Return a field that a server may leave out or fill with anything."""
    value: Any = getattr(said, name, None)
    return value if isinstance(value, str) else None


def _short(said: object) -> str:
    text = " ".join(str(said).split())
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} ..."
