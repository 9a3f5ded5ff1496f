"""Several benchmarks with one model: how they are composed, and one that joins two others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chat_server import ChatServer, completion, run_chat_server
from tests.evaluation.answering import evaluated
from tests.evaluation.test_published_benches import TASKS, ask, bench_data, vcr
from vipllava.commands.job import compose_benches
from vipllava.evaluation.benches import get_bench
from vipllava.evaluation.joining import join, joined_settings
from vipllava.evaluation.journal import Journal
from vipllava.evaluation.run import run_evaluation
from vipllava.evaluation.summary import summarise
from vipllava.files.atomic import write_json
from vipllava.types import VipLlavaError


def test_each_is_composed_alone():
    jobs = compose_benches("[vcr_qar_joint, vip_bench, regions]", ["limit=3"])
    assert [(job.bench.name, job.limit, job.max_new_tokens, job.marks) for job in jobs] == [
        ("vip_bench", 3, 1024, "kept"),
        ("regions", 3, 16, ["kept", "removed"]),
        ("vcr_qar_joint", 3, 16, "kept"),
    ]
    assert [job.run_dir for job in jobs] == [
        f"runs/eval/tiny-gpt4v/{name}" for name in ("vip_bench", "regions", "vcr_qar_joint")
    ]
    mine = compose_benches("[regions,vip_bench]", ["name=mine"])
    assert [job.run_dir for job in mine] == ["runs/mine/regions", "runs/mine/vip_bench"]


def test_all_are_those_whose_data_are_here(tmp_path: Path):
    (tmp_path / "v7w_test").mkdir()
    (tmp_path / "v7w_test" / "x.tar").touch()
    jobs = compose_benches("all", [f"paths.data_root={tmp_path}"])
    assert sorted(job.bench.name for job in jobs) == ["regions", "v7w", "vip_bench"]


def test_an_item_is_right_in_the_joint_one_if_both_are(tmp_path: Path):
    # Always saying A is right in two answers and in one reason, and in one item in both.
    labels = ((1, 1), (2, 1), (0, 0), (0, 2))
    records = [vcr(number, *each) for number, each in enumerate(labels)]
    data = bench_data(tmp_path, records)
    folders = {name: tmp_path / name for name in TASKS}
    for name, folder in folders.items():
        _, found = ask(name, data, lambda _: "A", folder)
        Journal(folder, {"seed": 1}).finish("kept", found)
        (folder / "settings.json").write_text(json.dumps({"bench": {"name": name}, "seed": 1}))
        write_json(folder / "metrics.json", {})
    wanted = {"bench": {"name": "vcr_qar_joint"}, "seed": 1}
    settings = joined_settings(folders, wanted)
    assert settings == {"bench": {n: {"name": n} for n in TASKS}, "seed": 1}
    joint = join(folders, "kept")
    assert [(each.key, each.score, each.answer) for each in joint] == [
        ("toy/vcr-0", 0, '["A", "A"]'),
        ("toy/vcr-1", 0, '["A", "A"]'),
        ("toy/vcr-2", 1, '["A", "A"]'),
        ("toy/vcr-3", 0, '["A", "A"]'),
    ]
    assert summarise(joint, get_bench("vcr_qar_joint").chance)["marks"]["kept"]["score"] == 0.25

    (folders["vcr_qar"] / "settings.json").write_text('{"bench": {}, "seed": 2}')
    with pytest.raises(VipLlavaError, match=r"this job's: .*\n  .*vcr_qar: seed=2, now 1$"):
        joined_settings(folders, wanted)
    lines = (folders["vcr_qa"] / "predictions.jsonl").read_text().splitlines()
    (folders["vcr_qa"] / "predictions.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(VipLlavaError, match=r"1 items of .*vcr_qar are not in all of .*toy/vcr-0"):
        join(folders, "kept")
    (folders["vcr_qa"] / "metrics.json").unlink()
    with pytest.raises(VipLlavaError, match=r"no finished evaluation of vcr_qa, .*bench=\[vcr_qa,"):
        joined_settings(folders, wanted)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with run_chat_server() as state:
        state.answer = lambda _: completion("A")
        yield state


def test_answers_with_other_settings_than_the_job_s_are_not_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: ChatServer
):
    bench_data(tmp_path / "data", [vcr(number, 0, number % 2) for number in range(3)])
    manifest = {
        "schema_version": 2, "name": "toy", "stage": "evaluation", "licence": "mine",
        "record_kind": "vcr", "shards": "toy/*.tar",
    }  # fmt: skip
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(manifest))
    monkeypatch.chdir(tmp_path)
    common = [
        "name=mine", "bench.manifest=toy.yaml", f"paths.data_root={tmp_path / 'data'}",
        "answerer=endpoint", f"endpoint.base_url={server.address}", "endpoint.model=toy",
        "endpoint.check_images=false",
    ]  # fmt: skip

    def evaluate(chosen: str, *more: str) -> dict[str, dict[str, Any]]:
        jobs = compose_benches(chosen, [*common, *more], folder="runs/mine")
        return run_evaluation(*jobs)

    found = evaluate(f"[vcr_qar_joint,{','.join(TASKS)}]")["vcr_qar_joint"]
    assert found["marks"]["kept"]["score"] == pytest.approx(2 / 3)
    assert found["settings"]["seed"] == 42
    server.asked.clear()
    assert evaluate("vcr_qar_joint") == {"vcr_qar_joint": found}
    other = ("seed=7", "limit=2", "perturb.jitter=0.5", "perturb.colour=red", "endpoint.model=big")
    with pytest.raises(VipLlavaError, match="other settings than this job's") as error:
        evaluate("vcr_qar_joint", *other)
    message, *lines = str(error.value).splitlines()
    assert "pass the settings that they have, or evaluate bench=[vcr_qa,vcr_qar] with" in message
    differ = (
        'endpoint.model="toy", now "big"; seed=42, now 7; limit=null, now 2; '
        'perturb.colour=null, now "red"; perturb.jitter=null, now 0.5'
    )
    assert lines == [f"  runs/mine/{name}: {differ}" for name in TASKS]
    assert server.asked == []


def test_what_failed_in_one_has_no_joint_score(tmp_path: Path):
    data = bench_data(tmp_path, [vcr(0, 0, 0)])
    folders = {name: tmp_path / name for name in TASKS}
    for name, folder in folders.items():
        bench = get_bench(name)
        found = evaluated(bench, bench.items(data), lambda _: "A", folder, data=data,
                          policies=data.policies)  # fmt: skip
        failed = [each.failed("no verdict") for each in found] if name == "vcr_qa" else found
        Journal(folder, {"seed": 1}).finish("kept", failed)
    (both,) = join(folders, "kept")
    assert (both.score, both.failure) == (None, "no verdict")
