"""``vipllava train``, which is ``python train.py``, too: one stage of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


def train(cfg: DictConfig) -> None:
    """Check a job, then run it; nothing heavy is imported before the check has passed."""
    from vipllava.config.checks import (
        check_config,
        check_data_config,
        check_plan_config,
        check_targets,
    )

    if cfg.inspect:
        check_data_config(cfg)
        from vipllava.commands.inspect import inspect_job

        inspect_job(cfg)
        return
    if cfg.preflight:
        check_plan_config(cfg)
        from vipllava.commands.preflight import preflight

        preflight(cfg)
        return
    if cfg.replay:
        check_data_config(cfg)
        from vipllava.commands.replay import replay_job

        replay_job(cfg)
        return
    check_config(cfg)
    check_targets(cfg)
    from vipllava.training.run import run_training

    run_training(cfg)
