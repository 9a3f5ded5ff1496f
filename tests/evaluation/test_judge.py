"""Judges: no item lost, none scored without a verdict, none asked again after one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.chat_server import (
    PASSING,
    Bad,
    ChatServer,
    completion,
    run_chat_server,
    text_of,
    wrong_at_first,
)
from vipllava.evaluation.correctness import (
    REMINDER,
    JudgePrompt,
    correctness_question,
    official_grades,
    read_correctness,
    read_prompt,
    run_totals,
)
from vipllava.evaluation.judge import Judge, Judged, JudgeQuestion
from vipllava.inference.endpoint import Endpoint, EndpointSettings, Reply
from vipllava.types import ConfigError, Failure, VipLlavaError

PROMPT = JudgePrompt("Grade.\nq | t | p | 1.0 \n")


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with run_chat_server() as state:
        state.answer = verdict_of
        yield state


def judge(server: ChatServer, cache: Path | None = None, **options: Any) -> Judge:
    names = ("runs", "max_asks", "max_tokens")
    given = {"timeout_s": 1.5, "max_retries": 2, "total_s": 30.0, **options}
    settings = {name: value for name, value in given.items() if name not in names}
    endpoint = Endpoint(EndpointSettings(server.address, "toy", **settings))
    return Judge(endpoint, cache, **{n: given[n] for n in names if n in given})


def questions(predictions: Iterable[str]) -> list[JudgeQuestion[float]]:
    return [correctness_question(PROMPT, f"v1_{p}", "What?", "it", p) for p in predictions]


def sent(prediction: str, reminder: str = "") -> str:
    return f"Grade.\nq | t | p | 1.0 \n\nWhat? | it | {prediction} | {reminder}"


def verdict_of(body: dict[str, Any]) -> bytes:
    """Give 0.3 to the prediction ``3``."""
    return completion(f"0.{text_of(body).split(' | ')[-2]}")


def by_key(judged: Iterable[Judged[float]]) -> dict[str, tuple[float, ...] | Failure]:
    return {each.key: each.failure or each.verdicts for each in judged}


def test_what_a_judge_is_asked(server: ChatServer, tmp_path: Path):
    server.answer = lambda body: completion("0.5")
    (tmp_path / "prompt.txt").write_text("Grade.\nq | t | p | 1.0 \n\n")
    prompt = read_prompt(tmp_path / "prompt.txt")
    asked = correctness_question(prompt, "v1_0", "How many?", "a<OR>b<AND>c", "It | is\nb.")
    (found,) = judge(server).judge([asked])
    assert server.asked == [
        {
            "model": "toy",
            "messages": [
                {
                    "role": "user",
                    "content": "Grade.\nq | t | p | 1.0 \n\n"
                    "How many? | a <OR> b <AND> c | It | is\nb. | ",
                }
            ],
            "max_tokens": 3,
            "temperature": 0.0,
            "seed": 0,
        }
    ]
    assert found == Judged("v1_0", (0.5,), (Reply("0.5", "stop", "toy-1", "fp_1"),))
    assert (prompt.source, prompt.sha256) == (
        str(tmp_path / "prompt.txt"),
        "c0da9f50a001689f1092d6576d70ac7a5b3307ebe813be998d989d9df88d3ee8",
    )


def test_our_prompt_is_a_table_of_seven_rows():
    head, *rows = JudgePrompt().text.split("\n\n")[1].splitlines()
    assert head == "Question | Ground truth | Prediction | Correctness"
    assert len(rows) == 1 + 7
    assert {row.count(" | ") for row in rows} == {3}
    worked = [read_correctness(Reply(row.split(" | ")[-1], None, None, None)) for row in rows[1:]]
    assert worked == [1.0, 0.0, 0.5, 1.0, 0.7, 0.2, 0.6]


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_prompt_of_nothing_is_an_error(tmp_path: Path, text: str):
    (tmp_path / "prompt.txt").write_text(text)
    with pytest.raises(VipLlavaError, match=r"prompt\.txt is empty"):
        read_prompt(tmp_path / "prompt.txt")
    with pytest.raises(VipLlavaError, match=r"other\.txt cannot be read"):
        read_prompt(tmp_path / "other.txt")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("1", 1.0),
        ("0", 0.0),
        ("0.0", 0.0),
        (" 0.7\n", 0.7),
        ("1.0 |", 1.0),
        (".5", 0.5),
        ("0.3 because", 0.3),
        ("0.5 of the parts", 0.5),
        ("1 outcome", 1.0),
        ("1 out of 10", None),  # parts of another number
        ("1 Out  of ten", None),
        ("1 of 10", None),
        ("1 / 10", None),
        ("1 /10", None),
        ("1/10", None),
        ("1 %", None),
        ("0 . 8", None),
        ("0 .8", None),
        ("0 , 8", None),
        ("", None),
        ("0.", None),  # the beginning of any verdict
        ("1.", None),
        ("1.1", None),
        ("-0.5", None),
        ("7", None),
        ("10", None),
        ("0.5.", None),
        ("0,5", None),
        ("1e-1", None),
        ("nan", None),
        ("\u0661", None),
        ("Correctness: 0.5", None),
        ("The answer is right.", None),
    ],
)
def test_a_verdict_is_the_first_word_as_a_number_from_0_to_1(text: str, verdict: float | None):
    assert read_correctness(Reply(text, "stop", None, None)) == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("0", None),
        ("1", None),
        ("0.5", 0.5),
        ("0 ", None),
        ("1 |", 1.0),
        ("0 .", None),
        ("1 out", None),
        ("1 out of", None),
    ],
)
def test_a_whole_number_that_was_cut_may_be_the_beginning_of_another(
    text: str, verdict: float | None
):
    assert read_correctness(Reply(text, "length", None, None)) == verdict


def test_prose_is_asked_for_again_and_never_a_zero(server: ChatServer, tmp_path: Path):
    prose = Bad(body=completion("I think that it is"))
    replies = {sent("2"): 9 * [prose], sent("3"): 9 * [prose], sent("2", REMINDER): [prose]}
    replies[sent("3", REMINDER)] = 9 * [Bad(body=completion("0", "length"))]
    server.answer = wrong_at_first(verdict_of, replies)
    asked = judge(server, tmp_path / "cache.jsonl")
    judged = list(asked.judge(questions("123")))
    failure = "run 1 of 1: no verdict in 5 replies; the last one: `0`, cut after 3 tokens"
    assert by_key(judged) == {
        "v1_1": (0.1,),
        "v1_2": (0.2,),
        "v1_3": Failure(f"{failure} (max_tokens)"),
    }
    assert Counter(server.texts) == {
        sent("1"): 1,
        sent("2"): 1,
        sent("2", REMINDER): 2,
        sent("3"): 1,
        sent("3", REMINDER): 4,
    }
    totals = run_totals(judged)
    assert totals.pop("total") == pytest.approx(15.0)
    assert totals.pop("totals") == pytest.approx([15.0])
    assert totals == {
        "std": 0.0,
        "num_items": 2,
        "num_failures": 1,
        "failures": {"v1_3": f"{failure} (max_tokens)"},
    }


def test_a_server_that_misbehaves_loses_no_item(server: ChatServer, tmp_path: Path):
    predictions = [str(number) for number in range(len(PASSING) + 2)]
    wrong = {sent(each): [bad] for each, bad in zip(predictions, PASSING, strict=False)}
    server.answer = wrong_at_first(verdict_of, wrong)
    judged = judge(server, tmp_path / "cache.jsonl").judge(questions(predictions))
    assert by_key(judged) == {f"v1_{each}": (float(f"0.{each}"),) for each in predictions}
    assert Counter(server.texts) == {
        sent(each): 1 + len(wrong.get(sent(each), [])) for each in predictions
    }


def test_what_is_not_answered_is_a_failure_and_asked_at_the_next_start(
    server: ChatServer, tmp_path: Path
):
    down = {sent("2"): [Bad(500, b"")], sent("3"): [Bad(hold_s=4.0)]}
    server.answer = wrong_at_first(verdict_of, down)
    options = {"max_retries": 0, "timeout_s": 1}
    first = judge(server, tmp_path / "cache.jsonl", **options).judge(questions("123"))
    assert by_key(first) == {
        "v1_1": (0.1,),
        "v1_2": Failure("run 1 of 1: HTTP 500: Internal Server Error"),
        "v1_3": Failure("run 1 of 1: no answer within timeout_s=1"),
    }
    server.asked.clear()
    second = judge(server, tmp_path / "cache.jsonl", **options).judge(questions("123"))
    assert by_key(second) == {"v1_1": (0.1,), "v1_2": (0.2,), "v1_3": (0.3,)}
    assert sorted(server.texts) == [sent("2"), sent("3")]


def test_runs_have_a_mean_and_a_population_deviation(server: ChatServer, tmp_path: Path):
    verdicts = {("1", 7): "1.0", ("1", 8): "0.5", ("2", 7): "0.5", ("2", 8): "0.2"}

    def answer(body: dict[str, Any]) -> bytes:
        return completion(verdicts[text_of(body).split(" | ")[-2], body["seed"]])

    server.answer = answer
    asked = judge(server, tmp_path / "cache.jsonl", runs=2, seed=7, revision="main@abc")
    judged = sorted(asked.judge(questions("12")), key=lambda each: each.key)
    totals = run_totals(judged)
    assert totals["totals"] == pytest.approx([75.0, 35.0])
    assert (totals["total"], totals["std"]) == (pytest.approx(55.0), pytest.approx(20.0))
    assert totals["num_items"] == 2
    assert official_grades(judged) == {
        "v1_1": {"model": 2 * ["toy-1"], "content": ["1.0", "0.5"], "score": [1.0, 0.5]},
        "v1_2": {"model": 2 * ["toy-1"], "content": ["0.5", "0.2"], "score": [0.5, 0.2]},
    }
    assert asked.described(judged) == {
        "base_url": server.address,
        "model": "toy",
        "revision": "main@abc",
        "temperature": 0.0,
        "top_p": None,
        "seed": 7,
        "extra_body": {},
        "reported": [{"model": "toy-1", "system_fingerprint": "fp_1"}],
        "max_tokens": 3,
        "runs": 2,
        "max_asks": 5,
    }
    json.dumps(asked.described(judged))


def test_an_item_counts_if_it_has_a_verdict_in_every_run(server: ChatServer):
    def answer(body: dict[str, Any]) -> bytes | Bad:
        return Bad(400, b"no") if "2" in text_of(body) and body["seed"] == 1 else verdict_of(body)

    server.answer = answer
    judged = list(judge(server, runs=3, concurrency=1).judge(questions("123")))
    totals = run_totals(judged)
    assert totals["totals"] == pytest.approx([20.0, 20.0, 20.0])  # of 0.1 and 0.3
    assert totals["failures"] == {"v1_2": "run 2 of 3: HTTP 400: no"}
    assert sorted(official_grades(judged)) == ["v1_1", "v1_3"]


def test_no_verdicts_are_no_total():
    totals = run_totals([Judged("v1_0", (), (), Failure("down"))])
    assert (totals["total"], totals["std"], totals["num_items"]) == (None, None, 0)
    assert totals["failures"] == {"v1_0": "down"}


def test_what_has_a_verdict_is_not_asked_again(server: ChatServer, tmp_path: Path):
    """Left half-way, with the last line cut, it goes on where it was."""
    cache = tmp_path / "cache.jsonl"
    asked = judge(server, cache, concurrency=1, runs=2)
    started = asked.judge(questions("1234"))
    assert len(list(islice(started, 3))) == 3
    started.close()
    lines = cache.read_bytes().splitlines(keepends=True)
    cache.write_bytes(b"".join(lines[:6])[:-20])
    server.asked.clear()
    assert by_key(judge(server, cache, runs=2).judge(questions("1234"))) == {
        f"v1_{each}": 2 * (float(f"0.{each}"),) for each in "1234"
    }
    again = [(text, body["seed"]) for text, body in zip(server.texts, server.asked, strict=True)]
    assert sorted(again) == [(sent("3"), 1), (sent("4"), 0), (sent("4"), 1)]


def test_a_killed_judge_goes_on(server: ChatServer, tmp_path: Path):
    """A child is killed while it judges: what it has kept is not asked again, the rest once."""
    cache, killed_at = tmp_path / "cache.jsonl", 6
    predictions = [str(number) for number in range(1, 20)]
    code = f"""if True:
        from pathlib import Path
        from tests.evaluation.test_judge import ChatServer, judge, questions
        list(judge(ChatServer({server.address!r}), Path({str(cache)!r}), concurrency=2, total_s=60,
                   timeout_s=30).judge(questions({predictions!r})))"""
    server.answer = lambda body: (
        verdict_of(body) if len(server.asked) < killed_at else Bad(hold_s=60)
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    while len(server.asked) <= killed_at and child.poll() is None:
        time.sleep(0.01)
    child.kill()
    child.wait()
    kept = set(server.texts[: killed_at - 1])
    assert len(cache.read_text().splitlines()) == len(kept) == killed_at - 1
    server.asked.clear()
    server.answer = verdict_of
    found = by_key(judge(server, cache).judge(questions(predictions)))
    assert found == {f"v1_{each}": (float(f"0.{each}"),) for each in predictions}
    assert Counter(server.texts) == Counter({sent(each) for each in predictions} - kept)


def test_with_everything_in_the_cache_nobody_is_asked(tmp_path: Path):
    cache = tmp_path / "cache.jsonl"
    with run_chat_server() as server:
        server.answer = verdict_of
        expected = by_key(judge(server, cache).judge(questions("123")))
    assert by_key(judge(server, cache).judge(questions("123"))) == expected
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"temperature": 0.5},
        {"max_tokens": 8},
        {"revision": "b"},
        {"extra_body": {"top_k": 1}},
    ],
)
def test_another_judge_has_verdicts_of_its_own(
    server: ChatServer, tmp_path: Path, changed: dict[str, Any]
):
    list(judge(server, tmp_path / "cache.jsonl").judge(questions("1")))
    list(judge(server, tmp_path / "cache.jsonl", **changed).judge(questions("1")))
    assert len(server.asked) == 2


def test_two_judges_may_share_a_cache(server: ChatServer, tmp_path: Path):
    first, second = (judge(server, tmp_path / "cache.jsonl") for _ in range(2))
    list(first.judge(questions("1")))
    server.answer = lambda body: completion("1.0")
    assert by_key(second.judge(questions("12"))) == {"v1_1": (0.1,), "v1_2": (1.0,)}
    assert server.texts == [sent("1"), sent("2")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: toy\n", "holds no JSON lines"),
        ('{"key": "v1_0", "answer": "a star"}\n', "no cache of a judge's replies.* answer, key"),
    ],
)
def test_another_file_is_not_written_into(
    server: ChatServer, tmp_path: Path, text: str, message: str
):
    (tmp_path / "file").write_text(text)
    with pytest.raises(VipLlavaError, match=message):
        judge(server, tmp_path / "file")
    assert (tmp_path / "file").read_text() == text


def test_other_forms_bring_their_own_question_and_reading(server: ChatServer):
    """A choice with a score, as detailed captions are judged."""
    choices: Sequence[tuple[str, float]] = [("Yes", 1.0), ("No", -1.0)]

    def read(reply: Reply) -> float | None:
        return next((score for text, score in choices if reply.text == text), 0.0)

    replies = {"a": "Yes", "b": "No", "c": "Perhaps"}
    server.answer = lambda body: completion(replies[text_of(body)])
    asked = [JudgeQuestion(key, key, read) for key in replies]
    found = by_key(judge(server, max_tokens=300).judge(asked))
    assert found == {"a": (1.0,), "b": (-1.0,), "c": (0.0,)}
    assert {body["max_tokens"] for body in server.asked} == {300}


def test_bounds(server: ChatServer):
    with pytest.raises(ConfigError, match="runs=0, max_asks=5 and max_tokens=3 must be at least 1"):
        judge(server, runs=0)


def test_the_documented_example(
    server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    page = Path(__file__).parents[2] / "docs" / "evaluation.md"
    (code,) = re.findall(r"```python\n(from pathlib.*?)```", page.read_text("utf-8"), re.DOTALL)
    assert "http://localhost:8001/v1" in code
    server.answer = lambda body: completion("0.9")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("http://localhost:8001/v1", server.address), {})
    assert "'total': 90.0, 'std': 0.0, 'totals': [90.0, 90.0, 90.0" in capsys.readouterr().out
    assert len((tmp_path / "runs" / "judge-cache.jsonl").read_text().splitlines()) == 5
