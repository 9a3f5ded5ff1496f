"""The quick start: the commands it runs, and the summary and page it makes of their files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vipllava import cli
from vipllava.commands import quickstart
from vipllava.evaluation.bench import Prediction, jsonl
from vipllava.evaluation.journal import predictions_path
from vipllava.files.locks import hold_folder
from vipllava.sample_world.build import ensure_sample_world
from vipllava.types import VipLlavaError

ROOT = Path(__file__).resolve().parents[2]


def test_the_steps_are_the_commands_a_user_would_type(tmp_path: Path):
    steps = quickstart.plan_steps(Path("runs/q"), Path("d"), 7)
    assert list(steps) == [
        "sample_data", "pretrain", "finetune", "gpt4v", "regions", "vip_bench",
    ]  # fmt: skip
    finetune = steps["finetune"]
    assert finetune == (
        "train", "experiment=quickstart", "paths.runs=runs/q", "paths.data_root=d", "seed=7",
        "stage=finetune",
    )  # fmt: skip
    assert "checkpoint=runs/q/tiny-gpt4v/export" in steps["regions"]


def test_a_failing_step_stops_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps = {"broken": ("data", "show", "nothing")}
    monkeypatch.setattr(quickstart, "plan_steps", lambda *_: steps)
    with pytest.raises(VipLlavaError, match="step `broken` ended with code 2"):
        quickstart.quickstart(tmp_path)


def test_what_carries_the_photographs_may_not_be_installed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("vipllava.sample_world.build.find_spec", lambda name: None)
    for command in ("quickstart", "sample-data"):
        monkeypatch.setenv("VIPLLAVA_DATA", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        assert cli.main([command]) == 2
        assert 'pip install "vipllava-lightning[sample]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def two_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A quick start whose second step fails until there is a file; returns its folder."""
    code = "import sys; from pathlib import Path; folder = Path(sys.argv[2]); "
    code += "folder.mkdir(parents=True); (folder / 'metrics.json').write_text(sys.argv[1]); "
    code += "sys.exit(0 if Path('allowed').exists() or sys.argv[1] == 'first' else 3)"
    steps = {
        name: (name, str(tmp_path / "q" / "eval" / f"{name}{end}"))
        for name, end in (("first", ""), ("second", "/deep"))
    }
    monkeypatch.setattr(quickstart, "plan_steps", lambda *_: steps)
    monkeypatch.setattr(quickstart, "PROGRAM", (sys.executable, "-c", code))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "q"


def test_an_interrupted_one_goes_on_and_an_ended_one_stays(two_steps: Path, monkeypatch, caplog):
    def write_report(output: Path, data_root: Path, seconds) -> dict:
        (output / "report.html").write_text(f"{sorted(seconds)}")
        return {"accuracy_marked": 1, "accuracy_unmarked": 0, "num_questions": 2}

    monkeypatch.setattr(quickstart, "write_report", write_report)
    with pytest.raises(VipLlavaError, match=r"step `second` ended with code 3; the same command"):
        quickstart.quickstart(two_steps)
    (two_steps / "tiny-mine").mkdir()
    with pytest.raises(VipLlavaError, match=r"holds a quick start with --seed 42, not 7: "):
        quickstart.quickstart(two_steps, seed=7)
    shutil.rmtree(two_steps / "eval" / "second")
    Path("allowed").touch()
    with caplog.at_level("INFO"):
        quickstart.quickstart(two_steps)  # the first step would fail: its folder is there
    assert "first: done before" in caplog.text
    assert (two_steps / "report.html").read_text() == "['all', 'first', 'second']"

    (two_steps / "report.html").write_text("mine")
    with caplog.at_level("INFO"):
        quickstart.quickstart(two_steps)
    assert "has ended already" in caplog.text
    assert (two_steps / "report.html").read_text() == "mine"

    quickstart.quickstart(two_steps, again=True)
    assert (two_steps / "report.html").read_text() != "mine"
    kept = two_steps.with_name("q-before-1")
    assert (kept / "report.html").read_text() == "mine"
    assert (kept / "tiny-mine").is_dir()


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_of_others_is_left_alone(two_steps: Path, again: bool):
    for name in ("tiny-finetune", "eval"):
        (two_steps / name).mkdir(parents=True)
        (two_steps / name / "mine.txt").write_text("mine")
    with pytest.raises(VipLlavaError, match=r"not made by .* and holds eval, tiny-finetune: pass"):
        quickstart.quickstart(two_steps, again=again)
    assert sorted(p.name for p in two_steps.rglob("*.*")) == ["mine.txt", "mine.txt"]


def test_two_at_once_in_one_folder(two_steps: Path):
    Path("allowed").touch()
    two_steps.mkdir()
    (two_steps / quickstart.MARK).write_text(f"seed: 42\ndata_root: {Path('data').absolute()}\n")
    with (
        hold_folder(two_steps, another="nothing"),
        pytest.raises(VipLlavaError, match=rf"in use by process {os.getpid()} on .* --output"),
    ):
        quickstart.quickstart(two_steps)


QUICKSTART = """
import sys
from pathlib import Path
from vipllava import cli
from vipllava import cli
from vipllava.commands import quickstart

waiting = "import os, time; from vipllava.processes import begin; begin();"
waiting += "print(os.getpid(), flush=True); time.sleep(600)"
quickstart.plan_steps = lambda *_: {"waiting": ()}
quickstart.PROGRAM = (sys.executable, "-c", waiting)
sys.argv = ["vipllava", "quickstart", "--output", sys.argv[1]]
sys.exit(cli.main())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has it")
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143), (signal.SIGINT, 130)],
)
def test_a_killed_quick_start_leaves_no_step(tmp_path: Path, number: signal.Signals, code: int):
    program = subprocess.Popen(
        [sys.executable, "-c", QUICKSTART, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    assert program.stdout.readline()
    program.send_signal(number)
    errors = program.communicate(timeout=60)[1]  # no process holds the streams any more
    assert program.returncode == code, errors
    assert "Traceback" not in errors


def accuracy(correct: int, total: int) -> dict[str, Any]:
    return {"score": correct / total, "low": 0.1, "high": 0.9, "num_items": total}


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, Path]:
    """Output and data root of a quick start whose steps have ended."""
    data_root, output = tmp_path / "data", tmp_path / "out"
    ensure_sample_world(data_root, scale=0.01)
    for stage in quickstart.STAGES:
        folder = output / f"tiny-{stage}" / "csv"
        folder.mkdir(parents=True)
        rows = "".join(f"{step},{2 - step / 10}\n" for step in range(20))
        (folder / "metrics.csv").write_text("step,train/loss\n" + rows)
    regions = output / "eval" / "regions"
    regions.mkdir(parents=True)
    halves = {"kept": accuracy(7, 8), "removed": accuracy(1, 8)}
    metrics = {
        "settings": {"seed": 42},
        "marks": {name: {**half, "groups": {"arrow": half}} for name, half in halves.items()},
        "faithfulness": {
            "gap": {"score": 0.75, "low": 0.5, "high": 0.9},
            "follows": accuracy(5, 8),
            "stays": accuracy(6, 7),
        },
    }
    (regions / "metrics.json").write_text(json.dumps(metrics))
    for marks in ("kept", "removed"):
        rows = [
            Prediction(f"{n}", "i", marks, "What?", "x", ("arrow",), f"{marks}{n}")
            for n in range(8)
        ]
        predictions_path(regions, marks).write_text(jsonl(row.row() for row in rows))
    split = {
        "total": 40.0, "low": 30.0, "high": 50.0, "num_items": 60,
        "by_capability": {"rec": {"score": 40.0, "num_items": 60}},
    }  # fmt: skip
    bench = output / "eval" / "vip_bench"
    bench.mkdir(parents=True)
    splits = {"bbox": split, "human": {**split, "total": 50.0}}
    (bench / "metrics.json").write_text(json.dumps({"splits": splits}))
    return output, data_root


def test_summary_and_page_come_from_the_steps_files(finished: tuple[Path, Path]):
    output, data_root = finished
    summary = quickstart.write_report(output, data_root, {"pretrain": 1.25, "all": 9.0})
    assert summary == json.loads((output / "summary.json").read_text())
    assert summary["accuracy_marked"] == 0.875
    assert summary["accuracy_unmarked"] == 0.125
    assert summary["num_questions"] == 8
    assert summary["vip_bench_total"] == 45.0
    assert summary["loss_first"]["pretrain"] == pytest.approx(1.55)
    assert summary["loss_last"]["gpt4v"] == pytest.approx(0.55)
    assert set(summary["seconds"]) == {"pretrain", "all"}
    page = (output / "report.html").read_text()
    assert "kept0" in page
    assert "removed7" in page
    assert (output / "shapes.png").stat().st_size > 10_000
