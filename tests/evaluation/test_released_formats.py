"""Files as others have them: released lists and answer lines, ViP-Bench's answers and grades."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.evaluation.answering import Says, evaluated
from tests.toy_data import encode_picture
from vipllava import cli
from vipllava.evaluation.bench import BenchData, Prediction
from vipllava.evaluation.benches import BENCHES, get_bench
from vipllava.evaluation.benches.vip_bench import VIP_BENCH
from vipllava.evaluation.summary import summarise
from vipllava.evaluation.vip_bench_files import read_answers, read_grades
from vipllava.inference.endpoint import Reply
from vipllava.shards.manifest import load_manifest
from vipllava.types import RecordError
from vipllava.visual_prompts.policies import POLICIES

MANIFESTS = Path(__file__).resolve().parents[2] / "data_manifests"
BOXES = [[5, 5, 60, 60], [70, 5, 130, 60], [5, 70, 60, 200], [140, 70, 200, 200]]
CLIP = "movieclips_A_Film/abc@0"
VCR: dict[str, Any] = {
    "image": f"vcr1images/{CLIP}.jpg",
    "meta_dir": f"./dataset/vcr1images/{CLIP}.json",
    "class_names": ["person", "dog"],
    "question": ["Why", "is", [0], "looking", "at", [0, 1], "?"],
    "answer_choices": [["no"], [[1], "barks", "."], ["so"], ["it"]],
    "rationale_choices": [["a"], ["b"], ["c"], [[0], "smiles"]],
}
META = {
    "boxes": [[5, 5, 30, 40, 0.9], [20, 10, 60, 40, 0.8]],
    "segms": [[[[5, 5], [30, 5], [30, 40], [5, 40]]], []],
}
LISTS: dict[str, list[dict[str, Any]]] = {
    "v7w-test.json": [
        {"id": f"v7w-{n}", "image": f"v7w/v7w_{n}.jpg", "bboxes": BOXES,
         "question": "Which is a dog?", "answer": BOXES[at]}
        for n, at in enumerate((0, 1, 1, 3))
    ],
    "pointQA_twice_test.json": [
        {"id": f"pointQA_twice-{n}", "image": f"vg/VG_100K/{n}.jpg", "bboxes": [BOXES[n]],
         "general_question": "How many of these are there?", "answer": answer}
        for n, answer in enumerate(("2", "Yes", 3))
    ],
    "vcr-val.json": [
        {"id": f"vcr-{n}", **VCR, "answer_label": label, "rationale_label": reason}
        for n, (label, reason) in enumerate(((1, 3), (1, 0), (0, 3), (2, 3)))
    ],
}  # fmt: skip


def built(root: Path, manifest_name: str) -> BenchData:
    """Return a benchmark's data, built by the command from a list as it is released."""
    manifest = load_manifest(manifest_name, MANIFESTS)
    assert manifest.annotation_file is not None
    records = LISTS[manifest.annotation_file]
    (root / manifest.annotation_file).write_text(json.dumps(records))
    for number, record in enumerate(records):
        path = root / record["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_picture(320, 240, seed=number))
        path.with_suffix(".json").write_text(json.dumps(META))
    where = [manifest_name, "--data-root", str(root), "--num-workers", "0"]
    assert cli.main(["shards", "build", *where]) == 0
    return BenchData(manifest, root, POLICIES["evaluation"])


@pytest.mark.parametrize(
    ("bench", "manifest", "said", "score"),
    [
        ("v7w", "v7w_test", ["A", " b\n", "C", "D."], 2 / 4),
        ("pointqa", "pointqa_twice_test", ["2", "yes", "4"], 2 / 3),
        ("vcr_qa", "vcr_val", ["B", "B", "A", "A"], 3 / 4),
        ("vcr_qar", "vcr_val", ["D", "B", "D", "d"], 3 / 4),
    ],
)
def test_a_released_list_to_its_score_and_answer_lines(
    tmp_path: Path, bench: str, manifest: str, said: list[str], score: float
):
    data, chosen, answers = built(tmp_path, manifest), get_bench(bench), iter(said)
    found = evaluated(
        chosen, chosen.items(data), Says(lambda _: next(answers)), tmp_path / "out", data=data,
        policies=data.policies,
    )  # fmt: skip
    assert summarise(found)["marks"]["kept"]["score"] == pytest.approx(score)
    ((name, text),) = chosen.files(found, "my-model").items()
    assert name == "answers.jsonl"
    lines = [json.loads(line) for line in text.splitlines()]
    records = LISTS[str(data.manifest.annotation_file)]
    assert [line["question_id"] for line in lines] == [record["id"] for record in records]
    assert [line["text"] for line in lines] == [each.strip() for each in said]
    assert len({line["answer_id"] for line in lines}) == len(lines)
    assert lines[0] == {
        "question_id": records[0]["id"],
        "prompt": found[0].question,
        "text": said[0],
        "answer_id": lines[0]["answer_id"],
        "model_id": "my-model",
        "metadata": {},
    }


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("v7w_test", ""),
        ("pointqa_twice_test", ""),
        ("vcr_val", ", which says how to get VCR, https://visualcommonsense.com/download/"),
        ("refcocog_val", ", which says how to get RefCOCOg, https://github.com/lichengunc/refer"),
        ("vip_bench", ""),
    ],
)
def test_where_the_data_of_a_benchmark_are_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, by_hand: str
):
    where = ["--data-root", str(tmp_path), "--manifests", str(MANIFESTS)]
    assert cli.main(["data", "check", name, *where]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert f"-> vipllava data fetch {name}{by_hand}" in shown
    assert all(source.address for source in load_manifest(name, MANIFESTS).sources)
    page = (MANIFESTS.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert f"`vipllava data fetch {name}`" in page


def test_every_benchmark_stands_in_the_table_of_the_data():
    page = (MANIFESTS.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    table = page.partition("## The data\n")[2].partition("```")[0]
    assert [name for name in BENCHES if f"`{name}`" not in table] == []


NEEDED = {
    "v1_0": ["ocr", "math"], "v1_1": ["rec"], "v1_2": ["math", "ocr"], "v1_3": ["rec", "know"],
}  # fmt: skip
TRUTHS = ["4", "a dog<OR>a puppy", "9<AND>x", "a bridge"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """ViP-Bench with four questions."""
    meta = {
        key: {"image_source": "a", "image": "0.png", "question": "<obj>?", "answer": truth,
              "capability": needed}
        for (key, needed), truth in zip(NEEDED.items(), TRUTHS, strict=True)
    }  # fmt: skip
    lines = [
        json.dumps({"question_id": n, "image": "0.png", "text": f"{n}?"}) for n in range(len(meta))
    ]
    (tmp_path / "vip-bench-meta-data.json").write_text(json.dumps(meta))
    (tmp_path / "human" / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "human" / "images" / "0.png")
    (tmp_path / "human" / "questions.jsonl").write_text("\n".join(lines))
    return tmp_path


ANSWERS = {
    "v1_0": "The value within the blue ellipse is 4.",
    "v1_1": "A cat.",
    "v1_2": "It is 9.",
    "v1_3": "Das ist \u201ea bridge\u201c.",
}


def test_an_answer_file_of_another_program_is_scored_and_written_again(folder: Path):
    path = folder / "vip-llava-7b-human.json"
    path.write_text(json.dumps(ANSWERS, indent=2), encoding="utf-8")
    data = BenchData(load_manifest("vip_bench", MANIFESTS), folder, {})
    scored = VIP_BENCH.score(read_answers(path, folder, "human"), data)
    assert [each.score for each in scored] == [1.0, 0.0, 0.5, 1.0]
    result = VIP_BENCH.summarise(scored, None)["splits"]["human"]
    assert result["total"] == pytest.approx(62.5)
    written = VIP_BENCH.files(scored, "mine")["answers-human.json"]
    assert json.loads(written) == ANSWERS
    assert written == json.dumps(ANSWERS, indent=2, ensure_ascii=False) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"v1_0": "4", "v1_1": "x"}', "nothing for v1_2, v1_3: is it of another split"),
        (json.dumps({**ANSWERS, "v1_9": "x"}), "v1_9: no such questions"),
        (json.dumps({**ANSWERS, "v1_1": None}), "v1_1: expected a text for each id"),
        ('{"v1_0": "4", "v1_0": "5"}', "cannot be read: `v1_0` occurs twice"),
        ("[]", "is no object of ids, such as `v1_0`"),
    ],
)
def test_an_answer_file_that_does_not_fit_is_refused(folder: Path, text: str, message: str):
    path = folder / "answers.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=rf"answers\.json.*{message}"):
        read_answers(path, folder, "human")


VERDICTS = {"v1_0": (1.0, 0.5), "v1_1": (0.0, 0.2), "v1_2": (0.5, 0.5), "v1_3": (0.3, 1.0)}


def answered(folder: Path) -> list[Prediction]:
    (folder / "answers.json").write_text(json.dumps(ANSWERS))
    return read_answers(folder / "answers.json", folder, "human")


def graded(folder: Path, grades: dict[str, Any]) -> list[Prediction]:
    (folder / "grades.json").write_text(json.dumps(grades))
    return read_grades(folder / "grades.json", answered(folder))


def scores_of(found: dict[str, Any]) -> dict[str, tuple[float, int]]:
    return {name: (round(of["score"], 9), of["num_items"]) for name, of in found.items()}


def test_saved_verdicts_to_totals_capabilities_combinations_and_deviation(folder: Path):
    saved = {key: {"model": ["j"], "content": ["-"], "score": v} for key, v in VERDICTS.items()}
    found = VIP_BENCH.summarise(graded(folder, saved), None)["splits"]["human"]
    # Runs: (1 + 0 + .5 + .3) / 4 and (.5 + .2 + .5 + 1) / 4; means 45 and 55.
    assert found["totals"] == pytest.approx([45.0, 55.0])
    assert (found["total"], found["std"]) == (pytest.approx(50.0), pytest.approx(5.0))
    assert (found["num_items"], found["num_failures"]) == (4, 0)
    assert scores_of(found["by_capability"]) == {
        "rec": (37.5, 2), "ocr": (62.5, 2), "know": (65.0, 1), "math": (62.5, 2),
    }  # fmt: skip
    assert scores_of(found["by_combination"]) == {
        "ocr, math": (62.5, 2), "rec": (10.0, 1), "rec, know": (65.0, 1),
    }  # fmt: skip


def test_the_files_of_the_official_evaluator(folder: Path):
    judged = [
        replace(
            each, verdicts=verdicts, score=sum(verdicts) / 2,
            replies=tuple(Reply(str(value), "stop", "judge-1", None) for value in verdicts),
        )
        for each, verdicts in zip(answered(folder), VERDICTS.values(), strict=True)
    ]  # fmt: skip
    lost = replace(judged[0], key="human/v1_9", groups=("human", "lang")).failed("down")
    files = VIP_BENCH.files([*judged, lost], "my-7b")
    assert list(files) == [
        "answers-bbox.json", "answers-human.json", "human-grade-2runs.json",
        "human-cap-score-2runs.csv", "human-cap-int-score-2runs.csv",
    ]  # fmt: skip
    *_, grades, by_capability, by_combination = files.values()
    assert list(json.loads(grades)) == list(VERDICTS)
    assert json.loads(grades)["v1_0"] == {
        "model": ["judge-1", "judge-1"], "content": ["1.0", "0.5"], "score": [1.0, 0.5],
    }  # fmt: skip
    assert by_capability == (
        ',rec,ocr,math,know,total,std,runs\nmy-7b,37.5,62.5,62.5,65.0,50.0,5.0,"[45.0, 55.0]"\n'
    )
    assert by_combination == (
        ',ocr_math,rec,rec_know,total,std,runs\nmy-7b,62.5,10.0,65.0,50.0,5.0,"[45.0, 55.0]"\n'
    )
    read = graded(folder, json.loads(grades))
    assert [each.score for each in read] == [each.score for each in judged]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v1_1": {"score": [0.0, 1.5]}}, "v1_1: expected as `score` numbers from 0 to 1"),
        ({"v1_1": {"score": ["1.0", True]}}, "v1_1: expected as `score` numbers from 0 to 1"),
        ({"v1_1": {"score": []}}, "v1_1: without the verdicts of 2 runs"),
        ({"v1_1": 0.5}, "v1_1: without the verdicts of 2 runs"),
        ({"v1_1": {"score": [0.0]}}, "v1_1: without the verdicts of 2 runs"),
        ({"v1_7": {"score": [0.0, 1.0]}}, "v1_7: no such questions"),
    ],
)
def test_verdicts_that_are_none_are_refused(folder: Path, change: dict[str, Any], message: str):
    grades = {key: {"score": list(values)} for key, values in VERDICTS.items()}
    with pytest.raises(RecordError, match=message):
        graded(folder, grades | change)
