"""The sample data: real shards of the real record kinds, made once, and an official ViP-Bench."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from vipllava.keyed_random import generator_for
from vipllava.records import kind_of, parse_record
from vipllava.sample_world.build import FOLDER, ensure_sample_world
from vipllava.shards.manifest import load_manifest
from vipllava.shards.tars import open_shards
from vipllava.types import VipLlavaError

MANIFESTS = Path(__file__).parents[2] / "data_manifests"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_sample_world(tmp_path_factory.mktemp("data"), scale=0.03)


def digest(folder: Path) -> str:
    """Hash of all file names and bytes under ``folder``."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(str(path.relative_to(folder)).encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def test_it_is_deterministic_and_made_once(world: Path, tmp_path: Path):
    again = ensure_sample_world(tmp_path, scale=0.03)
    assert digest(world) == digest(again)
    times = {path: path.stat().st_mtime_ns for path in again.rglob("*")}
    assert ensure_sample_world(tmp_path) == again
    assert times == {path: path.stat().st_mtime_ns for path in again.rglob("*")}
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]


def test_half_a_folder_is_an_error_that_says_what_to_do(tmp_path: Path):
    (tmp_path / FOLDER).mkdir()
    with pytest.raises(VipLlavaError, match=r"is not whole.*remove the folder"):
        ensure_sample_world(tmp_path)


def test_an_unwritable_root_names_the_setting(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(VipLlavaError, match=r"with data_root=FOLDER"):
        ensure_sample_world(blocked)


@pytest.mark.parametrize("name", ["pretrain", "finetune", "gpt4v", "regions"])
def test_every_record_parses_in_its_schema(world: Path, name: str):
    manifest = load_manifest(f"sample_{name}", MANIFESTS)
    assert manifest.made_by == "sample_world"
    kinds: Counter[str] = Counter()
    for path in sorted((world / name).glob("*.tar")):
        assert path.with_suffix("").with_suffix(".index.npz").exists()
    shards = open_shards(manifest, world.parent)
    for row in range(len(shards)):
        entry = shards.read(row)
        kinds[kind_of(entry.record)] += 1
        sample = parse_record(
            entry.record,
            key=entry.key,
            dataset=manifest.name,
            image=entry.image,
            kind=manifest.record_kind,
            rng=generator_for(name),
        )
        assert sample.turns[-1].role == "assistant"
        if name == "regions":  # where else its mark can go, and what is right there
            others = {other["answer"] for other in entry.record["others"]}
            assert others
            assert entry.record["answer"] not in others
    expected = {
        "pretrain": {"image_level"},
        "finetune": {"refcocog", "regions", "image_level", "vg_rel", "v7w", "text_only"},
        "gpt4v": {"refcocog-gpt4v", "vg_rel-gpt4v", "refcocog", "regions", "image_level"},
        "regions": {"refcocog"},
    }[name]
    assert expected <= set(kinds)


def test_vip_bench_has_the_official_layout(world: Path):
    bench = world / "ViP-Bench"
    meta = json.loads((bench / "vip-bench-meta-data.json").read_text())
    assert {c for item in meta.values() for c in item["capability"]} == {
        "rec", "ocr", "know", "math", "rel", "lang",
    }  # fmt: skip
    assert any("<AND>" in item["answer"] for item in meta.values())
    assert any("<OR>" in item["answer"] for item in meta.values())
    for split in ("bbox", "human"):
        lines = (bench / split / "questions.jsonl").read_text().splitlines()
        questions = [json.loads(line) for line in lines]
        assert [f"v1_{q['question_id']}" for q in questions] == list(meta)
        for question in questions:
            item = meta[f"v1_{question['question_id']}"]
            assert (bench / split / "images" / question["image"]).is_file()
            assert "<obj>" in item["question"]
            assert "<obj>" not in question["text"]
            assert (bench / "source_image" / item["image"]).is_file()


def test_the_shards_open_by_their_manifest(world: Path):
    shards = open_shards(load_manifest("sample_regions", MANIFESTS), world.parent)
    assert len(shards) == 24
