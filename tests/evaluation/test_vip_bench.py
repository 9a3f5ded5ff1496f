"""ViP-Bench: the official layout read strictly, the official answer file, scores by capability."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.toy_data import encode_picture, make_manifest
from vipllava.evaluation.bench import BenchData, ask_all
from vipllava.evaluation.benches import vip_bench
from vipllava.evaluation.judge import NoVerdictError, match_offline
from vipllava.types import ConfigError, RecordError, VipLlavaError

META = {
    "v1_0": {
        "image_source": "toy", "image": "0.png", "question": "What is <obj>?",
        "answer": "star", "capability": ["rec"],
    },
    "v1_1": {
        "image_source": "toy", "image": "1.png", "question": "<obj> plus <obj>?",
        "answer": "7<OR>seven", "capability": ["ocr", "math"],
    },
    "v1_2": {
        "image_source": "toy", "image": "0.png", "question": "How is <obj>?",
        "answer": "left<AND>cup", "capability": ["rec", "rel"],
    },
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in vip_bench.SPLITS:
        images = tmp_path / split / "images"
        images.mkdir(parents=True)
        for name in ("0.png", "1.png"):
            Image.new("RGB", (8, 8)).save(images / name)
        lines = [
            json.dumps({"question_id": n, "image": item["image"], "text": f"{split} {n}?"})
            for n, item in enumerate(META.values())
        ]
        (tmp_path / split / "questions.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "vip-bench-meta-data.json").write_text(json.dumps(META))
    return tmp_path


def change(folder: Path, key: str, **fields) -> None:
    meta = {**META, key: {**META[key], **fields}}
    (folder / "vip-bench-meta-data.json").write_text(json.dumps(meta))


class Fixed:
    """Answers with given texts and remembers what was asked."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = list(texts), []

    def answer(self, requests, *, max_new_tokens=64, batch_size=16):
        self.asked += [request.turns[-1].text for request in requests]
        return self.texts


def ask(asked, model: Fixed):
    return ask_all(asked, model, max_new_tokens=4, batch_size=16)


def answered(folder: Path, split: str, model: Fixed):
    return ask(vip_bench.ask(vip_bench.read_items(folder, split)), model)


def bench_data(folder: Path, limit: int | None = None) -> BenchData:
    manifest = make_manifest(format="vip_bench", folder=folder.name, shards=[])
    return BenchData(manifest, folder.parent, {}, limit=limit)


def test_answers_and_scores(folder: Path):
    model = Fixed("a star", "six", "left of the tree")
    found = answered(folder, "human", model)
    assert model.asked == ["human 0?", "human 1?", "human 2?"]
    assert [(each.key, each.texts["answer"]) for each in found] == [
        ("v1_0", "a star"), ("v1_1", "six"), ("v1_2", "left of the tree"),
    ]  # fmt: skip
    result = vip_bench.score(found, match_offline)
    assert result["total"] == pytest.approx(50.0)
    assert result["by_capability"] == {
        "rec": {"score": 75.0, "num_items": 2},
        "ocr": {"score": 0.0, "num_items": 1},
        "math": {"score": 0.0, "num_items": 1},
        "rel": {"score": 50.0, "num_items": 1},
    }
    assert (result["num_items"], result["num_failures"]) == (3, 0)


@pytest.mark.parametrize(("upright", "size"), [(True, (48, 64)), (False, (64, 48))])
def test_the_manifest_says_whether_pictures_are_turned(
    folder: Path, upright: bool, size: tuple[int, int]
):
    for path in folder.glob("*/images/*"):
        path.write_bytes(encode_picture(orientation=6))
    data = bench_data(folder)
    manifest = replace(data.manifest, apply_exif_orientation=upright)
    for asked in vip_bench.VIP_BENCH.read(replace(data, manifest=manifest)):
        image = asked.requests["answer"].image
        assert image is not None
        assert image.size == size


def test_both_splits_and_a_limit_of_each(folder: Path):
    bench = vip_bench.VIP_BENCH
    model = Fixed("star", "é", "star", "7")
    found = ask(bench.read(bench_data(folder, limit=2)), model)
    assert model.asked == ["bbox 0?", "bbox 1?", "human 0?", "human 1?"]
    assert bench.files(found) == {
        "answers-bbox.json": '{\n  "v1_0": "star",\n  "v1_1": "é"\n}\n',
        "answers-human.json": '{\n  "v1_0": "star",\n  "v1_1": "7"\n}\n',
    }
    results = bench.score(found)
    assert list(results) == ["judge", "splits"]
    assert {name: split["total"] for name, split in results["splits"].items()} == {
        "bbox": 50.0, "human": 100.0,
    }  # fmt: skip
    table = bench.table(results)
    assert table.columns == ("capability", "bbox", "human")
    assert ("math", "0.0 (1)", "100.0 (1)") in table.rows
    assert table.total[2] == "100.0 (34.2-100.0), 2 items"


def test_the_folder_is_the_manifests_and_everything_is_checked_before_a_model(folder: Path):
    (folder / "human" / "images" / "1.png").unlink()
    with pytest.raises(RecordError, match=r"human/questions.jsonl:2: v1_1"):
        vip_bench.VIP_BENCH.read(bench_data(folder))
    with pytest.raises(VipLlavaError, match="there is missing; put the data of `toy` there"):
        _ = bench_data(folder / "there").folder
    with pytest.raises(ConfigError, match="manifest `toy` names no folder"):
        _ = BenchData(make_manifest(), folder, {}).folder


def test_an_item_without_verdict_is_a_failure_not_a_zero(folder: Path):
    def judge(question: str, ground_truth: str, prediction: str) -> float:
        if ground_truth == "star":
            raise NoVerdictError("unreadable: maybe")
        return 1.0

    result = vip_bench.score(answered(folder, "bbox", Fixed("x", "x", "x")), judge)
    assert result["failures"] == {"v1_0": "unreadable: maybe"}
    assert result["total"] == 100.0
    assert result["num_items"] == 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "vip-bench-meta-data.json").unlink(), "vip-bench-meta-data.json"),
        (lambda f: (f / "bbox" / "images" / "1.png").unlink(), r"questions.jsonl:2: v1_1"),
        (lambda f: (f / "bbox" / "questions.jsonl").write_text('{"image": "0.png"}\n'),
         r":1: has no question_id, text"),
        (lambda f: (f / "bbox" / "questions.jsonl").write_text("{oops\n"), r"questions.jsonl:1"),
        (lambda f: (f / "bbox" / "questions.jsonl").write_text(
            '{"question_id": 9, "image": "0.png", "text": "?"}\n'), "v1_9 is not in"),
        (lambda f: (f / "vip-bench-meta-data.json").write_text("[]"), "object of items"),
        (lambda f: (f / "vip-bench-meta-data.json").write_text('{"v1_0": {}, "v1_0": {}}'),
         "`v1_0` occurs twice"),
        (lambda f: (f / "vip-bench-meta-data.json").write_text('{"v1_0": 3}'),
         "v1_0 must be objects"),
        (lambda f: change(f, "v1_1", capability="rec"), r"jsonl:2: v1_1: capability is 'rec'"),
        (lambda f: change(f, "v1_1", capability=["rec", "see"]),
         r"v1_1 has unknown capabilities \['see'\]; known: rec, ocr"),
        (lambda f: change(f, "v1_2", answer="left<AND>"), r"jsonl:3: v1_2: .*empty part"),
        (lambda f: change(f, "v1_0", answer=4), r"jsonl:1: v1_0: answer is 4; expected a text"),
        (lambda f: (f / "bbox" / "questions.jsonl").write_bytes(b"\xff\n"),
         r"bbox/questions.jsonl: .* decode byte 0xff.* UTF-8 texts"),
    ],
)  # fmt: skip
def test_broken_layouts_name_file_line_and_id(folder: Path, spoil, message: str):
    spoil(folder)
    with pytest.raises(RecordError, match=message):
        vip_bench.read_items(folder, "bbox")


def test_a_question_asked_twice_or_not_at_all_is_an_error(folder: Path):
    path = folder / "bbox" / "questions.jsonl"
    first, second, _ = path.read_text().splitlines()
    path.write_text("\n".join([first, second, first]))
    with pytest.raises(RecordError, match=r"(?s)jsonl:3: question_id of v1_0 occurs.*for v1_2 of"):
        vip_bench.read_items(folder, "bbox")


def test_an_unreadable_picture_names_the_item_and_the_file(folder: Path):
    path = folder / "bbox" / "images" / "1.png"
    path.write_bytes(b"no picture")
    with pytest.raises(RecordError, match=r"v1_1 \(.*1\.png\)"):
        answered(folder, "bbox", Fixed("a", "b", "c"))


def test_the_interval_stays_within_the_scale(folder: Path):
    found = answered(folder, "bbox", Fixed("star", "star", "star"))
    result = vip_bench.score(found, match_offline)
    assert result["total"] == pytest.approx(33.333, abs=1e-3)
    assert (result["low"], result["high"]) == (0.0, 50.0)  # of 50, 0, 50


def test_an_unknown_split_lists_the_known(folder: Path):
    with pytest.raises(RecordError, match="known: bbox, human"):
        vip_bench.read_items(folder, "mask")
