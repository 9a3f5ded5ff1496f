"""Any OpenAI-compatible server as an engine: pictures go as PNG, text comes as it is made.

The official client tries again what has not begun: no connection, a busy server (429, 503, with its
``Retry-After``). Once a piece of text has been passed on nothing is tried again, for it would come
twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, cast

from vipllava.inference.endpoint import Connection
from vipllava.inference.endpoint_client import (
    NOBODY_THERE,
    EndpointClient,
    EndpointError,
    EndpointSettings,
    count_field,
    messages_of,
    short,
    text_field,
    waiting_time,
    whole_characters,
)
from vipllava.inference.protocol import (
    Delta,
    EngineStopped,
    FinishReason,
    Generation,
    Sampling,
    SamplingError,
    TokenLogprob,
    Usage,
)
from vipllava.types import VipLlavaError

_LISTED_WITHIN_S: Final = 10.0
"""Of the list of models; a server that computes still tells it at once."""
_LONGEST_NAME: Final = 300
_LONGEST_TOKEN: Final = 256
"""Characters that each token of an answer may have, all together."""
_LONGEST_ANSWER: Final = 2**22
"""Characters of an answer, however many tokens it may have."""
_LOGPROBS_SHARE: Final = 8
"""Times the characters of an answer that its log probabilities may have."""
_MOST_UNREAD: Final = 2**20
"""Characters that wait for who reads them; then nothing more is taken from the endpoint."""
_DELTA_SIZE: Final = 256
"""Characters that the memory of a delta is worth."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One of an endpoint's models, as it lists them."""

    name: str
    max_positions: int | None = None  # ids of prompt and answer together; vLLM says it


class OpenAIEngine:
    """Answers by a model behind an address; see :class:`protocol.GenerationEngine`.

    Sampling comes with each request; of the settings, ``temperature``, ``top_p`` and ``seed`` have
    no part in it. ``top_k`` is no option of OpenAI's: it is sent, where set, as vLLM and this
    project's server read it.

    Args:
        settings: where it is; ``concurrency`` requests are sent at once, further ones wait here.

    Raises:
        ConfigError: the key's variable is not set, or the client is not installed.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings = settings
        self._client = EndpointClient(settings)
        self._checks: Connection | None = None
        self._running: dict[str, asyncio.Task[Delta]] = {}
        self._free = asyncio.Semaphore(settings.concurrency)
        self._max_positions: int | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    @property
    def max_positions(self) -> int | None:
        """Ids of prompt and answer together; known after :meth:`check` if the server says it."""
        return self._max_positions

    async def served_models(self) -> list[ServedModel]:
        """Return what the endpoint lists.

        Raises:
            EndpointError: it does not answer, or not with a list of models.
        """
        import openai

        where = self.settings.base_url
        try:
            async with asyncio.timeout(_LISTED_WITHIN_S):
                page = await self._client.opened().with_options(max_retries=0).models.list()
            listed = [(each.id, count_field(each, "max_model_len")) for each in page.data]
        except TimeoutError as error:
            said = f"{where}: its models are not listed within {_LISTED_WITHIN_S:g} s"
            raise EndpointError(said) from error
        except openai.OpenAIError as error:
            status = getattr(error, "status_code", None)
            variable = self.settings.api_key_env
            key = f"{variable} holds its key" if variable else "it needs no key: none is sent"
            raise EndpointError(
                f"{where} does not list its models: {self._client.reason(error, 1)}; see that it "
                "runs, that the address ends as its documentation says (mostly /v1), and that "
                f"{key}",
                status,
            ) from error
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise EndpointError(f"{where} lists no models: its reply is another one") from error
        return [
            ServedModel(name, most or None)
            for name, most in listed
            if isinstance(name, str) and len(name) <= _LONGEST_NAME
        ]

    async def check(self) -> None:
        """Make sure that the endpoint is there and serves the model.

        Raises:
            EndpointError: it does not answer, or its list of models lacks this one.
        """
        models = {each.name: each for each in await self.served_models()}
        if self.settings.model not in models:
            raise EndpointError(
                f"{self.settings.base_url} does not serve `{self.settings.model}`; it serves "
                f"{short(', '.join(models)) or 'none'}"
            )
        self._max_positions = models[self.settings.model].max_positions

    async def check_images(self) -> None:
        """Make sure, until it is known, that images reach the model; asks two small questions.

        Raises:
            EndpointError: images are refused, or take part in no answer.
        """
        if self._checks is None:
            self._checks = Connection(self._client)
        try:
            await self._checks.check_images()
        except EndpointError:
            self._checks = None  # it may be another one's fault, and over soon
            raise

    async def generate(self, requests: Sequence[Generation]) -> AsyncGenerator[Delta]:
        """Yield the deltas of all requests as they come; see the protocol.

        Raises:
            EngineStopped: it was closed.
            VipLlavaError: two requests have one key.
        """
        if self._closed:
            raise EngineStopped(f"the engine for {self.settings.base_url} was closed")
        keys = [each.request.key for each in requests]
        taken = [key for key in keys if key in self._running or keys.count(key) > 1]
        if taken:
            raise VipLlavaError(f"several requests have the key {taken[0]!r}: give each its own")
        deltas = _Unread()
        tasks = [self._start(each, deltas) for each in requests]
        try:
            unfinished = len(tasks)
            while unfinished:
                delta = await deltas.get()
                if isinstance(delta, BaseException):
                    raise delta  # a defect of ours
                unfinished -= delta.finish_reason is not None
                yield delta
        finally:
            await _end(tasks)

    def cancel(self, key: str) -> None:
        """End a request and its transfer; its last delta says ``cancelled``."""
        if task := self._running.get(key):
            task.cancel()

    async def close(self) -> None:
        """End what runs and close the connections."""
        self._closed = True
        await _end(list(self._running.values()))
        await self._client.close()

    def _start(self, generation: Generation, deltas: _Unread) -> asyncio.Task[Delta]:
        key = generation.request.key

        def end(task: asyncio.Task[Delta]) -> None:
            self._running.pop(key, None)
            if task.cancelled():
                deltas.end(Delta(key, finish_reason="cancelled"))
            else:
                deltas.end(task.exception() or task.result())

        task = asyncio.create_task(self._answer(generation, deltas.put))
        self._running[key] = task
        task.add_done_callback(end)
        return task

    async def _answer(
        self, generation: Generation, put: Callable[[Delta], Awaitable[None]]
    ) -> Delta:
        """Pass on all deltas but the last one, and return that."""
        import openai

        key, total_s = generation.request.key, self.settings.total_s
        try:
            fields = _sampling_fields(generation.sampling, self.settings)
            async with self._free, asyncio.timeout(total_s):
                messages = await asyncio.to_thread(messages_of, generation.request)
                if generation.request.image is not None and self.settings.check_images:
                    await self.check_images()
                stream = await self._client.opened().chat.completions.create(
                    model=self.settings.model,
                    messages=messages,
                    stream=True,
                    stream_options={"include_usage": True},
                    **fields,
                )
                async with stream:
                    return await _read(generation, stream, put)
        except VipLlavaError as error:
            return _failed(key, error)
        except TimeoutError:
            return _failed(key, EndpointError(f"not answered within total_s={total_s:g}"))
        except openai.OpenAIError as error:
            return _failed(key, self._error(error))
        except UnicodeEncodeError as error:
            said = f"the question has characters that cannot be sent: {error.reason}"
            return _failed(key, VipLlavaError(said))
        except (ValueError, RecursionError) as error:  # what is no JSON amid the stream
            said = f"the answer was broken off: {short(error)}"
            return _failed(key, EndpointError(said))

    def _error(self, error: Any) -> EndpointError:
        status = getattr(error, "status_code", None)
        if status is None:
            return EndpointError(f"{self.settings.base_url}: {self._client.reason(error)}")
        if status in NOBODY_THERE:
            return self._client.nobody_there(error)
        seconds = waiting_time(error.response.headers.get("retry-after", ""))
        return EndpointError(self._client.reason(error), status, seconds)


class _Unread:
    """The deltas of one call that nobody has read yet; who has more waits until there is room."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[tuple[Delta | BaseException, int]] = asyncio.Queue()
        self._size = 0
        self._has_room = asyncio.Event()

    async def put(self, delta: Delta) -> None:
        """Wait for room, and add a delta behind which others of its request come."""
        while self._size >= _MOST_UNREAD:
            self._has_room.clear()
            await self._has_room.wait()
        size = _DELTA_SIZE + len(delta.text) + _size_of(delta.logprobs)
        self._size += size
        self._events.put_nowait((delta, size))

    def end(self, last: Delta | BaseException) -> None:
        """Add a request's last delta, for which there is always room."""
        self._events.put_nowait((last, 0))

    async def get(self) -> Delta | BaseException:
        """Wait for the next one."""
        event, size = await self._events.get()
        self._size -= size
        self._has_room.set()
        return event


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _failed(key: str, error: VipLlavaError) -> Delta:
    return Delta(key, finish_reason="error", error=error)


def _sampling_fields(sampling: Sampling, settings: EndpointSettings) -> dict[str, Any]:
    """Return the fields of a request's body that say how its answer is chosen.

    Raises:
        SamplingError: an endpoint has no such option.
    """
    if sampling.num_beams > 1:
        raise SamplingError(
            "num_beams", sampling.num_beams, "1: an OpenAI-compatible endpoint has no beam search"
        )
    extra = dict(settings.extra_body)
    if sampling.top_k:
        extra["top_k"] = sampling.top_k
    fields: dict[str, Any] = {
        settings.limit_name: sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "extra_body": extra or None,
    }
    if sampling.top_p < 1:
        fields["top_p"] = sampling.top_p
    if sampling.seed is not None:
        fields["seed"] = sampling.seed
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    if sampling.logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    return fields


async def _read(
    generation: Generation, stream: Any, put: Callable[[Delta], Awaitable[None]]
) -> Delta:
    """Pass on the texts of a stream and return its last delta.

    Raises:
        EndpointError: the answer is none, only a part of one, or longer than it may be.
    """
    import openai

    key, sampling = generation.request.key, generation.sampling
    most = min(_LONGEST_ANSWER, 2**16 + _LONGEST_TOKEN * sampling.max_new_tokens)
    num_letters, logprobs_size = 0, 0
    reason: str | None = None
    usage: Usage | None = None
    refusal = ""
    try:
        async for chunk in stream:
            usage = _usage_of(chunk) or usage
            for choice in getattr(chunk, "choices", None) or ():
                delta = getattr(choice, "delta", None)
                refusal += text_field(delta, "refusal") or ""
                text = whole_characters(text_field(delta, "content") or "")
                logprobs = _logprobs_of(choice) if sampling.logprobs is not None else ()
                num_letters += len(text)
                logprobs_size += _size_of(logprobs)
                if max(num_letters, len(refusal)) > most or logprobs_size > _LOGPROBS_SHARE * most:
                    raise EndpointError(
                        f"the endpoint sends too much: more than {most} characters for "
                        f"max_new_tokens={sampling.max_new_tokens}"
                    )
                if text or logprobs:
                    await put(Delta(key, text, logprobs=logprobs))
                reason = text_field(choice, "finish_reason") or reason
    except openai.OpenAIError:
        if reason is None:  # else only the count of tokens is lost
            raise
    if refusal:
        raise EndpointError(f"the model refuses: {short(refusal)}")
    if reason == "content_filter":
        raise EndpointError("the endpoint's filter withheld the answer")
    if reason is None:
        raise EndpointError("the answer was broken off: its stream ended before it did")
    if reason not in ("stop", "length"):
        raise EndpointError(f"the answer was broken off (finish_reason {short(reason)})")
    return Delta(key, finish_reason=cast("FinishReason", reason), usage=usage)


def _usage_of(chunk: Any) -> Usage | None:
    said: Any = getattr(chunk, "usage", None)
    prompt, answer = (count_field(said, each) for each in ("prompt_tokens", "completion_tokens"))
    return None if prompt is None or answer is None else Usage(prompt, answer)


def _logprobs_of(choice: Any) -> tuple[TokenLogprob, ...]:
    said: Any = getattr(choice, "logprobs", None)
    try:
        return tuple(
            TokenLogprob(*_named(each), tuple(map(_named, each.top_logprobs or ())))
            for each in getattr(said, "content", None) or ()
        )
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise EndpointError(f"log probabilities of another form: {short(said)}") from error


def _named(said: Any) -> tuple[str, float]:
    return whole_characters(str(said.token)), float(said.logprob)


def _size_of(logprobs: Sequence[TokenLogprob]) -> int:
    """Return the characters that log probabilities are worth, a number as eight."""
    return sum(
        8 + len(each.token) + sum(8 + len(token) for token, _ in each.top) for each in logprobs
    )
