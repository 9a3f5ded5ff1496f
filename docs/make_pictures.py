"""Make the pictures and pages of this folder: `make pictures`.

Everything comes from the sample data and the code as it stands, so a change of either shows here.
The heat map is of the sweep that evaluation.md starts, where that has been run; the evaluation's
page of the model of `make quickstart`, where that has. It needs the extra `browser` and Chromium.
"""

from __future__ import annotations

import io
import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from vipllava.commands.inspect import inspect_job
from vipllava.commands.job import compose_data_job
from vipllava.commands.robustness import draw_grids, read_grids
from vipllava.report.shapes_image import draw_shapes_image

CHECKPOINT = Path("runs/quickstart/tiny-gpt4v/export")
FOLDER = Path(__file__).resolve().parent / "pictures"
SWEEP = FOLDER.parents[1] / "runs" / "sweeps" / "eval" / "tiny-gpt4v" / "regions"


def main() -> None:
    """Write the eight shapes, a page of `vipllava inspect`, the heat map, an evaluation's page."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    FOLDER.mkdir(exist_ok=True)
    draw_shapes_image().save(FOLDER / "shapes.jpg", quality=88)
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


def draw_evaluation_page() -> None:
    """Evaluate the quick start's model, and take a picture of its page down to the second item."""
    from playwright.sync_api import sync_playwright

    marks = "marks=[kept,removed,moved,recoloured]"
    with tempfile.TemporaryDirectory() as folder:
        job = ["bench=regions", "limit=120", f"checkpoint={CHECKPOINT}", marks, "name=page"]
        words = ["-m", "vipllava.cli", "evaluate", *job, f"paths.runs={folder}"]
        subprocess.run([sys.executable, *words], check=True)
        with sync_playwright() as playwright:
            browsers = ("chromium", "chromium-browser", "google-chrome")
            browser = playwright.chromium.launch(
                executable_path=next(filter(None, map(shutil.which, browsers))),
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


if __name__ == "__main__":
    main()
