"""Asking from Python: one question, several, streams, errors, and the end."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.chat_server import listed, run_chat_server, streamed, text_of
from tests.inference.scripted_engine import ScriptedEngine
from vipllava.inference import model as model_module
from vipllava.inference.image_sources import image_from_data_uri
from vipllava.inference.marked import mark_request
from vipllava.inference.model import Model, Reply, connect, load
from vipllava.inference.protocol import EngineStopped, Sampling, SamplingError, Usage
from vipllava.types import ConfigError, RecordError, Turn, VipLlavaError
from vipllava.visual_prompts.mark_places import MarkError
from vipllava.visual_prompts.marks import Arrow, Ellipse, Rectangle
from vipllava.visual_prompts.render import render_plan

PHOTO = np.full((80, 100, 3), 90, np.uint8)
BOX = (10, 20, 60, 70)
RED = Rectangle(BOX, colour="red")


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def model(engine: ScriptedEngine) -> Generator[Model]:
    with Model(engine) as opened:
        yield opened


def test_one_question(model: Model, engine: ScriptedEngine, tmp_path: Path):
    path = tmp_path / "photo.png"
    Image.fromarray(PHOTO).save(path)
    reply = model.ask(path, "What is {0}?", [RED])
    assert str(reply) == reply.text == "You asked: What is within the red rectangle? "
    assert reply.question == "What is within the red rectangle?"
    assert reply.words == ("within the red rectangle",)
    assert (reply.finish_reason, reply.usage) == ("stop", Usage(7, 3))
    expected = mark_request(Image.fromarray(PHOTO), [Turn("user", "What is {0}?")], [RED])
    (asked,) = engine.asked
    assert asked.request.turns == expected.request.turns
    assert asked.request.turns[0].has_image
    assert asked.sampling == Sampling()
    assert asked.request.image is reply.overlay
    assert reply.overlay is not None
    assert expected.plan is not None
    drawn = render_plan(Image.fromarray(PHOTO), expected.plan)
    assert reply.overlay.tobytes() == drawn.tobytes()


def test_letters_in_braces_are_written_the_same_with_and_without_marks(model: Model):
    for regions in ([RED], []):
        assert model.ask(PHOTO, "Write {{0}} {}", regions).question == "Write {0} {}"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_says_that_it_has_no_model(model: Model):
    begun = model.ask(None, "wait", stream=True)
    assert next(begun) == "You "
    mine, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        for use in (lambda: model.ask(None, "Who?"), begun.__next__, begun.close, model.close):
            try:
                use()
                said = "done"
            except VipLlavaError as error:
                said = str(error)
            os.write(theirs, f"{said}\n".encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(mine) as pipe:
        asked, streamed_on, *ended = pipe.read().splitlines()
    os.waitpid(child, 0)
    assert f"loaded by process {os.getpid()}, and this one is its fork" in asked
    assert (
        'load the model here, or start processes by multiprocessing.get_context("spawn")' in asked
    )
    assert streamed_on == asked
    assert ended == ["done", "done"]
    begun.close()
    assert model.ask(None, "Who?").text == "You asked: Who? "


def test_a_question_about_nothing_seen(model: Model, engine: ScriptedEngine):
    reply = model.ask(None, "Who is {0}?")
    assert (reply.text, reply.words, reply.overlay) == ("You asked: Who is {0}? ", (), None)
    assert engine.asked[0].request.image is None
    assert not engine.asked[0].request.turns[0].has_image
    with pytest.raises(VipLlavaError, match="1 regions and no image: give the image they are on"):
        model.ask(None, "Who is {0}?", [RED])


def test_sampling_reaches_the_engine(model: Model, engine: ScriptedEngine):
    options: Any = {"max_new_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 1}
    model.ask(PHOTO, "a", stop="x", **options)
    model.ask(PHOTO, ["a"], stop=["x", "y"], **options)
    with model.ask(PHOTO, "a", stream=True, num_beams=2) as stream:
        list(stream)
    assert [each.sampling for each in engine.asked] == [
        Sampling(9, 0.5, 0.9, 3, 1, ("x",)),
        Sampling(9, 0.5, 0.9, 3, 1, ("x", "y")),
        Sampling(num_beams=2),
    ]
    with pytest.raises(SamplingError, match="temperature=-1: expected a number from 0 to 100"):
        model.ask(PHOTO, "a", temperature=-1)
    unknown: Any = {"temprature": 1}
    for ask in (lambda: model.ask(PHOTO, "a", **unknown), lambda: model.chat().ask("a", **unknown)):
        with pytest.raises(ConfigError, match=r"temprature= is no option .* mean temperature=\?"):
            ask()
    with pytest.raises(ConfigError, match=r"region= .*: they are max_new_tokens, temperature, "):
        model.ask(PHOTO, "a", region=1)  # pyright: ignore
    assert len(engine.asked) == 3


def test_a_list_of_questions_has_a_list_of_replies_in_its_order(
    model: Model, engine: ScriptedEngine
):
    replies = model.ask(PHOTO, ["What is {0}?", "And {1}?"], [RED, Arrow(BOX)])
    assert [reply.text for reply in replies] == [
        "You asked: What is within the red rectangle? ",
        "You asked: And pointed to by the red arrow? ",
    ]
    assert replies[0].overlay is replies[1].overlay  # drawn once
    assert len({each.request.key for each in engine.asked}) == 2
    assert model.ask(PHOTO, []) == []
    assert len(model.ask(PHOTO, ("one",))) == 1


def test_each_question_may_have_its_own_image_and_marks(model: Model, engine: ScriptedEngine):
    dark = np.zeros((30, 40, 3), np.uint8)
    small = Ellipse((5, 5, 20, 20), colour="blue")
    replies = model.ask([PHOTO, dark, None], ["{0}?", "{0}?", "c"], [[RED], [small], []])
    assert [reply.question for reply in replies] == [
        "within the red rectangle?",
        "within the blue ellipse?",
        "c",
    ]
    sizes = [reply.overlay and reply.overlay.size for reply in replies]
    assert sizes == [(100, 80), (40, 30), None]
    shared = model.ask([PHOTO, PHOTO], ["{0}?", "{0}?"], RED)
    assert shared[0].overlay is shared[1].overlay
    assert [len(reply.words) for reply in model.ask(PHOTO, ["a", "b"], [[RED], []])] == [1, 0]


@pytest.mark.parametrize(
    ("image", "question", "regions", "kind", "message"),
    [
        ([PHOTO], ["a", "b"], (), VipLlavaError, "1 images for 2 questions: give one for each or"),
        (PHOTO, ["a"], [[RED], []], VipLlavaError, "2 lists of regions for 1 questions"),
        ([PHOTO], "a", (), VipLlavaError, "image is of type list; expected a path"),
        (PHOTO, 7, (), VipLlavaError, "question is 7; expected a text or a list of them"),
        (PHOTO, ["a", None], (), VipLlavaError, r"question is \['a', None\]; expected a text"),
        (PHOTO, "a", [BOX], VipLlavaError, r"regions\[0\] is \(10, 20, 60, 70\); expected a mark"),
        (PHOTO, "a", BOX, VipLlavaError, r"regions\[0\] is 10; expected a mark"),
        (PHOTO, "a", {"shape": "mask"}, VipLlavaError, r"regions\[0\] is {'shape': 'mask'}; exp"),
        (PHOTO, "a", [Rectangle((200, 0, 300, 9))], MarkError, r"regions\[0\]\.box is \(200\.0"),
        (PHOTO, "{1}", [RED], RecordError, r"mentions \{1\}, and the only mark is \{0\}"),
        (PHOTO, "{0}", [], RecordError, r"mentions \{0\}, and nothing is marked: give its region"),
        (b"no image", "a", (), RecordError, "image: 8 bytes starting with b'no image'"),
        ("http://a.example/x.png", "a", (), VipLlavaError, "pass allow_urls=True"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_it_is_asked(
    model: Model, engine: ScriptedEngine, image: Any, question: Any, regions: Any,
    kind: type[Exception], message: str,
):  # fmt: skip
    with pytest.raises(kind, match=message):
        model.ask(image, question, regions)
    assert engine.asked == []


def test_what_goes_wrong_in_the_engine_is_raised(model: Model):
    with pytest.raises(VipLlavaError, match="the question failed"):
        model.ask(PHOTO, "fail")
    with pytest.raises(VipLlavaError, match="question 1 failed"):
        model.ask(PHOTO, ["a", "fail"])
    stream = model.ask(PHOTO, "fail", stream=True)
    with pytest.raises(VipLlavaError, match="the question failed"):
        next(stream)
    assert list(stream) == []
    with pytest.raises(VipLlavaError, match="there is no reply yet"):
        _ = stream.reply
    assert model.ask(PHOTO, "still there").text == "You asked: still there "


def test_a_stream_is_the_pieces_of_the_reply(model: Model):
    stream = model.ask(PHOTO, "What is {0}?", [RED], stream=True)
    with pytest.raises(VipLlavaError, match="there is no reply yet: read the stream to its end"):
        _ = stream.reply
    pieces = list(stream)
    assert pieces[:3] == ["You ", "asked: ", "What "]
    assert stream.reply == Reply(
        "".join(pieces), "What is within the red rectangle?", ("within the red rectangle",),
        stream.reply.overlay, "stop", Usage(7, 3),
    )  # fmt: skip
    with pytest.raises(VipLlavaError, match="stream=True takes one question at a time"):
        model.ask(PHOTO, ["a"], stream=True)  # pyright: ignore


def test_a_closed_stream_is_cancelled_and_has_what_came(model: Model, engine: ScriptedEngine):
    with model.ask(PHOTO, "wait", stream=True) as stream:
        assert [next(stream) for _ in range(3)] == ["You ", "asked: ", "wait "]
    assert list(stream) == []
    assert (stream.reply.text, stream.reply.finish_reason) == ("You asked: wait ", "cancelled")
    dropped = model.ask(PHOTO, "wait", stream=True)
    next(dropped)
    thrown = model.ask(PHOTO, "wait", stream=True)
    with pytest.raises(KeyError):
        thrown.throw(KeyError("x"))
    del dropped, thrown
    gc.collect()
    model.ask(PHOTO, "still there")
    assert len(engine.cancelled) == 3


def test_it_answers_where_an_event_loop_runs_already(model: Model):
    async def notebook() -> str:
        with model.ask(PHOTO, "b", stream=True) as stream:
            return model.ask(PHOTO, "a").text + "".join(stream)

    assert asyncio.run(notebook()) == "You asked: a You asked: b "


def test_threads_may_ask_at_once(model: Model):
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda n: model.ask(PHOTO, f"q{n}").text, range(50)))
    assert texts == [f"You asked: q{n} " for n in range(50)]


def test_after_its_end_it_says_so(engine: ScriptedEngine):
    num_threads = threading.active_count()
    model = Model(engine)
    stream = model.ask(PHOTO, "wait", stream=True)
    next(stream)
    chat = model.chat(PHOTO)
    model.close()
    model.close()
    assert engine.num_closed == 1
    assert engine.cancelled == ["question 1"]
    assert threading.active_count() == num_threads
    closed = "the model is closed: load it again"
    with pytest.raises(EngineStopped, match=closed):
        list(stream)
    with pytest.raises(EngineStopped, match=closed):
        model.ask(PHOTO, "a")
    with pytest.raises(EngineStopped, match=closed):
        model.ask(PHOTO, "a", stream=True)
    with pytest.raises(EngineStopped, match=closed):
        chat.ask("a")


def test_it_ends_when_nobody_knows_it_any_more(engine: ScriptedEngine):
    num_threads = threading.active_count()
    model = Model(engine)
    model.ask(PHOTO, "a")
    del model
    gc.collect()
    assert engine.num_closed == 1
    assert threading.active_count() == num_threads


def test_ctrl_c_cancels(model: Model, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch):
    from concurrent.futures import Future

    begun = threading.Event()
    generate = engine.generate

    async def noted(requests: Any) -> Any:
        begun.set()
        async for delta in generate(requests):
            yield delta

    def interrupted(future: Any) -> None:
        begun.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "generate", noted)
    with monkeypatch.context() as patched:
        patched.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.ask(PHOTO, "wait")
    model.ask(PHOTO, "still there")
    assert engine.cancelled == ["question 1"]


def test_it_is_loaded_in_eight_bits_four_or_all():
    with pytest.raises(ConfigError, match="load_in='2bit': expected None, '8bit' or '4bit'"):
        load("nowhere", load_in="2bit")  # pyright: ignore
    assert list(model_module._BITS) == [None, "8bit", "4bit"]


def test_a_model_behind_a_server_is_asked_in_the_same_words():
    with run_chat_server() as server:
        server.answer = lambda body: streamed("you said ", text_of(body))
        server.models = listed({"id": "toy", "max_model_len": 4096})
        with connect(server.address, "toy") as model:
            assert model.engine.max_positions == 4096
            reply = model.ask(PHOTO, "What is {0}?", RED)
            assert reply.text == "you said What is within the red rectangle?"
            sent = server.asked[-1]["messages"][-1]["content"]
            (picture,) = (part["image_url"]["url"] for part in sent if "image_url" in part)
            assert reply.overlay is not None
            assert image_from_data_uri(picture).tobytes() == reply.overlay.tobytes()
            with model.ask(None, "a", stream=True) as stream:
                assert list(stream) == ["you said ", "a"]
        with pytest.raises(VipLlavaError, match="does not serve `other`; it serves toy"):
            connect(server.address, "other")


def test_a_server_that_is_not_there_is_said():
    with pytest.raises(VipLlavaError, match=r"127\.0\.0\.1:1"):
        connect("http://127.0.0.1:1/v1", "m", max_retries=0)
