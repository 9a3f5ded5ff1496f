"""Questions and answers: streams side by side, mentions, blind votes, what a model may not do."""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.serve.page.conftest import BROWSER, Tab, says
from tests.serve.page.fake_engine import FakeEngine
from tests.toy_server import run_app
from vipllava.commands.demo import build_demo
from vipllava.inference.marked import mark_request
from vipllava.types import Turn, VipLlavaError
from vipllava.visual_prompts.mark_fields import parse_marks

pytestmark = BROWSER

Open = Callable[..., Tab]
PICTURE = Image.new("RGB", (320, 240), (90, 120, 150))


def wait_for(tab: Tab, holds: Callable[[], bool]) -> None:
    """Look until something holds; twenty seconds and it is an error."""
    for _ in range(800):
        if holds():
            return
        tab.page.wait_for_timeout(25)
    raise AssertionError("it did not come")


def test_two_models_stream_side_by_side(open_tab: Open):
    tab = open_tab("?model=one,two")
    one, two = (tab.served.engines[name] for name in ("one", "two"))
    one.gate, two.gate = asyncio.Event(), asyncio.Event()
    one.say, two.say = says("A **red** ", "cup."), says("A bowl, ", "I think.")
    tab.open(PICTURE)
    tab.drag((40, 40), (120, 120))
    tab.planned(1)
    tab.page.locator(".vip-chip-say").click()
    tab.write("What is {0}?")
    tab.page.locator(".vip-ask").click()
    tab.page.wait_for_function("document.querySelectorAll('.vip-text.writing').length === 2")
    wait_for(tab, lambda: tab.answers == ["A red", "A bowl,"])
    assert tab.page.locator(".vip-text strong").inner_text() == "red"
    names = tab.page.locator(".vip-name").all_inner_texts()
    assert names == ["one", "two"]
    boxes = [panel.bounding_box() for panel in tab.page.locator(".vip-answer").all()]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] < boxes[1]["x"]
    assert tab.page.locator(".vip-stop").is_visible()
    assert tab.page.locator("#vip-question").input_value() == ""
    two.gate.set()
    wait_for(tab, lambda: tab.answers == ["A red", "A bowl, I think."])
    one.gate.set()
    tab.answered()
    assert tab.answers == ["A red cup.", "A bowl, I think."]
    images = [np.asarray(engine.asked[0].request.image) for engine in (one, two)]
    mark = tab.served.rows("answer")[-1]["marks"]
    asked = mark_request(PICTURE, [Turn("user", "What is {0}?")], parse_marks(mark))
    assert all(np.array_equal(image, asked.overlay) for image in images)
    thumb = tab.page.locator(".vip-thumb img")
    thumb.evaluate("image => image.decode()")
    tab.page.locator(".vip-thumb").click()
    whole = tab.page.locator(".vip-dialog img").get_attribute("src")
    seen = Image.open(io.BytesIO(tab.page.request.get(whole).body()))
    assert np.array_equal(seen, asked.overlay)
    tab.page.keyboard.press("Escape")
    # the next turn is about the same picture, and each model hears its own answer again
    tab.ask("Sure?")
    texts = [turn.text for turn in two.asked[1].request.turns]
    assert texts == ["What is within the red rectangle?", "A bowl, I think.", "Sure?"]


def test_what_a_mark_is_called_goes_into_the_question(open_tab: Open):
    tab = open_tab()
    tab.open(PICTURE)
    tab.drag((20, 20), (80, 80))
    tab.drag((120, 20), (180, 80))
    tab.tool("point")
    tab.click(250, 120)
    tab.planned(3)
    page = tab.page
    question = page.locator("#vip-question")
    question.click()
    question.press_sequentially("Is @")
    assert page.locator(".vip-menu [role=option]").count() == 3
    page.locator(".vip-menu [role=option]").nth(1).click()
    question.press_sequentially(" like")
    page.locator(".vip-chip-say").nth(2).click()
    assert question.input_value() == "Is {1} like {2}"
    reading = page.locator(".vip-reading").inner_text()
    assert reading == "The model reads: Is within the lime rectangle like at the red point"
    # deleting the first mark changes no number: words never come to mean another mark
    page.locator(".vip-chip-remove").first.click()
    tab.planned(2)
    assert tab.chips == ["{1} within the lime rectangle", "{2} at the red point"]
    tab.ask()
    (generation,) = tab.served.engines["one"].asked
    assert generation.request.turns[-1].text == "Is within the lime rectangle like at the red point"
    assert tab.served.rows("answer")[-1]["question"] == "Is {0} like {1}"


def test_a_mention_of_a_mark_that_is_gone_is_not_asked(open_tab: Open):
    tab = open_tab()
    tab.open(PICTURE)
    tab.drag((20, 20), (80, 80))
    tab.planned(1)
    tab.write("What is {0}?")
    tab.page.locator(".vip-window").focus()
    tab.page.keyboard.press("Delete")
    assert tab.page.locator(".vip-said.bad").inner_text() == "there is no mark {0}"
    tab.page.locator(".vip-ask").click()
    assert tab.status == "there is no mark {0}"
    assert tab.page.locator(".vip-round").count() == 0
    tab.drag((120, 20), (180, 80))  # another mark is no substitute
    assert tab.page.locator(".vip-said.bad").count() == 1
    tab.page.keyboard.press("Control+z")
    tab.page.keyboard.press("Control+z")
    tab.planned(1)
    tab.ask()
    assert tab.served.engines["one"].asked[0].request.turns[-1].text == (
        "What is within the red rectangle?"
    )
    # a question of this chat is about the mark: it cannot change behind its words
    tab.tool("select")
    tab.drag((50, 50), (90, 90))
    assert "An earlier question is about mark {0}" in tab.status
    tab.write("And now?")
    tab.page.locator(".vip-ask").click()
    notice = tab.page.locator(".vip-notice.error")
    notice.wait_for()
    assert "the mark within the red rectangle, which was changed" in notice.inner_text()
    assert tab.page.locator("#vip-question").input_value() == "And now?"
    tab.page.locator(".vip-window").focus()
    tab.page.keyboard.press("Control+z")
    tab.ask()
    assert len(tab.served.engines["one"].asked) == 2


def test_blind_names_are_hidden_until_the_vote_which_is_written(open_tab: Open):
    tab = open_tab("?model=one,two,three")
    for name in ("one", "two", "three"):
        tab.served.engines[name].say = says(f"{name} says so")
    page = tab.page
    tab.open(PICTURE)
    tab.drag((40, 40), (120, 120))
    tab.planned(1)
    page.locator("#vip-blind input").check()
    frames: list[str] = []
    page.on("response", lambda r: "queue/data" in r.url and frames.append(r.text()))
    tab.ask("What is {0}?")
    assert page.locator(".vip-name").all_inner_texts() == ["Model A", "Model B", "Model C"]
    order = [answer.split()[0] for answer in tab.answers]
    assert sorted(order) == ["one", "three", "two"]
    assert page.locator(".vip-vote button").all_inner_texts() == [
        "A is better", "B is better", "C is better", "Tie", "All bad",
    ]  # fmt: skip
    page.locator("[data-choice=B]").click()
    page.locator(".vip-voted").wait_for()
    assert page.locator(".vip-voted").inner_text() == f"Your vote: {order[1]}"
    assert page.locator(".vip-name").all_inner_texts() == order
    vote = tab.served.rows("vote")[-1]
    assert vote["choice"] == "B"
    assert vote["winner"] == order[1]
    assert vote["blind"] is True
    assert [(a["letter"], a["model"]) for a in vote["answers"]] == [*zip("ABC", order, strict=True)]
    assert [a["text"] for a in vote["answers"]] == [f"{name} says so" for name in order]
    assert vote["question"] == "What is {0}?"
    assert vote["asked"] == "What is within the red rectangle?"
    assert len(vote["marks"]) == 1
    assert len(vote["picture"]) == 64
    # the chat goes on with the names known; each is asked in its place
    tab.ask("Sure?")
    assert page.locator(".vip-round").last.locator(".vip-name").all_inner_texts() == order


def test_answers_are_rated_reported_and_asked_for_again(open_tab: Open):
    tab = open_tab()
    page = tab.page
    tab.open(PICTURE)
    tab.ask("What is it?")
    for kind in ("up", "down", "flag"):
        page.locator(f".vip-rate-button[data-kind={kind}]").click()
        page.wait_for_selector(f".vip-rate-button[data-kind={kind}][aria-pressed=true]")
    rows = [tab.served.rows(kind)[-1] for kind in ("up", "down", "flag")]
    assert [row["model"] for row in rows] == ["one"] * 3
    assert page.locator("[data-kind=up]").get_attribute("aria-pressed") == "false"
    tab.served.engines["one"].say = says("Something else")
    page.get_by_role("button", name="Ask again").click()
    wait_for(tab, lambda: tab.answers == ["Something else"])
    tab.answered()
    assert page.locator(".vip-round").count() == 1
    page.get_by_role("button", name="Clear").last.click()
    page.wait_for_function("document.querySelectorAll('.vip-round').length === 0")
    tab.ask("Again?")
    assert len(tab.served.engines["one"].asked[-1].request.turns) == 1
    # a new picture is a new chat
    tab.open(PICTURE.resize((100, 100)))
    page.wait_for_function("document.querySelectorAll('.vip-round').length === 0")


def test_stop_keeps_what_was_written_and_ends_the_rest(open_tab: Open):
    tab = open_tab()
    engine = tab.served.engines["one"]
    engine.gate, engine.say = asyncio.Event(), says("This far ", "and no farther")
    tab.write("Tell me")
    tab.page.locator(".vip-ask").click()
    wait_for(tab, lambda: tab.page.locator(".vip-text").all_inner_texts() == ["This far"])
    tab.page.locator(".vip-stop").click()
    tab.answered()
    assert tab.answers == ["This far"]
    assert tab.page.locator(".vip-answer-note").inner_text() == "Stopped."
    assert engine.ended == [engine.asked[0].request.key]


def test_a_closed_tab_ends_its_answer(open_tab: Open):
    tab = open_tab()
    engine = tab.served.engines["one"]
    engine.gate, engine.say = asyncio.Event(), says("This far ", "and no farther")
    tab.write("Tell me")
    tab.page.locator(".vip-ask").click()
    wait_for(tab, lambda: tab.page.locator(".vip-text").all_inner_texts() == ["This far"])
    other = open_tab()
    tab.page.close()
    wait_for(other, lambda: bool(engine.ended))


def test_two_tabs_do_not_see_each_other(open_tab: Open):
    first, second = open_tab(), open_tab()
    first.ask("Mine?")
    second.ask("And mine?")
    first.ask("Mine still?")
    texts = [turn.text for turn in first.served.engines["one"].asked[-1].request.turns]
    assert texts == ["Mine?", "yes", "Mine still?"]
    assert second.page.locator(".vip-round").count() == 1


EVIL = (
    "<script>window.hacked = 1</script> <img src=x onerror='window.hacked = 1'>\n\n"
    "![pixel](http://203.0.113.1/pixel.png) [click](javascript:window.hacked=1)\n\n"
    "[data](data:text/html,x) [fine](https://example.org/a) <http://example.org/b>\n\n"
    "<style>body { display: none }</style> ${1+1} {{7*7}} `code <b>`\n\n"
    "| a | b |\n| - | - |\n| <i>1 | 2 |"
)


def test_what_a_model_writes_does_nothing(open_tab: Open):
    tab = open_tab()
    tab.served.engines["one"].say = says(*(letter for letter in EVIL))
    tab.ask("Say <b>evil</b> things <script>window.hacked = 2</script> &amp; more")
    page = tab.page
    assert page.evaluate("window.hacked") is None
    found = "names => document.querySelectorAll(names.map(n => `.vip-text ${n}`).join()).length"
    assert page.evaluate(found, ["script", "img", "style", "iframe", "b", "i", "[onerror]"]) == 0
    links = page.locator(".vip-text a")
    assert [link.get_attribute("href") for link in links.all()] == [
        "http://203.0.113.1/pixel.png", "https://example.org/a", "http://example.org/b",
    ]  # fmt: skip
    assert {link.get_attribute("rel") for link in links.all()} == {"noopener noreferrer nofollow"}
    assert page.locator(".vip-text td").all_inner_texts() == ["<i>1", "2"]
    asked = "Say <b>evil</b> things <script>window.hacked = 2</script> &amp; more"
    assert page.locator(".vip-asked-text").inner_text() == asked


def test_one_model_that_fails_leaves_the_others_alone(open_tab: Open):
    tab = open_tab("?model=one,two")
    tab.served.engines["one"].say = says("half an ", VipLlavaError("the memory is full"))
    tab.ask("What is it?")
    assert tab.answers == ["half an", "yes"]
    notes = tab.page.locator(".vip-answer-note").all_inner_texts()
    assert notes == ["the memory is full", ""]


def test_the_list_of_models_follows_the_servers(open_tab: Open):
    tab = open_tab()
    box = tab.page.locator("#vip-models input")
    box.click()
    assert tab.page.locator("[role=option]").all_inner_texts() == ["✓\none", "two", "three", "four"]
    tab.page.keyboard.press("Escape")
    tab.served.servers["http://127.0.0.1:9/v1"] = ["far"]

    def listed() -> bool:
        box.blur()
        box.click()
        return "far" in " ".join(tab.page.locator("[role=option]").all_inner_texts())

    wait_for(tab, listed)
    tab.page.get_by_role("option", name="far").click()
    tab.page.keyboard.press("Escape")
    tab.ask("Who is there?")
    assert tab.answers == ["yes", "far from afar"]
    tab.served.servers.clear()
    chosen = tab.page.locator("#vip-models .token")
    wait_for(tab, lambda: chosen.all_inner_texts() == ["one"])


def test_parameters_reach_the_model(open_tab: Open):
    tab = open_tab()
    page = tab.page
    page.get_by_role("button", name="Parameters").click()
    for label, value in (("Temperature", "0.7"), ("Top-p", "0.5"), ("Longest answer", "33")):
        number = page.locator(f".vip-params input[type=number][aria-label*='{label}']")
        slider = page.locator(f".vip-params input[type=range][aria-label*='{label}']")
        number.fill(value)
        number.press("Tab")
        wait_for(tab, lambda slider=slider, value=value: slider.input_value() == value)
    page.get_by_label("Seed").fill("12")
    page.get_by_label("Seed").press("Tab")
    page.get_by_role("radio", name="中文").click()  # words change, and nothing else
    page.locator(".vip-params input[aria-label*=温度]").first.wait_for()
    page.get_by_role("radio", name="English").click()
    page.locator(".vip-params input[aria-label*=Temperature]").first.wait_for()
    tab.ask("What is it?")
    sampling = tab.served.engines["one"].asked[-1].sampling
    found = (sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.seed)
    assert found == (0.7, 0.5, 33, 12)
    page.get_by_label("Seed").fill("many")
    page.get_by_label("Seed").press("Tab")
    tab.write("And now?")
    page.locator(".vip-ask").click()
    page.locator(".vip-notice.error").wait_for()
    assert "seed='many'" in page.locator(".vip-notice").inner_text()


def test_export_is_the_conversation_and_the_picture(open_tab: Open):
    tab = open_tab("?model=one,two")
    tab.open(PICTURE)
    tab.drag((40, 40), (120, 120))
    tab.planned(1)
    tab.ask("What is {0}?")
    files: dict[str, bytes] = {}

    def keep(download: Any) -> None:
        files[download.suggested_filename] = download.path().read_bytes()

    tab.page.on("download", keep)
    tab.page.get_by_role("button", name="Export").click()
    wait_for(tab, lambda: len(files) == 2)
    whole = json.loads(files["conversation.json"])
    (round_,) = whole["rounds"]
    assert round_["question"] == "What is {0}?"
    assert round_["words"] == ["within the red rectangle"]
    assert [answer["model"] for answer in round_["answers"]] == ["one", "two"]
    assert whole["picture"]["size"] == [320, 240]
    marks = parse_marks(round_["regions"])
    asked = mark_request(PICTURE, [Turn("user", "What is {0}?")], marks)
    assert np.array_equal(Image.open(io.BytesIO(files["conversation.png"])), asked.overlay)


def test_an_example_is_a_picture_with_marks_and_a_question(open_tab: Open):
    tab = open_tab()
    tab.page.locator(".vip-example").nth(2).click()
    tab.planned(2)
    question = tab.page.locator("#vip-question").input_value()
    assert question == "What is the sum of the digits {0} and {1}?"
    tab.ask()
    said = tab.page.locator(".vip-asked-text").inner_text()
    assert said == (
        "What is the sum of the digits within the blue ellipse and within the red ellipse?"
    )


def test_a_file_that_is_no_picture_is_refused_in_words(open_tab: Open):
    tab = open_tab()
    file = {"name": "x.png", "mimeType": "image/png", "buffer": b"no picture at all"}
    tab.page.set_input_files(".vip-file", file)
    tab.page.locator(".vip-status.error").wait_for()
    assert re.search("picture", tab.status)
    tab.errors[:] = [error for error in tab.errors if "422" not in error]


def test_an_open_page_does_not_hold_the_servers_end(browser: Any, caplog: pytest.LogCaptureFixture):
    engine = FakeEngine()
    app = build_demo({"toy": engine}, ())
    page = browser.new_page()
    with run_app(app) as server:
        with page.expect_response("**/heartbeat/*"):
            page.goto(server.url)
        page.wait_for_selector(".vip[data-ready]")
        app.state.serving.lifecycle.ending = True
        server.thread.join(20)
        assert not server.thread.is_alive()
    page.close()
    assert engine.closed
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []
