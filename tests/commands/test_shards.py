"""``vipllava shards``: its arguments, tables and exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from tests import preloaded
from tests.files.file_server import run_server
from tests.toy_data import encode_picture, said
from vipllava import cli
from vipllava.commands import shards
from vipllava.ingest.building.shard_build import MAX_BAD_RATE, MAX_SAMPLES
from vipllava.ingest.check.stats import NUM_RECORDS

ALONE = ("--num-workers", "0")
ROOT = Path(__file__).resolve().parents[2]
MANIFEST = """\
schema_version: 2
name: toy
stage: task
licence: none
shards: toy/*.tar
annotation_file: list.json
image_roots: [pictures]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root with a manifest, a list of seven records and their pictures."""
    monkeypatch.setenv("VIPLLAVA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests/toy.yaml").write_text(MANIFEST)
    (tmp_path / "pictures").mkdir()
    records: list[dict[str, Any]] = []
    for number in range(7):
        records.append({"id": f"r{number}", "conversations": said("Q?", "A.")})
        if number != 3:
            records[-1]["image"] = f"{number}.jpg"
            (tmp_path / f"pictures/{number}.jpg").write_bytes(encode_picture(seed=number))
    (tmp_path / "list.json").write_text(json.dumps(records))
    return tmp_path


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command; returns its code and what it printed."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> tuple[int, str]:
        code = cli.main(["shards", *words])
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return run


def options(place: Path, *more: str) -> list[str]:
    return ["toy", "--data-root", str(place), "--manifests", str(place / "manifests"), *more]


def settings(place: Path, *more: str) -> list[str]:
    return options(place, *ALONE, *more)


@pytest.fixture
def build(place: Path, run: Run) -> Run:
    """Build the place's data set."""
    return lambda *more: run("build", *settings(place, "--max-samples", "3", *more))


def test_build_says_what_was_made(place: Path, run: Run, build: Run):
    (place / "pictures/1.jpg").write_bytes(encode_picture(fmt="PNG"))
    code, text = build()
    assert code == 0
    for line in (
        "samples +7 of 7 records",
        "text only +1",
        "tars +3, ",
        "kinds +image_level 6, text_only 1",
        "pictures changed +jpg is png 1",
    ):
        assert re.search(line, text)
    assert "rejected" not in text
    assert len(list((place / "toy").glob("*.tar"))) == 3


def test_build_fails_unless_told_otherwise(place: Path, run: Run, build: Run):
    (place / "pictures/1.jpg").unlink()
    code, text = build()
    assert code == 2
    assert "1 of 3 records read cannot be used" in text
    assert build("--max-bad-rate", "0.1")[0] == 2
    code, text = build("--max-bad-rate", "1", "--output", str(place / "elsewhere"))
    assert code == 0
    assert re.search("rejected +1: image-missing 1; listed in rejected.jsonl", text)
    code, _ = build("--max-bad-rate", "0.15")
    assert code == 0


def test_a_manifest_of_ones_own_is_a_path(place: Path, run: Run, build: Run):
    own = place / "manifests/toy.yaml"
    assert run("build", str(own), "--data-root", str(place), *ALONE)[0] == 0


def test_build_says_what_the_manifest_lacks(place: Path, run: Run, build: Run):
    code, text = build("--output", str(place / "elsewhere"))
    assert code == 0
    lines = "shards: elsewhere/shard-*.tar\nnum_samples: 7\n"
    assert text.endswith(f"lines for the manifest:\n{lines}")
    own = MANIFEST.replace("shards: toy/*.tar\n", lines)
    (place / "manifests/toy.yaml").write_text(own)
    assert run("verify", *settings(place))[0] == 0
    _, text = build()
    assert "lines for the manifest" not in text


def test_bars_are_drawn_on_a_terminal_only(place: Path, capfd: pytest.CaptureFixture[str]):
    for command in ("build", "verify"):
        assert cli.main(["shards", command, *settings(place)]) == 0
        assert capfd.readouterr().err == ""
    shown, terminal = os.openpty()
    try:
        words = [*settings(place), "--output", str(place / "seen")]
        command = [sys.executable, "-m", "vipllava.cli", "shards", "build", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
        preloaded.run(
            command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL,
            stderr=terminal,
        )  # fmt: skip
        assert b"7 of 7 records" in os.read(shown, 1 << 16)
    finally:
        os.close(shown)
        os.close(terminal)


def test_tars_at_an_address(place: Path, run: Run, build: Run):
    build()
    with run_server() as server:
        for path in (place / "toy").iterdir():
            server.serve(f"toy/{path.name}", path.read_bytes())
        (place / "manifests/toy.yaml").write_text(
            MANIFEST.replace("toy/*.tar", "toy/shard-{000000..000002}.tar")
        )
        words = ["toy", "--data-root", server.address, "--manifests", str(place / "manifests")]
        for num_workers in ("0", "2"):
            code, text = run("verify", *words, "--num-workers", num_workers, "--decode")
            assert code == 0
            assert re.search("whole samples +7", text)
        code, text = run("stats", *words)
        assert "image_level 6, text_only 1" in text
        assert re.search(r"size of a tar .* kB", text)
        assert len(server.asked("toy/shard-000000.tar")) == 1


def test_index(place: Path, run: Run, build: Run):
    build()
    indices = sorted((place / "toy").glob("*.index.npz"))
    contents = [path.read_bytes() for path in indices]
    for path in indices:
        path.unlink()
    one = place / "toy/shard-000001.tar"
    assert run("index", str(one), *ALONE) == (0, "1 tars indexed, 3 samples\n")
    assert run("index", str(place / "toy"), *ALONE) == (0, "3 tars indexed, 7 samples\n")
    assert [path.read_bytes() for path in indices] == contents
    one.write_bytes(one.read_bytes()[:3000])
    code, text = run("index", str(place / "toy"), *ALONE)
    assert code == 1
    assert text.startswith("2 tars indexed, 4 samples\n- ")
    assert "shard-000001.tar is not a whole tar" in text


def test_verify(place: Path, run: Run, build: Run):
    build()
    code, text = run("verify", *settings(place))
    assert code == 0
    assert re.search("whole samples +7", text)
    assert re.search("damage +none", text)
    tar = place / "toy/shard-000001.tar"
    with tarfile.open(tar) as file:
        offset = file.getmember("r5-5.jpg").offset_data
    data = bytearray(tar.read_bytes())
    data[offset + 5] ^= 1
    tar.write_bytes(data)
    code, text = run("verify", *settings(place))
    assert code == 1
    assert re.search("damage +1", text)
    assert "r5-5" in text
    code, text = run("verify", *settings(place, "--json"))
    assert code == 1
    assert [row["key"] for row in json.loads(text)["damages"]] == ["r5-5"]


def test_long_lists_of_damage_are_cut_in_the_table(place: Path, run: Run, build: Run):
    build()
    (place / "manifests/toy.yaml").write_text(
        MANIFEST.replace("toy/*.tar", "toy/shard-{000000..000029}.tar")
    )
    code, text = run("verify", *settings(place))
    assert code == 1
    assert re.search("damage +27", text)
    assert "and 7 more: --json lists them all" in text


def test_stats(place: Path, run: Run, build: Run):
    build()
    code, text = run("stats", *options(place))
    assert code == 0
    assert "7, 1 text only (14.3 %)" in text
    assert "image_level 6, text_only 1" in text
    assert re.search(r"picture width +.* 64 ", text)
    content = json.loads(run("stats", *options(place, "--json"))[1])
    assert content["kinds_from"] == "build"
    assert content["image_shapes"]["landscape"] == 6
    (place / "toy/build.json").unlink()
    code, text = run("stats", *options(place, "--records", "2"))
    assert "(estimated from 2 records; --records all counts)" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("make",), "No such command 'make'"),
        (("build",), "Missing argument 'NAME'"),
        (("build", "manifest=toy"), "no manifest `manifest=toy`"),
        (("build", "toy", "--max-samples", "0"), "'--max-samples': Input should be greater than"),
        (("build", "toy", "--max-bad-rate", "2"), "'--max-bad-rate': Input should be less than"),
        (("build", "toy", "--max-bad-rate", "x"), "Invalid value for '--max-bad-rate'"),
        (("build", "toy", "--max-sample", "3"), "Possible options: --max-bad-rate, --max-samples"),
        (("verify", "toy", "--cache-gb", "0"), "Invalid value for '--cache-gb'"),
        (("index",), "Missing argument 'PATH..."),
        (("index", "--num-workers", "1"), "Missing argument 'PATH..."),
    ],
)
def test_arguments_that_cannot_be_used(run: Run, words: tuple[str, ...], message: str):
    code, text = run(*words)
    assert code == 2
    assert message in text


def test_an_empty_folder_has_nothing_to_index(tmp_path: Path, run: Run):
    code, text = run("index", str(tmp_path))
    assert code == 2
    assert "holds no *.tar" in text


def test_defaults_are_those_of_the_library():
    """They are spelt out because the library is slow to import."""
    build, stats = (signature(command).parameters for command in (shards.build, shards.stats))
    assert build["max_samples"].default == MAX_SAMPLES
    assert build["max_bad_rate"].default == MAX_BAD_RATE
    assert stats["records"].default == NUM_RECORDS
