"""Make the pictures and pages of this folder: `make pictures`.

Everything comes from the sample data and the code as it stands, so a change of either shows here.
The heat map is of the sweep that evaluation.md starts, where that has been run; the evaluation's
page and the page to draw on are of the models of `make quickstart`, where that has. It needs the
extra `browser`, Chromium and a font with Chinese letters.
"""

from __future__ import annotations

import io
import logging
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vipllava.commands.inspect import inspect_job
from vipllava.commands.job import compose_data_job
from vipllava.commands.robustness import draw_grids, read_grids
from vipllava.report.shapes_image import draw_shapes_image
from vipllava.visual_prompts.marks import MARKS, Mark, plan_marks
from vipllava.visual_prompts.render import render_plan

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHECKPOINT = Path("runs/quickstart/tiny-gpt4v/export")
FOLDER = Path(__file__).resolve().parent / "pictures"
SWEEP = FOLDER.parents[1] / "runs" / "sweeps" / "eval" / "tiny-gpt4v" / "regions"


def main() -> None:
    """Write the shapes, the marks, a page of `vipllava inspect`, the heat map, an evaluation."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    FOLDER.mkdir(exist_ok=True)
    draw_shapes_image().save(FOLDER / "shapes.jpg", quality=88)
    draw_marks_table().save(FOLDER / "marks.jpg", quality=85)
    inspect_job(
        compose_data_job("sample_gpt4v", []),
        num_samples=8,
        output=FOLDER / "inspect.html",
        command="vipllava inspect --data sample_gpt4v --num-samples 8",
    )
    if SWEEP.is_dir():
        _, heat_map = draw_grids(SWEEP, read_grids(SWEEP))
        (FOLDER / heat_map.name).write_bytes(heat_map.read_bytes())
    if CHECKPOINT.is_dir():
        draw_evaluation_page()
        draw_demo_pages()


def draw_marks_table() -> Image.Image:
    """Draw every shape at every place that it takes, on a cup of coffee."""
    from skimage.data import coffee

    cup = Image.fromarray(coffee()).resize((240, 160), Image.Resampling.BICUBIC)
    x, y = np.meshgrid(np.arange(240), np.arange(160))
    ring = ((x - 118) / 48) ** 2 + ((y - 50) / 42) ** 2
    places = {
        "box": (68, 8, 166, 96),
        "polygon": ((68, 38), (90, 14), (118, 8), (148, 16), (166, 36), (146, 84), (90, 88)),
        "rle": (ring < 1) & (ring > 0.3),
        "point": (118, 50),
        "stroke": ((40, 130), (95, 30), (160, 60)),
    }
    left, top, gap = 150, 40, 8
    sheet = Image.new("RGB", (left + 5 * (240 + gap), top + 8 * (160 + gap)), (252, 252, 251))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(20)
    for column, place in enumerate(places):
        draw.text((left + column * (240 + gap), 8), place, (20, 20, 19), font)
    for row, (shape, kind) in enumerate(MARKS.items()):
        draw.text((8, top + row * (160 + gap) + 66), shape, (20, 20, 19), font)
        for column, (place, value) in enumerate(places.items()):
            if place in kind.places:
                mark: Mark = kind(**{place: value}, colour="aqua", alpha=200, seed=2)
                tile = render_plan(cup, plan_marks([mark], cup.size))
                sheet.paste(tile, (left + column * (240 + gap), top + row * (160 + gap)))
    return sheet


def draw_evaluation_page() -> None:
    """Evaluate the quick start's model, and take a picture of its page down to the second item."""
    from playwright.sync_api import sync_playwright

    marks = "marks=[kept,removed,moved,recoloured]"
    with tempfile.TemporaryDirectory() as folder:
        job = ["bench=regions", "limit=120", f"checkpoint={CHECKPOINT}", marks, "name=page"]
        words = ["-m", "vipllava.cli", "evaluate", *job, f"paths.runs={folder}"]
        subprocess.run([sys.executable, *words], check=True)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=next(filter(None, map(shutil.which, BROWSERS))),
                args=["--no-sandbox"],
            )
            page = browser.new_page(viewport={"width": 1180, "height": 900})
            page.goto((Path(folder) / "page" / "report.html").as_uri())
            third = page.locator(".item").nth(2).bounding_box()
            assert third is not None
            clip = {"x": 0, "y": 0, "width": 1180, "height": third["y"]}
            picture = page.screenshot(full_page=True, clip=clip)
            browser.close()
    Image.open(io.BytesIO(picture)).save(FOLDER / "evaluation.webp", quality=72, method=6)


def draw_demo_pages() -> None:
    """Take pictures of `vipllava demo` with two models of the quick start: wide, dark, narrow."""
    from playwright.sync_api import sync_playwright

    models = [str(CHECKPOINT), str(CHECKPOINT.parents[1] / "tiny-finetune" / "export")]
    with (
        tempfile.TemporaryDirectory() as folder,
        _running_demo(models, Path(folder)) as address,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(
            executable_path=next(filter(None, map(shutil.which, BROWSERS))),
            args=["--no-sandbox"],
        )
        for name, width, height, scheme, language in (
            ("demo-wide", 1440, 900, "light", "en"),
            ("demo-dark", 1440, 900, "dark", "zh"),
            ("demo-narrow", 390, 1180, "light", "en"),
        ):
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme,
                device_scale_factor=1.5 if width > 1000 else 2,
            )  # fmt: skip
            page.goto(f"{address}/?lang={language}&model=tiny-gpt4v,tiny-finetune")
            page.locator(".vip-params button").first.click()
            page.locator(".vip-params input[type=number]").first.fill("0")
            page.locator(".vip-params input[type=number]").first.press("Tab")
            page.locator(".vip-params button").first.click()
            page.locator("#vip-blind input").check()
            page.locator(".vip-example").nth(0).click()
            page.locator(".vip-chip").first.wait_for()
            page.locator(".vip-ask").click()
            page.locator(".vip-vote button").first.wait_for()
            page.locator(".vip-chip-say").first.click()
            page.locator("#vip-question").fill("What kind of thing is the object {0}?")
            page.evaluate("scrollTo(0, 0)")
            page.wait_for_timeout(600)
            picture = page.screenshot()
            image = Image.open(io.BytesIO(picture)).convert("RGB")
            image.save(FOLDER / f"{name}.jpg", quality=82)
            page.close()
        browser.close()


@contextmanager
def _running_demo(models: list[str], folder: Path) -> Generator[str]:
    words = [sys.executable, "-m", "vipllava.cli", "demo", *models, "--port", "7861"]
    program = subprocess.Popen([*words, "--feedback", str(folder / "votes.jsonl")])
    address = "http://127.0.0.1:7861"
    try:
        for _ in range(600):
            with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                break
            time.sleep(0.2)
        yield address
    finally:
        program.terminate()
        program.wait()


if __name__ == "__main__":
    main()
