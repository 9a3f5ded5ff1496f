"""The offline matcher: whole words, alternatives, parts, numbers."""

from __future__ import annotations

import pytest

from vipllava.evaluation.bench import Prediction
from vipllava.evaluation.matching import (
    is_exact_match,
    is_lenient_match,
    match_offline,
    split_ground_truth,
)
from vipllava.evaluation.scoring import exact, lenient
from vipllava.types import VipLlavaError


@pytest.mark.parametrize(
    ("truth", "prediction", "expected"),
    [
        ("star", "It is a star.", 1.0),
        ("star", "starfish", 0.0),
        ("star", "", 0.0),
        ("The Eiffel Tower", "eiffel tower!", 1.0),
        ("0.75<OR>x=0.75<OR>3/4", "The answer is 3/4", 1.0),
        ("0.75<OR>x=0.75<OR>3/4", "x = 0.7", 0.0),
        ("3", "3/4", 0.0),
        ("7", "seven", 1.0),
        ("12", "twelve apples", 1.0),
        ("-1<AND>-5", "x = -1", 0.5),
        ("-1<AND>-5", "x = 1", 0.0),
        ("-1<AND>-5", "-1 or -5", 1.0),
        ("star<AND>left of<AND>cup", "star, left of, fish", 0.7),
        ("star<AND>left of<AND>cup", "a star left of the cup", 1.0),
        ("cat<OR>kitten<AND>sofa", "a kitten on a sofa", 1.0),
        ("cat<OR>kitten<AND>sofa", "a cat and a kitten", 0.5),
        ("yes", "Yes, it is.", 1.0),
        ("no", "Yes, no doubt.", 0.0),
        ("A", "A", 1.0),
        ("A", "a cup", 0.0),
        ("1,200", "It costs $1200.00", 1.0),
        ("50%", "50 percent", 1.0),
        ("two hundred and five", "205", 1.0),
        ("21", "Twenty-one.", 1.0),
        ("1 2", "one two", 1.0),
        ("2nd", "the second row", 1.0),
        ("cafe", "Café", 1.0),
        ("a<AND>b<AND>c<AND>d", "b", 0.3),  # a quarter, rounded half up
        ("a1<AND>b<AND>c", "c", 0.3),
    ],
)
def test_verdicts(truth: str, prediction: str, expected: float):
    assert match_offline("question", truth, prediction) == expected


def test_or_binds_tighter_than_and():
    assert split_ground_truth("a <OR> b<AND>c") == (("a", "b"), ("c",))


@pytest.mark.parametrize("truth", ["", "a<AND>", "<OR>b", "a<AND><OR>b"])
def test_empty_parts_are_refused(truth: str):
    with pytest.raises(VipLlavaError, match="empty part or alternative"):
        split_ground_truth(truth)


@pytest.mark.parametrize(
    ("prediction", "truth", "exact", "lenient"),
    [
        ("7", "7", True, True),
        (" a\n", "A", True, True),
        ("Two Dogs", "two dogs", True, True),
        ("Star.", "star", False, True),
        ("(A)", "A", False, True),
        ("A. within the red rectangle", "A", False, False),
        ("two  dogs", "two dogs", False, True),
        ("the star", "star", False, False),
        ("77", "7", False, False),
    ],
)
def test_exact_match_puts_case_aside_the_lenient_one_punctuation_too(
    prediction: str, truth: str, exact: bool, lenient: bool
):
    assert is_exact_match(prediction, truth) is exact
    assert is_lenient_match(prediction, truth) is lenient


def test_one_of_several_right_answers_is_enough():
    def scored(truth: str) -> tuple[float, float]:
        prediction = Prediction("1", "i", "kept", "What?", truth, answer="A cat.")
        return exact(prediction), lenient(prediction)

    assert scored("kitten<OR>a cat") == (0, 1)
    assert scored("kitten <OR> A cat. ") == (1, 1)
    assert scored("kitten<OR>dog") == (0, 0)
