"""An endpoint as an engine: deltas as they come, each request its own end, nothing twice."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.chat_server import (
    QUICK,
    Bad,
    ChatServer,
    Events,
    chunk,
    completion,
    has_image,
    listed,
    run_chat_server,
    streamed,
    text_of,
)
from vipllava.inference.endpoint_client import EndpointError, EndpointSettings
from vipllava.inference.openai_engine import OpenAIEngine, ServedModel, _Unread
from vipllava.inference.protocol import (
    Answer,
    Delta,
    EngineStopped,
    Generation,
    Sampling,
    SamplingError,
    TokenLogprob,
    Usage,
    collect,
)
from vipllava.types import Request, Turn, VipLlavaError


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with run_chat_server() as state:
        state.answer = echo
        yield state


def echo(body: dict[str, Any]) -> Events:
    return streamed("you said", f" {text_of(body)}")


def question(text: str, image: Image.Image | None = None, **sampling: Any) -> Generation:
    turns = [Turn("user", text, has_image=image is not None)]
    return Generation(Request(image, turns, key=text), Sampling(**sampling))


def run(
    server: ChatServer, use: Callable[[OpenAIEngine], Coroutine[Any, Any, Any]], **settings: Any
) -> Any:
    """Return what is made of an engine, which is closed then."""

    async def main() -> Any:
        given = {"timeout_s": 1.5, "max_retries": 2, "total_s": 30.0, "check_images": False}
        engine = OpenAIEngine(EndpointSettings(server.address, "toy", **given | settings))
        try:
            return await use(engine)
        finally:
            await engine.close()

    return asyncio.run(main())


def ask(server: ChatServer, *asked: Generation, **settings: Any) -> list[Delta]:
    async def use(engine: OpenAIEngine) -> list[Delta]:
        return [delta async for delta in engine.generate(asked)]

    return run(server, use, **settings)


def test_deltas_come_as_they_are_made(server: ChatServer):
    assert ask(server, question("a")) == [
        Delta("a", "you said"),
        Delta("a", " a"),
        Delta("a", finish_reason="stop", usage=Usage(7, 2)),
    ]


def test_each_request_has_its_own_answer(server: ChatServer):
    asked = [question(f"q{number}") for number in range(20)]

    async def use(engine: OpenAIEngine) -> list[Answer]:
        return await collect(engine, asked)

    assert [each.text for each in run(server, use)] == [f"you said q{n}" for n in range(20)]


def test_no_more_run_at_once_than_are_to(server: ChatServer):
    running: list[int] = []

    def answer(body: dict[str, Any]) -> Events:
        def events() -> Iterator[bytes | float]:
            running.append(1)
            yield 0.05
            yield chunk(str(len(running)))
            running.pop()
            yield chunk(finish_reason="stop")

        return Events(events())

    server.answer = answer
    found = ask(server, *(question(str(n)) for n in range(9)), concurrency=3)
    assert {delta.text for delta in found} <= {"1", "2", "3", ""}
    assert len([delta for delta in found if delta.finish_reason]) == 9


def test_what_is_sent(server: ChatServer):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    turns = [Turn("user", "what?", has_image=True), Turn("assistant", "a cat"), Turn("user", "no")]
    sampling = Sampling(
        max_new_tokens=9, temperature=0.5, top_p=0.9, top_k=40, seed=3, stop=("###", "\n"),
        logprobs=2,
    )  # fmt: skip
    request = Request(Image.fromarray(pixels), turns, "k")
    ask(server, Generation(request, sampling), extra_body={"repetition_penalty": 1.1})
    (body,) = server.asked
    first, *others = body.pop("messages")
    assert body == {
        "model": "toy",
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "stop": ["###", "\n"],
        "logprobs": True,
        "top_logprobs": 2,
        "top_k": 40,
        "repetition_penalty": 1.1,
    }
    assert others == [
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "no"},
    ]
    shown, text = first["content"]
    head, _, encoded = shown["image_url"]["url"].partition(",")
    assert (head, text) == ("data:image/png;base64", {"type": "text", "text": "what?"})
    arrived = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert np.array_equal(np.asarray(arrived), pixels)


def test_what_is_left_open_is_not_sent(server: ChatServer):
    ask(server, question("a"), limit_name="max_completion_tokens", seed=5, top_p=0.3)
    (body,) = server.asked
    assert sorted(body) == [
        *("max_completion_tokens", "messages", "model", "stream", "stream_options"),
        "temperature",
    ]
    assert (body["temperature"], body["max_completion_tokens"]) == (0.0, 512)


def test_log_probabilities(server: ChatServer):
    said = {
        "content": [
            {
                "token": "yes", "logprob": -0.5, "bytes": None,
                "top_logprobs": [
                    {"token": "yes", "logprob": -0.5}, {"token": "no", "logprob": -1.0}
                ],
            }
        ]
    }  # fmt: skip
    server.answer = lambda body: Events(
        [chunk("yes", logprobs=said), chunk(finish_reason="length")]
    )
    assert ask(server, question("a", logprobs=2)) == [
        Delta("a", "yes", logprobs=(TokenLogprob("yes", -0.5, (("yes", -0.5), ("no", -1.0))),)),
        Delta("a", finish_reason="length"),
    ]


def failed(deltas: list[Delta], key: str) -> str:
    """Return what the last delta of a key says that went wrong."""
    last = [delta for delta in deltas if delta.key == key][-1]
    assert last.finish_reason == "error"
    return str(last.error)


@pytest.mark.parametrize(
    ("bad", "reason", "attempts"),
    [
        (Bad(500, b'{"error": {"message": "no memory"}}'), "HTTP 500: no memory", 3),
        (Bad(429, b'{"error": {"message": "full"}}', {**QUICK}), "HTTP 429: full", 3),
        (Bad(400, b'{"error": {"message": "too long"}}'), "HTTP 400: too long", 1),
        (Bad(404, b'{"error": {"message": "no toy"}}'), "no toy; see that base_url", 1),
        (Bad(hold_s=4.0), r"no answer within timeout_s=0.5 \(3 attempts\)", 3),
        (Bad(cut=True), r"peer closed .*\(3 attempts\)", 3),
        (Bad(body=b"<html>"), r"the reply is no JSON: <html> \(3 attempts\)", 3),
        (completion("not streamed"), "its stream ended before it did", 1),
        (Events([]), "its stream ended before it did", 1),
        (Events([chunk("half")], done=False), "peer closed", 1),
        (Events([chunk("half")]), "its stream ended before it did", 1),
        (Events([b"{half"]), "the answer was broken off: Expecting", 1),
        (Events([b"[]", b"null", b'"a"']), "its stream ended before it did", 1),
        (Events([b'{"choices": [null, {}, {"delta": null}]}']), "its stream ended before", 1),
        (Events([b'{"error": {"message": "out of memory"}}']), "out of memory", 1),
        (Events([chunk("half", "abort")]), r"broken off \(finish_reason abort\)", 1),
        (Events([chunk("", "content_filter")]), "filter withheld the answer", 1),
        (Events([chunk(delta={"refusal": "I "}), chunk(delta={"refusal": "can't"}),
                 chunk(finish_reason="stop")]), "the model refuses: I can't", 1),
        (Events([b"[" * 100_000]), "the answer was broken off: ", 1),
        (Events(itertools.cycle([chunk("y" * 10_000)])),
         "sends too much: more than 196608 characters for max_new_tokens=512", 1),
        (Events(itertools.cycle([chunk(delta={"refusal": "n" * 10_000})])), "sends too much", 1),
        (Events([chunk("z" * 2**22)]), "too much: an event of its stream has more than 2097152", 1),
        (Bad(body=b"x" * 2**24 + b"x"), r"too much: its reply has more than 16777216 bytes", 3),
        (Bad(headers={**QUICK, "Content-Encoding": "gzip"}), r"compressed \(gzip\), which", 3),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_the_request_s_own(
    server: ChatServer, bad: Any, reason: str, attempts: int
):
    server.answer = lambda body: bad if text_of(body) == "b" else echo(body)
    found = ask(server, *map(question, "abc"), timeout_s=0.5)
    texts = {key: "".join(d.text for d in found if d.key == key) for key in "ac"}
    assert texts == {"a": "you said a", "c": "you said c"}
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(failed(found, "b"))
    assert Counter(server.texts) == {"a": 1, "b": attempts, "c": 1}


@pytest.mark.parametrize(
    "content",
    [
        [3],
        [{"token": "a", "logprob": 10**400, "top_logprobs": []}],
        [{"token": "a", "logprob": "likely", "top_logprobs": []}],
        [{"token": "a", "logprob": 0, "top_logprobs": 5}],
    ],
)
def test_log_probabilities_of_another_form(server: ChatServer, content: Any):
    server.answer = lambda body: Events([chunk("a", "stop", logprobs={"content": content})])
    found = ask(server, question("a", logprobs=1))
    assert failed(found, "a").startswith("log probabilities of another form: ")
    assert [d.text for d in ask(server, question("a"))] == ["a", ""]  # which nobody asked for


def test_log_probabilities_without_end(server: ChatServer):
    each = {"token": "a" * 1000, "logprob": -1.0, "top_logprobs": []}
    events = itertools.cycle([chunk("", logprobs={"content": [each] * 100})])
    server.answer = lambda body: Events(events)
    assert "sends too much" in failed(ask(server, question("a", logprobs=0)), "a")


@pytest.mark.parametrize("usage", [(-5, 7), (7, -5), (10**400, 1), (1, 2**31), (1.5, 1)])
def test_a_count_that_cannot_be_is_none(server: ChatServer, usage: Any):
    server.answer = lambda body: streamed("yes", usage=usage)
    assert ask(server, question("a"))[-1] == Delta("a", finish_reason="stop")


@pytest.mark.parametrize(
    ("said", "seconds"), [("9" * 400, 86400.0), ("-5", None), ("soon", None), ("7", 7.0)]
)
def test_a_wait_that_cannot_be(server: ChatServer, said: str, seconds: float | None):
    server.answer = lambda body: Bad(503, b"", {"Retry-After": said})
    (last,) = ask(server, question("a"), max_retries=0)
    assert isinstance(last.error, EndpointError)
    assert last.error.retry_after_s == seconds


def test_who_reads_nothing_is_sent_no_more():
    async def main() -> None:
        unread = _Unread()
        await unread.put(Delta("a", "x" * 2**20))
        further = asyncio.create_task(unread.put(Delta("a", "y")))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not further.done()
        unread.end(Delta("b", finish_reason="stop"))
        assert (await unread.get()).text == "x" * 2**20
        await further
        assert (await unread.get(), await unread.get()) == (
            Delta("b", finish_reason="stop"),
            Delta("a", "y"),
        )

    asyncio.run(main())


def test_nothing_is_asked_again_once_text_has_been_passed_on(server: ChatServer):
    server.answer = lambda body: Events([chunk("half")], done=False)
    found = ask(server, question("a"), max_retries=5)
    assert [delta.text for delta in found] == ["half", ""]
    assert len(server.asked) == 1


def test_a_busy_server_is_asked_again_when_it_says(server: ChatServer):
    busy = [Bad(429, b"", {"Retry-After": "0.05"}), Bad(503, b"", {"Retry-After": "0.05"})]
    server.answer = lambda body: busy.pop() if busy else echo(body)
    assert [delta.text for delta in ask(server, question("a"))] == ["you said", " a", ""]
    assert len(server.asked) == 3


def test_one_that_stays_busy_says_so(server: ChatServer):
    server.answer = lambda body: Bad(503, b"", {"Retry-After": "7"})
    (last,) = ask(server, question("a"), max_retries=0)
    assert isinstance(last.error, EndpointError)
    assert (last.error.status, last.error.retry_after_s) == (503, 7.0)


def test_all_attempts_have_one_time(server: ChatServer):
    server.answer = lambda body: Bad(429, b"", {"Retry-After": "60"})
    found = ask(server, question("a"), total_s=0.3)
    assert failed(found, "a") == "not answered within total_s=0.3"


def test_an_answer_without_an_end_has_its_time(server: ChatServer):
    server.answer = lambda body: Events(itertools.cycle([chunk("on"), 0.02]))
    found = ask(server, question("a"), total_s=0.5)
    assert failed(found, "a") == "not answered within total_s=0.5"
    assert found[0] == Delta("a", "on")


def test_a_whole_answer_without_its_count_is_whole(server: ChatServer):
    server.answer = lambda body: Events([chunk("yes", "stop")], done=False)
    assert ask(server, question("a"))[-1] == Delta("a", finish_reason="stop")


def test_no_beam_search_elsewhere(server: ChatServer):
    found = ask(server, question("a", num_beams=2), question("b"))
    error = next(d.error for d in found if d.key == "a")
    assert isinstance(error, SamplingError)
    assert str(error).startswith("num_beams=2: expected 1: an OpenAI-compatible endpoint has no")
    assert server.texts == ["b"]


def test_a_request_that_contradicts_itself(server: ChatServer):
    wrong = Generation(Request(Image.new("RGB", (8, 8)), [Turn("user", "a")], key="k7"))
    assert "request 'k7' has an image, but 0" in failed(ask(server, wrong), "k7")
    assert server.asked == []


def test_half_characters(server: ChatServer):
    server.answer = lambda body: Events([chunk("emoji \ud83d"), chunk(finish_reason="stop")])
    found = ask(server, question("a"), question("b \ud83d"))
    assert "".join(d.text for d in found if d.key == "a") == "emoji ?"
    assert "characters that cannot be sent" in failed(found, "b \ud83d")


def endless(body: dict[str, Any]) -> Events:
    return Events(itertools.cycle([chunk("on"), 0.01])) if text_of(body) != "b" else echo(body)


def wait_for(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_cancel_ends_one_request_and_its_transfer(server: ChatServer):
    server.answer = endless

    async def use(engine: OpenAIEngine) -> list[Delta]:
        found: list[Delta] = []
        async for delta in engine.generate([question("a"), question("b")]):
            found.append(delta)
            if {each.key for each in found} == {"a", "b"}:
                engine.cancel("a")
                engine.cancel("nobody")
        return found

    found = run(server, use)
    ends = {delta.key: delta.finish_reason for delta in found if delta.finish_reason}
    assert ends == {"a": "cancelled", "b": "stop"}
    wait_for(lambda: server.left == ["a"])


def test_cancel_before_anything_is_sent(server: ChatServer):
    async def use(engine: OpenAIEngine) -> list[Delta]:
        deltas = engine.generate([question("a"), question("b")])
        first = asyncio.ensure_future(anext(deltas))
        await asyncio.sleep(0)
        engine.cancel("a")
        return [await first, *[delta async for delta in deltas]]

    found = run(server, use, concurrency=1)
    assert [d for d in found if d.key == "a"] == [Delta("a", finish_reason="cancelled")]
    assert server.texts == ["b"]


def test_leaving_the_stream_ends_all_transfers(server: ChatServer):
    server.answer = endless

    async def use(engine: OpenAIEngine) -> None:
        deltas = engine.generate([question("a"), question("c")])
        seen: set[str] = set()
        while seen != {"a", "c"}:
            seen.add((await anext(deltas)).key)
        await deltas.aclose()
        found = [delta async for delta in engine.generate([question("b")])]
        assert found[-1].finish_reason == "stop"

    run(server, use)
    wait_for(lambda: sorted(server.left) == ["a", "c"])


def test_close_ends_what_runs(server: ChatServer):
    server.answer = endless

    async def use(engine: OpenAIEngine) -> list[Delta]:
        deltas = engine.generate([question("a")])
        found = [await anext(deltas)]
        await engine.close()
        await engine.close()
        found += [delta async for delta in deltas]
        with pytest.raises(EngineStopped, match="was closed"):
            await anext(engine.generate([question("c")]))
        return found

    assert run(server, use)[-1] == Delta("a", finish_reason="cancelled")
    wait_for(lambda: server.left == ["a"])


def test_two_requests_with_one_key(server: ChatServer):
    async def one(deltas: AsyncGenerator[Delta]) -> Delta:
        return await anext(deltas)

    async def use(engine: OpenAIEngine) -> None:
        with pytest.raises(VipLlavaError, match="several requests have the key 'a'"):
            await one(engine.generate([question("a"), question("a")]))
        running = engine.generate([question("a")])
        await one(running)
        with pytest.raises(VipLlavaError, match="several requests have the key 'a'"):
            await one(engine.generate([question("a")]))
        async for _ in running:
            pass
        await one(engine.generate([question("a")]))

    server.answer = lambda body: Events([chunk("on"), 0.2, chunk(finish_reason="stop")])
    run(server, use)


def test_what_is_served(server: ChatServer):
    async def use(engine: OpenAIEngine) -> list[ServedModel]:
        assert engine.max_positions is None
        await engine.check()
        assert engine.max_positions == 4096
        return await engine.served_models()

    server.models = listed({"id": "toy", "max_model_len": 4096}, {"id": "other"})
    assert run(server, use) == [ServedModel("toy", 4096), ServedModel("other", None)]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (listed({"id": "a"}, {"id": "b"}), "does not serve `toy`; it serves a, b"),
        (listed(), "does not serve `toy`; it serves none"),
        (None, "does not list its models: HTTP 404: .*see that it runs"),
        ([1], "lists no models: its reply is another one"),
        ({"data": None}, "lists no models: its reply is another one"),
    ],
)
def test_a_model_that_is_not_served(server: ChatServer, models: Any, message: str):
    server.models = models
    with pytest.raises(EndpointError, match=message):
        run(server, lambda engine: engine.check())


def test_a_server_that_leaves_images_out_is_no_engine_for_them(server: ChatServer):
    takes_images = False

    def answer(body: dict[str, Any]) -> bytes | Events:
        if body.get("stream"):
            return echo(body)
        tokens = 12 + 5 * (has_image(body) and takes_images)
        return completion("yes")[:-1] + f', "usage": {{"prompt_tokens": {tokens}}}}}'.encode()

    async def use(engine: OpenAIEngine) -> None:
        nonlocal takes_images
        image = Image.new("RGB", (8, 8))
        found = [delta async for delta in engine.generate([question("a", image), question("b")])]
        assert "takes no images: it leaves them out" in failed(found, "a")
        takes_images = True  # another model behind the same address
        for text in "cd":
            (_, _, last) = [delta async for delta in engine.generate([question(text, image)])]
            assert last.finish_reason == "stop"

    server.answer = answer
    run(server, use, check_images=True)
    assert len(server.asked) == 2 + 1 + 2 + 2


def test_a_key_is_sent_and_hidden(server: ChatServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOY_KEY", "sk-secret")
    server.answer = lambda body: Bad(401, b'{"error": {"message": "bad key sk-secret!"}}')
    found = ask(server, question("a"), api_key_env="TOY_KEY")
    assert "bad key ***!" in failed(found, "a")
    assert server.headers[0]["authorization"] == "Bearer sk-secret"
