"""Two engines asked the same: equal, or where they part."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest

from vipllava.inference.agreement import Compared, compare
from vipllava.inference.protocol import Delta, Generation, Sampling, TokenLogprob, Usage
from vipllava.types import Request, Turn, VipLlavaError

TOKENS = (
    TokenLogprob("a", -0.1, (("a", -0.1), ("the", -3.0))),
    TokenLogprob(" red", -0.5, ((" red", -0.5), (" blue", -0.75))),
    TokenLogprob(" cup", -0.2, ((" cup", -0.2), (" mug", -2.0))),
)


class Says:
    """Says its text to everything, whose number of letters is that of the prompt's tokens."""

    max_positions = None

    def __init__(self, text: str, tokens: Sequence[TokenLogprob] = ()) -> None:
        self.text, self.tokens = text, tokens
        self.asked: list[list[Generation]] = []

    async def generate(self, requests: Sequence[Generation]) -> AsyncGenerator[Delta]:
        self.asked.append(list(requests))
        for each in requests:
            key = each.request.key
            if key == "refused":
                error = VipLlavaError("too long")
                yield Delta(key, finish_reason="error", error=error)
                continue
            yield Delta(key, self.text, logprobs=tuple(self.tokens))
            yield Delta(key, finish_reason="stop", usage=Usage(len(self.text), 3))

    def cancel(self, key: str) -> None: ...

    async def close(self) -> None: ...


def run(ours: Says, theirs: Says, *keys: str) -> list[Compared]:
    requests = [Request(None, [Turn("user", f"what is {key}?")], key) for key in keys]

    async def main() -> list[Compared]:
        return [each async for each in compare(ours, theirs, requests, max_new_tokens=9)]

    return asyncio.run(main())


def test_equal_but_for_blanks_at_their_ends():
    ours, theirs = Says("a red cup", TOKENS), Says(" a red cup\n")
    (found,) = run(ours, theirs, "k")
    expected = Compared("k", "what is k?", "a red cup", "a red cup", prompt_tokens=(9, 11))
    assert found == expected
    assert found.is_equal
    assert ours.asked[0][0].sampling == Sampling(max_new_tokens=9, logprobs=2)
    assert theirs.asked[0][0].sampling == Sampling(max_new_tokens=9)


@pytest.mark.parametrize(
    ("other", "letter", "token", "gap"),
    [
        ("a blue cup", 2, 1, 0.25),
        (" a red mug", 6, 2, 1.8),
        ("the red cup", 0, 0, 2.9),
        ("a red cup, and more", 9, 3, None),
        ("a red", 5, 2, 1.8),
        ("", 0, 0, 2.9),
    ],
)
def test_where_they_part(other: str, letter: int, token: int, gap: float | None):
    (found,) = run(Says("a red cup", TOKENS), Says(other), "k")
    assert not found.is_equal
    assert (found.letter, found.token) == (letter, token)
    assert found.gap == (gap if gap is None else pytest.approx(gap))


def test_without_log_probabilities_letters_are_left():
    (found,) = run(Says("a red cup"), Says("a blue cup"), "k")
    assert (found.letter, found.token, found.gap) == (2, None, None)


def test_a_text_that_ends_at_once():
    (found,) = run(Says(""), Says("a blue cup"), "k")
    assert (found.letter, found.token, found.gap) == (0, 0, None)


def test_what_our_engine_does_not_answer_ends_it():
    with pytest.raises(VipLlavaError, match="too long"):
        run(Says("a"), Says("a"), "a", "refused")


def test_a_question_that_fails_there_is_a_failure():
    class Fine(Says):
        async def generate(self, requests: Sequence[Generation]) -> AsyncGenerator[Delta]:
            for each in requests:
                yield Delta(each.request.key, "a", finish_reason="stop")

    first, second = run(Fine("a"), Says("a"), "refused", "b")
    assert (first.theirs, first.failure, first.is_equal) == (None, "too long", False)
    assert second.is_equal


def test_a_few_are_asked_at_a_time():
    ours = Says("a")
    found = run(ours, Says("a"), *(str(number) for number in range(40)))
    assert [each.key for each in found] == [str(number) for number in range(40)]
    assert [len(each) for each in ours.asked] == [16, 16, 8]
