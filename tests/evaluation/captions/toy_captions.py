"""Captions as people and models write them: 500 answers with two to five references each."""

from __future__ import annotations

import random


def _choices(text: str) -> list[str]:
    return text.replace("\n", "|").split("|")


_WHO = _choices("""a man|two women|the boy's dog|A "small" cat|an elderly couple|three kids|Mr. Lee
the player (No. 23)|a girl who's smiling|someone|the T-shirt vendor|a bird""")
_DOES = _choices("""sits on|is standing next to|isn't looking at|rides|can't reach|is holding
walks past|stares at|'s on top of|gonna eat|points at|jumps over""")
_WHAT = _choices("""a red-and-white umbrella|the 20-year-old sofa|an open laptop|pizza w/ olives
a black/white photo|the stop sign|a bench, a tree|Café "Zoë"|a 1/2 eaten sandwich|$5 hats
the bus at 10:30 a.m.|some R&B CDs""")
_WHERE = _choices("""in the park|on St. Mary's street|at home|near the U.S. flag|inside
on a rainy day|behind them|in the '90s|to the left -- far away|in 3,000 pieces|
by the sea; it's sunny""")
_ENDS = ("", ".", " .", "!", "...", " ?!", '."', " :)")


def toy_captions(seed: int = 0, num: int = 500) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return answers and references by item; some answers are a reference, one is empty."""
    rng = random.Random(seed)

    def caption(scene: tuple[str, ...]) -> str:
        parts = [
            part if rng.random() < 0.7 else rng.choice(kind)
            for part, kind in zip(scene, (_WHO, _DOES, _WHAT, _WHERE), strict=True)
        ]
        text = " ".join(part for part in parts if part) + rng.choice(_ENDS)
        return text.capitalize() if rng.random() < 0.3 else text

    answers: dict[str, str] = {}
    references: dict[str, list[str]] = {}
    for number in range(num):
        scene = tuple(rng.choice(kind) for kind in (_WHO, _DOES, _WHAT, _WHERE))
        references[str(number)] = [caption(scene) for _ in range(rng.randint(2, 5))]
        answers[str(number)] = caption(scene)
    answers["7"] = ""
    answers["8"] = references["8"][0]
    return answers, references
