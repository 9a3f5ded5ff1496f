"""``vipllava inspect`` and ``train.py inspect=true``: the job's own data, on a page."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import preloaded
from tests.commands.conftest import UserData
from vipllava import cli

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_shows_the_first_samples_of_training(user_data: UserData):
    page = user_data.root / "pages" / "mine.html"
    assert (
        cli.main(["inspect", *user_data.arguments, "--num-samples", "4", "--output", str(page)])
        == 0
    )
    text = page.read_text()
    assert text.count("<article") == 4
    assert f"vipllava inspect --data {user_data.manifest} --num-samples 4 --output" in text
    for word in ("mine", "regions", "shard-000000.tar", "supervised"):
        assert word in text


def test_a_refused_sample_is_shown_with_the_reason(faulty_data: UserData):
    page = faulty_data.root / "mine.html"
    assert (
        cli.main(["inspect", *faulty_data.arguments, "--num-samples", "20", "--output", str(page)])
        == 0
    )
    text = page.read_text()
    assert text.count("<article") == 11
    assert "this one is empty" in text


def test_train_with_inspect_writes_a_page_and_trains_nothing(user_data: UserData):
    overrides = [
        "stage=task", "inspect=3", "trainer=8xa100", f"data.manifest={user_data.manifest}",
        *user_data.arguments[2:],
    ]  # fmt: skip
    done = preloaded.run(
        [sys.executable, str(ROOT / "train.py"), *overrides],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run_dir = user_data.root / "tiny-task"
    assert (run_dir / "inspect.html").read_text().count("<article") == 3
    assert not (run_dir / "export").exists()
    assert not (run_dir / "checkpoints").exists()


def test_unknown_data_is_an_error_of_one_line(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["inspect", "--data", "nowhere"]) == 2
    assert "--data nowhere: unknown" in capsys.readouterr().err
