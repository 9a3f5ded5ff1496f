"""Which machine do I need: the page in the docs, and the command that makes it."""

from __future__ import annotations

import argparse
import io

from rich.console import Console

from vipllava.cli import main
from vipllava.commands.machines import MODELS, machine_rows, run
from vipllava.config.composing import CONFIG_DIR

PAGE = CONFIG_DIR.parent / "docs" / "machines.md"


def printed(**options: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    values = {"model": None, "mfu": 0.4, "markdown": False}
    assert run(argparse.Namespace(**values | options), console) == 0
    return console.file.getvalue()


def test_the_page_is_what_the_command_makes():
    assert PAGE.read_text(encoding="utf-8") == printed(markdown=True)


def test_every_model_workload_and_machine_is_there():
    rows = machine_rows(["7b"], mfu=0.4)
    machines = {row.machine for row in rows}
    names = "8xa100 8xa100_40g 8xh100 8xh200 8xa6000 8xrtx3090 8xv100 multinode"
    assert set(names.split()) < machines
    assert len(rows) == 4 * len(machines)
    assert PAGE.read_text(encoding="utf-8").count("\n| projector |") == len(MODELS) * len(machines)
    by_place = {(row.workload, row.machine): row for row in rows}
    for row in rows:
        assert (row.memory <= row.capacity) == (row.strategy is not None), row
    # What the recipe was published for.
    assert by_place["projector", "8xa100"].micro_batch_size == 32
    assert by_place["full", "8xa100"].micro_batch_size == 16
    assert by_place["full", "8xa100"].strategy == "zero2"
    assert by_place["full", "1gpu (RTX 4090)"].strategy is None


def test_a_table_of_one_model_at_another_mfu():
    text = printed(model=["phi3_mini"], mfu=0.2)
    assert "phi3_mini, hours at an MFU of 20%" in text
    assert "13b" not in text
    (line,) = [line for line in text.splitlines() if "projector" in line and "8xv100" in line]
    assert line.split()[-1] == "7.3"  # the page has 3.6


def test_an_unknown_model_is_an_error_with_a_proposal(capsys):
    assert main(["machines", "--model", "llama3-8b"]) == 2
    assert "did you mean llama3_8b?" in capsys.readouterr().err
