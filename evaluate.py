"""Run one benchmark: ``python evaluate.py bench=vip_bench checkpoint=runs/7b-gpt4v/export``."""

from pathlib import Path

from omegaconf import DictConfig

from vipllava.config.checks import check_config
from vipllava.config.entry import run_main


def evaluate(cfg: DictConfig) -> None:
    """Check the job, then run it; nothing heavy is imported before the check has passed."""
    check_config(cfg)
    from vipllava.evaluation.run import run_evaluation

    run_evaluation(cfg)


if __name__ == "__main__":
    run_main(evaluate, config_dir=Path(__file__).resolve().parent / "conf", config_name="evaluate")
