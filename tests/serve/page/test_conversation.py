"""Conversations without a browser: turns, marks of earlier questions, blind votes, ends."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.serve.page.fake_engine import FakeEngine
from vipllava.inference.protocol import Sampling
from vipllava.serve.limits import Memory
from vipllava.serve.page.blocks import Sessions, _sampling
from vipllava.serve.page.conversation import Conversation, QuestionRefused
from vipllava.serve.page.feedback import Feedback
from vipllava.serve.page.models import ModelList
from vipllava.serve.page.pictures import PictureLimits, PictureStore
from vipllava.serve.pictures import as_png
from vipllava.types import VipLlavaError
from vipllava.visual_prompts.marks import Arrow, Mark, Rectangle, plan_marks

IMAGE = Image.new("RGB", (64, 48), (90, 120, 150))
RED, LIME = Rectangle((4, 4, 30, 30), colour="red"), Rectangle((8, 8, 40, 40), colour="lime")


class Talk:
    """A conversation, and a person who waits for each answer."""

    def __init__(self, feedback: Path | None = None, *names: str) -> None:
        self.engines = {name: FakeEngine() for name in names or ("one", "two", "three")}
        self.store = PictureStore()
        self.picture = self.store.keep(IMAGE, "f" * 64).name
        models = ModelList(self.engines)
        self.conversation = Conversation(self.store, models, Feedback(feedback, True))

    def ask(
        self, question: str, marks: Sequence[Mark] = (), names: Sequence[str] = ("one",),
        *, blind: bool = False, picture: str | None = "", sampling: Sampling | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        async def ask() -> list[dict[str, Any]]:
            views = self.conversation.ask(
                question, self.picture if picture == "" else picture, marks, names,
                sampling or Sampling(), blind=blind,
            )  # fmt: skip
            return [view async for view in views]

        return asyncio.run(ask())

    def texts(self, name: str = "one") -> list[str]:
        """What a model was last asked."""
        return [turn.text for turn in self.engines[name].asked[-1].request.turns]


def test_views_end_with_everything_said():
    talk = Talk()
    talk.engines["one"].say = lambda request: ["a ", "**b**"]
    views = talk.ask("What is {0}?", [RED])
    assert views[0]["busy"] is True
    assert views[0]["rounds"][0]["answers"][0]["state"] == "waiting"
    last = views[-1]
    assert last["busy"] is False
    (answer,) = last["rounds"][0]["answers"]
    assert (answer["name"], answer["text"], answer["state"]) == ("one", "a **b**", "done")
    assert answer["html"] == "<p>a <strong>b</strong></p>\n"
    assert last["rounds"][0]["asked"] == "What is within the red rectangle?"
    numbers = [view["number"] for view in views]
    assert numbers == sorted(set(numbers))
    json.dumps(last)


def test_each_model_hears_its_own_answers():
    talk = Talk()
    talk.engines["one"].say = lambda request: ["1"]
    talk.engines["two"].say = lambda request: ["2"]
    talk.ask("What is {0}?", [RED], ["one", "two"])
    talk.ask("Sure about {0}?", [RED], ["one", "two"])
    first, second = "What is within the red rectangle?", "Sure about within the red rectangle?"
    assert talk.texts("one") == [first, "1", second]
    assert talk.texts("two") == [first, "2", second]
    request = talk.engines["one"].asked[-1].request
    assert [turn.has_image for turn in request.turns] == [True, False, False]
    assert not np.array_equal(request.image, IMAGE)


def test_a_model_that_failed_is_asked_as_if_it_had_not_been():
    talk = Talk()
    talk.engines["one"].say = lambda request: [VipLlavaError("no memory")]
    views = talk.ask("First?", names=["one", "two"])
    assert [a["state"] for a in views[-1]["rounds"][0]["answers"]] == ["failed", "done"]
    assert views[-1]["rounds"][0]["answers"][0]["error"] == "no memory"
    talk.ask("Second?", names=["one", "two"])
    assert talk.texts("one") == ["Second?"]
    assert talk.texts("two") == ["First?", "yes", "Second?"]


def test_a_defect_of_an_engine_ends_only_its_answer(caplog: pytest.LogCaptureFixture):
    talk = Talk()

    def broken(request: Any) -> list[str]:
        raise RuntimeError("secret")

    talk.engines["one"].say = broken
    with caplog.at_level(logging.ERROR):
        views = talk.ask("First?", names=["one", "two"])
    answers = views[-1]["rounds"][0]["answers"]
    assert [answer["state"] for answer in answers] == ["failed", "done"]
    assert answers[0]["error"] == "the model broke off; the server's log says why"
    assert "secret" in caplog.text


def test_marks_of_earlier_questions_keep_their_words_when_numbers_change():
    talk = Talk()
    talk.ask("What is {1}?", [RED, LIME])
    talk.ask("And {0}, {1}?", [LIME, Arrow(stroke=((2, 2), (30, 30)), colour="red")])
    assert talk.texts() == [
        "What is within the lime rectangle?", "yes",
        "And within the lime rectangle, pointed to by the red arrow?",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "now", [[], [LIME], [Rectangle((4, 4, 30, 31), colour="red")]], ids=["gone", "other", "moved"]
)
def test_a_mark_of_an_earlier_question_cannot_change(now: list[Mark]):
    talk = Talk()
    talk.ask("What is {0}?", [RED])
    view = talk.ask("And now?", now)[-1]
    assert view["notice"]["kind"] == "error"
    assert "within the red rectangle, which was changed or deleted" in view["notice"]["text"]
    assert len(view["rounds"]) == 1
    assert len(talk.engines["one"].asked) == 1


def test_braces_that_meant_no_mark_stay_braces():
    talk = Talk()
    talk.ask("Write {{0}}", [])
    talk.ask("What is {0}?", [RED])
    assert talk.texts()[0] == "Write {0}"


def test_braces_without_a_picture_stay_as_they_are():
    talk = Talk()
    talk.ask("Write {0} and {{1}}", picture=None)
    talk.ask("And now?", picture=None)
    assert talk.texts()[0] == "Write {0} and {{1}}"


@pytest.mark.parametrize(
    ("question", "marks", "names", "said"),
    [
        ("", [], ["one"], "a question has 1 to"),
        ("x" * 20_001, [], ["one"], "a question has 1 to"),
        ("What?", [], [], "choose 1 to 4"),
        ("What?", [], ["one", "one"], "choose 1 to 4"),
        ("What?", [], ["nobody"], "nobody does not answer now; there are: one, two, three"),
        ("What is {1}?", [RED], ["one"], "{1}"),
        ("What is {0}?", [], ["one"], "nothing is marked: give its region"),
        ("What is {0}?", [RED, RED], ["one"], "name marks [0, 1]"),
        ("What is {0}?", [Rectangle((100, 100, 110, 110))], ["one"], "regions[0].box"),
    ],
)
def test_what_cannot_be_asked_is_said(question: str, marks: Any, names: Any, said: str):
    talk = Talk()
    talk.ask("Before?")
    view = talk.ask(question, marks, names)[-1]
    assert view["notice"]["kind"] == "error"
    assert said in view["notice"]["text"]
    assert view["busy"] is False
    assert len(view["rounds"]) == 1
    assert "notice" in talk.ask("After?")[-1]


def test_a_picture_that_is_no_longer_kept_is_said():
    view = Talk().ask("What?", picture="x")[-1]
    assert view["notice"]["text"] == "the picture is no longer here: open it again"


def test_other_models_another_picture_or_blindness_begin_anew():
    talk = Talk()
    talk.ask("First?", names=["one", "two"])
    view = talk.ask("Second?", names=["one"])[-1]
    assert view["notice"] == {"kind": "restarted"}
    assert talk.texts() == ["Second?"]
    talk.ask("Third?")
    talk.picture = talk.store.keep(IMAGE, "e" * 64).name
    assert len(talk.ask("Fourth?")[-1]["rounds"]) == 1
    talk.ask("Fifth?", names=["one", "two"])
    assert len(talk.ask("Sixth?", names=["two", "one"])[-1]["rounds"]) == 2
    assert len(talk.ask("Seventh?", names=["one", "two"], blind=True)[-1]["rounds"]) == 1


def test_blind_views_hold_no_name_and_the_order_is_drawn(tmp_path: Path):
    orders: set[tuple[str, ...]] = set()
    for _ in range(40):
        talk = Talk(None, "alpha", "beta")
        talk.engines["alpha"].say = lambda request: [VipLlavaError("alpha is not well")]
        views = talk.ask("Who?", names=["alpha", "beta"], blind=True)
        assert "alpha" not in json.dumps(views)
        assert "beta" not in json.dumps(views)
        assert views[-1]["blind"] is True
        orders.add(talk.conversation.names)
    assert orders == {("alpha", "beta"), ("beta", "alpha")}


def test_a_vote_is_written_once_and_says_who_is_who(tmp_path: Path):
    path = tmp_path / "new" / "votes.jsonl"
    talk = Talk(path)
    talk.ask("What is {0}?", [RED], ["one", "two"], blind=True)
    order = talk.conversation.names
    asyncio.run(talk.conversation.vote("B"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    vote = rows[-1]
    assert [row["kind"] for row in rows] == ["answer", "vote"]
    assert (vote["choice"], vote["winner"], vote["blind"]) == ("B", order[1], True)
    assert vote["marks"][0]["shape"] == "rectangle"
    assert vote["picture"] == "f" * 64
    assert vote["sampling"]["temperature"] == 0.0
    view = talk.conversation.view()
    assert [answer["name"] for answer in view["rounds"][0]["answers"]] == [*order]
    with pytest.raises(QuestionRefused, match="there is no vote"):
        asyncio.run(talk.conversation.vote("A"))
    for choice in ("C", "", "AB", "none"):
        talk.ask("Next?", [RED], ["one", "two"])
        with pytest.raises(QuestionRefused, match="there is no vote"):
            asyncio.run(talk.conversation.vote(choice))
    asyncio.run(talk.conversation.vote("tie"))
    assert json.loads(path.read_text().splitlines()[-1])["winner"] is None


def test_a_vote_that_cannot_be_written_is_none(tmp_path: Path):
    (tmp_path / "file").write_text("")
    talk = Talk(tmp_path / "file" / "votes.jsonl")
    talk.conversation.feedback.conversations = False
    talk.ask("Who?", names=["one", "two"], blind=True)
    with pytest.raises(OSError, match="file"):
        asyncio.run(talk.conversation.vote("A"))
    assert talk.conversation.view()["blind"] is True
    assert talk.conversation.rounds[-1].vote is None


def test_stop_clear_and_a_closed_page_end_answers():
    async def run(end: str) -> tuple[FakeEngine, dict[str, Any]]:
        talk = Talk()
        engine = talk.engines["one"]
        engine.gate, engine.say = asyncio.Event(), lambda request: ["a", "b"]
        views = talk.conversation.ask("Who?", None, [], ["one"], Sampling())
        async for view in views:
            if view["rounds"] and view["rounds"][0]["answers"][0]["text"]:
                break
        assert engine.ended == []
        if end == "close":
            await views.aclose()
        else:
            getattr(talk.conversation, end)()
            async for _ in views:
                pass
        again = [v async for v in talk.conversation.ask("Again?", None, [], ["two"], Sampling())]
        assert again[-1]["rounds"][-1]["answers"][0]["state"] == "done"
        return engine, talk.conversation.view()

    for end in ("stop", "clear", "close"):
        engine, view = asyncio.run(run(end))
        assert engine.ended == [engine.asked[0].request.key]
        assert view["busy"] is False


def test_a_second_question_waits_for_none():
    async def run() -> None:
        talk = Talk()
        engine = talk.engines["one"]
        engine.gate, engine.say = asyncio.Event(), lambda request: ["a", "b"]
        first = talk.conversation.ask("Who?", None, [], ["one"], Sampling())
        await anext(first)
        second = [v async for v in talk.conversation.ask("Me!", None, [], ["one"], Sampling())]
        assert "an answer is being written" in second[-1]["notice"]["text"]
        with pytest.raises(QuestionRefused, match="no finished answer"):
            await talk.conversation.rate(0, "up")
        await first.aclose()

    asyncio.run(run())


def test_regenerate_asks_the_last_question_with_the_settings_of_now():
    talk = Talk()
    talk.ask("First?")
    talk.ask("What is {0}?", [RED])

    async def again() -> list[dict[str, Any]]:
        return [view async for view in talk.conversation.regenerate(Sampling(seed=7))]

    views = asyncio.run(again())
    assert len(views[-1]["rounds"]) == 2
    assert talk.texts() == ["First?", "yes", "What is within the red rectangle?"]
    assert talk.engines["one"].asked[-1].sampling.seed == 7
    keys = [generation.request.key for generation in talk.engines["one"].asked]
    assert len({*keys}) == 3


def test_pictures_make_room_and_are_bounded():
    image = Image.new("RGB", (10, 10))
    file = len(as_png(image))
    limits = PictureLimits(most_bytes=1000, most_pixels=100, kept_bytes=3 * file, decoded_bytes=800)
    store = PictureStore(limits)
    first, *others = (store.keep(image, "") for _ in range(4))
    assert store.picture(others[-1].name) is others[-1]
    with pytest.raises(VipLlavaError, match="no longer here"):
        store.picture(first.name)
    with pytest.raises(VipLlavaError, match="at most 1000"):
        store.open(b"x" * 1001)
    assert [*store._decoded] == [each.name for each in others[1:]]  # 400 bytes each
    assert store.image(others[0]).tobytes() == image.tobytes()
    assert [*store._decoded] == [others[2].name, others[0].name]


def test_plans_of_drawn_pictures_are_bounded_by_their_points():
    store = PictureStore(PictureLimits(kept_points=5))
    picture = store.keep(IMAGE, "")
    names = [store.keep_drawn(picture, plan_marks([mark], IMAGE.size)) for mark in (RED, LIME)]
    assert store.draw(names[1]).size == IMAGE.size
    store.keep_drawn(picture, plan_marks([RED, LIME], IMAGE.size))
    with pytest.raises(VipLlavaError, match="no longer here"):
        store.draw(names[0])


def test_a_conversation_keeps_no_picture_alive():
    talk = Talk()
    talk.store.limits = PictureLimits(kept_bytes=1)
    talk.ask("What is {0}?", [RED], ["one", "two"])
    first, second = (talk.engines[name].asked[0].request.image for name in ("one", "two"))
    assert first is second  # drawn once for all
    assert talk.store.work.memory.free == talk.store.work.memory.size
    talk.store.keep(IMAGE, "e" * 64)
    assert "no longer here" in talk.ask("And?", [RED], ["one", "two"])[-1]["notice"]["text"]

    async def again() -> list[dict[str, Any]]:
        return [view async for view in talk.conversation.regenerate(Sampling())]

    view = asyncio.run(again())[-1]
    assert "no longer here" in view["notice"]["text"]
    assert view["rounds"][0]["answers"][0]["text"] == "yes"


def test_a_picture_that_the_memory_does_not_hold_is_said():
    talk = Talk()
    talk.store.work.memory = Memory(1000)
    assert "MB for its image" in talk.ask("What?")[-1]["notice"]["text"]


def test_marks_that_take_minutes_to_draw_are_refused():
    talk = Talk()
    talk.picture = talk.store.keep(Image.new("RGB", (4000, 4000)), "e" * 64).name
    marks = [Rectangle((0, 0, 3999, 3999), colour="red", alpha=200)] * 100
    assert "what one question may" in talk.ask("What?", marks)[-1]["notice"]["text"]
    assert not talk.engines["one"].asked


def test_half_characters_are_refused_and_what_models_say_of_them_is_shown():
    talk = Talk()
    view = talk.ask("\ud800?")[-1]
    assert "half a character" in view["notice"]["text"]
    json.dumps(talk.ask("What?", names=["\ud800"])[-1], ensure_ascii=False).encode()
    talk.engines["one"].say = lambda request: ["\ud83d", "\ude00", "\ud800"]
    views = talk.ask("What?")
    json.dumps(views, ensure_ascii=False).encode()
    assert views[-1]["rounds"][0]["answers"][0]["text"] == "\U0001f600\ufffd"
    assert talk.ask("And?")[-1]["notice"] is None


def test_a_chat_is_only_so_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vipllava.serve.page.conversation.MOST_BYTES", 10_000)
    talk = Talk()
    talk.ask("First?")
    talk.ask("Second?")
    assert "clear it" in talk.ask("Third?")[-1]["notice"]["text"]
    talk.conversation.clear()
    assert talk.ask("Fourth?")[-1]["notice"] is None


def test_chats_make_room_for_others_and_say_so():
    talk = Talk()

    def make() -> Conversation:
        return Conversation(talk.store, talk.conversation.models, Feedback(None))

    def of(name: str) -> Conversation:
        return sessions.of(SimpleNamespace(session_hash=name))

    def ask(name: str) -> dict[str, Any]:
        talk.conversation = of(name)
        return talk.ask("What?")[-1]

    sessions = Sessions(make, most=2)
    assert ask("a")["notice"] is None
    ask("b")
    assert of("a").rounds
    ask("c")  # for which b makes room
    assert of("a").rounds
    assert of("b").view()["notice"] == {"kind": "forgotten"}
    view = ask("b")
    assert (view["notice"], len(view["rounds"])) == ({"kind": "forgotten"}, 1)
    assert ask("b")["notice"] is None

    sessions = Sessions(make, most_bytes=6_000)
    ask("a")
    ask("b")
    ask("c")
    assert not of("a").rounds
    assert of("c").rounds


@pytest.mark.parametrize("seed", ["--5", "9" * 5000, "5-", "\ud800", "1.5", "9" * 19, ["a"]])
def test_a_seed_that_is_none_is_said(seed: Any):
    with pytest.raises(VipLlavaError, match="seed") as caught:
        _sampling(0.2, 1.0, 20, seed)
    assert len(str(caught.value)) < 200
    str(caught.value).encode()


def test_seeds():
    assert [_sampling(0.2, 1.0, 20, seed).seed for seed in ("", None, " 5 ")] == [None, None, 5]
