"""train.py where a machine lacks something: disk, shared memory, a home, letters."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.toy_data import toy_samples
from vipllava.shards.tars import write_shards

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 4


def _can(*command: str) -> bool:
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0


own_mounts = pytest.mark.skipif(
    not _can("unshare", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /dev/shm"),
    reason="mounting needs rights",
)
own_users = pytest.mark.skipif(
    not _can("unshare", "--user", "--map-user=12345"), reason="no user namespaces here"
)


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_shards(toy_samples(16), root / "mine", max_samples=8)
    (root / "mine.yaml").write_text(
        "schema_version: 2\nname: mine\nstage: pretrain\nlicence: für 名\nshards: mine/*.tar\n",
        encoding="utf-8",
    )
    return root


def command(data_root: Path, runs: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "train.py"), "stage=pretrain", "model=tiny", "trainer=cpu"),
        *(f"data.manifest={data_root / 'mine.yaml'}", f"paths.data_root={data_root}"),
        *(f"paths.runs={runs}", f"paths.manifests={ROOT / 'data_manifests'}", "name=run"),
        *("stage.global_batch_size=8", "machine.micro_batch_size=4", "stage.epochs=2"),
        *("stage.checkpoint_steps=2", "machine.num_workers=0", "callbacks=quiet", *more),
    ]


def run(arguments: list[str], cwd: Path, **variables: str | None) -> subprocess.CompletedProcess:
    changed = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    kept = {name: value for name, value in os.environ.items() if name not in changed}
    return subprocess.run(
        arguments,
        cwd=cwd,
        env=kept | {name: value for name, value in changed.items() if value is not None},
        capture_output=True,
        timeout=300,
        check=False,
    )


def on_small_disk(kilobytes: int, place: Path, arguments: list[str]) -> list[str]:
    """Mount a small disk for a command and its children alone, and list what they left on it."""
    script = (
        f"mount -t tmpfs -o size={kilobytes}k tmpfs {shlex.quote(str(place))} || exit 99\n"
        f"{shlex.join(arguments)}; code=$?\n"
        f"find {shlex.quote(str(place))} -type f; exit $code"
    )
    return ["unshare", "--mount", "sh", "-c", script]


def readable(done: subprocess.CompletedProcess) -> str:
    """Return the one error that a command ended with."""
    errors = done.stderr.decode("utf-8", "replace")
    assert done.returncode == 2, errors[-3000:]
    assert "Traceback" not in errors
    found = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(found) == 1, errors[-3000:]
    return found[0].removeprefix("error: ")


@own_mounts
@pytest.mark.parametrize(
    ("kilobytes", "what"),
    [
        (52, "no space is left on the device: free some"),
        pytest.param(64, "(0.0 MB free): no space is left", marks=pytest.mark.slow, id="samples"),
        pytest.param(12_000, "could not be written", marks=pytest.mark.slow, id="export"),
        pytest.param(
            19_800, "projector could not be written", marks=pytest.mark.slow, id="projector"
        ),
    ],
)
def test_a_full_disk_is_one_error_and_no_half_file(
    data_root: Path, tmp_path: Path, kilobytes: int, what: str
):
    done = run(on_small_disk(kilobytes, tmp_path, command(data_root, tmp_path)), tmp_path)
    assert what in readable(done)
    left = [Path(line).name for line in done.stdout.decode().splitlines() if line.startswith("/")]
    assert "train.log" in left
    assert [name for name in left if name.endswith((".part", ".partial", ".unfinished"))] == []
    assert ("environment.json" in left) is (kilobytes > 52)


def test_a_file_that_may_not_be_so_large_is_one_error(data_root: Path, tmp_path: Path):
    """As a full disk while the model is exported; needs no rights."""
    limited = ["bash", "-c", 'ulimit -f 3000; exec "$@"', "limited"]
    done = run([*limited, *command(data_root, tmp_path / "runs")], tmp_path)
    assert f"{tmp_path / 'runs' / 'run' / 'export'} could not be" in readable(done)
    left = sorted(path.name for path in (tmp_path / "runs" / "run").iterdir())
    assert [name for name in left if name.startswith((".export", "export"))] == []
    assert (tmp_path / "runs" / "run" / "checkpoints" / "000004.ckpt").is_file()


@own_mounts
def test_small_shared_memory_is_told_at_the_start_and_as_the_end(data_root: Path, tmp_path: Path):
    started = command(data_root, tmp_path / "runs", "machine.num_workers=2")
    mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 99\nexec "
    done = run(["unshare", "--mount", "sh", "-c", mount + shlex.join(started)], tmp_path)
    assert readable(done).startswith("shared memory ran out: a loader process found no room in ")
    said = (tmp_path / "runs" / "run" / "train.log").read_text(encoding="utf-8")
    assert "/dev/shm has 0.1 MB free, and batches in flight take 1.2 MB (1 processes x " in said


def test_without_home_and_letters_a_run_comes_to_its_end(data_root: Path, tmp_path: Path):
    done = run(
        command(data_root, tmp_path / "runs", "callbacks=default"),
        tmp_path,
        HOME="/proc/nowhere",
        LC_ALL="C",
        PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
        PYTHONIOENCODING="ascii",
    )
    errors = done.stderr.decode("ascii")
    assert done.returncode == 0, errors[-3000:]
    assert "Logging error" not in errors
    run_dir = tmp_path / "runs" / "run"
    with (run_dir / "csv" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == NUM_STEPS
    about = json.loads((run_dir / "export" / "vipllava.json").read_text(encoding="utf-8"))
    assert about["data"] == ["mine: für 名"]
    assert "für 名" in (run_dir / "export" / "README.md").read_text(encoding="utf-8")


@own_users
def test_a_user_without_any_home_is_told_what_to_set(data_root: Path, tmp_path: Path):
    nobody = ["unshare", "--user", "--map-user=12345"]
    started = [*nobody, *command(data_root, tmp_path / "runs")]
    done = run(started, tmp_path, HOME=None, USER=None, LOGNAME=None)
    errors = done.stderr.decode()
    assert done.returncode == 2
    assert errors.startswith("error: this configuration cannot run: 1 problem\n")
    assert "this user has no home folder, neither by HOME nor by the system: set HOME" in errors
    assert "Traceback" not in errors
    doctor = [*nobody, sys.executable, "-m", "vipllava.cli", "doctor", "--no-network", "--json"]
    told = run(doctor, tmp_path, HOME=None, USER=None, LOGNAME=None)
    assert told.returncode == 1, told.stderr
    rows = json.loads(told.stdout)["sections"]["Environment"]
    found = [(row["value"], row["status"]) for row in rows if row["name"] == "home"]
    assert found == [("none", "problem")]
