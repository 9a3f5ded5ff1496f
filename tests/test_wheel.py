"""What `pip install` brings, without the repository: built, installed, used in an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from vipllava.sample_world.build import ensure_sample_world

ROOT = Path(__file__).resolve().parent.parent
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
OFFLINE = ("--no-deps", "--no-index")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: an older build beside the sources would be packed, too."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "*.pyi")
    for name in ("vipllava", "conf", "data_manifests"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    command = [*PIP, "wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", place, source]
    subprocess.run(command, check=True)
    (built,) = place.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what the wheel installs; the packages it needs are those of the tests."""
    place = tmp_path_factory.mktemp("installed")
    subprocess.run([*PIP, "install", *OFFLINE, "--target", place, wheel], check=True)
    return place


def vipllava(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(installed / "bin" / "vipllava"), *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(installed), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_file_travels(wheel: Path):
    carried = set(ZipFile(wheel).namelist())
    own = [p for name in ("conf", "data_manifests") for p in (ROOT / name).rglob("*")]
    made = ("__pycache__", ".pyi")  # by Python, and by Gradio of its components
    package = [p for p in (ROOT / "vipllava").rglob("*") if not {p.parent.name, p.suffix} & {*made}]
    wanted = {f"vipllava/_{path.relative_to(ROOT).as_posix()}" for path in own if path.is_file()}
    wanted |= {path.relative_to(ROOT).as_posix() for path in package if path.is_file()}
    assert len(wanted) > 200
    assert wanted - carried == set()
    others = {name.partition("/")[0] for name in carried - wanted}
    assert others == {f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}


def test_an_empty_folder_is_enough_to_compose(installed: Path, tmp_path: Path):
    shown = vipllava(installed, tmp_path, "--help")
    assert "Usage: vipllava" in shown.stdout, shown.stderr
    job = vipllava(installed, tmp_path, "train", "stage=pretrain", "--cfg", "job", "--resolve")
    assert f"manifests: {installed / 'vipllava' / '_data_manifests'}" in job.stdout, job.stderr
    known = vipllava(installed, tmp_path, "data", "show", "v7w_test")
    assert "Visual7W" in known.stdout, known.stderr
    assert list(tmp_path.iterdir()) == []


def test_two_steps_are_trained_from_it_and_evaluated(installed: Path, tmp_path: Path):
    ensure_sample_world(tmp_path / "data", scale=0.01)
    job = ["experiment=quickstart", "trainer=cpu", "trainer.max_steps=2"]
    small = ["stage.global_batch_size=8", "machine.micro_batch_size=4", "data.num_workers=0"]
    done = vipllava(installed, tmp_path, "train", *job, *small)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = tmp_path / "runs" / "quickstart"
    assert (runs / "tiny-pretrain" / "export" / "model.safetensors").is_file()
    assert str(ROOT) not in (runs / "tiny-pretrain" / "train.log").read_text()
    checkpoint = f"checkpoint={runs / 'tiny-pretrain' / 'export'}"
    done = vipllava(
        installed, tmp_path, "evaluate", checkpoint, "limit=2", f"paths.runs={runs}", "device=cpu"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (runs / "eval" / "tiny-pretrain" / "regions" / "metrics.json").is_file()
