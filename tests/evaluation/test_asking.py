"""Items to predictions on disk: killed and resumed, failures asked again, settings that differ."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluation.answering import Says, evaluated, grey_sample
from vipllava.evaluation.bench import Item
from vipllava.evaluation.benches.regions import REGIONS
from vipllava.evaluation.journal import Journal, read_predictions
from vipllava.types import Failure, RecordError, Request, VipLlavaError

ROOT = Path(__file__).parents[2]


def items(count: int = 8) -> list[Item]:
    return [Item(f"toy/{number}", grey_sample(str(number), "star")) for number in range(count)]


def echo(request: Request) -> str:
    return f"{request.key}: {request.turns[-1].text}"


def keys(model: Says) -> list[str]:
    return [request.key for request in model.asked]


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.evaluation.answering import evaluated
from tests.evaluation.test_asking import echo, items
from vipllava.evaluation.benches.regions import REGIONS

def say(request):
    if request.key == "toy/5":
        os.kill(os.getpid(), signal.SIGKILL)
    return echo(request)

evaluated(REGIONS, items(), say, Path(sys.argv[1]), ("kept", "removed"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="signals")
def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed")],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    path = tmp_path / "killed" / "predictions.jsonl"
    assert set(read_predictions(path)) == {"toy/0", "toy/1", "toy/2", "toy/3", "toy/4"}
    with path.open("ab") as file:
        file.write('{"key": "toy/5", "answer": "é'.encode()[:-1])  # torn in a letter
    model = Says(echo)
    found = evaluated(REGIONS, items(), model, tmp_path / "killed", ("kept", "removed"))
    # Three at a time: 4 had been answered with its mark, not without.
    assert keys(model) == ["toy/4", "toy/5", "toy/5", "toy/6", "toy/6", "toy/7", "toy/7"]
    assert found == evaluated(REGIONS, items(), echo, tmp_path / "whole", ("kept", "removed"))
    again = Says(echo)
    assert evaluated(REGIONS, items(), again, tmp_path / "killed", ("kept", "removed")) == found
    assert again.asked == []


def test_a_model_is_opened_only_if_there_is_something_to_ask(tmp_path: Path):
    from vipllava.evaluation.asking import Protocol, ask_items

    def no_model():
        raise AssertionError("opened")

    assert ask_items([], Protocol({}, 1), no_model, Journal(tmp_path, {})) == {"kept": []}


def test_failures_are_asked_again(tmp_path: Path):
    def say(request: Request) -> str | Failure:
        return Failure("no answer in 60 s") if request.key in ("toy/1", "toy/6") else "star"

    found = evaluated(REGIONS, items(), say, tmp_path)
    assert [each.failure for each in found if each.failure] == ["no answer in 60 s"] * 2
    assert [each.score for each in found] == [1, None, 1, 1, 1, 1, None, 1]
    model = Says(lambda _: "cup")
    found = evaluated(REGIONS, items(), model, tmp_path)
    assert keys(model) == ["toy/1", "toy/6"]
    assert [each.score for each in found] == [1, 0, 1, 1, 1, 1, 0, 1]
    assert [each.key for each in found] == [item.key for item in items()]


def test_other_settings_are_refused_by_name(tmp_path: Path):
    Journal(tmp_path, {"seed": 1, "limit": None, "bench": {"name": "regions"}})
    Journal(tmp_path, {"seed": 1, "limit": None, "bench": {"name": "regions"}})
    wrong = {"seed": 2, "limit": None, "bench": {"name": "v7w"}, "encoding": "crop"}
    with pytest.raises(VipLlavaError) as error:
        Journal(tmp_path, wrong)
    assert str(error.value) == (
        f"{tmp_path} holds answers with other settings (seed: 1, now 2; bench: {{'name': "
        "'regions'}, now {'name': 'v7w'}; encoding: None, now 'crop'); evaluate into another "
        "folder with name=NEW_NAME, or delete this one"
    )
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "predictions.jsonl").write_text("{}\n")
    with pytest.raises(VipLlavaError, match=r"predictions.jsonl without settings.json"):
        Journal(tmp_path / "old", {"seed": 1})


def test_answers_of_another_marking_are_refused(tmp_path: Path):
    evaluated(REGIONS, items(2), echo, tmp_path, ("kept", "removed"))
    path = tmp_path / "predictions.jsonl"
    path.write_text(path.with_name("predictions-removed.jsonl").read_text())
    with pytest.raises(VipLlavaError) as error:
        evaluated(REGIONS, items(2), echo, tmp_path, ("kept", "removed"))
    assert str(error.value) == (
        f"{path}:1: marks is removed, which predictions-removed.jsonl holds; this file holds kept: "
        "restore the file, or delete it to have its items asked again"
    )
    path.unlink()
    model = Says(echo)
    evaluated(REGIONS, items(2), model, tmp_path, ("kept", "removed"))
    assert keys(model) == ["toy/0", "toy/1"]


def test_two_items_of_one_key_are_refused(tmp_path: Path):
    with pytest.raises(RecordError, match="two items have the key toy/0; each needs one of its"):
        evaluated(REGIONS, [*items(2), *items(1)], echo, tmp_path)
