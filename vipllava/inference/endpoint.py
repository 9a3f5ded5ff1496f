"""Any OpenAI-compatible endpoint: conversations out, replies or recorded failures back.

The official client does attempts, pauses and what the server says about them (``Retry-After``).
Added here: a reply that is no reply counts as a failed attempt, all attempts together have one
time, and an endpoint that is of no use at all is an error instead of a failure per question.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from PIL import Image

from vipllava.files.pools import run_tasks
from vipllava.inference.endpoint_client import (
    ABOUT_THE_QUESTION,
    NOBODY_THERE,
    EndpointClient,
    EndpointError,
    EndpointSettings,
    Message,
    count_field,
    messages_of,
    short,
    text_field,
    user_message,
    whole_characters,
)
from vipllava.types import Failure, Request

_MOST_IN_A_ROW: Final = 32


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
        self.settings = settings
        EndpointClient(settings)  # says now what is missing

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
        connection = Connection(EndpointClient(self.settings))
        try:
            yield connection
        finally:
            await connection.close()


class Connection:
    """Asks for the tasks of one event loop; made by :meth:`Endpoint.connect`."""

    def __init__(self, client: EndpointClient) -> None:
        self.settings = client.settings
        self._client = client
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
        if not getattr(completion, "choices", None):  # it calls itself a stream, for example
            return self._unanswered(f"the reply is no chat completion: {short(completion)}")
        choice = completion.choices[0]
        text, reason = choice.message.content, text_field(choice, "finish_reason")
        if refusal := getattr(choice.message, "refusal", None):
            return Failure(f"the model refuses: {short(refusal)}")
        if reason == "content_filter":
            return Failure("the endpoint's filter withheld the answer")
        if not text and reason == "length":
            return Failure(f"the answer has no text within {max_tokens} tokens, the limit")
        if text is None:
            return Failure(f"the answer has no text (finish_reason {reason})")
        text = whole_characters(text)
        reported = text_field(completion, "model"), text_field(completion, "system_fingerprint")
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
        await self._client.close()

    async def _check_images(self) -> None:
        what = f"`{self.settings.model}` at {self.settings.base_url}"
        num_tokens: list[int | None] = []
        for image in (None, Image.new("RGB", (64, 64), "white")):
            turn = user_message("Is this image white?", image)
            try:
                found = await self._complete([turn], 16, self.settings.seed)
            except EndpointError as error:
                if image is None:
                    raise
                found = Failure(str(error))  # some say that there is no model for images
            if isinstance(found, Failure):
                does = "does not answer" if image is None else "takes no images"
                raise EndpointError(f"{what} {does}: {found.reason}")
            num_tokens.append(count_field(getattr(found, "usage", None), "prompt_tokens"))
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
                completion = await self._client.opened().chat.completions.create(
                    model=asked.model,
                    messages=messages,
                    **{asked.limit_name: max_tokens},
                    **{name: value for name, value in optional.items() if value is not None},
                    extra_body=dict(asked.extra_body) or None,
                )
        except openai.APIStatusError as error:
            status, said = error.status_code, self._client.reason(error)
            if status in NOBODY_THERE:
                raise self._client.nobody_there(error) from error
            if status in ABOUT_THE_QUESTION and self._has_answered:
                self._failed_in_a_row = 0
                return Failure(said)
            return self._unanswered(said)
        except TimeoutError:
            return self._unanswered(f"not answered within total_s={asked.total_s:g}")
        except openai.OpenAIError as error:
            return self._unanswered(self._client.reason(error))
        except RecursionError:
            return self._unanswered("the reply is no chat completion: it is nested too deeply")
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
