"""One server of fake engines and one browser for all tests of the page."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.serve.page.fake_engine import FakeEngine
from tests.toy_server import ToyServer, run_app
from vipllava.serve.app import build_app
from vipllava.serve.settings import ServerSettings

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
# Gradio counts its events with pandas, whose newest release no longer likes how.
BROWSER = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore:(.*no_silent_downcasting|The copy keyword)"),
]
NAMES = ("one", "two", "three", "four")


@dataclass
class Served:
    """The page's server: its engines by name, and what it has written."""

    server: ToyServer
    engines: dict[str, FakeEngine]
    feedback: Path
    servers: dict[str, list[str]] = field(default_factory=dict)  # address -> its models

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """The lines of a kind."""
        if not self.feedback.exists():
            return []
        rows = [json.loads(line) for line in self.feedback.read_text("utf-8").splitlines()]
        return [row for row in rows if row["kind"] == kind]


def says(*pieces: Any) -> Callable[[Any], list[Any]]:
    return lambda request: [*pieces]


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from vipllava.serve.page.examples import sample_examples
    from vipllava.serve.page.models import ModelList
    from vipllava.serve.page.mount import PageSettings, mount_page

    engines = {name: FakeEngine() for name in NAMES}
    feedback = tmp_path_factory.mktemp("page") / "feedback.jsonl"
    app = build_app(engines, ServerSettings())
    far: dict[str, list[str]] = {}

    async def list_names(address: str) -> list[str]:
        return far[address]

    models = ModelList(
        engines, ["http://127.0.0.1:9/v1"], list_names=list_names,
        make_engine=lambda address, name: FakeEngine(says(f"{name} from afar")),
        seconds_between=0.2,
    )  # fmt: skip
    settings = PageSettings(feedback=feedback, log_conversations=True, tick_s=1.0)
    mount_page(app, models, sample_examples(), settings)
    with run_app(app) as server:
        yield Served(server, engines, feedback, far)


@pytest.fixture(scope="module")  # while it is there, asyncio.run is not possible in this thread
def browser() -> Iterator[Any]:
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


@dataclass
class Tab:
    """The page in a browser's tab, and a person's hands."""

    page: Any
    served: Served
    errors: list[str]

    def open(self, image: Image.Image, kind: str = "PNG", **options: Any) -> None:
        """Choose a picture as a file."""
        data = io.BytesIO()
        image.save(data, kind, **options)
        file = {"name": "x", "mimeType": f"image/{kind.lower()}", "buffer": data.getvalue()}
        shown = self.page.locator(".vip-image:not(.vip-seen)")
        before = shown.get_attribute("src")
        self.page.set_input_files(".vip-file", file)
        self.page.wait_for_function(
            "before => document.querySelector('.vip-image').getAttribute('src') !== before && "
            "document.querySelector('.vip-body').dataset.empty === 'false' && "
            "!document.querySelector('.vip-body').hasAttribute('aria-busy')",
            arg=before,
        )
        self.settle()

    def settle(self) -> None:
        """Wait until what was done is painted."""
        self.page.evaluate(
            "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )

    def planned(self, count: int) -> None:
        """Wait for so many marks with their words."""
        self.page.wait_for_function(
            "count => { const said = [...document.querySelectorAll('.vip-words')];"
            " return said.length === count && said.every(s => / the /.test(s.textContent)); }",
            arg=count,
        )
        self.settle()

    def tool(self, name: str) -> None:
        self.page.locator(f".vip-tool[data-tool='{name}']").click()

    def client(self, x: float, y: float) -> tuple[float, float]:
        """Where a pixel of the picture is in the tab."""
        found = self.page.evaluate(
            "([x, y]) => { const b = document.querySelector('.vip-sheet').getBoundingClientRect();"
            " const s = document.querySelector('.vip-layer').viewBox.baseVal;"
            " return [b.left + x / s.width * b.width, b.top + y / s.height * b.height]; }",
            [x, y],
        )
        return found[0], found[1]

    def drag(self, *points: tuple[float, float], steps: int = 4) -> None:
        """Press the mouse at the first point, pass the others, release it at the last."""
        first, *others = (self.client(*point) for point in points)
        self.page.mouse.move(*first)
        self.page.mouse.down()
        for point in others:
            self.page.mouse.move(*point, steps=steps)
        self.page.mouse.up()
        self.settle()

    def click(self, x: float, y: float, **options: Any) -> None:
        self.page.mouse.click(*self.client(x, y), **options)
        self.settle()

    def write(self, text: str) -> None:
        self.page.locator("#vip-question").fill(text)

    def ask(self, text: str | None = None) -> None:
        """Ask, and wait for the whole answer."""
        if text is not None:
            self.write(text)
        rounds = self.page.locator(".vip-round").count()
        self.page.locator(".vip-ask").click()
        self.page.wait_for_function(
            "rounds => document.querySelectorAll('.vip-round').length !== rounds", arg=rounds
        )
        self.answered()

    def answered(self) -> None:
        self.page.wait_for_selector(".vip-ask:not([hidden])")

    def marks(self, text: str = "What is it?") -> list[dict[str, Any]]:
        """Ask, and return the marks as Python has got them."""
        before = len(self.served.rows("answer"))
        self.ask(text)
        self.page.wait_for_timeout(20)
        rows = self.served.rows("answer")
        assert len(rows) == before + 1
        return rows[-1]["marks"]

    @property
    def answers(self) -> list[str]:
        """The texts of the last round."""
        return self.page.locator(".vip-round").last.locator(".vip-text").all_inner_texts()

    @property
    def chips(self) -> list[str]:
        return self.page.evaluate(
            "() => [...document.querySelectorAll('.vip-chip-say')].map(chip =>"
            " [...chip.children].slice(1).map(each => each.textContent).join(' '))"
        )

    @property
    def status(self) -> str:
        return self.page.locator(".vip-status").text_content()

    def screenshot(self) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.page.screenshot())).convert("RGB"))


@pytest.fixture
def open_tab(browser: Any, served: Served) -> Iterator[Callable[..., Tab]]:
    """Open the page; keywords are the browser context's. It may ask nobody else, nor fail."""
    contexts: list[Any] = []
    tabs: list[Tab] = []
    for engine in served.engines.values():
        engine.__init__()
    served.servers.clear()

    def open_tab(query: str = "", width: int = 1200, height: int = 800, **options: Any) -> Tab:
        context = browser.new_context(
            viewport={"width": width, "height": height}, locale=options.pop("locale", "en-GB"),
            **options,
        )  # fmt: skip
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda m: m.type == "error" and errors.append(m.text))
        ours = (f"{served.server.url}/", "data:", "blob:")
        page.on("request", lambda r: r.url.startswith(ours) or errors.append(f"asked {r.url}"))
        page.goto(f"{served.server.url}/{query}")
        page.wait_for_selector(".vip[data-ready]")
        page.wait_for_selector("#vip-models input")
        tabs.append(Tab(page, served, errors))
        return tabs[-1]

    yield open_tab
    for context in contexts:
        context.close()
    for tab in tabs:
        assert tab.errors == []
