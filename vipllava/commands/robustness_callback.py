"""What a sweep of evaluations does each time one of its jobs has ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from vipllava.commands.output import say
from vipllava.commands.robustness import draw_grids, read_grids
from vipllava.types import VipLlavaError


class DrawHeatMap(Callback):
    """Hydra's callback that draws the heat map of a sweep; ``conf/evaluate.yaml`` has it."""

    def on_job_end(self, config: DictConfig, **_: Any) -> None:
        """Draw what is there; a job that failed is in it, and ends the sweep when all have run."""
        hydra = config.hydra
        if hydra.mode != RunMode.MULTIRUN or "perturb" not in hydra.job.override_dirname:
            return
        folder = Path(hydra.sweep.dir)
        try:
            grids = read_grids(folder)
            page = draw_grids(folder, grids)[0]
        except (VipLlavaError, OSError) as error:
            # The answers are there, whatever keeps a heat map of them from being drawn.
            say(f"no heat map: {error}")
            return
        # Not in the job's log: what it ends with tells how the job ended.
        say("\n".join([*(f"{grid.name}: {grid.summary()}" for grid in grids), f"heat map: {page}"]))
