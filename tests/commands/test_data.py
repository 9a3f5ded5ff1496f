from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.files.file_server import run_server
from tests.ingest.fetch.test_unpacking import make_zip
from tests.toy_data import encode_picture, toy_samples
from vipllava import cli
from vipllava.commands import data
from vipllava.ingest.check.availability import NUM_IMAGES, PARTS
from vipllava.shards.tars import write_shards

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


@pytest.fixture
def call(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """Run a command on the place; returns its code and what it printed."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("VIPLLAVA_DATA", str(place))

    def run(*words: str) -> tuple[int, str]:
        code = cli.main(["data", *words, "--manifests", str(place / "manifests")])
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return run


Call = Callable[..., tuple[int, str]]


def write_pictures(place: Path) -> None:
    (place / "coco/train").mkdir(parents=True)
    (place / "coco/train/1.jpg").write_bytes(encode_picture())
    records = [{"id": "1", "image": "coco/train/1.jpg"}, {"id": "2", "conversations": []}]
    (place / "toy.json").write_text(json.dumps(records))


def test_list(place: Path, call: Call) -> None:
    write(place, MANIFEST.replace("name: toy", "name: two"), "two")
    write_shards(toy_samples(10), place / "toy", max_samples=4)
    code, shown = call("list")
    assert code == 0
    rows = [line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["toy", "finetune", "by their id", "about 2", "3 tars"],
        ["two", "finetune", "by their id", "about 2", "3 tars"],
    ]


def test_list_as_json(call: Call) -> None:
    code, shown = call("list", "--json")
    assert code == 0
    listed = json.loads(shown)
    assert [row["name"] for row in listed["manifests"]] == ["toy"]


def test_a_bad_manifest_does_not_hide_the_others(place: Path, call: Call) -> None:
    write(place, "name: bad", "bad")
    code, shown = call("list")
    assert code == 2
    assert "bad.yaml is not a valid manifest" in shown
    assert "toy" in shown


def test_list_of_the_shipped_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "list", "--data-root", str(tmp_path)]) == 0
    assert "vip_llava_region_520k" in capsys.readouterr().out  # names are never cut
    (tmp_path / "data_manifests").mkdir()  # a folder of one's own comes first
    assert cli.main(["data", "list"]) == 2
    assert "--manifests data_manifests holds no manifests" in capsys.readouterr().err


def test_show(place: Path, call: Call) -> None:
    source = """
sources:
  - {name: VCR, what: films, access: form, address: https://vcr.example/form, licence: own,
     files: [{file: vcr.zip, into: vcr1images, unpack: .}]}
"""
    write(place, MANIFEST + source)
    code, shown = call("show", "toy")
    assert code == 0
    for words in ("CC0 [as stated]", "toy/*.tar", "coco/train", "from VCR", "ask by a form",
                  "https://vcr.example/form", "vcr1images"):  # fmt: skip
        assert words in shown


def test_check_says_what_is_there_and_what_is_not(place: Path, call: Call) -> None:
    write_pictures(place)
    code, shown = call("check", "toy")
    assert code == 1
    assert "1 of 1 files looked at are whole" in shown
    assert "-> vipllava shards build toy" in shown
    code, shown = call("check", "toy", "--json")
    assert code == 1
    found = json.loads(shown)
    assert found["schema_version"] == 1
    assert [finding["status"] for finding in found["findings"]] == ["ok", "ok", "missing"]
    assert found["ok"] is False
    code, _ = call("check", "toy", "--part", "annotations", "--part", "images", "--images", "all")
    assert code == 0
    write_shards(toy_samples(10), place / "toy", max_samples=4)
    assert call("check", "toy")[0] == 0


def test_fetch_then_check(place: Path, tmp_path: Path, call: Call) -> None:
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
                "what": "images",
                "files": [
                    {"url": server.serve("t.zip", archive), "into": "coco/train", "unpack": "train"}
                ],
            },
        ]
        write(place, f"{MANIFEST}sources: {json.dumps(sources)}")
        code, shown = call("fetch", "toy")
        assert code == 0
        assert shown.count("fetched") == 2
        assert "licence: CC0 [as stated]" in shown
        code, shown = call("fetch", "toy", "--json")
        assert code == 0
        assert json.loads(shown)["ok"] is True
        assert call("check", "toy", "--part", "annotations", "--part", "images")[0] == 0
        sources[0]["files"][0]["url"] = server.url("gone.json")
        write(place, f"{MANIFEST}sources: {json.dumps(sources)}")
        code, shown = call("fetch", "toy")
        assert code == 1
        assert f"lists, gone.json: {server.url('gone.json')}: the server answered 404" in shown


def test_a_manifest_by_its_path(place: Path, call: Call) -> None:
    write_pictures(place)
    path = place / "manifests" / "toy.yaml"
    code, _ = call("check", str(path), "--part", "images")
    assert code == 0


def test_sample_data_are_made(place: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "vipllava.sample_world.build.ensure_sample_world", lambda root: root / "sample_world-v3"
    )
    write(place, MANIFEST + "made_by: sample_world\n")
    code, shown = call("fetch", "toy")
    assert code == 0
    assert f"toy is made, not fetched: {place / 'sample_world-v3'}" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lits"], "No such command 'lits'. Did you mean 'list'?"),
        (["show"], "Missing argument 'NAME'"),
        (["check", "toy", "--image", "3"], "(Possible options: --images)"),
        (["check", "toy", "--images", "few"], "expected a number from 0, or all"),
        (["check", "toy", "--part", "tars"], "'tars' is not one of 'annotations', 'images',"),
        (["show", "other"], "no manifest `other`"),
        (["fetch", "toy"], "`toy` names no sources"),
    ],
)
def test_mistakes_are_named(call: Call, words: list[str], message: str) -> None:
    code, shown = call(*words)
    assert code == 2
    assert message in shown


def test_the_parts_are_those_of_the_library() -> None:
    assert tuple(data.Part) == PARTS
    assert inspect.signature(data.check).parameters["images"].default == NUM_IMAGES
