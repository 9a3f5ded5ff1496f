"""ViP-Bench: the official layout read strictly, the official answer file, scores by capability."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.evaluation.answering import META, Says, evaluated, make_vip_bench
from tests.toy_data import encode_picture, make_manifest
from vipllava.evaluation.bench import Bench, BenchData, Prediction
from vipllava.evaluation.benches import vip_bench
from vipllava.evaluation.benches.vip_bench import VIP_BENCH
from vipllava.evaluation.matching import NoVerdictError
from vipllava.evaluation.scoring import per_item
from vipllava.types import ConfigError, Failure, RecordError, VipLlavaError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_vip_bench(tmp_path)


def change(folder: Path, key: str, **fields) -> None:
    meta = {**META, key: {**META[key], **fields}}
    (folder / "vip-bench-meta-data.json").write_text(json.dumps(meta))


def answered(
    data: BenchData, *texts: str | Failure, bench: Bench = VIP_BENCH
) -> tuple[Says, list[Prediction]]:
    """Return the model, for what it was asked, and the scored predictions."""
    left = list(texts)
    model = Says(lambda _: left.pop(0))
    folder = data.folder / "evaluation"
    return model, evaluated(bench, bench.items(data), model, folder, data=data)


def questions(model: Says) -> list[str]:
    return [request.turns[-1].text for request in model.asked]


def bench_data(folder: Path, limit: int | None = None) -> BenchData:
    manifest = make_manifest(format="vip_bench", folder=folder.name, shards=[])
    return BenchData(manifest, folder.parent, {}, limit=limit)


def test_answers_and_scores(folder: Path):
    texts = ("a star", "six", "left of the tree")
    model, found = answered(bench_data(folder), "x", "x", "x", *texts)
    assert questions(model)[3:] == ["human 0?", "human 1?", "human 2?"]
    assert [(each.key, each.answer, each.score) for each in found[3:]] == [
        ("human/v1_0", "a star", 1.0),
        ("human/v1_1", "six", 0.0),
        ("human/v1_2", "left of the tree", 0.5),
    ]
    result = vip_bench.summarise(found)["splits"]["human"]
    assert result["total"] == pytest.approx(50.0)
    # Three images of one value each. `ocr` and `math` have one item, `rec` has two.
    none = {"low": None, "high": None, "num_items": 1}
    assert result["by_capability"] == {
        "rec": {"score": 75.0, "low": 50.0, "high": 100.0, "num_items": 2},
        "ocr": {"score": 0.0, **none},
        "math": {"score": 0.0, **none},
        "rel": {"score": 50.0, **none},
    }
    assert result["by_combination"] == {
        "rec": {"score": 100.0, **none},
        "ocr, math": {"score": 0.0, **none},
        "rec, rel": {"score": 50.0, **none},
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
    model, _ = answered(replace(data, manifest=manifest), *("x",) * 6)
    assert {request.image.size for request in model.asked if request.image} == {size}


def test_the_alpha_of_an_image_is_dropped(folder: Path):
    for path in folder.glob("*/images/*"):
        Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(path)
    model, _ = answered(bench_data(folder, limit=1), "x", "x")
    assert model.asked[0].image is not None
    assert model.asked[0].image.getpixel((4, 4)) == (10, 20, 30)


def test_both_splits_and_a_limit_of_each(folder: Path):
    model, found = answered(bench_data(folder, limit=2), "star", "é", "star", "7")
    assert questions(model) == ["bbox 0?", "bbox 1?", "human 0?", "human 1?"]
    assert VIP_BENCH.files(found, "toy") == {
        "answers-bbox.json": '{\n  "v1_0": "star",\n  "v1_1": "é"\n}\n',
        "answers-human.json": '{\n  "v1_0": "star",\n  "v1_1": "7"\n}\n',
    }
    metrics = VIP_BENCH.summarise(found, None)
    assert {name: split["total"] for name, split in metrics["splits"].items()} == {
        "bbox": 50.0, "human": 100.0,
    }  # fmt: skip
    groups = metrics["marks"]["kept"]["groups"]  # where other benchmarks have them
    assert (groups["bbox"]["score"], groups["human"]["score"]) == (0.5, 1.0)
    table = VIP_BENCH.table(VIP_BENCH, metrics)
    assert table.columns == ("capability", "bbox", "human")
    assert ("math", "0.0 (no interval) of 1", "100.0 (no interval) of 1") in table.rows
    assert table.total == ("total", "50.0 (0.0 to 100.0) of 2", "100.0 (34.2 to 100.0) of 2")
    assert table.notes[0] == (
        "published, ViP-LLaVA-7B: bbox 48.4, human 48.3 "
        "(ViP-LLaVA, CVPR 2024; graded by gpt-4-0613)"
    )


def test_the_folder_is_the_manifests_and_everything_is_checked_before_a_model(folder: Path):
    (folder / "human" / "images" / "1.png").unlink()
    with pytest.raises(RecordError, match=r"human/questions.jsonl:2: v1_1"):
        VIP_BENCH.items(bench_data(folder))
    with pytest.raises(VipLlavaError, match="there is missing; put the data of `toy` there"):
        _ = bench_data(folder / "there").folder
    with pytest.raises(ConfigError, match="manifest `toy` names no folder"):
        _ = BenchData(make_manifest(), folder, {}).folder


def test_an_item_without_verdict_or_answer_is_a_failure_not_a_zero(folder: Path):
    def judge(prediction: Prediction) -> float:
        if prediction.ground_truth == "star":
            raise NoVerdictError("unreadable: maybe")
        return 1.0

    bench = replace(VIP_BENCH, score=per_item(score=judge))
    texts = ("x", Failure("no answer in 60 s"), "x")
    _, found = answered(bench_data(folder), *texts, "x", "x", "x", bench=bench)
    result = vip_bench.summarise(found)["splits"]["bbox"]
    assert result["failures"] == {
        "v1_0": "no verdict: unreadable: maybe", "v1_1": "no answer in 60 s",
    }  # fmt: skip
    assert (result["total"], result["num_items"], result["num_failures"]) == (100.0, 1, 2)
    assert bench.files(found, "toy")["answers-bbox.json"] == '{\n  "v1_0": "x",\n  "v1_2": "x"\n}\n'


def test_marks_of_the_image_itself_can_only_be_kept(folder: Path):
    data = bench_data(folder)
    refused = pytest.raises(ConfigError, match=r"marks=removed: bbox/v1_0 has no regions, its")
    with refused:
        evaluated(VIP_BENCH, VIP_BENCH.items(data), lambda _: "x", folder / "out", ("removed",))


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
        vip_bench.read_questions(folder, "bbox")


def test_a_question_asked_twice_or_not_at_all_is_an_error(folder: Path):
    path = folder / "bbox" / "questions.jsonl"
    first, second, _ = path.read_text().splitlines()
    path.write_text("\n".join([first, second, first]))
    with pytest.raises(RecordError, match=r"(?s)jsonl:3: question_id of v1_0 occurs.*for v1_2 of"):
        vip_bench.read_questions(folder, "bbox")


def test_an_unreadable_image_costs_its_own_item(folder: Path):
    path = folder / "bbox" / "images" / "1.png"
    path.write_bytes(b"no picture")
    _, found = answered(bench_data(folder), *("star",) * 5)
    assert [each.answer for each in found] == ["star", None, "star", "star", "star", "star"]
    assert found[1].failure is not None
    assert found[1].failure.startswith(f"bbox/v1_1 ({path}): ")


def test_the_interval_stays_within_the_scale(folder: Path):
    _, found = answered(bench_data(folder), *("left",) * 6)
    result = vip_bench.summarise(found)["splits"]["bbox"]
    assert (result["total"], result["low"]) == (pytest.approx(16.667, abs=1e-3), 0.0)
    assert result["high"] == pytest.approx(50.0)


def test_an_unknown_split_lists_the_known(folder: Path):
    with pytest.raises(RecordError, match="known: bbox, human"):
        vip_bench.read_questions(folder, "mask")
