"""``vipllava evaluate``, which is ``python evaluate.py``, too: one benchmark, one model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


def evaluate(cfg: DictConfig) -> None:
    """Check a job, then run it; nothing heavy is imported before the check has passed."""
    from vipllava.config.checks import check_config
    from vipllava.evaluation.run import bench_problems, run_evaluation

    check_config(cfg, more=bench_problems(cfg))
    run_evaluation(cfg)
