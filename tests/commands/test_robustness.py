"""A sweep over ``perturb`` as a heat map and a table; a real one is among the slow tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.types import RunMode
from omegaconf import OmegaConf

from tests import preloaded, tiny_model
from tests.toy_data import encode_picture, said
from vipllava import cli
from vipllava.checkpoints.hf_format import save_export
from vipllava.checkpoints.loading import build_model, load_tokenizer
from vipllava.commands.robustness import Cell, lay_out, read_grids
from vipllava.commands.robustness_callback import DrawHeatMap
from vipllava.config.composing import CONFIG_DIR
from vipllava.models.building import ModelSpec
from vipllava.shards.tars import write_shards
from vipllava.types import VipLlavaError

KEYS = ("shape", "colour", "width", "alpha", "jitter", "jpeg_quality")
LOG = "2026-11-29 11:24:35,986 {} vipllava.x: {}\n"


def job(
    folder: Path, perturb: dict[str, Any], score: float | None, *more: str, error: str = ""
) -> Path:
    """Write what a job leaves in its folder; one without a score has no ``metrics.json``."""
    name = ",".join([f"{key}={value}" for key, value in perturb.items()] + list(more))
    place = folder / (name or "as-it-is")
    (place / ".hydra").mkdir(parents=True)
    section = {**dict.fromkeys(KEYS), **perturb}
    config = {"perturb": section, "bench": {"name": "regions"}}
    (place / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    overrides = ["limit=9", *more, *(f"perturb.{k}={v}" for k, v in perturb.items())]
    (place / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    log = LOG.format("INFO", "error: no") + "more\n" + (LOG.format("ERROR", error) if error else "")
    (place / "evaluate.log").write_text(log)
    if score is not None:
        kept = {"score": score, "low": score - 0.1, "high": score + 0.1}
        metrics = {"bench": "regions", "marks": {"kept": {**kept, "num_items": 9}}}
        metrics["splits"] = {"bbox": {"score": 40.0}}  # of a benchmark that counts to 100
        metrics["faithfulness"] = {"follows": {"score": 1.0, "low": None, "high": None}}
        (place / "metrics.json").write_text(json.dumps(metrics))
    return place


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep"
    job(folder, {"shape": "arrow"}, 0.75)
    job(folder, {"shape": "arrow", "alpha": 64}, 0.5)
    job(folder, {"shape": "point"}, 0.875)
    job(folder, {"shape": "point", "alpha": 64}, None, error="none of 9 items\nhas an answer <b>")
    return folder


def test_cells_from_the_worst_on_with_the_failed_one_last(sweep: Path):
    (grid,) = read_grids(sweep)
    assert grid.cells[0] == Cell(
        {"shape": "arrow", "alpha": 64}, "shape=arrow,alpha=64", 0.5, 0.4, 0.6, 9, 0, None
    )
    assert [cell.score for cell in grid.cells] == [0.5, 0.75, 0.875, None]
    failed = grid.cells[-1]
    assert failed.failure == "none of 9 items\nhas an answer <b>"
    assert grid.summary() == (
        "mean of 3 cells 70.8; worst 50.0 (40.0 to 60.0): arrow, opacity 64; best 87.5; "
        "1 of 4 cells have no score, not counted"
    )


def test_the_command_prints_the_table_and_draws_the_map(sweep: Path, capsys):
    assert cli.main(["robustness", str(sweep)]) == 0
    printed = capsys.readouterr().out
    assert "regions: marks.kept in % (95 %)" in printed
    assert re.search(r"arrow, opacity 64 +│ +9 │ +0 │ +50.0 \(40.0 to 60.0\)", printed)
    assert re.search(r"mean of 3 +│ +│ +│ +70.8", printed)
    page, svg = ((sweep / f"robustness.{kind}").read_text() for kind in ("html", "svg"))
    for text in (page, svg):
        assert re.findall(r'class="value"[^>]*>([\d.]+)<', text) == ["75.0", "50.0", "87.5"]
        assert text.count(">failed</text>") == 1
        assert text.count('class="cell lowest"') == 1
        assert ">40 to 60</text>" in text
        # Rows are shapes, columns what is changed.
        names = re.findall(r'class="tick" text-anchor="(?:middle|end)">([a-z][^<]*)<', text)
        assert names == ["unchanged", "opacity 64", "arrow", "point"]
    assert "has an answer &lt;b&gt;" in page
    assert svg.startswith("<svg xmlns=")
    assert cli.main(["robustness", str(sweep), "--json"]) == 0
    (grid,) = json.loads(capsys.readouterr().out)
    assert grid["cells"][0]["perturb"] == {"shape": "arrow", "alpha": 64}


def test_another_score_has_a_map_of_its_own(sweep: Path, capsys):
    assert cli.main(["robustness", str(sweep), "--score", "faithfulness.follows"]) == 0
    assert "100.0 (no interval)" in capsys.readouterr().out
    assert (sweep / "robustness-faithfulness.follows.svg").is_file()
    with pytest.raises(
        VipLlavaError, match=r"no score marks.moved; it has marks.kept, faithfulness.follows$"
    ):
        read_grids(sweep, "marks.moved")


def test_a_start_that_failed_hides_what_an_earlier_one_left(sweep: Path):
    log = sweep / "shape=arrow" / "evaluate.log"
    log.write_text(log.read_text() + LOG.format("ERROR", "holds answers with other settings"))
    failures = {cell.folder: cell.failure for cell in read_grids(sweep)[0].cells}
    assert failures["shape=arrow"] == "holds answers with other settings"
    log.write_text(log.read_text() + LOG.format("INFO", "written"))
    assert len(read_grids(sweep)[0].scored) == 3


def test_a_map_for_each_benchmark_and_each_checkpoint(tmp_path: Path):
    for number, model in enumerate("ab"):
        for jitter in (0.1, 0.2):
            job(tmp_path, {"jitter": jitter}, 0.5 + number / 4, f"checkpoint={model}")
    grids = {grid.name: grid.scored for grid in read_grids(tmp_path)}
    assert grids == {"regions, checkpoint=a": [0.5, 0.5], "regions, checkpoint=b": [0.75, 0.75]}
    # Two benchmarks in one job have a folder each in the job's.
    place = job(tmp_path / "several", {"jitter": 0.1}, None)
    for bench in ("v7w", "pointqa"):
        (place / bench).mkdir()
        text = json.dumps({"bench": bench, "marks": {"kept": {"score": 1.0}}})
        (place / bench / "metrics.json").write_text(text)
    job(tmp_path / "several", {"jitter": 0.2}, None)
    found = {grid.name: [c.failure for c in grid.cells] for grid in read_grids(place.parent)}
    missing = "no metrics.json: it still runs, or was killed"
    assert found == {"pointqa": [None, missing], "v7w": [None, missing]}
    assert [cell.note for cell in read_grids(place.parent)[0].cells][1] == "unfinished"
    # A job that has failed in one of them has not in the other.
    (place / "v7w" / "metrics.json").unlink()
    (place / "evaluate.log").write_text(LOG.format("ERROR", "no questions"))
    shutil.rmtree(place.parent / "jitter=0.2")
    found = {grid.name: [c.failure for c in grid.cells] for grid in read_grids(place.parent)}
    assert found == {"pointqa": [None]}


def test_rows_and_columns():
    shapes = [{"shape": shape} for shape in ("arrow", "point", "mask")]
    changed: list[dict[str, Any]] = [{}, {"width": 1}, {"alpha": 9}, {"jpeg_quality": 5}]
    one_each = [shape | more for shape in shapes for more in changed]
    assert lay_out(one_each) == (["shape"], ["width", "alpha", "jpeg_quality"])
    every = [
        {"width": w, "alpha": a, "jitter": j} for w in (1, 2) for a in (1, 2, 3) for j in (0, 1)
    ]
    assert lay_out(every) == (["alpha"], ["width", "jitter"])
    assert lay_out([{"alpha": 1}, {"alpha": 2}]) == ([], ["alpha"])


def test_what_is_no_grid(tmp_path: Path):
    with pytest.raises(VipLlavaError, match="holds no jobs"):
        read_grids(tmp_path)
    job(tmp_path, {}, 0.5)
    with pytest.raises(
        VipLlavaError, match=r"nothing is perturbed in the jobs below .* -m hydra/s"
    ):
        read_grids(tmp_path)


def test_a_sweep_draws_its_map_as_its_jobs_end(sweep: Path, capsys):
    def end(mode: RunMode, differs: str) -> str:
        hydra = {"mode": mode, "job": {"override_dirname": differs}, "sweep": {"dir": str(sweep)}}
        DrawHeatMap().on_job_end(OmegaConf.create({"hydra": hydra}), job_return=None)
        return capsys.readouterr().out

    assert end(RunMode.RUN, "perturb.alpha=64") == ""
    assert end(RunMode.MULTIRUN, "seed=1") == ""
    assert not (sweep / "robustness.html").exists()
    assert "mean of 3 cells 70.8" in end(RunMode.MULTIRUN, "perturb.alpha=64")
    assert (sweep / "robustness.html").is_file()
    metrics = sweep / "shape=arrow" / "metrics.json"
    metrics.write_text("{")
    said = end(RunMode.MULTIRUN, "perturb.alpha=64")
    assert said.startswith(f"no heat map: {metrics} cannot be read (")


@pytest.mark.slow
def test_a_real_sweep_with_a_cell_that_cannot_run(tmp_path: Path, tiny_sources: Any):
    sources = (tiny_sources.vision_tower, tiny_sources.language_model)
    model = ModelSpec(*sources, (-1, -2, 1), "llava_v1", 28)
    tokenizer = load_tokenizer(model)
    save_export(build_model(model, tokenizer, seed=1), tokenizer, tmp_path / "m", tiny_model.META)
    asked = {"bboxes": [[5, 5, 60, 40]], "conversations": said("<image>\nWhat is <bbox0>?", "cup")}
    records = [
        (f"a{n}", {"id": n, "image": "x"} | asked, encode_picture(), "jpg") for n in range(6)
    ]
    write_shards(records, tmp_path / "data" / "my_data")
    manifest = {"schema_version": 2, "name": "mine", "stage": "task", "licence": "mine"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(manifest | {"shards": "my_data/*.tar"}))
    words = ["-m", "bench.manifest=mine.yaml", "checkpoint=m", "marks=kept", "max_new_tokens=2"]
    words += ["device=cpu", "name=grid", "perturb.alpha=64,0", "perturb={},{jpeg_quality:9}"]

    def evaluate() -> Any:
        return preloaded.run(
            [sys.executable, "-m", "vipllava.cli", "evaluate", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(CONFIG_DIR.parent), "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            nested=True,
        )

    done = evaluate()
    assert done.returncode == 2
    assert re.search(r"error: job 2 of the sweep \(.*perturb.alpha=0, perturb={}", done.stderr)
    folder = tmp_path / "runs" / "sweeps" / "grid"
    (grid,) = read_grids(folder)
    assert [(cell.perturb["alpha"], cell.num_items) for cell in grid.cells[:2]] == [(64, 6)] * 2
    assert [cell.note for cell in grid.cells[2:]] == ["failed"] * 2
    assert "perturb.alpha=0: expected a whole number from 1 to 255" in str(grid.cells[2].failure)
    assert (folder / "robustness.svg").read_text().count(">failed</text>") == 2
    settings = json.loads((folder / grid.cells[0].folder / "settings.json").read_text())
    assert settings["perturb"] == {**dict.fromkeys(KEYS), **grid.cells[0].perturb}
    rows = [(folder / cell.folder / "predictions.jsonl").read_text() for cell in grid.cells[:2]]
    assert evaluate().returncode == 2
    (again,) = read_grids(folder)
    assert again == grid
    assert rows == [(folder / c.folder / "predictions.jsonl").read_text() for c in again.cells[:2]]
