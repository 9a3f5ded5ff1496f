"""Train one stage: ``python train.py stage=finetune model=7b trainer=8xa100``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vipllava.processes import begin

if TYPE_CHECKING:
    from omegaconf import DictConfig


def train(cfg: DictConfig) -> None:
    """Check the job, then run it; nothing heavy is imported before the check has passed."""
    from vipllava.config.checks import check_config, check_data_config, check_plan_config
    from vipllava.config.targets import check_targets

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


if __name__ == "__main__":
    begin()
    from vipllava.config.entry import run_main

    run_main(train, config_dir=Path(__file__).resolve().parent / "conf", config_name="train")
