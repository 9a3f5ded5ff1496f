"""Held-out questions about marked regions: the samples of any manifest.

A record's last turn is the right answer, the turns before it are the question. Its marks are keyed
by (seed, data set, key): the same in every run. Asked a second time with the marks removed, words
kept, a model that answers as well never looked at them.
"""

from __future__ import annotations

from typing import Final

from vipllava.evaluation.bench import Bench
from vipllava.evaluation.marking import items_of
from vipllava.evaluation.scoring import SCORERS

REGIONS: Final = Bench("regions", items_of, SCORERS["exact"])
