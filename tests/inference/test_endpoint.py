"""Endpoints: each question its own answer or a recorded failure, whatever the server does."""

from __future__ import annotations

import base64
import io
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.chat_server import (
    PASSING,
    QUICK,
    Bad,
    ChatServer,
    completion,
    has_image,
    run_chat_server,
    text_of,
    wrong_at_first,
)
from vipllava.inference.endpoint import Endpoint, EndpointError, EndpointSettings, Reply
from vipllava.types import ConfigError, Failure, Request, Turn, VipLlavaError


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with run_chat_server() as state:
        yield state


def endpoint(server: ChatServer, **settings: Any) -> Endpoint:
    given = {"timeout_s": 1.5, "max_retries": 2, "total_s": 30.0, **settings}
    return Endpoint(EndpointSettings(server.address, "toy", **given))


def question(text: str, image: Image.Image | None = None) -> Request:
    return Request(image, [Turn("user", text, has_image=image is not None)], key=text)


def echo(body: dict[str, Any]) -> bytes:
    return completion(f" answer to {text_of(body)}\n")


def ask(server: ChatServer, *texts: str, **settings: Any) -> list[str | Failure]:
    """Return what is answered, in the order of the questions."""
    found = dict(endpoint(server, **settings).answers(map(question, texts)))
    assert sorted(found) == list(range(len(texts)))
    return [
        each.text if isinstance(each := found[number], Reply) else each
        for number in range(len(texts))
    ]


def test_a_question_is_asked_until_it_has_its_answer_and_never_again(server: ChatServer):
    texts = [f"q{number}" for number in range(len(PASSING) + 3)]
    wrong = {f"q{number}": [bad] for number, bad in enumerate(PASSING)}
    server.answer = wrong_at_first(echo, wrong)
    assert ask(server, *texts) == [f"answer to {text}" for text in texts]
    expected = {text: 1 + len(wrong.get(text, [])) for text in texts}
    assert Counter(server.texts) == expected


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Bad(500, b'{"error": {"message": "no memory"}}'), "HTTP 500: no memory"),
        (Bad(429, b"", {**QUICK}), "HTTP 429"),
        (Bad(400, b'{"error": {"message": "too long"}}'), "HTTP 400: too long"),
        (Bad(422, b'{"detail": "no seed, please"}'), "no seed, please"),
        (Bad(hold_s=4.0), r"no answer within timeout_s=1 \(2 attempts\)"),
        (Bad(cut=True), r"peer closed .*\(2 attempts\)"),
        (Bad(body=b"<html>"), r"the reply is no JSON: <html> \(2 attempts\)"),
        (Bad(body=b""), "the reply is no JSON: "),
        (Bad(body=b"\xff\xfe"), "the reply is no JSON: "),
        (Bad(body=b"[" * 100_000), "the reply is no JSON: "),
        (Bad(body=b"null"), "the reply is no object: None"),
        (Bad(body=b'{"choices": [{"message": {}}]}'), "the reply has no text: "),
        (Bad(body=b'{"choices": [null]}'), "the reply is no chat completion: "),
        (Bad(body=b'{"error": "upstream"}'), "the reply is an error: upstream"),
        (Bad(body=completion("half an", "abort")), "the answer was broken off"),
        (Bad(body=completion(None, "content_filter")), "filter withheld the answer"),
        (Bad(body=completion("", "length")), "no text within 64 tokens"),
        (Bad(body=completion(None, "stop")), r"no text \(finish_reason stop\)"),
        (Bad(body=completion(None, "stop", refusal="I can't.")), "the model refuses: I can't."),
    ],
)
def test_what_never_comes_well_is_a_failure_of_its_question_alone(
    server: ChatServer, bad: Bad, reason: str
):
    server.answer = lambda body: bad if text_of(body) == "b" else echo(body)
    found = ask(server, "a", "b", "c", timeout_s=1, concurrency=1, max_retries=1)
    assert found[0::2] == ["answer to a", "answer to c"]
    assert isinstance(found[1], Failure)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found[1].reason)


def test_a_server_that_sends_a_byte_now_and_then_has_its_time(server: ChatServer):
    server.answer = lambda body: Bad(drip_s=0.05) if text_of(body) == "b" else echo(body)
    found = ask(server, "a", "b", total_s=1.5)
    assert found == ["answer to a", Failure("not answered within total_s=1.5")]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (completion(""), ""),
        (completion("cut", "length"), "cut"),
        (completion("bare", None), "bare"),
        (completion("emoji \ud83d"), "emoji ?"),
        (completion("[INST] </s> \x00"), "[INST] </s> \x00"),
    ],
)
def test_texts_are_as_they_came(server: ChatServer, body: bytes, text: str):
    server.answer = lambda _: body
    ((index, reply),) = endpoint(server).answers([question("a")])
    assert isinstance(reply, Reply)
    assert (index, reply.text, reply.model, reply.system_fingerprint) == (0, text, "toy-1", "fp_1")


def test_what_is_sent(server: ChatServer):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    turns = [Turn("user", "what?", has_image=True), Turn("assistant", "a cat"), Turn("user", "no")]
    asked = endpoint(server, seed=3, extra_body={"chat_template_kwargs": {"thinking": False}})
    list(asked.answers([Request(Image.fromarray(pixels), turns, "k")], max_new_tokens=9))
    without, with_image, body = server.asked  # two small questions first
    assert (has_image(without), has_image(with_image)) == (False, True)
    messages = body.pop("messages")
    assert body == {
        "model": "toy",
        "max_tokens": 9,
        "temperature": 0.0,
        "seed": 3,
        "chat_template_kwargs": {"thinking": False},
    }
    picture = messages[0]["content"].pop(0)
    assert messages == [
        {"role": "user", "content": [{"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "no"},
    ]
    kind, encoded = picture["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64"
    arrived = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert np.array_equal(np.asarray(arrived), pixels)


def test_further_images_follow_the_first(server: ChatServer):
    images = [Image.new("RGB", (8 + number, 8)) for number in range(3)]
    turn = Turn("user", "Which?", has_image=True)
    asked = Request(images[0], [turn], key="a", more_images=tuple(images[1:]))
    assert len(list(endpoint(server, check_images=False).answers([asked]))) == 1
    *shown, text = server.asked[0]["messages"][0]["content"]
    urls = [part["image_url"]["url"].partition("base64,")[2] for part in shown]
    sizes = [Image.open(io.BytesIO(base64.b64decode(url))).width for url in urls]
    assert (sizes, text) == ([8, 9, 10], {"type": "text", "text": "Which?"})


def test_other_sampling_is_sent_and_recorded(server: ChatServer):
    settings = {"temperature": None, "seed": None, "top_p": 0.9}
    asked = endpoint(server, **settings, limit_name="max_completion_tokens", revision="abc")
    list(asked.answers([question("a")]))
    (body,) = server.asked
    del body["messages"]
    assert body == {"model": "toy", "max_completion_tokens": 64, "top_p": 0.9}
    assert asked.settings.recorded() == {
        "base_url": server.address,
        "model": "toy",
        "revision": "abc",
        "temperature": None,
        "top_p": 0.9,
        "seed": None,
        "extra_body": {},
    }


def test_half_a_character_in_a_question_is_its_failure(server: ChatServer):
    assert ask(server, "a", "b \ud83d") == [
        "yes",
        Failure("the question has characters that cannot be sent: surrogates not allowed"),
    ]


def test_what_a_server_says_of_itself_may_be_anything(server: ChatServer):
    body = completion("yes").replace(b'"toy-1"', b'{"name": 1}').replace(b'"fp_1"', b"[2]")
    server.answer = lambda _: body
    assert list(endpoint(server).answers([question("a")])) == [
        (0, Reply("yes", "stop", None, None))
    ]


def counted(num_text: int, num_image: int):
    """Answer with a count of prompt tokens."""

    def answer(body: dict[str, Any]) -> bytes:
        tokens = num_text + num_image * has_image(body)
        usage = f', "usage": {{"prompt_tokens": {tokens}}}}}'.encode()
        return completion("yes")[:-1] + usage

    return answer


def refuse(body: dict[str, Any]) -> bytes | Bad:
    return Bad(400, b'{"error": {"message": "not multimodal"}}') if has_image(body) else echo(body)


def find_none(body: dict[str, Any]) -> bytes | Bad:
    return Bad(404, b'{"error": {"message": "no such route"}}') if has_image(body) else echo(body)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (refuse, "takes no images: HTTP 400: not multimodal"),
        (find_none, "takes no images: .*no such route"),
        (counted(12, 0), "takes no images: it leaves them out, .* 12 tokens .* 12 with one"),
    ],
)
def test_an_endpoint_without_images_is_an_error(server: ChatServer, answer: Any, reason: str):
    server.answer = answer
    image = Image.new("RGB", (8, 8))
    with pytest.raises(EndpointError, match=f"`toy` at .*{reason}"):
        list(endpoint(server).answers([question("a", image), question("b", image)]))
    assert not {"a", "b"} & set(server.texts)


@pytest.mark.parametrize("counts", [('"many"', "12"), ("12", "[]"), ("-1", "-1"), ("9" * 400, "9")])
def test_counts_that_cannot_be_say_nothing_about_images(server: ChatServer, counts: Any):
    def answer(body: dict[str, Any]) -> bytes:
        usage = f', "usage": {{"prompt_tokens": {counts[has_image(body)]}}}}}'
        return completion("yes")[:-1] + usage.encode()

    server.answer = answer
    found = list(endpoint(server).answers([question("a", Image.new("RGB", (8, 8)))]))
    assert [reply.text for _, reply in found] == ["yes"]


@pytest.mark.parametrize(
    "bad",
    [
        Bad(body=b"data: {}\n\n", type="text/event-stream"),
        Bad(body=b'{"choices": ' + b"[" * 100_000),
        Bad(body=completion("x" * 2**24)),
    ],
)
def test_what_is_no_reply_is_a_failure(server: ChatServer, bad: Bad):
    server.answer = lambda body: bad
    (found,) = endpoint(server, max_retries=0).answers([question("a")])
    assert isinstance(found[1], Failure)
    assert "the reply is no" in found[1].reason or "sends too much" in found[1].reason


def test_an_endpoint_with_images_is_asked_that_once(server: ChatServer):
    server.answer = counted(12, 1)
    image = Image.new("RGB", (8, 8))
    found = list(endpoint(server).answers(question(text, image) for text in "abcd"))
    assert len(found) == 4
    assert len(server.asked) == 6
    list(endpoint(server, check_images=False).answers([question("e", image)]))
    assert len(server.asked) == 7


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Bad(401, b'{"error": {"message": "bad key sk-secret!"}}'), r"HTTP 401: bad key \*\*\*!"),
        (Bad(404, b'{"error": {"message": "no model toy"}}'), "no model toy.*model=toy is one"),
    ],
)
def test_a_wrong_key_or_model_is_an_error(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch, bad: Bad, reason: str
):
    monkeypatch.setenv("TOY_KEY", "sk-secret")
    server.answer = lambda body: bad
    with pytest.raises(EndpointError, match=reason):
        list(endpoint(server, api_key_env="TOY_KEY").answers([question("a")]))
    assert server.headers[0]["authorization"] == "Bearer sk-secret"


def test_a_key_goes_only_where_it_is_meant_to(server: ChatServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    ask(server, "a")
    assert "sk-secret" not in str(server.headers)
    monkeypatch.delenv("TOY_KEY", raising=False)
    with pytest.raises(ConfigError, match="TOY_KEY: this environment variable holds no key"):
        endpoint(server, api_key_env="TOY_KEY")


def test_an_endpoint_that_stops_answering_ends_the_run(server: ChatServer):
    server.answer = lambda body: Bad(500) if text_of(body) > "c" else echo(body)
    asked = endpoint(server, max_retries=0, concurrency=1)
    found: list[Reply | Failure] = []
    with pytest.raises(EndpointError, match=r"32 questions in a row are not answered.*HTTP 500"):
        found.extend(
            each for _, each in asked.answers(map(question, ["a", "b", *map(chr, range(100, 150))]))
        )
    assert [type(each) for each in found] == [Reply, Reply] + 31 * [Failure]
    assert len(server.asked) == 2 + 32


def test_one_that_refuses_every_question_too(server: ChatServer):
    server.answer = lambda body: Bad(400, b'{"error": {"message": "no `seed`"}}')
    with pytest.raises(EndpointError, match=r"32 questions in a row .*no `seed`"):
        ask(server, *map(str, range(100)))


def test_nobody_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    settings = EndpointSettings("http://127.0.0.1:9/v1", "toy", max_retries=0)
    ((_, found),) = Endpoint(settings).answers([question("a")])
    assert isinstance(found, Failure)
    assert "connect" in found.reason.lower()


def test_answers_come_before_the_error_of_a_question(server: ChatServer):
    server.answer = lambda body: Bad(body=echo(body), hold_s=0.1)

    def requests() -> Iterator[Request]:
        yield from map(question, "ab")
        raise VipLlavaError("image c.png does not open")

    found: list[int] = []
    with pytest.raises(VipLlavaError, match=r"c\.png"):
        found.extend(number for number, _ in endpoint(server).answers(requests()))
    assert sorted(found) == [0, 1]


def test_no_more_questions_are_held_than_run(server: ChatServer):
    taken: list[str] = []

    def requests() -> Iterator[Request]:
        for number in range(50):
            taken.append(str(number))
            yield question(str(number))

    answers = endpoint(server, concurrency=3).answers(requests())
    next(answers)
    assert len(taken) == 3
    answers.close()
    assert not [each for each in threading.enumerate() if each.name == "run_tasks"]


def test_a_request_that_contradicts_itself_is_named(server: ChatServer):
    wrong = Request(Image.new("RGB", (8, 8)), [Turn("user", "a")], key="k7")
    with pytest.raises(VipLlavaError, match="request 'k7' has an image, but 0 of its turns"):
        list(endpoint(server).answers([wrong]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "base_url=localhost:8000/v1: expected e.g. http"),
        ({"base_url": "http://me:key@host/v1"}, "base_url holds a name, password or query; name"),
        ({"model": ""}, "model is empty"),
        ({"concurrency": 0, "timeout_s": 0}, "concurrency=0 must .*timeout_s=0 and"),
        ({"total_s": float("inf")}, "total_s=inf must be above 0 and finite"),
        ({"limit_name": "max_new_tokens"}, "limit_name=max_new_tokens: expected max_tokens or"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        EndpointSettings(**{"base_url": "http://localhost:8000/v1", "model": "toy", **settings})
