"""The official client, as a user would call it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from tests.serve.conftest import Served
from tests.serve.fake_engine import data_uri, from_data_uri, picture, question

KEY = "a-key"
BOX = {"shape": "rectangle", "box": [5, 5, 20, 20], "colour": "red"}


@pytest.fixture
def served(serve: Callable[..., Served]) -> Served:
    return serve(api_key=KEY)


@pytest.fixture
def client(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[openai.OpenAI]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with openai.OpenAI(base_url=f"{served.http.url}/v1", api_key=KEY, max_retries=0) as found:
        yield found


def messages(text: str = "What is {0}?") -> Any:
    return [question(text, data_uri(picture()))]


def test_models(client: openai.OpenAI):
    assert [each.id for each in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").owned_by == "vipllava"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_an_answer_with_regions(client: openai.OpenAI):
    found = client.chat.completions.create(
        model="toy", messages=messages(), max_tokens=9, logprobs=True, top_logprobs=1,
        extra_body={"regions": [BOX], "overlay": True},
    )  # fmt: skip
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason) == ("The box is red.", "stop")
    assert found.usage is not None
    assert found.usage.total_tokens == 18
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [each.token for each in choice.logprobs.content] == ["The ", "box ", "is ", "red."]
    extra: Any = choice.message
    assert extra.vipllava["words"] == ["within the red rectangle"]
    assert from_data_uri(extra.vipllava["overlay"]).size == (40, 30)


def test_a_message_can_be_sent_back(client: openai.OpenAI, served: Served):
    first = client.chat.completions.create(
        model="toy", messages=messages(), extra_body={"regions": [BOX]}
    )
    said: Any = first.choices[0].message
    client.chat.completions.create(
        model="toy", messages=[*messages(), said.model_dump(), question("And {0}?")],
        extra_body={"regions": [BOX]},
    )  # fmt: skip
    assert [turn.text for turn in served.engine.asked[-1].request.turns] == [
        "What is within the red rectangle?", "The box is red.",
        "And within the red rectangle?",
    ]  # fmt: skip


def test_a_stream(client: openai.OpenAI):
    stream = client.chat.completions.create(
        model="toy", messages=messages(), stream=True, stream_options={"include_usage": True},
        extra_body={"regions": [BOX]},
    )  # fmt: skip
    chunks = list(stream)
    texts = [each.choices[0].delta.content or "" for each in chunks if each.choices]
    assert "".join(texts) == "The box is red."
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4
    last: Any = chunks[-2].choices[0]
    assert last.finish_reason == "stop"
    assert last.delta.vipllava == {"words": ["within the red rectangle"], "overlay": None}


def test_a_stream_that_is_closed_early(client: openai.OpenAI, served: Served):
    with client.chat.completions.create(
        model="toy", messages=[question("hold")], stream=True
    ) as stream:
        next(iter(stream))
    from tests.toy_server import wait_for

    wait_for(lambda: served.engine.left)


def test_errors(client: openai.OpenAI, served: Served):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="toy", messages=messages(), extra_body={"regions": [BOX | {"alpha": 900}]}
        )
    assert (refused.value.param, refused.value.code) == ("regions[0].alpha", "invalid_region")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=messages())


def test_an_error_amid_a_stream(client: openai.OpenAI, serve: Callable[..., Served]):
    short = serve(deadline_s=0.3)
    other = client.with_options(base_url=f"{short.http.url}/v1")
    stream = other.chat.completions.create(model="toy", messages=[question("hold")], stream=True)
    with pytest.raises(openai.APIError, match="within"):
        list(stream)
