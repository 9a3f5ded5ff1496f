"""The page as a person sees it: languages, light and dark, wide and narrow, where the focus is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from tests.report.test_pages_in_browser import LEAST_CONTRAST
from tests.serve.page.conftest import BROWSER, Tab, says

pytestmark = BROWSER

Open = Callable[..., Tab]
PICTURE = Image.new("RGB", (320, 240), (90, 120, 150))

# Of every text that is seen: its contrast as WCAG 2 defines it, and what it is. Disabled controls
# and texts on a mark's own colour are no part of it.
CONTRASTS = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b]
    .map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] > 0) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  for (const e of document.body.querySelectorAll('*:not(svg *)')) {
    const text = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join('').trim()
      || e.placeholder || '';
    if (!text || !e.checkVisibility() || e.closest(':disabled, .heard')) continue;
    const style = getComputedStyle(e, e.placeholder && !e.value ? '::placeholder' : null);
    const [a, b] = [light(rgba(style.color)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, `${e.className}: ${text.slice(0, 40)}`]);
  }
  return found;
}"""

BEYOND = """() => [...document.querySelectorAll('.vip *')].filter(element => {
  const scrolls = '.vip-chips, .vip-examples, .vip-window, pre, svg';
  if (!element.checkVisibility() || element.closest(scrolls)) return false;
  const {left, right, width} = element.getBoundingClientRect();
  return width > 1 && (left < -0.5 || right > window.innerWidth + 0.5);
}).map(element => `${element.tagName} ${element.className}`)"""

LONG = "A **very** long answer " + "w" * 90 + "\n\n```\n" + "code " * 40 + "\n```\n\n- one\n- two"


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_it_is_whole_and_readable(open_tab: Open, width: int, scheme: str, language: str):
    tab = open_tab(
        f"?model=one,two,three,four&lang={language}", width, 900, color_scheme=scheme,
        has_touch=width < 500,
    )  # fmt: skip
    page = tab.page
    for engine in tab.served.engines.values():
        engine.say = says(LONG)
    tab.open(PICTURE)
    tab.drag((40, 40), (120, 120))
    tab.drag((160, 40), (300, 200))
    tab.planned(2)
    page.locator("#vip-blind input").check()
    tab.ask("What is {0}, and what is {1}? " + "x" * 120)
    page.locator(".vip-params button").first.click()
    tab.write("And {1} or {7}?")
    page.locator(".vip-look > button").click()
    tab.settle()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(BEYOND) == []
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 40
    assert [entry for entry in contrasts if entry[0] < LEAST_CONTRAST] == []
    corner = tab.screenshot()[2, 2].mean()
    assert corner > 200 if scheme == "light" else corner < 60
    if width == 1440:  # the picture is the largest part, and all of it is in the window
        assert page.evaluate("document.documentElement.scrollHeight") == 900
        areas = page.evaluate(
            "['.vip-window', '.vip-talk', '.vip-models'].map(name => {"
            " const b = document.querySelector(name).getBoundingClientRect();"
            " return b.width * b.height; })"
        )
        assert max(areas) == areas[0]


def test_the_first_look_is_whole_and_readable(open_tab: Open):
    tab = open_tab(width=390, height=844)
    assert tab.page.evaluate(BEYOND) == []
    contrasts = tab.page.evaluate(CONTRASTS)
    assert [entry for entry in contrasts if entry[0] < LEAST_CONTRAST] == []
    button = tab.page.get_by_role("button", name="Open a picture").first
    assert button.bounding_box()["height"] >= 40  # for a finger


def test_the_language_is_the_browsers_the_address_or_the_switch(open_tab: Open):
    tab = open_tab(locale="zh-CN")
    ask = tab.page.locator(".vip-ask")
    assert ask.inner_text() == "提问"
    assert tab.page.evaluate("document.documentElement.lang") == "zh-CN"
    tab.page.get_by_text("最多四个").wait_for()
    tab.page.get_by_role("radio", name="English").click()
    assert ask.inner_text() == "Ask"
    tab.page.get_by_text("Models (up to four, side by side)").wait_for()
    tab.page.reload()
    tab.page.wait_for_selector(".vip[data-ready]")
    assert ask.inner_text() == "Ask"  # as chosen
    other = open_tab("?lang=zh")
    assert other.page.locator(".vip-ask").inner_text() == "提问"
    other.open(PICTURE)
    other.tool("ellipse")
    assert other.status == "椭圆"


def test_what_was_said_does_not_stay_in_the_language_of_before(open_tab: Open):
    tab = open_tab()
    tab.ask("What?")
    assert tab.status == "Answered"
    tab.page.get_by_role("radio", name="中文").click()
    assert tab.status == ""
    tab.ask("What?")
    assert tab.status == "已回答"


def test_a_server_that_does_not_answer_is_said_in_the_readers_language(open_tab: Open):
    tab = open_tab()
    said = tab.page.locator("#vip-silent")
    english = "No server answers at http://127.0.0.1:9/v1: 'http://127.0.0.1:9/v1'"
    said.get_by_text(english).wait_for()
    assert said.inner_text().strip() == english
    tab.page.get_by_role("radio", name="中文").click()
    said.get_by_text("没有服务器应答").wait_for()
    assert "No server" not in said.inner_text()
    tab.served.servers["http://127.0.0.1:9/v1"] = ["far"]
    said.wait_for(state="hidden")


def test_every_text_is_in_both_languages():
    from vipllava.serve.page.component import page_texts

    texts = page_texts()
    assert {*texts["en"]} == {*texts["zh"]}
    assert all(text.strip() for each in texts.values() for text in each.values())


def test_dark_by_the_system_and_by_the_switch(open_tab: Open):
    tab = open_tab(color_scheme="dark")

    def corner(tab: Tab) -> float:
        tab.settle()
        return float(tab.screenshot()[2, 2].mean())

    assert corner(tab) < 60
    tab.page.locator("#vip-theme").click()
    assert corner(tab) > 200
    tab.page.reload()
    tab.page.wait_for_selector(".vip[data-ready]")
    assert corner(tab) > 200


def test_the_focus_is_seen(open_tab: Open):
    tab = open_tab()
    tab.open(PICTURE)
    tab.page.locator("body").click(position={"x": 3, "y": 3})
    seen: dict[str, Any] = {}
    for _ in range(60):
        tab.page.keyboard.press("Tab")
        name, outline, shadow = tab.page.evaluate(
            "() => { const e = document.activeElement, s = getComputedStyle(e);"
            " return [e.tagName + '.' + e.className + '#' + e.id,"
            " s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 1,"
            " s.boxShadow !== 'none']; }"
        )
        if name.startswith("BODY"):
            break
        seen[name] = outline or shadow
    ours = {name: is_seen for name, is_seen in seen.items() if "vip" in name}
    assert len(ours) > 8
    assert [name for name, is_seen in ours.items() if not is_seen] == []
    assert any("vip-window" in name for name in ours)
    assert any("vip-question" in name for name in ours)
