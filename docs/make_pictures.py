"""Make the pictures and pages of this folder: `make pictures`.

Everything comes from the sample data and the code as it stands, so a change of either shows here.
The heat map is of the sweep that evaluation.md starts, where that has been run.
"""

from __future__ import annotations

import logging
from pathlib import Path

from vipllava.commands.inspect import inspect_job
from vipllava.commands.job import compose_data_job
from vipllava.commands.robustness import draw_grids, read_grids
from vipllava.report.shapes_image import draw_shapes_image

FOLDER = Path(__file__).resolve().parent / "pictures"
SWEEP = FOLDER.parents[1] / "runs" / "sweeps" / "eval" / "tiny-gpt4v" / "regions"


def main() -> None:
    """Write the picture of the eight shapes, a page of `vipllava inspect`, and the heat map."""
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


if __name__ == "__main__":
    main()
