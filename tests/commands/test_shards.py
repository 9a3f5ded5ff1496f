"""``vipllava shards``: its arguments, tables and exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.files.file_server import run_server
from tests.toy_data import encode_picture, said
from vipllava.commands import shards
from vipllava.ingest.building.shard_build import BuildError
from vipllava.types import ConfigError

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


def run(*words: str) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=200)
    code = shards.run(words, console)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


def settings(place: Path, *more: str) -> list[str]:
    return [f"data_root={place}", f"manifests={place / 'manifests'}", "manifest=toy", *more]


def build(place: Path, *more: str) -> tuple[int, str]:
    return run("build", *settings(place, "num_workers=0", "max_samples=3", *more))


def test_build_says_what_was_made(place: Path):
    (place / "pictures/1.jpg").write_bytes(encode_picture(fmt="PNG"))
    code, text = build(place)
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


def test_build_fails_unless_told_otherwise(place: Path):
    (place / "pictures/1.jpg").unlink()
    with pytest.raises(BuildError, match="1 of 3 records read cannot be used"):
        build(place)
    with pytest.raises(BuildError):
        build(place, "max_bad_rate=0.1")
    code, text = build(place, "allow=all", f"output={place / 'elsewhere'}")
    assert code == 0
    assert re.search("rejected +1: image-missing 1; listed in rejected.jsonl", text)
    code, _ = build(place, "max_bad_rate=0.15")
    assert code == 0


def test_a_manifest_of_ones_own_is_a_path(place: Path):
    own = place / "manifests/toy.yaml"
    assert run("build", f"data_root={place}", f"manifest={own}", "num_workers=0")[0] == 0


def test_build_says_what_the_manifest_lacks(place: Path):
    code, text = build(place, f"output={place / 'elsewhere'}")
    assert code == 0
    lines = "shards: elsewhere/shard-*.tar\nnum_samples: 7\n"
    assert text.endswith(f"lines for the manifest:\n{lines}")
    own = MANIFEST.replace("shards: toy/*.tar\n", lines)
    (place / "manifests/toy.yaml").write_text(own)
    assert run("verify", *settings(place, "num_workers=0"))[0] == 0
    _, text = build(place)
    assert "lines for the manifest" not in text


def test_bars_are_drawn_on_a_terminal_only(place: Path, capfd: pytest.CaptureFixture[str]):
    build(place)
    run("verify", *settings(place, "num_workers=0"))
    assert capfd.readouterr().err == ""
    script = "import sys; from vipllava.commands.shards import run; sys.exit(run(sys.argv[1:]))"
    shown, terminal = os.openpty()
    try:
        words = [*settings(place), "num_workers=0", f"output={place / 'seen'}"]
        command = [sys.executable, "-c", script, "build", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
        subprocess.run(
            command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL,
            stderr=terminal,
        )  # fmt: skip
        assert b"7 of 7 records" in os.read(shown, 1 << 16)
    finally:
        os.close(shown)
        os.close(terminal)


def test_tars_at_an_address(place: Path):
    build(place)
    with run_server() as server:
        for path in (place / "toy").iterdir():
            server.serve(f"toy/{path.name}", path.read_bytes())
        (place / "manifests/toy.yaml").write_text(
            MANIFEST.replace("toy/*.tar", "toy/shard-{000000..000002}.tar")
        )
        words = [f"data_root={server.address}", *settings(place)[1:], f"cache={place / 'cache'}"]
        for num_workers in (0, 2):
            code, text = run("verify", *words, f"num_workers={num_workers}", "decode=true")
            assert code == 0
            assert re.search("whole samples +7", text)
        code, text = run("stats", *words)
        assert "image_level 6, text_only 1" in text
        assert re.search(r"size of a tar .* kB", text)
        assert len(server.asked("toy/shard-000000.tar")) == 1


def test_index(place: Path):
    build(place)
    indices = sorted((place / "toy").glob("*.index.npz"))
    contents = [path.read_bytes() for path in indices]
    for path in indices:
        path.unlink()
    one = place / "toy/shard-000001.tar"
    assert run("index", str(one), "num_workers=0") == (0, "1 tars indexed, 3 samples\n")
    assert run("index", str(place / "toy"), "num_workers=0") == (0, "3 tars indexed, 7 samples\n")
    assert [path.read_bytes() for path in indices] == contents
    one.write_bytes(one.read_bytes()[:3000])
    code, text = run("index", str(place / "toy"), "num_workers=0")
    assert code == 1
    assert text.startswith("2 tars indexed, 4 samples\n- ")
    assert "shard-000001.tar is not a whole tar" in text


def test_verify(place: Path):
    build(place)
    code, text = run("verify", *settings(place, "num_workers=0"))
    assert code == 0
    assert re.search("whole samples +7", text)
    assert re.search("damage +none", text)
    tar = place / "toy/shard-000001.tar"
    with tarfile.open(tar) as file:
        offset = file.getmember("r5-5.jpg").offset_data
    data = bytearray(tar.read_bytes())
    data[offset + 5] ^= 1
    tar.write_bytes(data)
    report = place / "report.json"
    code, text = run("verify", *settings(place, "num_workers=0", f"json={report}"))
    assert code == 1
    assert re.search("damage +1", text)
    assert "r5-5" in text
    assert [row["key"] for row in json.loads(report.read_text())["damages"]] == ["r5-5"]


def test_long_lists_of_damage_are_cut_in_the_table(place: Path):
    build(place)
    (place / "manifests/toy.yaml").write_text(
        MANIFEST.replace("toy/*.tar", "toy/shard-{000000..000029}.tar")
    )
    code, text = run("verify", *settings(place, "num_workers=0"))
    assert code == 1
    assert re.search("damage +27", text)
    assert "and 7 more: json=FILE lists them all" in text


def test_json_instead_of_the_table(place: Path, capsys: pytest.CaptureFixture[str]):
    build(place)
    code, text = run("verify", *settings(place, "num_workers=0", "json=-"))
    assert (code, text) == (0, "")
    assert json.loads(capsys.readouterr().out)["num_samples"] == 7


def test_stats(place: Path):
    build(place)
    report = place / "stats.json"
    code, text = run("stats", *settings(place, f"json={report}"))
    assert code == 0
    assert "7, 1 text only (14.3 %)" in text
    assert "image_level 6, text_only 1" in text
    assert re.search(r"picture width +.* 64 ", text)
    content = json.loads(report.read_text())
    assert content["kinds_from"] == "build"
    assert content["picture_shapes"]["landscape"] == 6
    (place / "toy/build.json").unlink()
    code, text = run("stats", *settings(place, "records=2"))
    assert "(estimated from 2 records; records=all counts)" in text


@pytest.mark.parametrize("words", [(), ("--help",), ("build", "--help"), ("index", "-h")])
def test_help(words: tuple[str, ...]):
    code, text = run(*words)
    assert code == 0
    assert "vipllava shards" in text
    if not words or words[0] == "build":
        assert "max_bad_rate=" in text
    if words[:1] == ("index",):
        assert "vipllava shards index PATH ..." in text
        assert "max_bad_rate" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("make",), "shards make: no such command; known: build, index, verify, stats"),
        (("build",), "manifest is missing"),
        (("build", "toy"), "`toy`: not NAME=VALUE"),
        (("build", "max_samples=0"), "max_samples=0: expected a number from 1"),
        (("build", "max_bad_rate=2"), "max_bad_rate=2: expected a share from 0 to 1"),
        (("build", "max_bad_rate=x"), "expected a share from 0 to 1"),
        (("build", "allow=some"), "allow=some: expected all"),
        (("build", "max_sample=3"), "did you mean max_samples"),
        (("verify", "cache_gb=0"), "cache_gb=0: expected gigabytes"),
        (("index",), "name tars or folders"),
        (("index", "num_workers=1"), "name tars or folders"),
    ],
)
def test_arguments_that_cannot_be_used(words: tuple[str, ...], message: str):
    with pytest.raises(ConfigError, match=message):
        run(*words)


def test_an_empty_folder_has_nothing_to_index(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no"):
        run("index", str(tmp_path))


def test_help_imports_nothing_heavy():
    script = (
        "import sys\n"
        "from vipllava.commands.shards import run\n"
        "run(['index', '--help'])\n"
        "heavy = {'torch', 'lightning', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
