"""Run one benchmark, as ``vipllava evaluate``: ``python evaluate.py bench=vip_bench``."""

from vipllava.processes import begin

if __name__ == "__main__":
    begin()
    from vipllava.commands.job import run_job

    run_job("evaluate")
