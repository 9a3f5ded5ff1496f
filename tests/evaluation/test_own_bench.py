"""The benchmark of docs/evaluation.md, run as it stands there; the registry; options."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.toy_data import encode_picture
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
    """Reads every sign as SHOP."""

    def answer(self, requests: list[Any], **settings: Any) -> list[str]:
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
    results = json.loads((folder / "results.json").read_text())
    assert results == {
        "benchmark": "sign_letters", "manifest": "my_signs.yaml", "checkpoint": "weights",
        "seed": 42, "limit": None, "num_signs": 2, "letters": 0.375,
    }  # fmt: skip
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert lines == [
        {"key": "my_signs/sign-0", "read": "SHOP"},
        {"key": "my_signs/sign-1", "read": "SHOP"},
    ]
    assert "letters in %" in capsys.readouterr().out


def test_a_second_evaluation_into_one_folder_is_refused(place: Path):
    cfg = job("checkpoint=weights", folder=place)
    folder = place / "runs" / "eval" / "weights" / "sign_letters"
    folder.mkdir(parents=True)
    refused = pytest.raises(VipLlavaError, match=rf"in use by process {os.getpid()} on .* name=NEW")
    with hold_folder(folder, another="nothing"), refused:
        run_evaluation(cfg)
    assert [path.name for path in folder.iterdir()] == ["run.lock"]


def test_results_of_another_question_are_not_replaced(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Engine, "from_checkpoint", lambda *_, **__: Reader())
    folder = place / "runs" / "eval" / "weights" / "sign_letters"
    words = ("checkpoint=weights", f"paths.data_root={place / 'data'}")
    run_evaluation(job(*words, folder=place))
    before = (folder / "results.json").read_bytes()
    run_evaluation(job(*words, folder=place))  # the same question may be asked again
    for other in ("limit=1", "seed=7"):
        with pytest.raises(ConfigError, match=r"results.json has the results of (limit|seed)=.*"):
            run_evaluation(job(*words, other, folder=place))
    assert (folder / "results.json").read_bytes() == before
    run_evaluation(job(*words, "limit=1", "name=few", folder=place))
    (folder / "results.json").write_text("{")
    with pytest.raises(ConfigError, match="has the results of something else: pass name=NEW_NAME"):
        run_evaluation(job(*words, folder=place))


def test_options_are_the_benchmarks_own(place: Path):
    (problem,) = bench_problems(job("+bench.ignore_cases=true", folder=place))
    assert problem == (
        "bench has unknown keys ignore_cases; `sign_letters` has name, module, manifest, "
        "max_new_tokens, ignore_case"
    )
    wrong = compose_job(["bench.draw_marks=maybe", "batch_size=0"], config_name="evaluate")
    with pytest.raises(ConfigError, match=r"(?s)batch_size=0: .*bench.draw_marks=maybe: expected"):
        check_config(wrong, more=bench_problems(wrong))


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
    assert sorted(BENCHES) == sorted(path.stem for path in folder.glob("*.yaml"))
