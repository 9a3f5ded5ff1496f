from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.files.file_server import run_server
from tests.ingest.fetch.test_unpacking import make_zip
from tests.toy_data import encode_picture, toy_samples
from vipllava.commands.data import run
from vipllava.shards.tars import write_shards
from vipllava.types import ConfigError, VipLlavaError

MANIFEST = """
schema_version: 2
name: toy
stage: finetune
licence: CC0 [as stated]
shards: toy/*.tar
annotation_file: toy.json
image_roots: [coco/train]
approximate_samples: 2
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A data root, and a folder of manifests in it."""
    (tmp_path / "manifests").mkdir()
    write(tmp_path, MANIFEST)
    return tmp_path


def write(place: Path, text: str, name: str = "toy") -> None:
    (place / "manifests" / f"{name}.yaml").write_text(text)


def call(place: Path, *words: str) -> tuple[int, str]:
    out = io.StringIO()
    folders = (f"data_root={place}", f"manifests={place / 'manifests'}")
    return run([*words, *folders], Console(file=out, width=200)), out.getvalue()


def write_pictures(place: Path) -> None:
    (place / "coco/train").mkdir(parents=True)
    (place / "coco/train/1.jpg").write_bytes(encode_picture())
    records = [{"id": "1", "image": "coco/train/1.jpg"}, {"id": "2", "conversations": []}]
    (place / "toy.json").write_text(json.dumps(records))


def test_list(place: Path) -> None:
    write(place, MANIFEST.replace("name: toy", "name: two"), "two")
    write_shards(toy_samples(10), place / "toy", max_samples=4)
    code, shown = call(place, "list")
    assert code == 0
    rows = [line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["toy", "finetune", "by their id", "about 2", "3 tars"],
        ["two", "finetune", "by their id", "about 2", "3 tars"],
    ]


def test_list_as_json(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = call(place, "list", "json=-")
    assert (code, shown) == (0, "")
    listed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in listed["manifests"]] == ["toy"]


def test_a_bad_manifest_does_not_hide_the_others(place: Path) -> None:
    write(place, "name: bad", "bad")
    out = io.StringIO()
    with pytest.raises(ConfigError, match=r"bad\.yaml is not a valid manifest"):
        run(["list", f"manifests={place / 'manifests'}"], Console(file=out, width=200))
    assert "toy" in out.getvalue()


def test_list_of_the_shipped_ones(tmp_path: Path) -> None:
    out = io.StringIO()
    assert run(["list", f"data_root={tmp_path}"], Console(file=out, width=80)) == 0
    assert "vip_llava_region_520k" in out.getvalue()  # names are never cut


def test_show(place: Path) -> None:
    source = """
sources:
  - {name: VCR, what: films, access: form, address: https://vcr.example/form, licence: own,
     files: [{file: vcr.zip, into: vcr1images, unpack: .}]}
"""
    write(place, MANIFEST + source)
    code, shown = call(place, "show", "toy")
    assert code == 0
    for words in ("CC0 [as stated]", "toy/*.tar", "coco/train", "from VCR", "ask by a form",
                  "https://vcr.example/form", "vcr1images"):  # fmt: skip
        assert words in shown


def test_check_says_what_is_there_and_what_is_not(place: Path) -> None:
    write_pictures(place)
    code, shown = call(place, "check", "toy", f"json={place / 'found.json'}")
    assert code == 1
    assert "1 of 1 that were looked at are good" in shown
    assert "-> vipllava shards build manifest=toy" in shown
    found = json.loads((place / "found.json").read_text())
    assert found["schema_version"] == 1
    assert [finding["status"] for finding in found["findings"]] == ["ok", "ok", "missing"]
    assert found["ok"] is False
    code, _ = call(place, "check", "toy", "parts=annotations,pictures", "pictures=all")
    assert code == 0
    write_shards(toy_samples(10), place / "toy", max_samples=4)
    assert call(place, "check", "toy")[0] == 0


def test_fetch_then_check(place: Path, tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"train/1.jpg": encode_picture()}).read_bytes()
    records = json.dumps([{"id": "1", "image": "coco/train/1.jpg"}, {"id": "2"}]).encode()
    with run_server() as server:
        sources: list[dict[str, Any]] = [
            {
                "name": "lists",
                "what": "records",
                "files": [{"url": server.serve("toy.json", records), "into": "."}],
            },
            {
                "name": "COCO",
                "what": "pictures",
                "files": [
                    {"url": server.serve("t.zip", archive), "into": "coco/train", "unpack": "train"}
                ],
            },
        ]
        write(place, f"{MANIFEST}sources: {json.dumps(sources)}")
        code, shown = call(place, "fetch", "toy", f"json={place / 'fetched.json'}")
        assert code == 0
        assert shown.count("fetched") == 2
        assert "licence: CC0 [as stated]" in shown
        assert json.loads((place / "fetched.json").read_text())["ok"] is True
        assert call(place, "check", "toy", "parts=annotations,pictures")[0] == 0
        sources[0]["files"][0]["url"] = server.url("gone.json")
        write(place, f"{MANIFEST}sources: {json.dumps(sources)}")
        code, shown = call(place, "fetch", "toy")
        assert code == 1
        assert f"lists, gone.json: {server.url('gone.json')}: the server answered 404" in shown


def test_a_manifest_by_its_path(place: Path) -> None:
    write_pictures(place)
    path = place / "manifests" / "toy.yaml"
    code, _ = call(place, "check", str(path), "parts=pictures")
    assert code == 0


def test_sample_data_are_made(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "vipllava.sample_world.build.ensure_sample_world", lambda root: root / "sample_world-v1"
    )
    write(place, MANIFEST + "made_by: sample_world\n")
    code, shown = call(place, "fetch", "toy")
    assert code == 0
    assert f"toy is made, not fetched: {place / 'sample_world-v1'}" in shown


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    assert run([], Console(file=out, width=100)) == 0
    assert run(["check", "--help"], Console(file=out, width=100)) == 0
    shown = out.getvalue()
    for words in ("vipllava data list", "vipllava data fetch NAME", "pictures=", "keep_archives="):
        assert words in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lits"], "data lits: no such command; known: list, show, check, fetch"),
        (["show"], "NAME is missing"),
        (["check", "toy", "picture=3"], "did you mean pictures"),
        (["check", "toy", "parts=tars"], "parts has tars; known"),
        (["show", "other"], "no manifest `other`"),
        (["fetch", "toy"], "`toy` names no sources"),
        (["list", "json=/nowhere/x.json"], "cannot be written"),
    ],
)
def test_mistakes_are_named(place: Path, words: list[str], message: str) -> None:
    with pytest.raises(VipLlavaError, match=message):
        call(place, *words)
    with pytest.raises(VipLlavaError, match="holds no manifests"):
        run(["list", f"manifests={place / 'coco'}"])
