"""One model gives the same answers however it is asked.

Batched or one at a time, in one process or two, killed and resumed, here or behind an endpoint.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.engine_server import run_engine_server
from tests.evaluation.answering import grey_sample
from tests.toy_data import encode_picture
from vipllava.evaluation.answerers import EndpointAnswerer, EngineSettings, make_answerer
from vipllava.evaluation.asking import Protocol, ask_items
from vipllava.evaluation.bench import Answerer, Item, Prediction
from vipllava.evaluation.journal import Journal
from vipllava.inference.endpoint import Endpoint, EndpointSettings
from vipllava.inference.engine import Engine
from vipllava.types import DraftTurn, Failure, Mention, Request
from vipllava.visual_prompts.policies import VisualPromptPolicy

ROOT = Path(__file__).parents[2]
NUM_ITEMS, MAX_NEW_TOKENS = 14, 6
PROTOCOL = Protocol({"refcocog": VisualPromptPolicy()}, seed=1, marks=("kept", "removed"))


def items() -> list[Item]:
    """Images of several sizes and questions of several lengths."""
    found: list[Item] = []
    for n in range(NUM_ITEMS):
        question = ("Look at it. " * (n % 4) + "What is ", Mention(0), "?")
        turns = (DraftTurn("user", question, has_image=True), DraftTurn("assistant", ("star",)))
        image = encode_picture(40 + n, 40, "PNG", seed=n)
        found.append(Item(f"toy/{n}", replace(grey_sample(str(n), ""), image=image, turns=turns)))
    return found


@dataclass
class Watched:
    """Notes what another one is asked, and ends this process after so many answers."""

    answerer: Answerer
    num_answers: int = 10**9
    asked: list[str] = field(default_factory=list)
    several_images = False

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[int, str | Failure]]:
        def noted() -> Iterator[Request]:
            for request in requests:
                self.asked.append(request.key)
                yield request

        for count, answer in enumerate(self.answerer.answer(noted())):
            if count == self.num_answers:
                os.kill(os.getpid(), signal.SIGKILL)
            yield answer


def engines(export: Path, processes: int, batch_size: int) -> Answerer:
    settings = EngineSettings(str(export), "cpu", "float32")
    return make_answerer(settings, processes, MAX_NEW_TOKENS, batch_size)


def ask(answerer: Answerer, folder: Path) -> list[Prediction]:
    found = ask_items(items(), PROTOCOL, lambda: answerer, Journal(folder, {}))
    return [each for predictions in found.values() for each in predictions]


@pytest.fixture(scope="module")
def one_by_one(export: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Prediction]:
    found = ask(engines(export, 1, batch_size=1), tmp_path_factory.mktemp("one_by_one"))
    assert [each.key for each in found] == [f"toy/{n}" for n in range(NUM_ITEMS)] * 2
    assert all(each.failure is None for each in found)
    assert len({each.answer for each in found}) > 5
    # Marks are looked at.
    halves = zip(found[:NUM_ITEMS], found[NUM_ITEMS:], strict=True)
    assert any(kept.answer != removed.answer for kept, removed in halves)
    return found


def test_in_batches(export: Path, one_by_one: list[Prediction], tmp_path: Path):
    assert ask(engines(export, 1, batch_size=8), tmp_path) == one_by_one


def test_in_two_processes(export: Path, one_by_one: list[Prediction], tmp_path: Path):
    # Jobs of four questions, so that both processes get several.
    assert ask(engines(export, 2, batch_size=1), tmp_path) == one_by_one


KILLED = """
import sys
from pathlib import Path
from tests.evaluation.test_same_answers import Watched, ask, engines

export, folder, processes = sys.argv[1:]
ask(Watched(engines(Path(export), int(processes), batch_size=1), 17), Path(folder))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="signals")
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed(
    export: Path, one_by_one: list[Prediction], processes: int, tmp_path: Path
):
    # Waits for whoever holds the pipe: no process of the pool outlives the one that was killed.
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(export), str(tmp_path), str(processes)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=100,
        check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    files = {marks: tmp_path / f"predictions{marks}.jsonl" for marks in ("", "-removed")}
    whole = {marks: path.read_bytes().splitlines(keepends=True) for marks, path in files.items()}
    assert sum(map(len, whole.values())) == 17
    last = whole[""].pop()  # the machine went off while this was written
    files[""].write_bytes(b"".join([*whole[""], last[: len(last) // 2]]))

    resumed = Watched(engines(export, 1, batch_size=8))
    assert ask(resumed, tmp_path) == one_by_one
    assert len(resumed.asked) == 2 * NUM_ITEMS - 16


def test_behind_an_endpoint(export: Path, one_by_one: list[Prediction], tmp_path: Path):
    with run_engine_server(Engine.from_checkpoint(export, "cpu", "float32")) as server:
        settings = EndpointSettings(server.address, "tiny", concurrency=3)
        answerer = EndpointAnswerer(Endpoint(settings), MAX_NEW_TOKENS)
        assert ask(answerer, tmp_path) == one_by_one
    assert len(server.asked) == 2 + 2 * NUM_ITEMS  # whether it sees, and each question once
