"""Chat completions: what the engine is asked, and what the client gets, whole and in chunks."""

from __future__ import annotations

import base64
from collections.abc import Callable

import pytest
from PIL import Image

from tests.serve.conftest import Served
from tests.serve.fake_engine import FakeEngine, data_uri, from_data_uri, picture, question
from tests.toy_server import run_app
from vipllava.inference.marked import mark_request
from vipllava.inference.protocol import Sampling
from vipllava.serve.app import build_app
from vipllava.serve.settings import ServerSettings
from vipllava.types import Turn
from vipllava.visual_prompts.marks import Ellipse, Rectangle

BOX = {"shape": "rectangle", "box": [5, 5, 20, 20], "colour": "red"}
BLUE = {"shape": "ellipse", "box": [15, 8, 35, 25], "color": "blue", "width": 2, "alpha": 200}


@pytest.fixture(scope="module")
def toy():
    engine = FakeEngine()
    app = build_app({"toy": engine}, ServerSettings())
    with run_app(app) as server:
        yield Served(server, engine, app.state.serving)


def test_an_answer(toy: Served):
    found = toy.http.chat(model="toy", messages=[question("What is it?")], max_tokens=9)
    assert found.status == 200
    body = found.json
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"], body["system_fingerprint"]) == (
        "chat.completion", "toy", None,
    )  # fmt: skip
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "The box is red.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}
    asked = toy.engine.asked[-1]
    assert asked.request.image is None
    assert list(asked.request.turns) == [Turn("user", "What is it?")]
    assert asked.sampling == Sampling(max_new_tokens=9)


def test_what_is_not_said_is_greedy_and_leaves_room_for_the_question(toy: Served):
    assert toy.http.chat(model="toy", messages=[question("What?")]).status == 200
    assert toy.engine.asked[-1].sampling == Sampling(max_new_tokens=256)  # of 512 positions


def test_every_option_reaches_the_engine(toy: Served):
    found = toy.http.chat(
        model="toy", messages=[question("What?")], max_completion_tokens=2, temperature=1,
        top_p=0.5, top_k=7, seed=-3, stop="###", logprobs=True, top_logprobs=2, n=1,
    )  # fmt: skip
    assert found.status == 200, found.body
    assert toy.engine.asked[-1].sampling == Sampling(
        max_new_tokens=2, temperature=1, top_p=0.5, top_k=7, seed=-3, stop=("###",), logprobs=2
    )
    choice = found.json["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("The box ", "length")
    first = choice["logprobs"]["content"][0]
    assert (first["token"], first["logprob"], first["bytes"]) == ("The ", -0.5, [84, 104, 101, 32])
    assert first["top_logprobs"][1] == {
        "token": "\U0001f600", "logprob": -9999.0, "bytes": [240, 159, 152, 128],
    }  # fmt: skip


def test_beams_and_several_stops(toy: Served):
    body = {"model": "toy", "messages": [question("What?")], "num_beams": 3, "stop": ["a", "b"]}
    assert toy.http.chat(**body).status == 200
    assert toy.engine.asked[-1].sampling.num_beams == 3
    assert toy.engine.asked[-1].sampling.stop == ("a", "b")
    refused = toy.http.chat(**body, temperature=0.5)
    assert (refused.status, refused.error["param"]) == (400, "num_beams")


def test_openai_fields_that_change_nothing(toy: Served):
    found = toy.http.chat(
        model="toy", messages=[question("What?") | {"name": "me"}], user="u", metadata={"a": "b"},
        store=False, service_tier="auto", frequency_penalty=0, presence_penalty=0.0, logit_bias={},
        response_format={"type": "text"}, tools=[], tool_choice="none", modalities=["text"],
        safety_identifier="x", prompt_cache_key="y", parallel_tool_calls=True, stream=None,
        stream_options=None,
    )  # fmt: skip
    assert found.status == 200, found.body


@pytest.mark.parametrize(
    ("regions", "said"),
    [({}, "{0} {{1}}"), ({"regions": None}, "{0} {{1}}"), ({"regions": []}, None)],
)
def test_letters_in_braces_are_nobodys_business_where_no_regions_are_given(
    toy: Served, regions: dict[str, None], said: str | None
):
    text = said or "{a} {{1}}"
    found = toy.http.chat(model="toy", messages=[question(text, data_uri(picture()))], **regions)
    assert found.status == 200, found.body
    assert toy.engine.asked[-1].request.turns[-1].text == said or "{a} {1}"


def test_a_conversation_with_an_image_and_marks(toy: Served):
    image = picture()
    found = toy.http.chat(
        model="toy",
        messages=[
            question("What is {0}?", data_uri(image)),
            {"role": "assistant", "content": "A {0}.", "refusal": None, "tool_calls": None},
            question("And {1}?"),
        ],
        regions=[BOX, BLUE],
        overlay=True,
    )
    assert found.status == 200, found.body
    words = ["within the red rectangle", "within the blue ellipse"]
    wanted = mark_request(
        image,
        (Turn("user", f"What is {words[0]}?"), Turn("assistant", "A {0}."),
         Turn("user", f"And {words[1]}?")),
        [Rectangle((5, 5, 20, 20), colour="red"),
         Ellipse((15, 8, 35, 25), colour="blue", width=2, alpha=200)],
    )  # fmt: skip
    asked = toy.engine.asked[-1].request
    assert [turn.text for turn in asked.turns] == [
        "What is within the red rectangle?", "A {0}.", "And within the blue ellipse?",
    ]  # fmt: skip
    assert [turn.has_image for turn in asked.turns] == [True, False, False]
    assert asked.image is not None
    assert wanted.overlay is not None
    assert asked.image.tobytes() == wanted.overlay.tobytes()
    assert asked.image.tobytes() != image.tobytes()
    extra = found.json["choices"][0]["message"]["vipllava"]
    assert extra["words"] == words
    assert from_data_uri(extra["overlay"]).tobytes() == wanted.overlay.tobytes()


def test_words_without_overlay(toy: Served):
    found = toy.http.chat(
        model="toy", messages=[question("What is {0}?", data_uri(picture()))], regions=[BOX]
    )
    extra = found.json["choices"][0]["message"]["vipllava"]
    assert extra == {"words": ["within the red rectangle"], "overlay": None}


def test_an_image_of_a_later_turn_and_texts_in_parts(toy: Served):
    parts = [
        {"type": "text", "text": "one"},
        {"type": "image_url", "image_url": {"url": data_uri(picture(), "JPEG"), "detail": "high"}},
        {"type": "text", "text": "two"},
    ]
    found = toy.http.chat(
        model="toy",
        messages=[
            question("Hello"),
            {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "user", "content": parts},
        ],
    )
    assert found.status == 200, found.body
    assert list(toy.engine.asked[-1].request.turns) == [
        Turn("user", "Hello"), Turn("assistant", "Hi"), Turn("user", "one\ntwo", has_image=True),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_images_arrive_upright(kind: str, toy: Served):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right
    uri = data_uri(picture((40, 30)), kind, exif=exif)
    assert toy.http.chat(model="toy", messages=[question("?", uri)]).status == 200
    image = toy.engine.asked[-1].request.image
    assert image is not None
    assert (image.size, image.mode) == ((30, 40), "RGB")


def test_a_stream_says_the_same(toy: Served):
    body = {
        "model": "toy", "messages": [question("What is {0}?", data_uri(picture()))],
        "regions": [BOX], "overlay": True, "logprobs": True,
    }  # fmt: skip
    whole = toy.http.chat(**body).json["choices"][0]
    found = toy.http.chat(**body, stream=True)
    assert found.status == 200
    assert found.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = found.events
    assert len({event["id"] for event in events}) == 1
    assert all("usage" not in event for event in events)
    choices = [event["choices"][0] for event in events]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [each["delta"].get("content") for each in choices[1:]] == [
        "The ", "box ", "is ", "red.", None,
    ]  # fmt: skip
    assert [each["finish_reason"] for each in choices] == [None] * 5 + ["stop"]
    assert choices[-1]["delta"] == {"vipllava": whole["message"]["vipllava"]}
    logprobs = [entry for each in choices[1:-1] for entry in each["logprobs"]["content"]]
    assert logprobs == whole["logprobs"]["content"]


def test_a_stream_with_usage(toy: Served):
    events = toy.http.chat(
        model="toy", messages=[question("What?")], stream=True,
        stream_options={"include_usage": True},
    ).events  # fmt: skip
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == {
        "prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14,
    }  # fmt: skip


def test_letters_beyond_ascii_and_what_is_no_letter(serve: Callable[..., Served]):
    served = serve(FakeEngine(pieces=lambda asked: ["狗 ", "\ud800", "\x00", " é"]))
    body = {"model": "toy", "messages": [question("这是什么 🐕")]}
    assert served.http.chat(**body).json["choices"][0]["message"]["content"] == "狗 ?\x00 é"
    assert served.engine.asked[-1].request.turns[0].text == "这是什么 🐕"
    events = served.http.chat(**body, stream=True).events
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == "狗 ?\x00 é"


def test_system_messages(toy: Served, serve: Callable[..., Served]):
    system = {"role": "system", "content": "Be brief."}
    refused = toy.http.chat(model="toy", messages=[system, question("What?")])
    assert (refused.status, refused.error["param"]) == (400, "messages[0]")
    assert "--prepend-system" in refused.error["message"]
    own = system | {
        "content": "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions."
    }
    for nothing in (own, system | {"content": " "}):
        assert toy.http.chat(model="toy", messages=[nothing, question("What?")]).status == 200
        assert toy.engine.asked[-1].request.turns[0].text == "What?"
    other = serve(prepend_system=True)
    developer = {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}
    assert other.http.chat(model="toy", messages=[developer, question("What?")]).status == 200
    assert other.engine.asked[-1].request.turns[0].text == "Be brief.\nWhat?"


def test_models(toy: Served):
    found = toy.http.get("/v1/models").json
    (model,) = found["data"]
    assert found["object"] == "list"
    assert (model["id"], model["object"], model["max_model_len"]) == ("toy", "model", 512)
    assert toy.http.get("/v1/models/toy").json == model
    missing = toy.http.get("/v1/models/toi")
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")
    assert "toy" in missing.error["message"]
    assert toy.http.chat(model="toi", messages=[question("?")]).error["param"] == "model"


def test_two_models():
    engines = {"org/one": FakeEngine(), "two": FakeEngine(None, lambda asked: ["two"])}
    with run_app(build_app(engines, ServerSettings())) as server:
        assert [each["id"] for each in server.get("/v1/models").json["data"]] == ["org/one", "two"]
        assert server.get("/v1/models/org/one").json["id"] == "org/one"
        assert server.get("/v1/models/org%2Fone").json["id"] == "org/one"
        found = server.chat(model="two", messages=[question("?")]).json
        assert found["choices"][0]["message"]["content"] == "two"
        assert not engines["org/one"].asked
    assert all(engine.is_closed for engine in engines.values())


def test_a_preview(toy: Served):
    image = picture()
    wanted = mark_request(image, [Turn("user", "")], [Rectangle((5, 5, 20, 20), colour="red")])
    assert wanted.overlay is not None
    body = {"image": data_uri(image), "regions": [BOX]}
    found = toy.http.post("/v1/regions/preview", body)
    assert (found.status, found.headers["content-type"]) == (200, "image/png")
    uri = f"data:image/png;base64,{base64.b64encode(found.body).decode()}"
    assert from_data_uri(uri).tobytes() == wanted.overlay.tobytes()
    said = toy.http.post("/v1/regions/preview", body | {"format": "json"}).json
    assert said == {
        "words": ["within the red rectangle"], "overlay": uri, "width": 40, "height": 30,
    }  # fmt: skip
