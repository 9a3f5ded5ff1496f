"""ViP-Bench: the official layout read strictly, the official answer file, scores by capability."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vipllava.evaluation.benches import vip_bench
from vipllava.evaluation.judge import NoVerdictError, OfflineMatcher
from vipllava.types import RecordError

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


def test_answers_and_scores(folder: Path, tmp_path: Path):
    items = vip_bench.read_items(folder, "human")
    model = Fixed("a star", "six", "left of the tree")
    answers = vip_bench.answer_items(items, model)
    assert model.asked == ["human 0?", "human 1?", "human 2?"]
    assert answers == {"v1_0": "a star", "v1_1": "six", "v1_2": "left of the tree"}
    result = vip_bench.score(items, answers, OfflineMatcher())
    assert result["total"] == pytest.approx(50.0)
    assert result["by_capability"] == {
        "rec": {"score": 75.0, "num_items": 2},
        "ocr": {"score": 0.0, "num_items": 1},
        "math": {"score": 0.0, "num_items": 1},
        "rel": {"score": 50.0, "num_items": 1},
    }
    assert (result["num_items"], result["num_failures"]) == (3, 0)
    vip_bench.write_answers(tmp_path / "out" / "answers.json", answers)
    assert json.loads((tmp_path / "out" / "answers.json").read_text()) == answers


def test_an_item_without_verdict_is_a_failure_not_a_zero(folder: Path):
    def judge(question: str, ground_truth: str, prediction: str) -> float:
        if ground_truth == "star":
            raise NoVerdictError("unreadable: maybe")
        return 1.0

    items = vip_bench.read_items(folder, "bbox")
    result = vip_bench.score(items, dict.fromkeys(META, "x"), judge)
    assert result["failures"] == {"v1_0": "unreadable: maybe"}
    assert result["total"] == 100.0
    assert result["num_items"] == 2


def test_answers_of_other_questions_are_refused(folder: Path):
    items = vip_bench.read_items(folder, "bbox")
    with pytest.raises(RecordError, match="differ in 1 ids"):
        vip_bench.score(items, {"v1_0": "", "v1_1": ""}, OfflineMatcher())


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
        (lambda f: (f / "bbox" / "questions.jsonl").write_bytes(b"\xff\n"), "is not UTF-8"),
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
        vip_bench.answer_items(vip_bench.read_items(folder, "bbox"), Fixed("a", "b", "c"))


def test_the_interval_stays_within_the_scale(folder: Path):
    items = vip_bench.read_items(folder, "bbox")
    result = vip_bench.score(items, dict.fromkeys(META, "star"), OfflineMatcher())
    assert (result["total"], result["low"]) == (pytest.approx(33.333, abs=1e-3), 0.0)
    assert result["high"] == pytest.approx(98.665, abs=1e-3)


def test_the_answer_file_is_the_official_one(folder: Path, tmp_path: Path):
    vip_bench.write_answers(tmp_path / "answers.json", {"v1_0": "4 é", "v1_1": 'a "b"'})
    expected = '{\n  "v1_0": "4 é",\n  "v1_1": "a \\"b\\""\n}\n'
    assert (tmp_path / "answers.json").read_text(encoding="utf-8") == expected


def test_an_unknown_split_lists_the_known(folder: Path):
    with pytest.raises(RecordError, match="known: bbox, human"):
        vip_bench.read_items(folder, "mask")
