"""Visual7W, PointQA and VCR: the published wording, marks and scores, on records as published."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.answering import Says, evaluated
from tests.toy_data import encode_picture, make_manifest
from vipllava.evaluation.bench import BenchData, Marks, Prediction
from vipllava.evaluation.benches import get_bench
from vipllava.evaluation.summary import score_table, summarise
from vipllava.shards.tars import write_shards
from vipllava.visual_prompts.policies import POLICIES

LETTER = "Answer with the option's letter from the given choices directly."


def bench_data(
    folder: Path, records: list[dict[str, Any]], marks: tuple[Marks, ...] = ("kept",), **manifest
) -> BenchData:
    rows = [
        (record["id"], record | {"image": "x.jpg"}, encode_picture(320, 240, seed=seed // 2), "jpg")
        for seed, record in enumerate(records)
    ]
    write_shards(rows, folder / "toy")
    return BenchData(make_manifest(**manifest), folder, POLICIES["evaluation"], marks=marks)


def ask(name: str, data: BenchData, say, folder: Path) -> tuple[Says, list[Prediction]]:
    bench, model = get_bench(name), say if isinstance(say, Says) else Says(say)
    policies = {"policies": data.policies, "seed": data.seed}
    found = evaluated(bench, bench.items(data), model, folder, data.marks, data, **policies)
    return model, found


BOXES = [[5, 5, 60, 60], [70, 5, 130, 60], [5, 5, 60, 60], [140, 70, 200, 200]]
V7W = [
    {"id": f"v7w-{n}", "bboxes": BOXES, "question": "Which one is red?", "answer": BOXES[at]}
    for n, at in enumerate((2, 1, 3, 3))
]


def test_v7w(tmp_path: Path):
    said = iter(["a", " B\n", "D.", "The answer is D"])
    data = bench_data(tmp_path, V7W)
    model, found = ask("v7w", data, lambda _: next(said), tmp_path / "out")
    names = "red|lime|blue|yellow|fuchsia|aqua|orange|purple|gold"
    option = rf"The object within (the )?({names}) rectangle"
    lines = found[0].question.split("\n")
    assert lines[0] == "Which one is red?"
    assert [line[:3] for line in lines[1:5]] == ["A. ", "B. ", "C. ", "D. "]
    colours = [match[2] for line in lines[1:5] if (match := re.fullmatch(option, line[3:]))]
    assert len(set(colours)) == 4
    assert lines[5] == LETTER
    assert [each.ground_truth for each in found] == ["A", "B", "D", "D"]  # the first of equal boxes
    assert [each.score for each in found] == [1, 1, 0, 0]
    assert [each.more["lenient_letter"] for each in found] == [1, 1, 1, 1]
    assert model.asked[0].image is not None
    assert model.asked[0].image.size == (320, 240)
    table = score_table(get_bench("v7w"), summarise(found, 0.25))
    assert table.total == ("all", "4", "50.0 (0.0 to 100.0)", "100.0")
    assert "published, ViP-LLaVA-7B: accuracy 86.09 (ViP-LLaVA, CVPR 2024)" in table.notes


def test_the_marks_of_v7w_change_places(tmp_path: Path):
    data = bench_data(tmp_path, V7W, ("kept", "moved"))
    model, found = ask("v7w", data, lambda _: "D", tmp_path / "out")
    kept, moved = found[:4], found[4:]
    assert [each.question for each in kept] == [each.question for each in moved]
    assert all(a.ground_truth != b.ground_truth for a, b in zip(kept, moved, strict=True))
    assert summarise(found, 0.25)["faithfulness"]["follows"]["score"] == 0
    images = [request.image.tobytes() for request in model.asked if request.image]
    assert len(set(images)) == 8


def test_pointqa(tmp_path: Path):
    general = "How many of these are there?"
    records = [
        {"id": f"pointQA_twice-{n}", "bboxes": [BOXES[n]], "general_question": general,
         "answer": answer}
        for n, answer in enumerate(("2", 3))
    ]  # fmt: skip
    data = bench_data(tmp_path, records, ("kept", "moved"))
    said = {"toy/pointQA_twice-0": "2", "toy/pointQA_twice-1": "three"}
    model, found = ask("pointqa", data, lambda request: said[request.key], tmp_path / "out")
    assert found[0].question == (
        "How many of these are there? The exemplary object is within the rectangle.\n"
        "Answer the question using a single word or phrase."
    )
    assert [each.score for each in found[:2]] == [1, 0]
    # Both records are about one image: the mark of each goes to the other's object.
    assert [each.ground_truth for each in found[2:]] == ["3", "2"]
    image = model.asked[0].image
    assert image is not None
    plain = Says(lambda _: "2")
    evaluated(get_bench("pointqa"), get_bench("pointqa").items(data), plain, tmp_path / "plain",
              ("removed",), data, policies=data.policies, seed=data.seed)  # fmt: skip
    before = plain.asked[0].image
    assert before is not None
    (r, g, b), (r0, g0, b0) = image.getpixel((5, 30)), before.getpixel((5, 30))  # pyright: ignore
    # Red at 128 of 255.
    assert (r, g, b) == pytest.approx(((r0 + 255) / 2, g0 / 2, b0 / 2), abs=2)


def vcr(number: int, answer: int, reason: int, objects: int = 3) -> dict[str, Any]:
    box = [[10 + 20 * n, 20, 28 + 20 * n, 60, 0.9] for n in range(objects)]
    everyone = list(range(objects))
    return {
        "id": f"vcr-{number}",
        "class_names": ["person"] * objects,
        "question": ["the", "man", "with", [0], "is", "who", "?"],
        "answer_choices": [["A", "friend", "of", [1], "."], ["Nobody"], ["He", "left"], ["Two"]],
        "answer_label": answer,
        "rationale_choices": [[everyone, "smile", "."], ["So"], ["It", "is"], ["No", ",", "yes"]],
        "rationale_label": reason,
        "meta": {"boxes": box, "segms": [[] for _ in everyone]},
    }


def test_vcr_asks_for_the_answer_and_for_its_reason(tmp_path: Path):
    data = bench_data(tmp_path, [vcr(0, 0, 1)])
    answers = {name: ask(name, data, lambda _: "A", tmp_path / name) for name in TASKS}
    mark = r"at (the )?(red|lime|blue|yellow|fuchsia|aqua|orange|purple|gold) point"
    (qa,), (qar,) = (found for _, found in answers.values())
    assert re.sub(mark, "@", qa.question) == (
        "The man with the person @ is who?\nA. A friend of the person @.\nB. Nobody\nC. He left\n"
        f"D. Two\n{LETTER}"
    )
    assert re.sub(mark, "@", qar.question) == (
        "I give you a question and its answer, I need you to provide a rationale explaining why "
        'the answer is right. "The man with the person @ is who?" The answer is "A friend of the '
        'person @.".What is the rationale for this decision?\nA. The person @ and the person @ '
        f"and the person @ smile.\nB. So\nC. It is\nD. No, yes\n{LETTER}"
    )
    assert (qa.ground_truth, qa.score, qar.ground_truth, qar.score) == ("A", 1, "B", 0)
    images = [model.asked[0].image for model, _ in answers.values()]
    assert [image and image.size for image in images] == [(336, 336), (336, 336)]


TASKS = ("vcr_qa", "vcr_qar")


def test_each_task_of_vcr_marks_what_its_own_texts_mention(tmp_path: Path):
    data = bench_data(tmp_path, [vcr(0, 1, 1)])
    marked: dict[str, int] = {}
    for name in TASKS:
        (item,) = get_bench(name).items(data)
        marked[name] = len(item.sample.regions)
    assert marked == {"vcr_qa": 2, "vcr_qar": 3}


def test_an_item_of_twelve_objects_is_asked(tmp_path: Path):
    data = bench_data(tmp_path, [vcr(0, 1, 0, objects=12)])
    _, (found,) = ask("vcr_qar", data, lambda _: "A", tmp_path / "out")
    assert found.score == 1
    named = re.findall(r"at (?:the )?(\w*) ?point", found.question)
    assert len(set(named) - {""}) == 9


def test_a_record_of_vcr_without_a_question_is_named(tmp_path: Path):
    record = vcr(0, 1, 0)
    del record["question"]
    with pytest.raises(Exception, match=r"toy/vcr-0: field `question` is missing"):
        list(get_bench("vcr_qa").items(bench_data(tmp_path, [record])))
