"""Train one stage, as ``vipllava train``: ``python train.py stage=finetune model=7b``."""

from vipllava.processes import begin

if __name__ == "__main__":
    begin()
    from vipllava.commands.train import train
    from vipllava.config.entry import run_main

    run_main(train, config_name="train")
