"""The page of an evaluation: figures, published ones, faithfulness, failures, the worst items."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.report.test_quickstart_page import Reader, accuracy
from vipllava.report.evaluation_page import (
    EvaluationPage,
    Figure,
    ShownAnswer,
    ShownItem,
    write_evaluation_page,
)

HOSTILE = "<script>alert(1)</script>"
JUDGE = {
    "model": "big-72b", "revision": "c0ffee", "prompt_source": "ours", "prompt_sha256": "ab" * 32,
    "runs": 5, "reported": [{"model": "big-72b"}],
}  # fmt: skip
PUBLISHED = [
    {"model": "A-7B", "figures": {"accuracy": 86.09}, "source": "a paper", "judge": None},
    {"model": "B-7B", "figures": {"accuracy": 60.7}, "source": "a page", "judge": "gpt-4-0613"},
]


def answer(marks: str, text: str | None, score: float | None, **changes: Any) -> ShownAnswer:
    image = Image.fromarray(np.full((60, 90, 3), 200, dtype=np.uint8))
    shown = ShownAnswer(marks, (image,), "What is in the red box?", "cup", text, score)
    return replace(shown, **changes)


def evaluation(**changes: Any) -> EvaluationPage:
    """Return what the page of an evaluation with all markings shows."""
    metrics = {
        "bench": "toys",
        "metric": "accuracy",
        "settings": {
            "checkpoint": "runs/tiny/export", "checkpoint_digest": "d1ce", "seed": 42,
            "limit": None, "bench": {"manifest": "toys.yaml", "module": None},
            "visual_prompts": {"ranges": {"alpha": [96, 255]}},
        },
        "faithfulness": {
            "follows": accuracy(27, 60, 0.331, 0.575),
            "gap": {"score": 0.383, "low": 0.25, "high": 0.517, "num_items": 60},
            "left": 0.233,
            "chance": 0.2,
            "stays": accuracy(34, 37, 0.787, 0.972),
        },
        "published": PUBLISHED,
    }  # fmt: skip
    items = [
        ShownItem(
            "toys/7",
            ("arrow",),
            [
                answer("kept", "plate", 0),
                answer("moved", "Plate", 1, ground_truth="plate"),
                answer("recoloured", "", 0, question="What is in the blue box?"),
            ],
        ),
        ShownItem("toys/8", (), [answer("kept", "a cup", 0.35), answer("removed", None, None)]),
    ]
    content = EvaluationPage(
        metrics=metrics,
        figures=[Figure("kept", 61.7, 49.0, 72.9, 60), Figure("removed", 23.3, 14.4, 35.4, 60)],
        title="toys: accuracy in % (95 %)",
        columns=("", "items", "kept", "removed"),
        rows=[("arrow", "20", "65.0 (43.3 to 81.9)", "25.0")],
        total=("all", "60", "61.7 (49.0 to 72.9)", "23.3 (14.4 to 35.4)"),
        num_asked=180,
        failures=[("toys/9", "moved", "the image does not open")],
        worst=items,
        versions={"torch": "2.13.0"},
        command="vipllava evaluate bench=toys 'marks=[kept,removed]'",
    )
    return replace(content, **changes)


def read(folder: Path, content: EvaluationPage) -> tuple[str, Reader]:
    path = folder / "deeper" / "report.html"
    write_evaluation_page(path, content)
    source, reader = path.read_text(encoding="utf-8"), Reader()
    reader.feed(source)
    reader.close()
    assert reader.open == []
    return source, reader


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return read(tmp_path_factory.mktemp("page"), evaluation())[1]


@pytest.mark.parametrize(
    "text",
    [
        "toys: accuracy in % (95 %). 180 questions asked, 179 with a score; "
        "graded without a judge: accuracy.",
        "61.7\naccuracy, marks kept\n95 %: 49.0 to 72.9; 60 items",
        "marks kept: 61.7 (49.0 to 72.9), 60 items",
        "marks removed: 23.3 (14.4 to 35.4), 60 items",
        "chance: 20.0",
        "arrow\n20\n65.0\n (43.3 to 81.9)\n25.0",
        "follows the mark\n45.0 %\n95 %: 33.1 to 57.5\nof 60 items are right both with the mark",
        "falls without the mark\n38.3 points\n95 %: 25.0 to 51.7\n"
        "over 60 items, to 23.3 with the mark removed; chance is 20.0.",
        "stays when recoloured\n91.9 %\n95 %: 78.7 to 97.2\nof the 37 right ones",
        "A-7B\na paper\n86.1",
        "B-7B\na page; graded by gpt-4-0613\n60.7",
        "this run\ngraded without a judge: accuracy\n61.7\n (49.0 to 72.9)",
        "Another judge is another scale",
        "1 of 180 questions; they count neither as right nor as wrong.",
        "toys/9\nmoved\nthe image does not open",
        "toys/7\narrow\nWhat is in the red box?\nright answer:\n cup",
        "marks kept\n\u2717 plate",
        "marks moved\n\u2713 Plate\nright: plate",
        "marks recoloured\n\u2717 (nothing)\nasked: What is in the blue box?",
        "a cup \n0.35",
        "no answer",
        "digest of its files\nd1ce",
        "data set\ntoys.yaml",
        "visual_prompts.ranges.alpha\n[96, 255]",
        "vipllava evaluate bench=toys 'marks=[kept,removed]'",
        "torch 2.13.0",
    ],
)
def test_it_holds_the_figures(reader: Reader, text: str):
    assert text in reader.text


def test_it_needs_no_other_file(tmp_path: Path):
    source, reader = read(tmp_path, evaluation())
    assert len(reader.sources) == 5
    assert all(link.startswith("data:image/jpeg;base64,") for link in reader.sources)
    assert {"script", "link"} & set(reader.tags) == set()
    assert not re.search(r"https?:|url\(|@import", source)


def test_a_setting_that_is_not_set_is_no_fact(reader: Reader):
    assert "only the first items" not in reader.text
    assert "limit\nnull" in reader.text  # but stands among all of them


def with_settings(**changes: Any) -> EvaluationPage:
    content = evaluation()
    settings = {**content.metrics["settings"], **changes}
    return replace(content, metrics={**content.metrics, "settings": settings})


def test_the_judge_stands_beside_the_score(tmp_path: Path):
    text = read(tmp_path, with_settings(judge=JUDGE, limit=60))[1].text
    graded = "graded by big-72b, revision c0ffee, prompt ours (SHA-256 abababababab)"
    assert f"179 with a score; {graded}." in text
    assert f"this run\n{graded}\n61.7" in text
    assert f"judge: prompt_sha256\n{'ab' * 32}" in text
    assert "judge: runs\n5" in text
    assert "This run has only a part of the items." in text
    assert "changed on the way" not in text


def test_a_judge_that_changed_is_said(tmp_path: Path):
    reported = [{"model": "big-72b"}, {"model": "small-8b"}]
    judge = {**JUDGE, "revision": None, "reported": reported}
    text = read(tmp_path, with_settings(judge=judge))[1].text
    assert "revision not named, prompt ours (SHA-256 abababababab); it changed on the way" in text


def test_only_another_judge_is_another_scale(tmp_path: Path):
    same = with_settings(judge={**JUDGE, "model": "gpt-4-0613"})
    assert "Another judge is another scale" not in read(tmp_path, same)[1].text


def test_a_model_behind_an_address(tmp_path: Path):
    endpoint = {"model": "org/model", "base_url": "http://localhost:8000/v1", "revision": None}
    content = with_settings(endpoint=endpoint)
    del content.metrics["settings"]["checkpoint"]
    text = read(tmp_path, content)[1].text
    assert "toys\norg/model\ntoys: accuracy" in text
    assert "behind\nhttp://localhost:8000/v1" in text


def test_published_figures_of_a_measure_stand_beside_the_same_one(tmp_path: Path):
    content = evaluation(
        figures=[Figure("bbox", 48.0, None, None, 3), Figure("human", 40, 30, 50, 9)]
    )
    figures = {"Human": 48.3, "other": 1.0}
    published = [{"model": "A-7B", "figures": figures, "source": "s", "judge": None}]
    metrics = {**content.metrics, "published": published}
    text = read(tmp_path, replace(content, metrics=metrics))[1].text
    assert "Human\nother\nA-7B\ns\n48.3\n1.0\n" in text
    assert "graded without a judge: accuracy\n40.0\n (30.0 to 50.0)\n\u2013\n" in text
    assert "bbox: 48.0, 3 items" in text


def test_scores_beyond_100_have_a_longer_axis(tmp_path: Path):
    source, reader = read(tmp_path, evaluation(figures=[Figure("CIDEr", 105.9, 101.0, 111.0, 500)]))
    assert "\n0\n50\n100\n150\n200\n" in reader.text
    assert 'style="width:52.95%"' in source


def test_texts_are_never_markup(tmp_path: Path):
    content = evaluation()
    metrics = {**content.metrics, "bench": HOSTILE, "metric": HOSTILE}
    judge = dict.fromkeys(("model", "revision", "prompt_source", "prompt_sha256"), HOSTILE)
    metrics["settings"] = {
        "checkpoint": HOSTILE, HOSTILE: {HOSTILE: HOSTILE}, "judge": judge | {"reported": []},
    }  # fmt: skip
    metrics["published"] = [
        {"model": HOSTILE, "figures": {HOSTILE: 1.0}, "source": HOSTILE, "judge": HOSTILE}
    ]
    hostile = answer(HOSTILE, HOSTILE, 0, question=HOSTILE, ground_truth=HOSTILE)
    other = answer('"><script>', HOSTILE, 0.5, question="'\">" + HOSTILE, ground_truth="<b>")
    content = evaluation(
        metrics=metrics, figures=[Figure(HOSTILE, 1.0, 0.0, 2.0, 3)], title=HOSTILE,
        columns=(HOSTILE, HOSTILE), rows=[(HOSTILE, HOSTILE)], total=(HOSTILE, HOSTILE),
        failures=[(HOSTILE, HOSTILE, HOSTILE)], versions={HOSTILE: HOSTILE}, command=HOSTILE,
        worst=[ShownItem(HOSTILE, (HOSTILE,), [hostile, other])],
    )  # fmt: skip
    source, reader = read(tmp_path, content)
    assert "script" not in reader.tags
    assert "b" not in reader.tags
    assert "<script" not in source
    assert reader.text.count(HOSTILE) > 30


def test_without_groups_judge_images_and_all_else(tmp_path: Path):
    metrics = {"bench": "toys", "metric": "accuracy", "settings": {}, "published": []}
    content = EvaluationPage(
        metrics, [], "toys", ("", "items"), [], ("all", "0"), 0, [], [], {"torch": "2.13.0"}
    )  # fmt: skip
    reader = read(tmp_path, content)[1]
    assert reader.sources == []
    assert "Scores\nitems\nall\n0" in reader.text
    for heading in ("Published", "read the mark", "Without a score", "Lowest scores", "to repeat"):
        assert heading not in reader.text


def test_items_without_images_have_their_texts(tmp_path: Path):
    item = ShownItem("toys/7", (), [answer("kept", "plate", 0, images=())])
    reader = read(tmp_path, evaluation(worst=[item]))[1]
    assert reader.sources == []
    assert "right answer:\n cup\n\u2717 plate" in reader.text  # nothing else was asked
    assert "Images as the model saw them" not in reader.text


def test_many_failures_are_counted_and_the_first_listed(tmp_path: Path):
    failures = [(f"toys/{n}", "kept", "refused") for n in range(60)]
    text = read(tmp_path, evaluation(failures=failures))[1].text
    assert "60 of 180 questions" in text
    assert "The first 50:" in text
    assert text.count("refused") == 50


def test_large_images_are_made_smaller_and_keep_their_colours(tmp_path: Path):
    pixels = np.full((600, 1200, 3), (250, 40, 30), dtype=np.uint8)
    item = ShownItem("a", (), [answer("kept", "x", 0, images=(Image.fromarray(pixels),))])
    reader = read(tmp_path, evaluation(worst=[item]))[1]
    code = reader.sources[0].partition("base64,")[2]
    with Image.open(BytesIO(base64.b64decode(code))) as image:
        assert image.size == (448, 224)
        assert np.abs(np.asarray(image).astype(int) - (250, 40, 30)).max() <= 4
