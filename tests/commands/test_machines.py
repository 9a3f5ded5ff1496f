"""Which machine do I need: the page in the docs, and the command that makes it."""

from __future__ import annotations

from vipllava.cli import main
from vipllava.commands.machines import MODELS, _corpus, machine_rows
from vipllava.config.composing import CONFIG_DIR

PAGE = CONFIG_DIR.parent / "docs" / "machines.md"


def test_the_pages_tables_are_what_the_command_makes(capsys):
    assert main(["machines", "--markdown"]) == 0
    text, tables = PAGE.read_text(encoding="utf-8").split("\n\n## ", maxsplit=1)
    assert f"## {tables}" == capsys.readouterr().out
    for words in (
        f"rows of {_corpus('7b', 'pretrain', 0).longest} tokens (projector) or "
        f"{_corpus('7b', 'finetune', 0).longest} (the others)",
        "at an MFU of 40%",
    ):
        assert words in text


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


def test_a_table_of_one_model_at_another_mfu(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["machines", "--model", "phi3_mini", "--mfu", "0.2"]) == 0
    text = capsys.readouterr().out
    assert "phi3_mini, hours at an MFU of 20%" in text
    assert "13b" not in text
    (line,) = [line for line in text.splitlines() if "projector" in line and "8xv100" in line]
    assert line.split()[-1] == "7.3"  # the page has 3.6


def test_an_unknown_model_is_an_error_with_a_proposal(capsys):
    assert main(["machines", "--model", "llama3-8b"]) == 2
    assert "did you mean llama3_8b?" in capsys.readouterr().err
