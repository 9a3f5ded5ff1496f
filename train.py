"""Train one stage, as ``vipllava train``: ``python train.py stage=finetune model=7b``."""

from vipllava.processes import begin

if __name__ == "__main__":
    begin()
    from vipllava.commands.job import run_job

    run_job("train")
