"""CIDEr-D against values by hand, and against pycocoevalcap."""

from __future__ import annotations

import math

import pytest

from tests.evaluation.captions.toy_captions import toy_captions
from vipllava.evaluation.captions.cider import cider
from vipllava.evaluation.captions.ptb_tokenizer import tokenize
from vipllava.evaluation.captions.scores import score_captions

OTHER = ("x", ["y"])  # a second item, so that words of the first weigh log(2)


def first(answer: str, *references: str) -> float:
    values = cider([answer, OTHER[0]], [list(references), OTHER[1]])
    assert values[1] == 0
    return float(values[0])


def test_mean_of_four_cosines_times_ten():
    assert first("a b c d", "a b c d") == pytest.approx(10)
    assert first("a b", "a b") == pytest.approx(5)  # no n-grams of 3 and 4
    assert first("a b", "b a") == pytest.approx(2.5)
    assert first("a b", "a b", "c d") == pytest.approx(2.5)  # the mean over references
    assert first("", "a b") == 0
    assert first("a b", "a b", "") == pytest.approx(2.5)


def test_another_length_is_penalized():
    # words 2 / sqrt(8 x 2), pairs 1 / sqrt(7 x 1), six words more than the reference
    expected = 10 * (0.5 + 1 / math.sqrt(7)) / 4 * math.exp(-36 / 72)
    assert first("a b c d e f g h", "a b") == pytest.approx(expected) == pytest.approx(1.331281)


def test_repeated_words_are_clipped():
    # min(3, 1) x 1 / (3 x 1), two words more
    assert first("a a a", "a") == pytest.approx(10 / 3 / 4 * math.exp(-4 / 72))
    assert first("a a a", "a") == pytest.approx(0.788299)


def test_frequencies_are_those_of_the_scored_items():
    # `a` is in the references of both items and weighs nothing, however often an item has it.
    assert cider(["a", "a c"], [["a b", "a"], ["a c"]]).tolist() == pytest.approx([0, 5])
    assert cider(["a", "a c", "z"], [["a b", "a"], ["a c"], ["d"]])[0] > 0


def test_pycocoevalcap_gives_the_same_values():
    module = pytest.importorskip("pycocoevalcap.cider.cider")
    answers, references = toy_captions()
    scores = score_captions(answers, references, ["cider"])
    assert len(scores.items["cider"]) == 500
    # By our tokens, which test_ptb_tokenizer.py compares with those of Java.
    total, values = module.Cider().compute_score(
        {key: [tokenize(text) for text in texts] for key, texts in references.items()},
        {key: [tokenize(text)] for key, text in answers.items()},
    )
    assert list(scores.items["cider"].values()) == pytest.approx(list(values), abs=1e-9)
    assert scores.totals["cider"] == pytest.approx(total, abs=1e-9)
    # What pycocoevalcap says with its own tokens, Java's.
    assert scores.totals["cider"] == pytest.approx(3.3598767837896584, abs=1e-9)
