"""``vipllava compare``: what it prints, as docs/evaluation.md shows it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from vipllava import cli
from vipllava.evaluation.bench import Prediction, jsonl

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
RUNS = ("7b-gpt4v", "my-lora", "my-lora-2")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three evaluations of 300 items, two of an image, as the page has them."""
    rng = np.random.default_rng(0)
    hard = np.repeat(rng.random(150), 2)
    groups = [("rec", "ocr") if at % 3 == 0 else ("rec",) for at in range(300)]
    for name, skill in zip(RUNS, (0.45, 0.47, 0.6), strict=True):
        folder = tmp_path / "runs" / "eval" / name / "vip_bench"
        folder.mkdir(parents=True)
        right = hard + rng.normal(0, 0.2, size=300) < skill
        items = [
            Prediction(
                f"v1_{at}", f"{at // 2}.jpg", "kept", "What?", "cup", groups[at], "a cup",
                float(right[at]),
            )
            for at in range(300 if name != "my-lora-2" else 299)
        ]  # fmt: skip
        if name == "my-lora":
            items[7] = items[7].failed("no verdict")
        text = jsonl(item.row() for item in items)
        (folder / "predictions.jsonl").write_text(text, encoding="utf-8")
        settings = {
            "checkpoint": f"runs/{name}/export", "seed": 42 if name == "7b-gpt4v" else 7,
            "marks": "kept", "judge": {"model": "Llama-3.3-70B", "prompt": "4be1f0"},
        }  # fmt: skip
        metrics = {"bench": "vip_bench", "settings": settings}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    return tmp_path


def folders(*names: str) -> list[str]:
    return [f"runs/eval/{name}/vip_bench" for name in names]


def test_the_page_shows_what_is_printed(place: Path, capsys: pytest.CaptureFixture[str]):
    blocks = re.findall(r"(?ms)^```\w*\n(.*?)^```", PAGE)
    block = next(each for each in blocks if "B - A" in each)
    assert f"vipllava compare {' '.join(folders(*RUNS[:2]))}\n" in PAGE
    assert cli.main(["compare", *folders(*RUNS[:2])]) == 0
    printed = capsys.readouterr().out
    assert [line.rstrip() for line in printed.splitlines()] == block.splitlines()


def test_a_narrow_terminal_keeps_the_difference(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "72")
    assert cli.main(["compare", *folders(*RUNS[:2])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if "┃" in line or "│" in line) <= 72
    assert any("B - A ┃" in line and "B is" in line for line in lines)


def test_several_models_and_json(place: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["compare", "--json", "--common", *folders(*RUNS)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["bench"], found["first"]) == ("vip_bench", "runs/eval/7b-gpt4v/vip_bench")
    assert found["settings"]["seed"] == [42, 7, 7]
    same, better = found["comparisons"]
    assert (same["num_unscored_other"], better["num_only_first"]) == (1, 1)
    assert (same["total"]["shown"], better["total"]["shown"]) == (None, "higher")
    assert better["groups"]["ocr"]["shown"] == "higher"
    assert better["total"]["first"]["num_items"] == 299
    assert better["total"]["p_corrected"] == 2 * better["total"]["difference"]["p_value"]
    assert cli.main(["compare", "--common", *folders(*RUNS)]) == 0
    printed = capsys.readouterr().out
    verdict = r"C - A: \+\d+\.\d \(\+\d+\.\d to \+\d+\.\d\), p < 0\.001: C is higher\n"
    assert re.search(verdict, printed)
    assert "items left out: 1 only in A\n" in printed


def test_what_does_not_compare_is_an_error(place: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["compare", *folders("7b-gpt4v", "my-lora-2")]) == 2
    assert "1 items (v1_299) only in runs/eval/7b-gpt4v/vip_bench" in capsys.readouterr().err
    path = place / "runs" / "eval" / "my-lora" / "vip_bench" / "metrics.json"
    path.write_text(path.read_text().replace("Llama-3.3-70B", "Qwen3-32B"))
    assert cli.main(["compare", *folders(*RUNS[:2])]) == 2
    assert "my-lora/vip_bench: judge.model=Qwen3-32B" in capsys.readouterr().err
    assert cli.main(["compare", "--different-judges", *folders(*RUNS[:2])]) == 0
    assert "Qwen3-32B" in capsys.readouterr().out


def test_another_field_that_is_not_a_share(place: Path, capsys: pytest.CaptureFixture[str]):
    for at, name in enumerate(RUNS[:2]):
        path = place / "runs" / "eval" / name / "vip_bench" / "predictions.jsonl"
        lines = [json.loads(line) | {"cider": 1.5 + at} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["compare", "--score", "cider", *folders(*RUNS[:2])]) == 0
    printed = capsys.readouterr().out
    assert "300 of 300 items changed: 0 lower, 300 higher" in printed
    assert "no interval can be given: all 150 images give the same value" in printed
    assert "B - A: +100.0 (no interval), p < 0.001: B is higher" in printed
    assert cli.main(["compare", "--score", "meteor", *folders(*RUNS[:2])]) == 2
    assert "has no meteor" in capsys.readouterr().err
