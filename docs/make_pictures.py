"""Make the pictures and pages of this folder: `make pictures`.

Everything comes from the sample data and the code as it stands, so a change of either shows here.
"""

from __future__ import annotations

import logging
from pathlib import Path

from vipllava.commands.inspect import inspect_job
from vipllava.commands.job import compose_data_job
from vipllava.report.shapes_image import draw_shapes_image

FOLDER = Path(__file__).resolve().parent / "pictures"


def main() -> None:
    """Write the picture of the eight shapes and one page of `vipllava inspect`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    FOLDER.mkdir(exist_ok=True)
    draw_shapes_image().save(FOLDER / "shapes.jpg", quality=88)
    inspect_job(
        compose_data_job("sample_gpt4v", []),
        num_samples=8,
        output=FOLDER / "inspect.html",
        command="vipllava inspect --data sample_gpt4v --num-samples 8",
    )


if __name__ == "__main__":
    main()
