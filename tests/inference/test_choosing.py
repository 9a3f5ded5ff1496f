"""Tokens are drawn as transformers' own warpers leave them, by each row for itself."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vipllava.inference.choosing import choose, generator_of
from vipllava.inference.protocol import Sampling

LOGITS = torch.tensor([[1.0, 3.0, 2.0, -1.0, 2.5, 0.0]])


class Says(random.Random):
    """Gives what it was made with."""

    def __init__(self, *numbers: float) -> None:
        super().__init__()
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)


def tokens_of(logits, samplings, generators) -> list[int]:
    return [each.token for each in choose(logits, samplings, generators, str)]


def shares_of(sampling: Sampling, steps: int = 1000) -> dict[int, float]:
    """How often each token is drawn, of evenly spread numbers."""
    drawn = Counter(
        tokens_of(LOGITS, [sampling], [Says((n + 0.5) / steps)])[0] for n in range(steps)
    )
    return {token: count / steps for token, count in drawn.items()}


@pytest.mark.parametrize(
    ("sampling", "warpers"),
    [
        (Sampling(temperature=1.0), []),
        (Sampling(temperature=0.5), [TemperatureLogitsWarper(0.5)]),
        (Sampling(temperature=1.0, top_k=2), [TopKLogitsWarper(2)]),
        (Sampling(temperature=1.0, top_p=0.7), [TopPLogitsWarper(0.7)]),
        (Sampling(temperature=1.0, top_p=0.01), [TopPLogitsWarper(0.01)]),
        (
            Sampling(temperature=2.0, top_k=4, top_p=0.8),
            [TemperatureLogitsWarper(2.0), TopKLogitsWarper(4), TopPLogitsWarper(0.8)],
        ),
        (Sampling(temperature=1.0, top_k=100), []),
    ],
)
def test_the_shares_are_those_of_transformers(sampling, warpers):
    warped = LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.long), LOGITS.clone())
    expected = dict(enumerate(warped.softmax(-1)[0].tolist()))
    found = shares_of(sampling)
    for token, share in expected.items():
        assert found.get(token, 0) == pytest.approx(share, abs=2e-3)


def test_the_likeliest_without_a_temperature():
    assert tokens_of(LOGITS, [Sampling()], [None]) == [1]
    assert tokens_of(torch.tensor([[1.0, 2.0, 2.0]]), [Sampling()], [None]) == [1]
    # So low a temperature that nothing else is left, and no number overflows.
    assert tokens_of(LOGITS * 1e4, [Sampling(temperature=1e-30)], [Says(0.999)]) == [1]


def test_a_row_draws_from_its_own_generator():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    hot = Sampling(temperature=2.0, seed=7)
    alone = generator_of(hot)
    expected = [tokens_of(logits[2:3], [hot], [alone])[0] for _ in range(5)]
    assert len(set(expected)) > 1

    samplings = [Sampling(), Sampling(temperature=3.0, top_k=5), hot, Sampling(temperature=0.1)]
    generators = [generator_of(each) for each in samplings]
    rows = [tokens_of(logits, samplings, generators) for _ in range(5)]
    assert [row[2] for row in rows] == expected
    assert {row[0] for row in rows} == {int(logits[0].argmax())}


def test_a_seed_repeats_and_none_does_not():
    assert generator_of(Sampling()) is None
    draws = [generator_of(Sampling(temperature=1.0, seed=3)).random() for _ in range(2)]
    assert draws[0] == draws[1]
    draws = [generator_of(Sampling(temperature=1.0)).random() for _ in range(2)]
    assert draws[0] != draws[1]


def test_log_probabilities_are_those_of_the_network():
    samplings = [Sampling(logprobs=2), Sampling(), Sampling(temperature=0.3, logprobs=0)]
    logits = LOGITS.repeat(3, 1)
    first, second, third = choose(logits, samplings, [None, None, Says(0.999)], str)
    shares = LOGITS[0].log_softmax(-1).tolist()
    assert first.token == 1
    assert first.logprob is not None
    assert first.logprob.token == "1"
    assert first.logprob.logprob == pytest.approx(shares[1])
    assert [name for name, _ in first.logprob.top] == ["1", "4"]
    assert [value for _, value in first.logprob.top] == pytest.approx([shares[1], shares[4]])
    assert second.logprob is None
    assert third.logprob is not None
    assert third.logprob.logprob == pytest.approx(shares[third.token])
    assert third.logprob.top == ()


def test_what_is_no_number_is_told_and_disturbs_nobody():
    logits = torch.tensor([[float("nan"), 1.0], [0.0, 1.0], [float("inf"), 1.0]])
    samplings = [Sampling(temperature=1.0, logprobs=1), Sampling(temperature=1.0), Sampling()]
    choices = choose(logits, samplings, [Says(), Says(0.5), None], str)
    assert [each.is_number for each in choices] == [False, True, False]
    assert choices[1].token == 1


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_p=1e-46),  # 0 in float32, as the next
        Sampling(temperature=1.0, top_p=5e-324),
        Sampling(temperature=5e-324),
        Sampling(temperature=1e-40, top_p=1e-40, top_k=3),
    ],
)
@pytest.mark.parametrize("number", [0.0, 0.5, 0.9999999999])
def test_the_least_values_leave_the_likeliest_token(sampling: Sampling, number: float):
    assert tokens_of(LOGITS, [sampling], [Says(number)]) == [1]


def test_a_row_that_cannot_be_drawn_for_is_told_and_disturbs_nobody(caplog):
    fine = Sampling(temperature=1.0)
    wrong = Sampling(temperature=1.0)
    object.__setattr__(wrong, "top_k", "many")
    first, second, third = choose(
        LOGITS.repeat(3, 1), [fine, wrong, fine], [Says(0.5), Says(0.5), Says(0.9)], str
    )
    assert isinstance(second.error, (TypeError, ValueError))
    assert first.error is third.error is None
    expected = tokens_of(LOGITS, [fine], [Says(0.5)]) + tokens_of(LOGITS, [fine], [Says(0.9)])
    assert [first.token, third.token] == expected
    assert "a defect" in caplog.text
