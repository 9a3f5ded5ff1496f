"""Run one benchmark: ``python evaluate.py bench=vip_bench checkpoint=runs/7b-gpt4v/export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vipllava.processes import begin

if TYPE_CHECKING:
    from omegaconf import DictConfig


def evaluate(cfg: DictConfig) -> None:
    """Check the job, then run it; nothing heavy is imported before the check has passed."""
    from vipllava.config.checks import check_config
    from vipllava.evaluation.run import bench_problems, run_evaluation

    check_config(cfg, more=bench_problems(cfg))
    run_evaluation(cfg)


if __name__ == "__main__":
    begin()
    from vipllava.config.entry import run_main

    run_main(evaluate, config_dir=Path(__file__).resolve().parent / "conf", config_name="evaluate")
