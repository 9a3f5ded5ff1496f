"""Eight shapes by mouse, touch and keys; what arrives is what was drawn, to the pixel."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.serve.page.conftest import BROWSER, Tab
from vipllava.inference.marked import mark_request
from vipllava.types import Turn
from vipllava.visual_prompts.mark_fields import parse_marks

pytestmark = BROWSER

Open = Callable[..., Tab]
SHAPES = (
    "rectangle", "ellipse", "point", "triangle", "mask", "mask contour", "arrow", "scribble",
)  # fmt: skip


def plain(width: int, height: int) -> Image.Image:
    """A picture whose pixels differ, so that a shift of it shows."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8)
    return Image.fromarray(pixels)


def near(found: Any, wanted: Any, within: float = 1.0) -> bool:
    return bool(np.abs(np.asarray(found, float) - np.asarray(wanted, float)).max() <= within)


def test_eight_shapes_by_mouse_arrive_and_are_drawn_as_in_training(open_tab: Open):
    tab = open_tab()
    picture = plain(400, 300)
    tab.open(picture)
    tab.tool("rectangle")
    tab.drag((20, 20), (80, 60))
    tab.tool("ellipse")
    tab.drag((120, 20), (180, 60))
    tab.tool("point")
    tab.click(220, 40)
    tab.tool("triangle")
    for corner in ((260, 60), (300, 20), (340, 60)):
        tab.click(*corner)
    tab.tool("mask")
    for corner in ((20, 120), (80, 120), (80, 180)):
        tab.click(*corner)
    tab.click(20, 180, click_count=2)
    tab.tool("mask contour")
    for corner in ((120, 120), (180, 120), (150, 180)):
        tab.click(*corner)
    tab.page.keyboard.press("Enter")
    tab.tool("arrow")
    tab.drag((220, 180), (280, 120))
    tab.tool("scribble")
    tab.drag((320, 120), (340, 140), (330, 160), (370, 180), steps=8)
    tab.planned(8)

    marks = tab.marks("What is {0}, and what is {7}?")
    assert [mark["shape"] for mark in marks] == [*SHAPES]
    assert near(marks[0]["box"], [20, 20, 80, 60])
    assert near(marks[1]["box"], [120, 20, 180, 60])
    assert near(marks[2]["point"], [220, 40])
    assert near(marks[3]["stroke"], [[260, 60], [300, 20], [340, 60]])
    assert near(marks[4]["polygon"], [[[20, 120], [80, 120], [80, 180], [20, 180]]])
    assert near(marks[5]["polygon"], [[[120, 120], [180, 120], [150, 180]]])
    assert near(marks[6]["stroke"], [[220, 180], [280, 120]])
    assert near(marks[7]["stroke"][0], [320, 120])
    assert near(marks[7]["stroke"][-1], [370, 180])
    assert 4 <= len(marks[7]["stroke"]) <= 12  # simplified, its corners kept
    for corner in ((340, 140), (330, 160)):
        assert min(np.hypot(*np.subtract(corner, p)) for p in marks[7]["stroke"]) <= 1.5

    asked = mark_request(
        picture, [Turn("user", "What is {0}, and what is {7}?")], parse_marks(marks)
    )
    (generation,) = tab.served.engines["one"].asked
    assert generation.request.turns == asked.request.turns
    said = "What is within the red rectangle, and what is with the red scribble?"
    assert generation.request.turns[-1].text == said
    assert tab.page.locator(".vip-asked-text").inner_text() == said
    assert np.array_equal(generation.request.image, asked.overlay)

    # what the model sees, as the page shows it
    tab.page.locator(".vip-strip button[aria-pressed]").click()
    tab.page.wait_for_selector(".vip-seen:not([hidden])")
    address = tab.page.locator(".vip-seen").get_attribute("src")
    seen = Image.open(io.BytesIO(tab.page.request.get(address).body()))
    assert np.array_equal(seen, asked.overlay)
    assert not tab.page.locator(".vip-layer").is_visible()


def test_drags_draw_triangles_boxes_and_outlines(open_tab: Open):
    tab = open_tab()
    tab.open(plain(400, 300))
    tab.tool("triangle")
    tab.drag((20, 20), (80, 60))
    tab.tool("mask")
    tab.drag((120, 20), (180, 20), (180, 60), (120, 60), (120, 22), steps=6)
    tab.page.locator("[data-way=box]").click()
    tab.drag((220, 20), (280, 60))
    tab.tool("mask contour")
    tab.drag((320, 20), (380, 60))
    tab.tool("point")
    tab.drag((20, 120), (60, 130))  # lies where it is let go
    tab.tool("rectangle")
    tab.drag((180, 260), (120, 220))  # from the lower right
    tab.drag((300, 250), (300, 250))  # no drag: nothing
    tab.drag((350, 200), (520, 400))  # out of the picture
    marks = tab.marks()
    assert near(marks[0]["stroke"], [[50, 20], [80, 60], [20, 60]])
    assert 4 <= len(marks[1]["polygon"][0]) <= 8
    assert near(marks[2]["box"], [220, 20, 280, 60])
    assert near(marks[3]["box"], [320, 20, 380, 60])
    assert near(marks[4]["point"], [60, 130])
    assert near(marks[5]["box"], [120, 220, 180, 260])
    assert near(marks[6]["box"], [350, 200, 400, 300])
    assert len(marks) == 7
    # two of a shape have colours of their own, so that words tell them apart
    assert [mark["colour"] for mark in marks] == ["red", "red", "lime", "red", "red", "red", "lime"]


COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255))
SPREAD = ((0.3, 0.3), (0.7, 0.35), (0.5, 0.5), (0.35, 0.7), (0.68, 0.66))


def targets(width: int, height: int) -> tuple[Image.Image, list[tuple[float, float]]]:
    """A black picture with a disc of each colour, and the middles of the discs."""
    image = Image.new("RGB", (width, height))
    canvas, reach = ImageDraw.Draw(image), round(0.03 * width)
    middles = [(round(x * width), round(y * height)) for x, y in SPREAD]
    for (x, y), colour in zip(middles, COLOURS, strict=True):
        canvas.ellipse((x - reach, y - reach, x + reach, y + reach), fill=colour)
    return image, [(x + 0.5, y + 0.5) for x, y in middles]


def where_shown(tab: Tab, scale: int) -> list[tuple[float, float]]:
    """The middles of the discs as a person sees them, CSS pixels."""
    box = tab.page.locator(".vip-window").bounding_box()
    pixels = tab.screenshot().astype(int)
    left, top = (round(box[side] * scale) for side in ("x", "y"))
    bottom, right = top + round(box["height"] * scale), left + round(box["width"] * scale)
    window = pixels[top:bottom, left:right]
    found: list[tuple[float, float]] = []
    for colour in COLOURS:
        share = np.abs(window - colour).sum(-1)
        ys, xs = np.nonzero(share < 120)
        found.append(((left + xs.mean() + 0.5) / scale, (top + ys.mean() + 0.5) / scale))
    return found


def press_targets(tab: Tab, middles: list[tuple[float, float]], scale: int) -> None:
    """Click where each disc is seen; what arrives is its middle, within a pixel of the picture."""
    seen = where_shown(tab, scale)
    spans = [np.subtract(p[4], p[0]) for p in (seen, middles)]
    css = float(np.linalg.norm(spans[0]) / np.linalg.norm(spans[1]))  # CSS pixels per pixel
    tab.tool("point")
    pressed = [(round(x), round(y)) for x, y in seen]
    for place in pressed:
        tab.page.mouse.click(*place)
    marks = tab.marks()
    tab.page.locator(".vip-action").last.click()
    assert len(marks) == len(middles)
    for mark, middle, place, shown in zip(marks, middles, pressed, seen, strict=True):
        wanted = np.add(middle, np.subtract(place, shown) / css)
        assert near(mark["point"], wanted), (mark["point"], wanted, css)
    while tab.page.locator(".vip-chip-remove").count():
        tab.page.locator(".vip-chip-remove").first.click()


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("size", [(200, 150), (1600, 1200), (4000, 3000)])
def test_coordinates_arrive_within_a_pixel(open_tab: Open, size: tuple[int, int], scale: int):
    tab = open_tab(device_scale_factor=scale)
    image, middles = targets(*size)
    tab.open(image)
    press_targets(tab, middles, scale)
    for _ in range(4):
        tab.page.get_by_role("button", name="Zoom in").click()
    tab.settle()
    assert tab.page.get_by_role("button", name="Show the whole picture").inner_text() == "244 %"
    middle = tab.client(size[0] / 2, size[1] / 2)
    tab.tool("point")
    places = [(middle[0] + dx, middle[1] + dy) for dx, dy in ((0, 0), (-150, -90), (170, 100))]
    shown = where_shown(tab, scale)[2]
    css = (
        2.44140625
        * tab.page.evaluate("document.querySelector('.vip-window').clientHeight")
        / size[1]
    )
    css = min(css, 8 * 2.44140625)
    for place in places:
        tab.page.mouse.click(round(place[0]), round(place[1]))
    for mark, place in zip(tab.marks(), places, strict=True):
        wanted = np.add(middles[2], (np.round(place) - shown) / css)
        assert near(mark["point"], wanted), (mark["point"], wanted)


def test_coordinates_are_those_of_the_upright_picture(open_tab: Open):
    tab = open_tab()
    image, middles = targets(600, 800)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by 90 degrees
    stored = image.transpose(Image.Transpose.ROTATE_90)
    assert stored.size == (800, 600)
    tab.open(stored, "JPEG", exif=exif, quality=95)
    press_targets(tab, middles, 1)
    (generation,) = tab.served.engines["one"].asked
    assert generation.request.image.size == (600, 800)


def test_marks_are_selected_moved_pulled_deleted_undone_and_redone(open_tab: Open):
    tab = open_tab()
    tab.open(plain(400, 300))
    page = tab.page
    tab.tool("rectangle")
    tab.drag((100, 100), (200, 180))
    tab.drag((200, 180), (220, 200))  # the corner of the one that is selected
    tab.tool("select")
    tab.click(300, 250)  # nothing there
    tab.drag((160, 150), (180, 130))
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+y")
    assert near(tab.marks()[0]["box"], [120, 80, 240, 180])
    page.locator(".vip-window").focus()
    page.keyboard.press("Delete")
    assert tab.chips == []
    page.get_by_role("button", name="Undo").click()
    tab.planned(1)
    page.get_by_role("button", name="Undo").click()
    page.get_by_role("button", name="Undo").click()
    assert near(tab.marks()[0]["box"], [100, 100, 200, 180])
    page.get_by_role("button", name="Undo").click()
    assert tab.chips == []
    page.get_by_role("button", name="Redo").click()
    assert len(tab.chips) == 1


def test_colour_width_and_opacity_are_of_the_selected_mark_and_of_those_to_come(open_tab: Open):
    tab = open_tab()
    tab.open(plain(400, 300))
    tab.drag((20, 20), (80, 60))
    page = tab.page
    page.get_by_role("button", name="Colour, width and opacity").click()
    page.get_by_role("radio", name="Blue").click()
    page.locator("#vip-width").fill("7")
    page.locator("#vip-alpha").fill("80")
    page.keyboard.press("Escape")
    tab.tool("ellipse")
    tab.drag((120, 20), (180, 60))
    page.get_by_role("button", name="Colour, width and opacity").click()
    page.locator(".vip-custom").fill("#123456")
    marks = tab.marks()
    first, second = ({k: m[k] for k in ("colour", "width", "alpha")} for m in marks)
    assert first == {"colour": "blue", "width": 7, "alpha": 204}
    assert second == {"colour": [0x12, 0x34, 0x56], "width": 7, "alpha": 204}
    tab.planned(2)
    assert tab.chips == ["{0} within the blue rectangle", "{1} within the ellipse"]


def test_escape_cancels_and_a_drag_with_select_pans(open_tab: Open):
    tab = open_tab()
    tab.open(plain(1600, 1200))
    page = tab.page
    tab.tool("mask")
    tab.click(200, 200)
    tab.click(400, 200)
    page.keyboard.press("Escape")
    tab.tool("rectangle")
    page.mouse.move(*tab.client(200, 200))
    page.mouse.down()
    page.mouse.move(*tab.client(600, 600), steps=3)
    page.keyboard.press("Escape")
    page.mouse.up()
    assert tab.chips == []
    before = tab.client(800, 600)
    page.mouse.move(*before)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -400)
    page.keyboard.up("Control")
    tab.settle()
    assert near(tab.client(800, 600), before)  # what is under the mouse stays there
    zoom = int(page.get_by_role("button", name="Show the whole picture").inner_text().split()[0])
    assert zoom > 200
    tab.tool("select")
    tab.drag((800, 600), (850, 640))
    assert near(
        np.subtract(tab.client(800, 600), before),
        np.subtract(tab.client(850, 640), tab.client(800, 600)),
        2,
    )


def test_everything_by_keyboard(open_tab: Open):
    tab = open_tab()
    tab.open(plain(200, 100))
    page = tab.page
    page.locator(".vip-window").focus()
    press = page.keyboard.press
    for _ in range(5):
        press("ArrowRight")  # 2 pixels each: a hundredth of the longer side
    assert tab.status == "110, 50"
    press("Shift+ArrowUp")
    assert tab.status == "110, 49"
    press("3")
    press("Space")
    press("1")
    press("Space")
    for key in ("ArrowRight", "ArrowDown") * 5:
        press(key)
    press("Space")
    press("7")
    press("Enter")
    for _ in range(10):
        press("ArrowLeft")
    press("Enter")
    press("5")
    for key in ("ArrowUp", "ArrowLeft", "ArrowDown"):
        press("Space")
        for _ in range(8):
            press(key)
    press("Enter")
    press("8")
    press("Space")
    press("ArrowUp")
    press("ArrowLeft")
    press("Space")
    press("4")
    for key in ("ArrowRight", "ArrowUp", "ArrowLeft"):
        press("Space")
        press(key)
    marks = tab.marks()
    assert [mark["shape"] for mark in marks] == [
        "point", "rectangle", "arrow", "mask", "scribble", "triangle",
    ]  # fmt: skip
    assert marks[0]["point"] == [110, 49]
    assert marks[1]["box"] == [110, 49, 120, 59]
    assert marks[2]["stroke"] == [[120, 59], [100, 59]]
    assert marks[3]["polygon"] == [[[100, 59], [100, 43], [84, 43]]]
    page.locator(".vip-window").focus()
    press("0")
    press("]")
    assert tab.status == "Point selected: mark {0}"
    press("ArrowLeft")
    press("Delete")
    press("Control+z")
    assert tab.marks()[0]["point"] == [108, 49]
    # from the picture by Tab to the question, and a mention of a mark in it
    page.locator(".vip-window").focus()
    for _ in range(40):
        press("Tab")
        if page.evaluate("document.activeElement.id") == "vip-question":
            break
    page.keyboard.type("What is @")
    press("ArrowDown")
    press("Enter")
    page.keyboard.type("?")
    press("Enter")
    page.wait_for_function("document.querySelectorAll('.vip-round').length === 3")
    said = page.locator(".vip-asked-text").last.inner_text()
    assert said == "What is within the red rectangle?"


def test_touch_draws_and_two_fingers_zoom(open_tab: Open):
    tab = open_tab(width=390, height=844, has_touch=True, is_mobile=True, device_scale_factor=2)
    tab.open(plain(400, 300))
    touch = tab.page.context.new_cdp_session(tab.page)

    def fingers(kind: str, *points: tuple[float, float]) -> None:
        places = [{"x": x, "y": y, "id": n} for n, (x, y) in enumerate(points)]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})

    start, middle, end = tab.client(50, 40), tab.client(100, 90), tab.client(150, 120)
    fingers("touchStart", start)
    fingers("touchMove", middle)
    fingers("touchMove", end)
    fingers("touchEnd")
    tab.tool("point")
    tab.page.touchscreen.tap(*tab.client(300, 200))
    marks = tab.marks()
    assert near(marks[0]["box"], [50, 40, 150, 120], 2)
    assert near(marks[1]["point"], [300, 200], 2)
    tab.page.evaluate("scrollTo(0, 0)")  # asking may have scrolled to the answer
    left, right = tab.client(180, 150), tab.client(220, 150)
    fingers("touchStart", left, right)
    fingers("touchMove", (left[0] - 20, left[1]), (right[0] + 20, right[1]))
    fingers("touchMove", (left[0] - 40, left[1]), (right[0] + 40, right[1]))
    fingers("touchEnd")
    tab.settle()
    zoom = int(
        tab.page.get_by_role("button", name="Show the whole picture").inner_text().split()[0]
    )
    assert zoom > 150
    assert len(tab.chips) == 2
