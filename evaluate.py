"""Run one benchmark, as ``vipllava evaluate``: ``python evaluate.py bench=vip_bench``."""

from vipllava.processes import begin

if __name__ == "__main__":
    begin()
    from vipllava.commands.evaluate import evaluate
    from vipllava.config.entry import run_main

    run_main(evaluate, config_name="evaluate")
