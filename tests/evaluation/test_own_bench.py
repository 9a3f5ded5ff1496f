"""The benchmark of docs/evaluation.md, run as it stands there; the registry; options."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.toy_data import encode_picture
from vipllava import cli
from vipllava.config.checks import check_config
from vipllava.config.composing import compose_job
from vipllava.evaluation import benches
from vipllava.evaluation.benches import BENCHES, get_bench, register_bench
from vipllava.evaluation.run import bench_problems, run_evaluation
from vipllava.files.locks import hold_folder
from vipllava.inference.engine import Engine
from vipllava.shards.tars import write_shards
from vipllava.types import ConfigError, VipLlavaError

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)[-1]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the module, the configuration and two signs; what is registered goes again."""
    (tmp_path / "sign_letters.py").write_text(block("python"))
    (tmp_path / "my_conf" / "bench").mkdir(parents=True)
    (tmp_path / "my_conf" / "bench" / "sign_letters.yaml").write_text(block("yaml"))
    manifest = {
        "schema_version": 2, "name": "my_signs", "stage": "evaluation", "licence": "mine",
        "record_kind": "regions", "shards": "signs/*.tar",
    }  # fmt: skip
    (tmp_path / "my_signs.yaml").write_text(yaml.safe_dump(manifest))
    records = [
        (
            f"sign-{number}",
            {
                "id": f"sign-{number}",
                "image": "sign.jpg",
                "bboxes": [[5, 5, 40, 30]],
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is written on <bbox0>?"},
                    {"from": "gpt", "value": sign},
                ],
            },
            encode_picture(),
            "jpg",
        )
        for number, sign in enumerate(("STOP", "No way"))
    ]
    write_shards(records, tmp_path / "data" / "signs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benches, "BENCHES", dict(BENCHES))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "sign_letters", raising=False)
    return tmp_path


class Reader:
    """Reads every sign as SHOP, once it may."""

    device = SimpleNamespace(type="none")  # it computes nothing, so that no threads are set
    num_answers = 99

    def answer(self, requests: list[Any], **settings: Any) -> list[str]:
        if self.num_answers < len(requests):
            raise KeyboardInterrupt
        return ["SHOP" for _ in requests]


def job(*overrides: str, folder: Path) -> Any:
    return compose_job(
        [f"hydra.searchpath=[file://{folder / 'my_conf'}]", "bench=sign_letters", *overrides],
        config_name="evaluate",
    )


def test_the_example_of_the_page(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(Engine, "from_checkpoint", lambda *_, **__: Reader())
    (place / "weights").mkdir()
    cfg = job("checkpoint=weights", f"paths.data_root={place / 'data'}", folder=place)
    check_config(cfg, more=bench_problems(cfg))
    run_evaluation(cfg)
    folder = place / "runs" / "eval" / "weights" / "sign_letters"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["bench"] == "sign_letters"
    assert metrics["metric"] == "letters"
    assert metrics["marks"]["kept"]["score"] == 0.375
    assert metrics["settings"]["seed"] == 42
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [(row["key"], row["answer"], row["score"]) for row in rows] == [
        ("my_signs/sign-0", "SHOP", 0.75),
        ("my_signs/sign-1", "SHOP", 0.0),
    ]
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [(line["question_id"], line["text"], line["model_id"]) for line in lines] == [
        ("sign-0", "SHOP", "weights"),
        ("sign-1", "SHOP", "weights"),
    ]
    assert "letters in %" in capsys.readouterr().out
    report = (folder / "report.html").read_text()
    assert "letters, marks kept" in report
    assert report.index("\u2717 SHOP") < report.index("SHOP <span")  # the worse one first
    assert report.count("data:image/jpeg") == 2

    # The same items under another seed, of marks that nobody sees: what `compare` says of both.
    run_evaluation(job("checkpoint=weights", f"paths.data_root={place / 'data'}", "seed=7",
                       "name=other", folder=place))  # fmt: skip
    capsys.readouterr()
    assert cli.main(["compare", str(folder), "runs/other"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"seed +│ 42 +│ 7 ", printed)
    assert "0 of 2 items changed: 0 lower, 0 higher" in printed
    assert printed.endswith("p 1.000: no difference that these items can show\n")


def test_what_gets_no_score_is_a_failure_and_never_a_zero(
    place: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Engine, "from_checkpoint", lambda *_, **__: Reader())
    path = place / "sign_letters.py"
    given = 'float("nan")))\n        break'
    path.write_text(path.read_text().replace("right / len(sign)))", given))
    with pytest.raises(VipLlavaError, match="none of 2 answers has a score, the first because"):
        run_evaluation(job("checkpoint=x", f"paths.data_root={place / 'data'}", folder=place))
    folder = place / "runs" / "eval" / "x" / "sign_letters"
    kept = json.loads((folder / "metrics.json").read_text())["marks"]["kept"]
    assert (kept["score"], kept["num_items"], kept["num_failures"]) == (None, 0, 2)
    assert list(kept["failures"].values()) == [
        "its score is no finite number", "it was given no score",
    ]  # fmt: skip


def test_answers_to_other_images_are_not_mixed(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Engine, "from_checkpoint", lambda *_, **__: Reader())
    (place / "weights").mkdir()
    common = ("checkpoint=weights", f"paths.data_root={place / 'data'}")
    run_evaluation(job(*common, folder=place))
    with pytest.raises(
        VipLlavaError, match=r"other settings \(perturb: .*'jpeg_quality': None.*, now"
    ):
        run_evaluation(job(*common, "perturb.jpeg_quality=50", folder=place))
    run_evaluation(job(*common, "perturb.jpeg_quality=50", "name=fifty", folder=place))
    settings = json.loads((place / "runs" / "fifty" / "settings.json").read_text())
    assert settings["perturb"]["jpeg_quality"] == 50


@pytest.mark.parametrize(
    ("field", "before", "now"),
    [
        ("policy", "auto", "refcocog"),
        ("record_kind", "regions", "auto"),
        ("apply_exif_orientation", True, False),
    ],
)
def test_a_manifest_that_makes_other_items_of_the_data_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, field: str, before: Any, now: Any
):
    monkeypatch.setattr(Engine, "from_checkpoint", lambda *_, **__: Reader())
    common = ("checkpoint=x", f"paths.data_root={place / 'data'}")
    run_evaluation(job(*common, folder=place))
    path = place / "my_signs.yaml"
    manifest = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(manifest | {"notes": "read by nobody"}))
    run_evaluation(job(*common, folder=place))
    path.write_text(yaml.safe_dump(manifest | {field: now}))
    with pytest.raises(VipLlavaError) as error:
        run_evaluation(job(*common, folder=place))
    assert "holds answers with other settings (manifest: {" in str(error.value)
    assert f"'{field}': {before!r}" in str(error.value).partition(", now ")[0]
    assert f"'{field}': {now!r}" in str(error.value).partition(", now ")[2]


@pytest.mark.parametrize("source", ["base", "vision_tower"])
def test_other_weights_of_the_same_name_are_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, source: str
):
    monkeypatch.setattr(Engine, "from_checkpoint", lambda *_, **__: Reader())
    (place / "tensors").mkdir()
    weights = place / "tensors" / "model.safetensors"
    weights.write_bytes(b"first")
    common = ("checkpoint=x", f"paths.data_root={place / 'data'}", f"{source}=tensors")
    run_evaluation(job(*common, folder=place))
    weights.write_bytes(b"other")
    with pytest.raises(VipLlavaError, match=rf"other settings \({source}_digest: '\w+', now '\w+'"):
        run_evaluation(job(*common, folder=place))


def test_a_second_evaluation_into_one_folder_is_refused(place: Path):
    cfg = job("checkpoint=weights", folder=place)
    folder = place / "runs" / "eval" / "weights" / "sign_letters"
    folder.mkdir(parents=True)
    refused = pytest.raises(VipLlavaError, match=rf"in use by process {os.getpid()} on .* name=NEW")
    with hold_folder(folder, another="nothing"), refused:
        run_evaluation(cfg)
    assert [path.name for path in folder.iterdir()] == ["run.lock"]


def test_options_are_the_benchmarks_own(place: Path):
    (problem,) = bench_problems(job("+bench.ignore_cases=true", folder=place))
    assert problem == (
        "bench has unknown keys ignore_cases; `sign_letters` has name, module, manifest, "
        "max_new_tokens, marks, ignore_case"
    )
    wrong = compose_job(["marks=maybe", "batch_size=0"], config_name="evaluate")
    known = "kept, removed, moved, recoloured"
    with pytest.raises(ConfigError, match=rf"(?s)batch_size=0: .*marks=maybe: expected .*{known}"):
        check_config(wrong, more=bench_problems(wrong))


def test_an_encoding_has_to_fit_the_marks():
    wrong = compose_job(["encoding=coordinates"], config_name="evaluate")
    (problem,) = bench_problems(wrong)
    assert problem.startswith("encoding=coordinates with marks=removed: it draws no marks")
    assert bench_problems(compose_job(["encoding=set_of_mark"], config_name="evaluate")) == []


def test_a_module_that_is_not_there(place: Path):
    (problem,) = bench_problems(job("bench.module=signs.nowhere", folder=place))
    assert problem.startswith("bench.module=signs.nowhere: there is no such module in this folder")
    (place / "broken.py").write_text("import not_installed_anywhere")
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        bench_problems(job("bench.module=broken", folder=place))


def test_an_unknown_name_lists_the_known_and_a_known_one_is_refused():
    with pytest.raises(ConfigError, match="unknown benchmark `mmvp`; known: regions, vip_bench"):
        get_bench("mmvp")
    with pytest.raises(ConfigError, match="there is a benchmark `regions` already; known: regions"):
        register_bench(replace(BENCHES["vip_bench"], name="regions"))


def test_every_benchmark_has_its_file_of_configuration():
    folder = Path(__file__).parents[2] / "conf" / "bench"
    assert sorted([*BENCHES, "all"]) == sorted(path.stem for path in folder.glob("*.yaml"))
