"""What is wrong with data, answers or a model is an error that names it, or a recorded failure."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.chat_server import Bad, completion, has_image, run_chat_server
from tests.evaluation.answering import POLICIES, Says, evaluated, grey_sample, make_vip_bench
from tests.toy_data import encode_picture, make_manifest, said
from vipllava import cli
from vipllava.evaluation.answerers import EndpointAnswerer, EngineSettings
from vipllava.evaluation.asking import Protocol, ask_items
from vipllava.evaluation.bench import BenchData, Item
from vipllava.evaluation.benches.regions import REGIONS
from vipllava.evaluation.benches.vip_bench import VIP_BENCH
from vipllava.evaluation.journal import Journal, read_predictions
from vipllava.evaluation.summary import score_table, summarise
from vipllava.inference.endpoint import Endpoint, EndpointError, EndpointSettings
from vipllava.shards.tars import write_shards
from vipllava.types import CheckpointError, ConfigError, VipLlavaError


def items(count: int = 4) -> list[Item]:
    return [Item(f"toy/{number}", grey_sample(str(number), "star")) for number in range(count)]


def no_model():
    raise AssertionError("opened")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with weights that cannot be opened, and a manifest of shards."""
    manifest = {
        "schema_version": 2, "name": "mine", "stage": "evaluation", "licence": "mine",
        "record_kind": "regions", "shards": "mine/*.tar",
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(manifest))
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


EVALUATE = ["evaluate", "bench=custom", "bench.manifest=mine.yaml", "checkpoint=weights"]


def test_no_questions(place: Path, capsys: pytest.CaptureFixture[str]):
    (place / "data").mkdir()
    assert cli.main(EVALUATE) == 2
    assert "mine/*.tar" in capsys.readouterr().err
    assert not list(place.rglob("metrics.json"))


def write_records(place: Path, *images: bytes) -> None:
    turns = said("<image>\nWhat is <bbox0>?", "star")
    record = {"image": "a.jpg", "bboxes": [[5, 5, 40, 30]], "conversations": turns}
    rows = [(str(n), record | {"id": str(n)}, image, "jpg") for n, image in enumerate(images)]
    write_shards(rows, place / "data" / "mine", check_images=False)


def test_a_record_whose_image_is_none_is_named(place: Path, capsys: pytest.CaptureFixture[str]):
    write_records(place, b"no image")
    assert cli.main(EVALUATE) == 2
    assert capsys.readouterr().err == (
        "error: data/mine/shard-000000.tar: mine/0: 8 bytes starting with b'no image' are no "
        "image; expected JPEG, PNG, WEBP, GIF, BMP; replace the file or remove the record\n"
    )


def test_no_image_opens_to_its_end(place: Path, capsys: pytest.CaptureFixture[str]):
    image = encode_picture()
    write_records(place, image[:-60], image[:-40])
    # No model is opened for that, either.
    assert cli.main(EVALUATE) == 2
    assert "none of 2 items has an answer: mine/0: " in capsys.readouterr().err
    (path,) = place.rglob("predictions.jsonl")
    failures = [row.failure for row in read_predictions(path).values()]
    assert [failure and failure[:8] for failure in failures] == ["mine/0: ", "mine/1: "]


def test_an_image_that_does_not_open_costs_its_item_alone(tmp_path: Path):
    first, *others = items()
    broken = replace(first, sample=replace(first.sample, image=b"no image"))
    model = Says(lambda _: "star")
    found = evaluated(REGIONS, [broken, *others], model, tmp_path, ("kept", "removed"))
    assert [each.score for each in found] == [None, 1, 1, 1] * 2
    assert [request.key for request in model.asked] == [f"toy/{n}" for n in (1, 1, 2, 2, 3, 3)]
    kept = summarise(found)["marks"]["kept"]
    assert (kept["score"], kept["num_items"], kept["num_failures"]) == (1.0, 3, 1)


def test_answers_to_unknown_items_are_named_and_missing_ones_asked(tmp_path: Path):
    evaluated(REGIONS, items(), lambda _: "star", tmp_path)
    path = tmp_path / "predictions.jsonl"
    lines = sorted(path.read_text().splitlines(keepends=True))
    path.write_text("".join([*lines[:2], lines[3].replace("toy/3", "toy/9")]))
    model = Says(lambda _: "cup")
    with pytest.raises(VipLlavaError) as error:
        evaluated(REGIONS, items(), model, tmp_path)
    assert str(error.value) == (
        f"{path} has answers to 1 items that the benchmark does not have, e.g. toy/9: delete those "
        "lines, or evaluate into another folder with name=NEW_NAME"
    )
    assert [request.key for request in model.asked] == ["toy/2", "toy/3"]
    kept = [line for line in path.read_text().splitlines(keepends=True) if "toy/9" not in line]
    path.write_text("".join(kept))
    found = evaluated(REGIONS, items(), lambda _: "never asked", tmp_path)
    assert [each.answer for each in found] == ["star", "star", "cup", "cup"]


def test_a_folder_of_questions_that_has_changed_is_known_by_its_content(tmp_path: Path):
    make_vip_bench(tmp_path / "ViP-Bench")
    manifest = make_manifest(format="vip_bench", folder="ViP-Bench", shards=[])
    data = BenchData(manifest, tmp_path, {})
    before = data.fingerprint
    assert before == data.fingerprint
    path = tmp_path / "ViP-Bench" / "bbox" / "questions.jsonl"
    path.write_text(path.read_text().replace("bbox 1?", "bbox 7?"))
    Journal(tmp_path / "out", {"data": before})
    with pytest.raises(VipLlavaError, match=rf"holds answers with other .*data: '{before}', now"):
        Journal(tmp_path / "out", {"data": data.fingerprint})


def test_an_empty_answer_is_scored_and_said(tmp_path: Path):
    texts = iter(["star", "", " \n", "star"])
    found = evaluated(REGIONS, items(), lambda _: next(texts), tmp_path)
    assert sorted((each.answer, each.score) for each in found) == [
        ("", 0), (" \n", 0), ("star", 1), ("star", 1),
    ]  # fmt: skip
    metrics = summarise(found)
    kept = metrics["marks"]["kept"]
    assert (kept["score"], kept["num_items"], kept["num_empty"]) == (0.5, 4, 2)
    note = "2 answers with marks kept are empty, and counted"
    assert note in score_table(REGIONS, metrics).notes


def test_an_empty_answer_of_vip_bench_stands_in_its_total(tmp_path: Path):
    make_vip_bench(tmp_path / "ViP-Bench")
    manifest = make_manifest(format="vip_bench", folder="ViP-Bench", shards=[])
    data = BenchData(manifest, tmp_path, {})
    found = evaluated(VIP_BENCH, VIP_BENCH.items(data), lambda _: "", tmp_path / "out", data=data)
    table = VIP_BENCH.table(VIP_BENCH, {"settings": {}, **VIP_BENCH.summarise(found, None)})
    assert [cell.endswith(" of 3, 3 empty answers") for cell in table.total[1:]] == [True, True]


def test_a_benchmark_without_regions_has_no_faithfulness_and_opens_no_model(tmp_path: Path):
    make_vip_bench(tmp_path / "ViP-Bench")
    manifest = make_manifest(format="vip_bench", folder="ViP-Bench", shards=[])
    asked = VIP_BENCH.items(BenchData(manifest, tmp_path, {}))
    protocol = Protocol({}, seed=1, marks=("kept", "moved"))
    with pytest.raises(ConfigError) as error:
        ask_items(asked, protocol, no_model, Journal(tmp_path / "out", {}))
    assert str(error.value) == (
        "marks=moved: bbox/v1_0 has no regions, its image carries its marks; such items can be "
        "asked with marks=kept only, and of what is perturbed with jpeg_quality"
    )


def test_an_endpoint_without_images_answers_nothing_and_one_that_sees_goes_on(tmp_path: Path):
    refusal = b'{"error": {"message": "toy is not a multimodal model"}}'
    protocol = Protocol(POLICIES, seed=1)
    with run_chat_server() as server:
        answerer = EndpointAnswerer(Endpoint(EndpointSettings(server.address, "toy")))
        server.answer = lambda body: Bad(400, refusal) if has_image(body) else completion("a star")
        with pytest.raises(EndpointError) as error:
            ask_items(items(), protocol, lambda: answerer, Journal(tmp_path, {}))
        assert str(error.value) == (
            f"`toy` at {server.address} takes no images: HTTP 400: toy is not a multimodal model"
        )
        assert read_predictions(tmp_path / "predictions.jsonl") == {}
        server.answer = lambda body: completion("a star")
        found = ask_items(items(), protocol, lambda: answerer, Journal(tmp_path, {}))["kept"]
    assert [each.answer for each in found] == ["a star"] * 4


def test_a_checkpoint_of_an_unknown_template(export: Path, tmp_path: Path):
    folder = shutil.copytree(export, tmp_path / "export")
    meta = json.loads((folder / "vipllava.json").read_text())
    (folder / "vipllava.json").write_text(json.dumps(meta | {"chat_template": "vicuna_v9"}))
    with pytest.raises(CheckpointError) as error:
        EngineSettings(str(folder), "cpu").open()
    assert str(error.value) == (
        f"{folder} says that it answers in a template that is not known here: unknown chat "
        "template 'vicuna_v9': use one of chatml, llama_3, llava_v0, llava_v1, phi_3, plain, with "
        "chat_template=NAME"
    )
    named = EngineSettings(str(folder), "cpu", options={"chat_template": "llava_v1"}).open()
    assert named.encoder.template.name == "llava_v1"


def test_a_checkpoint_that_says_no_template(export: Path, tmp_path: Path):
    folder = shutil.copytree(export, tmp_path / "export")
    (folder / "vipllava.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "</s>"}))
    with pytest.raises(CheckpointError) as error:
        EngineSettings(str(folder), "cpu").open()
    assert str(error.value) == (
        f"{folder} does not say which chat template it was trained with, and its tokenizer has "
        "the role tokens of none: pass chat_template=NAME"
    )
