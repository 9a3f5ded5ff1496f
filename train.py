if __name__ == "__main__":
    begin()
    from vipllava.commands.job import run_job

    run_job("train")
