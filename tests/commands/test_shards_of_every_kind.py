"""The published records, one of each kind: built by the command, read as training does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.toy_data import encode_picture, said
from vipllava import cli
from vipllava.records import KINDS, kind_of
from vipllava.shards.manifest import load_manifest
from vipllava.shards.tars import open_shards
from vipllava.stream.sample_encoder import SampleSource

MANIFESTS = Path(__file__).resolve().parents[2] / "data_manifests"
BOX, BOX2, BOX3, BOX4 = [5, 5, 30, 40], [20, 10, 60, 40], [0, 0, 9, 9], [1, 2, 30, 20]
MASK = [[10, 10, 30, 10, 30, 30, 10, 30]]
META = {
    "boxes": [[*BOX, 0.9], [*BOX2, 0.8]],
    "segms": [[[[5, 5], [30, 5], [30, 40], [5, 40]]], [[[1, 1], [2, 2], [3, 3]]]],
}
CLIP = "movieclips_A_Film/abc@0"
VCR: dict[str, Any] = {
    "image": f"vcr1images/{CLIP}.jpg",
    "meta_dir": f"./dataset/vcr1images/{CLIP}.json",
    "class_names": ["person", "dog"],
    "question": ["Why", "is", [0], "looking", "at", [0, 1], "?"],
    "answer_choices": [["no"], [[1], "barks", "."], ["so"], ["it"]],
    "answer_label": 1,
    "rationale_choices": [["a"], ["b"], ["c"], [[0], "smiles"]],
    "rationale_label": 3,
}
STAGE_2: list[dict[str, Any]] = [
    {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": said("<image>\nWhat is it?", "A bus.", "Where?", "In a street."),
    },
    {"id": "wgByO4Y_0", "conversations": said("Write a poem.", "A poem.")},
    {
        "id": "0306810",
        "image": "ocr_vqa/images/0306810.jpg",
        "conversations": said("Who wrote this?\n<image>", "A writer."),
    },
    {
        "id": "refcocog-17",
        "image": "coco/train2017/000000000017.jpg",
        "bboxes": [BOX],
        "segmentations": [MASK],
        "answer": "a red cup",
    },
    {
        "id": "refcocog-gpt4v-3",
        "image": "coco/train2017/000000000017.jpg",
        "bboxes": [BOX],
        "segmentations": [MASK],
        "conversations": said("Who is <bbox>?", "The man <bbox>."),
    },
    {
        "id": "vg_rel-5",
        "image": "vg/VG_100K/5.jpg",
        "bboxes": [BOX, BOX2],
        "answer": "man, riding, horse",
    },
    {
        "id": "vg_rel-gpt4v-5",
        "image": "vg/VG_100K_2/6.jpg",
        "bboxes": [BOX, BOX2],
        "conversations": said("<image>\nIs <bbox1> near <bbox0>?", "Yes"),
    },
    {
        "id": "flickr30k-9",
        "image": "flickr30k-images/9.jpg",
        "bbox": [[BOX, BOX2], [BOX2]],
        "grounding": "two men <bbox0> hold a rope <bbox1> .",
    },
    {"id": "vcr-1", **VCR},
    {
        "id": "v7w-2",
        "image": "v7w/v7w_2.jpg",
        "bboxes": [BOX, BOX2, BOX3, BOX4],
        "question": "Which is a dog?",
        "answer": BOX3,
    },
    {
        "id": "pointQA_twice-4",
        "image": "vg/VG_100K/5.jpg",
        "bboxes": [BOX],
        "general_question": "How many of these are there?",
        "answer": 2,
    },
    {
        "id": 7,
        "image": "gqa/images/7.jpg",
        "bboxes": [BOX],
        "conversations": said("<image>\nWhat is <bbox0>?", "a cup"),
    },
]
LISTS: dict[str, list[dict[str, Any]]] = {
    "vip_llava_stage2_mix": STAGE_2,
    "vip_llava_region_520k": STAGE_2,
    "llava_finetune_665k": STAGE_2[:3],
    "llava_pretrain_558k": [
        {
            "id": "004539375",
            "image": "00453/004539375.jpg",  # within its image root
            "conversations": said("Say it.\n<image>", "a white dog"),
        }
    ],
    "v7w_test": [STAGE_2[9]],
    "pointqa_twice_test": [STAGE_2[10]],
    "vcr_val": [{"id": "vcr-8", **VCR}],
}


def put_files(root: Path, name: str) -> None:
    """Write the list of a manifest, the pictures it names, and the clip's metadata."""
    manifest = load_manifest(name, MANIFESTS)
    assert manifest.annotation_file is not None
    annotations = root / manifest.annotation_file
    annotations.parent.mkdir(parents=True, exist_ok=True)
    annotations.write_text(json.dumps(LISTS[name]))
    for number, record in enumerate(LISTS[name]):
        if "image" in record:
            within = "LLaVA-Pretrain/images" if name == "llava_pretrain_558k" else "."
            picture = root / within / record["image"]
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(encode_picture(seed=number))
        if "meta_dir" in record:
            (root / record["meta_dir"].removeprefix("./dataset/")).write_text(json.dumps(META))


@pytest.mark.parametrize("name", LISTS)
def test_the_published_lists_become_samples(tmp_path: Path, name: str):
    put_files(tmp_path, name)
    where = [name, "--data-root", str(tmp_path), "--num-workers", "0"]
    assert cli.main(["shards", "build", *where]) == 0
    manifest = load_manifest(name, MANIFESTS)
    chosen = [record for record in LISTS[name] if manifest.has_record(record)]
    opened = open_shards(manifest, tmp_path)
    assert len(opened) == len(chosen)
    source = SampleSource.open(manifest, tmp_path, seed=0)
    for position, record in enumerate(chosen):
        stored = dict(opened.read(position).record)
        assert stored.pop("schema_version") == 1
        assert stored.pop("meta", META) == META
        assert stored == record
        for epoch in range(8):  # wordings differ
            sample = source.sample(position, epoch)
            assert (sample.image is not None) == ("image" in record)
            assert sample.turns
    assert cli.main(["shards", "verify", *where, "--decode"]) == 0


def test_no_kind_is_left_out():
    assert {kind_of(record) for record in STAGE_2} == set(KINDS)
