"""The pages as a browser shows them: nothing sticks out, all is readable, in light and dark.

Needs Playwright (the extra `browser`) and the system's Chromium; skipped without.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.report.conftest import SIDE, Inspect, make_sample
from tests.report.test_evaluation_page import JUDGE, answer, evaluation
from tests.report.test_quickstart_page import accuracy, scores
from vipllava.report.evaluation_page import Figure, ShownItem, write_evaluation_page
from vipllava.report.inspect_page import JobSummary, build_inspect_page
from vipllava.report.inspected import InspectedSample, RefusedSample
from vipllava.report.quickstart_page import Example, QuickstartPage, write_quickstart_page
from vipllava.types import Mention

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")
LEAST_CONTRAST = 4.5  # WCAG AA, text of ordinary size

# Contrast of every element that has a text of its own, as WCAG 2 defines it.
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
    const text = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join('').trim();
    if (!text) continue;
    const [a, b] = [light(rgba(getComputedStyle(e).color)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, e.className + ': ' + text.slice(0, 40)]);
  }
  return found;
}"""

# Elements that reach beyond the window, cut off there or not; what scrolls by itself may.
BEYOND = """() => [...document.body.querySelectorAll('*:not(.scroll *)')].filter(element => {
  const {left, right} = element.getBoundingClientRect();
  return left < -0.5 || right > window.innerWidth + 0.5;
}).map(element => element.className + ': ' + element.textContent.slice(0, 40))"""

# Colour and background of the tokens of a kind of row.
TOKEN_COLOURS = """(row) => [...document.querySelectorAll(`.said.${row} .t`)].map(token => {
  const style = getComputedStyle(token);
  return [style.color, style.backgroundColor];
})"""


@pytest.fixture(scope="module")
def browser() -> Generator[Any]:
    """The system's Chromium without a window."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip('Playwright is missing: pip install "vipllava-lightning[browser]"')
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium is installed: apt-get install chromium (Debian), or Chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shown(inspect: Inspect) -> list[InspectedSample | RefusedSample]:
    """What is hard to lay out: long words and keys, many marks, many turns, no picture."""
    asked = ("What is ", Mention(0), "?\n\nAnd\tthis: ", "x" * 300, "?")
    answer = "A <b>dog</b> and  犬 😀.\n" + "y" * 200
    hard = make_sample(
        asked, answer, *["Sure?", "Yes."] * 3, "Is it?" * 90, "No.",
        boxes=[(20, 10, 60, 40)], size=(640, 427),
    )  # fmt: skip
    samples: list[InspectedSample | RefusedSample] = [
        inspect(hard, max_length=900),
        inspect(make_sample("Sure?", "Yes.", size=None), "llama_3"),
        inspect(make_sample("Sure?", "a dog.", size=(60, 90)), "plain", aspect="square"),
    ]
    long_key = "a_key_of_ninety_letters_without_a_place_to_break/" + "z" * 41
    samples.append(RefusedSample(long_key, "toys", "folder/" * 12 + "b.tar", "box " + "9" * 200))
    return samples + samples[1:2] * 10


@pytest.fixture(scope="module")
def inspect_page(
    shown: list[InspectedSample | RefusedSample], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("inspect") / "inspect.html"
    job = JobSummary(
        dataset="toys", num_samples=12000, stage="finetune", model="tiny",
        chat_template="llava_v1", image_aspect="pad", image_size=SIDE, image_seq_length=3,
        max_length=900, seed=42, chosen="the first that training meets",
        command="vipllava inspect --data /data/" + "manifest_" * 12 + "toys.yaml --num-samples 14",
    )  # fmt: skip
    path.write_text(build_inspect_page(job, shown), "utf-8")
    return path


@pytest.fixture(scope="module")
def evaluation_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is hard to lay out: words without a place to break, wide tables, large images."""
    path = tmp_path_factory.mktemp("evaluation") / "report.html"
    word = "x" * 120
    stripes = Image.fromarray(np.arange(48 * 640 * 3, dtype=np.uint8).reshape(48, 640, 3))
    hard = answer(
        "kept", word, 0.25, images=(stripes, stripes.rotate(90, expand=True)), question=word,
        ground_truth=word,
    )  # fmt: skip
    content = evaluation()
    metrics = {**content.metrics, "bench": word, "metric": word}
    metrics["settings"] = {
        "checkpoint": f"/{word}/{word}", word: {"a": word}, "judge": {**JUDGE, "model": word},
    }  # fmt: skip
    content = evaluation(
        metrics=metrics, title=word, figures=[*content.figures, Figure(word, 48.0, None, None, 9)],
        columns=(word, *["a marking"] * 9), rows=[(word, *["100.0 (74.1 to 100.0)"] * 9)],
        total=(word, *["100.0 (74.1 to 100.0)"] * 9), failures=[(word, word, word)],
        worst=[ShownItem(word, (word, "rec"), [hard, answer("moved", word, 0)]), *content.worst],
        versions={word: "1"}, command=word,
    )  # fmt: skip
    write_evaluation_page(path, content)
    return path


@pytest.fixture(scope="module")
def quickstart_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quickstart") / "report.html"
    stripes = Image.fromarray(np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3))
    question = "What is within the red rectangle?\nAnswer the question using a single word."
    halves = [accuracy(90, 100, 0.826, 0.945), accuracy(20, 100, 0.13, 0.29)]
    marks = [{**half, "groups": {"mask contour": half}} for half in halves]
    gap = {"score": 0.7, "low": 0.62, "high": 0.77}
    content = QuickstartPage(
        shapes_image=stripes.resize((1700, 790)),
        loss_curves={stage: [(0, 5.0), (1, 2.5)] for stage in ("pretrain", "finetune", "gpt4v")},
        regions={
            "marks": {"kept": marks[0], "removed": marks[1]},
            "faithfulness": {"gap": gap, "follows": halves[0], "stays": halves[0]},
        },
        vip_bench={
            "splits": {name: scores(58.4, 50.1, 66.1, rec=71.2) for name in ("bbox", "human")}
        },
        examples=[Example(stripes, question, "cup", "Cup.", "a fish", "arrow")] * 5,
        seconds={"pretrain": 61.2, "all": 583.0},
        versions={"torch": "2.13.0"},
    )
    write_quickstart_page(path, content)
    return path


Open = Callable[[Path, int, str], Any]


@pytest.fixture
def open_page(browser: Any) -> Generator[Open]:
    """Open a file at a width and in a colour scheme; it may ask for nothing else."""
    contexts: list[Any] = []

    def open_page(path: Path, width: int, scheme: str) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.emulate_media(color_scheme=scheme)
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.evaluate(
            """() => Promise.all([...document.images].map(image => {
              image.loading = 'eager';
              return image.decode();
            }))"""
        )
        assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["inspect_page", "quickstart_page", "evaluation_page"])
def test_it_is_whole_and_readable(
    open_page: Open,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    name: str,
    width: int,
    scheme: str,
):
    page = open_page(request.getfixturevalue(name), width, scheme)

    widths = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert widths == [width, width]
    assert page.evaluate(BEYOND) == []
    pictures = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert pictures
    assert min(pictures) > 0

    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 30
    assert [entry for entry in contrasts if entry[0] < LEAST_CONTRAST] == []

    file = tmp_path / f"{name}_{width}_{scheme}.png"
    page.screenshot(path=file, full_page=True)
    pixels = np.asarray(Image.open(file).convert("L"), dtype=np.float64)
    assert pixels.shape[1] == width
    corner = pixels[2, 2]
    assert corner > 200 if scheme == "light" else corner < 60
    assert pixels.std() > 10  # something is drawn
    bands = np.array_split(pixels, len(pixels) // 900 + 1)
    assert min(band.std() for band in bands) > 2  # all the way down


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_supervised_tokens_look_different(
    open_page: Open, inspect_page: Path, width: int, scheme: str
):
    page = open_page(inspect_page, width, scheme)
    given, learned = (
        {tuple(colours) for colours in page.evaluate(TOKEN_COLOURS, row)}
        for row in ("given", "learned")
    )
    assert given
    assert len(learned) == 1  # end tokens have the same
    ((ink, paper),) = learned
    assert ink not in {colour for colour, _ in given}
    assert paper not in {colour for _, colour in given}


def test_the_text_in_the_browser_is_what_is_trained(
    open_page: Open, inspect_page: Path, shown: list[InspectedSample | RefusedSample]
):
    page = open_page(inspect_page, 1280, "light")
    said = page.evaluate(
        "[...document.querySelectorAll('.said.learned')].map(row => row.textContent)"
    )
    assert said == [
        stretch.text
        for sample in shown
        if isinstance(sample, InspectedSample)
        for stretch in sample.stretches
        if stretch.supervised
    ]
    sign = "getComputedStyle(document.querySelector('.said .nl'), '::before').content"
    assert page.evaluate(sign) == '"\u21b5"'


@pytest.mark.parametrize(("width", "large"), [(1280, 18 * SIDE), (420, None)])
def test_a_click_enlarges_the_picture(
    open_page: Open, inspect_page: Path, width: int, large: int | None
):
    page = open_page(inspect_page, width, "light")
    picture = page.locator(".view img").first
    assert picture.bounding_box()["width"] == 6 * SIDE  # whole pixels are crisp
    assert picture.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    picture.click()
    enlarged = picture.bounding_box()["width"]
    assert enlarged == large if large else 6 * SIDE <= enlarged < width
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_the_contents_lead_to_the_samples(open_page: Open, inspect_page: Path):
    page = open_page(inspect_page, 1280, "light")
    page.locator("nav a").nth(3).click()
    assert page.evaluate("location.hash") == "#sample-4"
    top = page.locator("#sample-4").bounding_box()["y"]
    assert 0 <= top < 900


@pytest.mark.parametrize("width", WIDTHS)
def test_a_click_enlarges_an_image_of_an_item(open_page: Open, evaluation_page: Path, width: int):
    page = open_page(evaluation_page, width, "light")
    image = page.locator(".asked img").first
    before = image.bounding_box()["width"]
    image.click()
    assert image.bounding_box()["width"] > 1.5 * before
    assert page.evaluate("document.documentElement.scrollWidth") == width
