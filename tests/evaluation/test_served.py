"""Evaluations whose answers come from a real server on loopback, by the command of the page."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chat_server import (
    Bad,
    ChatServer,
    completion,
    has_image,
    run_chat_server,
    text_of,
    wrong_at_first,
)
from tests.evaluation.answering import make_vip_bench
from tests.toy_data import encode_picture, said
from vipllava import cli
from vipllava.commands import job
from vipllava.config.composing import compose_job
from vipllava.evaluation.run import bench_problems
from vipllava.shards.tars import write_shards
from vipllava.types import VipLlavaError

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
ANSWERS = {"0": "a star", "1": "six", "2": "left of the tree"}
CHECK = "Is this image white?"


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with run_chat_server() as state:
        state.answer = answer
        yield state


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three questions of ViP-Bench, and a manifest of them."""
    manifest = {
        "schema_version": 2, "name": "three", "stage": "evaluation", "licence": "mine",
        "format": "vip_bench", "folder": "three", "shards": [],
    }  # fmt: skip
    (tmp_path / "three.yaml").write_text(yaml.safe_dump(manifest))
    make_vip_bench(tmp_path / "data" / "three")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


def answer(body: dict[str, Any]) -> bytes:
    """Answer ``bbox 1?`` and ``human 1?`` by :data:`ANSWERS`; as a judge grade them."""
    text = text_of(body)
    if " | " in text:
        return completion(verdict(row_of(text).split(" | ")[2], body["seed"]))
    return completion("yes" if text == CHECK else ANSWERS[text[-2]])


def row_of(text: str) -> str:
    """Return what a judge is asked after the worked rows, without a reminder."""
    return text.rpartition("\n\n")[2].partition("\n")[0]


def verdict(prediction: str, seed: int) -> str:
    verdicts = {"a star": "1.0", "six": f"0.{2 * seed}", "": "0.0"}
    return verdicts.get(prediction, "Hard to say")


def words(which: str, **replaced: str) -> list[str]:
    """Return a command of the page after its program, with other values of keys."""
    (line,) = [each for each in PAGE.splitlines() if each.startswith("python") and which in each]
    given = [word.split("=", 1) for word in shlex.split(line)[2:]]
    return [f"{key}={replaced.get(key, value)}" for key, value in given]


def evaluate(server: ChatServer, *more: str) -> Path:
    """Run the page's command with this server, the three questions and further words."""
    asked = words("answerer=endpoint", **{"endpoint.base_url": server.address})
    own = [] if "bench=custom" in more else ["bench.manifest=three.yaml"]
    cfg = compose_job([*asked, *own, *more], config_name="evaluate")
    job.evaluate(cfg)
    return Path(cfg.run_dir)


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return {row["key"]: row for row in map(json.loads, lines)}


def test_the_command_of_the_page(place: Path, server: ChatServer):
    refused = {"human 1?": [Bad(400, b'{"error": {"message": "too long"}}')]}
    server.answer = wrong_at_first(answer, refused)
    folder = evaluate(server)
    assert folder == Path("runs/eval/Qwen2.5-VL-7B-Instruct/vip_bench")
    assert sorted(text for text in server.texts if text != CHECK) == [
        *(f"bbox {n}?" for n in range(3)), *(f"human {n}?" for n in range(3)),
    ]  # fmt: skip
    assert all(has_image(body) for body in server.asked if text_of(body) != CHECK)
    found = rows(folder)
    assert [(row["answer"], row["score"]) for row in found.values()] == [
        ("a star", 1.0), ("six", 0.0), ("left of the tree", 0.5),
        ("a star", 1.0), (None, None), ("left of the tree", 0.5),
    ]  # fmt: skip
    assert found["human/v1_1"]["failure"] == "HTTP 400: too long"
    metrics = json.loads((folder / "metrics.json").read_text())
    human = metrics["splits"]["human"]
    assert (human["total"], human["num_items"], human["num_failures"]) == (75.0, 2, 1)
    settings = json.loads((folder / "settings.json").read_text())
    assert metrics["settings"] == settings
    assert (settings["answerer"], settings["max_new_tokens"]) == ("endpoint", 1024)
    assert "checkpoint" not in settings
    assert settings["endpoint"] == {
        "base_url": server.address, "model": "Qwen/Qwen2.5-VL-7B-Instruct", "revision": None,
        "temperature": 0.0, "top_p": None, "seed": 0, "extra_body": {},
    }  # fmt: skip

    # The same command asks what has no answer, and nothing else.
    server.asked.clear()
    evaluate(server)
    assert [text for text in server.texts if text != CHECK] == ["human 1?"]
    assert [row["score"] for row in rows(folder).values()] == [1.0, 0.0, 0.5] * 2


def test_two_evaluations_are_compared(
    place: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
):
    first = evaluate(server)
    server.answer = lambda body: completion("star seven, left of the cup")
    second = evaluate(server, "name=other", "endpoint.temperature=0.5")
    capsys.readouterr()
    assert cli.main(["compare", str(first), str(second)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"endpoint.temperature +│ 0.0 +│ 0.5 ", printed)
    # bbox and human: 0 -> 1 and 0.5 -> 1, which are 6 scores of 3 images.
    assert "4 of 6 items changed: 0 lower, 4 higher" in printed
    assert "B - A: +50.0" in printed
    assert cli.main(["compare", str(first), str(second), "--json"]) == 0
    total = json.loads(capsys.readouterr().out)["comparisons"][0]["total"]
    assert (total["first"]["value"], total["other"]["value"]) == (0.5, 1.0)


def test_another_temperature_in_the_same_folder_is_refused(place: Path, server: ChatServer):
    evaluate(server)
    with pytest.raises(VipLlavaError, match=r"holds answers with other settings \(endpoint: "):
        evaluate(server, "endpoint.temperature=0.5")


def problems(*overrides: str) -> list[str]:
    return bench_problems(compose_job(overrides, config_name="evaluate"))


def test_settings_that_cannot_work():
    (problem,) = problems("answerer=endpoint", "endpoint.model=toy")
    assert problem == "endpoint: base_url=None: expected e.g. http://localhost:8000/v1"
    (problem,) = problems("answerer=endpoint", "endpoint.base_url=http://x:secret@y/v1")
    assert problem.startswith("endpoint: base_url holds a name, password or query; name api_key")
    (problem,) = problems("endpoint.model=toy")
    assert problem == "endpoint.model=toy: the engine answers; pass answerer=endpoint, too"
    key = ("answerer=endpoint", "endpoint.base_url=http://y/v1", "endpoint.model=toy")
    (problem,) = problems(*key, "endpoint.api_key_env=NO_SUCH_KEY")
    assert problem.startswith("endpoint: api_key_env=NO_SUCH_KEY: this environment variable holds")
    assert problems(*key) == []


def test_several_images_are_for_who_takes_them():
    behind = ("answerer=endpoint", "endpoint.base_url=http://y/v1", "endpoint.model=toy")
    assert problems("encoding=crop", "marks=kept", *behind) == []
    (problem,) = problems("encoding=crop", "marks=kept")
    assert problem.startswith(
        "encoding=crop shows a region as a second image, and this model takes"
    )


def judged(server: ChatServer, *more: str) -> Path:
    """Grade twice, as the page's command does."""
    given = {"judge.base_url": server.address, "judge.runs": "2"}
    asked = [word for word in words("judge.base_url", **given) if word.startswith("judge.")]
    return evaluate(server, *asked, *more)


def test_a_judge_grades_what_has_an_answer(
    place: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
):
    refused = {"human 0?": [Bad(400, b'{"error": {"message": "too long"}}')]}
    server.answer = wrong_at_first(answer, refused)
    folder = judged(server)
    # Question 2 has prose for a verdict, five times.
    asked = [body for body in server.asked if " | " in text_of(body)]
    assert not any(has_image(body) for body in asked)
    assert len(asked) == 2 * 1 + 2 * 2 + 2 * 5
    metrics = json.loads((folder / "metrics.json").read_text())
    bbox, human = metrics["splits"]["bbox"], metrics["splits"]["human"]
    assert (bbox["total"], bbox["std"]) == (pytest.approx(55.0), pytest.approx(5.0))
    assert bbox["totals"] == pytest.approx([50.0, 60.0])
    assert (bbox["num_items"], bbox["num_failures"]) == (2, 1)
    no_verdict = "run 1 of 2: no verdict in 5 replies; the last one: `Hard to say`"
    assert bbox["failures"] == {"v1_2": no_verdict}
    assert bbox["by_capability"]["math"]["score"] == pytest.approx(10.0)
    assert (human["total"], human["num_items"]) == (pytest.approx(10.0), 1)
    assert human["failures"] == {"v1_0": "HTTP 400: too long", "v1_2": no_verdict}
    grades = json.loads((folder / "bbox-grade-2runs.json").read_text())
    assert grades == {
        "v1_0": {"model": ["toy-1"] * 2, "content": ["1.0"] * 2, "score": [1.0, 1.0]},
        "v1_1": {"model": ["toy-1"] * 2, "content": ["0.0", "0.2"], "score": [0.0, 0.2]},
    }
    assert rows(folder)["bbox/v1_1"]["verdicts"] == [0.0, 0.2]
    judge = metrics["settings"]["judge"]
    assert (judge["model"], judge["revision"]) == ("Qwen/Qwen2.5-72B-Instruct", "COMMIT")
    assert (judge["seed"], judge["runs"], judge["prompt_source"]) == (0, 2, "ours")
    assert len(judge["prompt_sha256"]) == 64
    printed = capsys.readouterr().out
    assert "ViP-Bench, graded by Qwen/Qwen2.5-72B-Instruct (0-100, 95 %)" in printed
    assert re.search(r"55.0 \(10.0 to 100.0\) of 2, 1 without verdict, std 5.0 over 2", printed)
    line = "graded by Qwen/Qwen2.5-72B-Instruct, revision COMMIT, seed 0, runs 2, prompt ours (SHA"
    assert line in printed
    assert "human 48.3 (ViP-LLaVA, CVPR 2024; graded by gpt-4-0613)" in printed
    report = (folder / "report.html").read_text()
    assert "graded by Qwen/Qwen2.5-72B-Instruct, revision COMMIT, prompt ours (SHA-256 " in report
    assert "Another judge is another scale" in report
    assert "3 of 6 questions; they count neither as right nor as wrong." in report
    assert "<td>HTTP 400: too long</td>" in report
    assert report.count("data:image/jpeg") == 3  # what has a score, shown as it was asked

    # Again: the model is asked what it has not answered, the judge about that.
    server.asked.clear()
    judged(server)
    texts = [row_of(text) for text in server.texts if text != CHECK]
    assert texts == ["human 0?", *["human 0? | star | a star | "] * 2]
    # Without a judge, and with another one, the model is asked nothing.
    server.asked.clear()
    evaluate(server)
    assert server.asked == []
    assert "judge" not in json.loads((folder / "metrics.json").read_text())["settings"]
    assert "verdicts" not in rows(folder)["bbox/v1_1"]
    judged(server, "judge.revision=ANOTHER")
    assert {" | " in text for text in server.texts} == {True}


def test_an_empty_answer_is_judged_as_one(place: Path, server: ChatServer):
    def say_nothing(body: dict[str, Any]) -> bytes:
        return answer(body) if " | " in text_of(body) else completion("")

    server.answer = say_nothing
    folder = judged(server, "endpoint.check_images=false")
    assert {(row["answer"], row["score"]) for row in rows(folder).values()} == {("", 0.0)}
    assert "bbox 1? | 7 <OR> seven |  | " in [row_of(text) for text in server.texts]


def test_records_of_ones_own_are_judged(
    place: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
):
    manifest = {
        "schema_version": 2, "name": "mine", "stage": "evaluation", "licence": "mine",
        "record_kind": "regions", "shards": "mine/*.tar",
    }  # fmt: skip
    (place / "mine.yaml").write_text(yaml.safe_dump(manifest))
    records = [
        {
            "id": f"r-{n}", "image": "x.jpg", "bboxes": [[5, 5, 40, 30]],
            "conversations": said(f"<image>\nWhat is <bbox0>? {n}?", "a cup"),
        }
        for n in range(3)
    ]  # fmt: skip
    entries = [(r["id"], r, encode_picture(seed=n), "jpg") for n, r in enumerate(records)]
    write_shards(entries, place / "data" / "mine")
    folder = judged(server, "bench=custom", "bench.manifest=mine.yaml", "bench.score=judge")
    kept = json.loads((folder / "metrics.json").read_text())["marks"]["kept"]
    assert (kept["score"], kept["num_items"]) == (pytest.approx(0.55), 2)
    assert (kept["low"], kept["high"]) == (pytest.approx(0.1), 1.0)
    assert kept["runs"] == {"scores": pytest.approx([0.5, 0.6]), "std": pytest.approx(0.05)}
    assert list(kept["failures"]) == ["mine/r-2"]
    assert "custom: graded by Qwen/Qwen2.5-72B-Instruct" in capsys.readouterr().out


def test_totals_of_different_judges_are_not_compared(
    place: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
):
    (place / "official.txt").write_text("Question | Ground truth | Prediction | Correctness\n")
    folders = [
        evaluate(server, "name=none"),
        judged(server, "name=ours"),
        judged(server, "name=seed", "judge.seed=1"),
        judged(server, "name=other", "judge.prompt=official.txt"),
    ]
    none, ours, seed, other = map(str, folders)
    capsys.readouterr()
    assert cli.main(["compare", ours, seed]) == 0
    assert re.search(r"judge.seed +│ 0 +│ 1 ", capsys.readouterr().out)
    assert cli.main(["compare", ours, none]) == 2
    assert "runs/none: judge.model=-" in capsys.readouterr().err
    assert cli.main(["compare", ours, other]) == 2
    assert "runs/other: judge.prompt_sha256=" in capsys.readouterr().err


def test_a_judge_that_cannot_work():
    (problem,) = problems("bench=custom", "bench.score=judge")
    assert problem.startswith("judge: base_url=None: expected e.g. http://localhost:8000/v1; model")
    (problem,) = problems("bench=vip_bench", "judge.model=toy")
    assert problem == "judge: base_url=None: expected e.g. http://localhost:8000/v1"
    given = ("bench=vip_bench", "judge.base_url=http://y/v1", "judge.model=toy")
    (problem,) = problems(*given, "judge.prompt=nowhere.txt")
    assert problem.startswith("the judge's prompt nowhere.txt cannot be read")
    assert problems(*given) == []
    assert problems(*given[1:], "bench=regions") == []  # which needs none
