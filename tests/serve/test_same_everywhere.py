"""A question's answer is the same by every door, among whichever neighbours, in whatever order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

import vipllava as vl
from tests.serve.everywhere import Question, mixed_questions, options_of_marks, orders
from tests.tiny_model import save_tiny_export
from tests.toy_server import run_app
from vipllava.cli import main
from vipllava.inference.engine import Engine
from vipllava.inference.local_engine import LocalEngine
from vipllava.inference.protocol import Answer, collect
from vipllava.serve.app import build_app
from vipllava.serve.settings import ServerSettings

QUESTIONS = mixed_questions()


@pytest.fixture(scope="module")
def export(tiny_sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_export(tiny_sources, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def expected(export: Path) -> list[str]:
    """What the engine says to each question when it is asked nothing else."""
    engine = Engine.from_checkpoint(export, "cpu", "float32")
    found: list[str] = []
    for number, question in enumerate(QUESTIONS):
        asked = question.generation(str(number))
        found += engine.answer([asked.request], sampling=asked.sampling, batch_size=1)
    assert len(set(found)) > 25  # the model looks at what it is asked
    return found


def ask_local(export: Path, orders: list[list[int]], **options: Any) -> list[list[Answer]]:
    """Return the answers to the questions in each order, all asked at once, by question."""

    async def ask() -> list[list[Answer]]:
        engine = LocalEngine(Engine.from_checkpoint(export, "cpu", "float32"), **options)
        found: list[list[Answer]] = []
        try:
            for order in orders:
                asked = [QUESTIONS[number].generation(str(number)) for number in order]
                answers = dict(zip(order, await collect(engine, asked), strict=True))
                found.append([answers[number] for number in range(len(QUESTIONS))])
        finally:
            await engine.close()
        return found

    return asyncio.run(ask())


def texts(answers: list[Answer]) -> list[str]:
    return [answer.text for answer in answers]


def test_in_batches_of_any_order(export: Path, expected: list[str]):
    for answers in ask_local(export, list(orders(len(QUESTIONS))), max_batch_size=8):
        assert texts(answers) == expected


def test_one_at_a_time(export: Path, expected: list[str]):
    (answers,) = ask_local(export, [list(range(len(QUESTIONS)))], max_batch_size=1)
    assert texts(answers) == expected


def test_by_continuous_batching(export: Path, expected: list[str]):
    """It is for CUDA; here only what it answers is looked at."""
    found = ask_local(export, list(orders(len(QUESTIONS))), max_batch_size=8, continuous=True)
    for answers in found:
        assert texts(answers) == expected


def test_by_the_engine_itself(export: Path, expected: list[str]):
    """Its lists have one sampling, so questions of each are asked together."""
    engine = Engine.from_checkpoint(export, "cpu", "float32")
    by_sampling: dict[Any, list[int]] = {}
    for number, question in enumerate(QUESTIONS):
        by_sampling.setdefault(question.sampling, []).append(number)
    for sampling, numbers in by_sampling.items():
        asked = [QUESTIONS[number].generation(str(number)).request for number in numbers]
        answers = engine.answer(asked, sampling=sampling, batch_size=5)
        assert answers == [expected[number] for number in numbers]


@pytest.fixture(scope="module")
def address(export: Path) -> Iterator[str]:
    engine = LocalEngine(Engine.from_checkpoint(export, "cpu", "float32"), max_batch_size=8)
    with run_app(build_app({"tiny": engine}, ServerSettings())) as server:
        yield f"{server.url}/v1"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_by_the_official_client(address: str, expected: list[str], stream: bool):
    """All at once; one connection each."""

    async def ask(client: openai.AsyncOpenAI, question: Question) -> str:
        body: Any = question.body()
        reply: Any = await client.chat.completions.create(
            model="tiny", stream=stream, extra_body={"regions": question.regions}, **body
        )
        if not stream:
            return reply.choices[0].message.content
        return "".join([chunk.choices[0].delta.content or "" async for chunk in reply])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, question) for question in QUESTIONS))

    assert asyncio.run(ask_all()) == expected


def options_of(question: Question) -> Any:
    sampling = question.sampling
    return {"max_new_tokens": sampling.max_new_tokens, "stop": sampling.stop}


def test_from_python(export: Path, expected: list[str]):
    single = [number for number, each in enumerate(QUESTIONS) if len(each.turns) == 1]
    assert len(single) > 40
    with vl.load(export, device="cpu", dtype="float32") as model:
        for number in single:
            question = QUESTIONS[number]
            asked = question.file, question.turns[0].text, question.marks
            whole = model.ask(*asked, **options_of(question))
            assert whole.text == expected[number]
            pieces = list(model.ask(*asked, stream=True, **options_of(question)))
            assert "".join(pieces) == expected[number]
        together = [number for number in single if QUESTIONS[number].sampling.max_new_tokens == 8]
        replies = model.ask(
            [QUESTIONS[number].file for number in together],
            [QUESTIONS[number].turns[0].text for number in together],
            regions=[QUESTIONS[number].marks for number in together],
            max_new_tokens=8,
        )
        plain = [n for n, number in enumerate(together) if not QUESTIONS[number].sampling.stop]
        assert len(plain) > 5
        for n in plain:
            assert replies[n].text == expected[together[n]]


def test_a_conversation(export: Path, address: str):
    """Each turn's answer is that of a server which is told the turns before it."""
    question = QUESTIONS[2]
    said = ("What is {0}?", "And beside it?", "Sure about {1}?")
    with vl.load(export, device="cpu", dtype="float32") as model:
        chat = model.chat(question.file, regions=question.marks)
        replies = [chat.ask(text, max_new_tokens=8).text for text in said]
    assert len(question.marks) == 2
    assert len(set(replies)) == 3
    turns: list[vl.Turn] = []
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        for text, reply in zip(said, replies, strict=True):
            turns.append(vl.Turn("user", text, has_image=not turns))
            body: Any = replace(question, turns=tuple(turns)).body() | {"max_tokens": 8}
            answer = client.chat.completions.create(
                model="tiny", extra_body={"regions": question.regions}, **body
            )
            assert answer.choices[0].message.content == reply
            turns.append(vl.Turn("assistant", reply))
    assert [turn.role for turn in chat.turns] == ["user", "assistant"] * 3


@pytest.mark.parametrize("number", [1, 4, 6])
def test_in_a_terminal(
    export: Path,
    address: str,
    expected: list[str],
    number: int,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
):
    question = QUESTIONS[number]
    command = ["--question", question.turns[0].text, "--json"]
    command += ["--max-new-tokens", str(question.sampling.max_new_tokens)]
    for stop in question.sampling.stop:
        command += ["--stop", stop]
    if question.file is not None:
        (tmp_path / "picture.jpg").write_bytes(question.file)
        command = [
            str(tmp_path / "picture.jpg"),
            *command,
            *options_of_marks(question.marks, tmp_path),
        ]
    here = [str(export), *command, "--device", "cpu", "--dtype", "float32"]
    for arguments in (here, [*command, "--base-url", address]):
        assert main(["chat", *arguments]) == 0
        (line,) = capfd.readouterr().out.splitlines()
        assert json.loads(line)["answer"] == expected[number]
