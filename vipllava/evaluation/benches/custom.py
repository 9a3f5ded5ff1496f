"""Records of one's own, of any kind: their last turn is the right answer, scored as one chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from vipllava.evaluation.bench import Bench, BenchData, Prediction
from vipllava.evaluation.marking import items_of
from vipllava.evaluation.scoring import SCORERS, check_score
from vipllava.types import ConfigError, VipLlavaError


@dataclass(frozen=True)
class CustomOptions:
    """Settings of this benchmark."""

    score: str = "exact"  # one of :data:`vipllava.evaluation.scoring.SCORERS`

    def __post_init__(self) -> None:
        """Refuse a score that is not known, or that cannot be computed here."""
        if self.score not in SCORERS:
            raise ConfigError(f"score={self.score}: expected one of {', '.join(SCORERS)}")
        try:
            check_score(self.score)
        except VipLlavaError as error:
            raise ConfigError(str(error)) from None


def _score(predictions: Sequence[Prediction], data: BenchData) -> Sequence[Prediction]:
    return SCORERS[data.options.score](predictions, data)


CUSTOM: Final = Bench(
    "custom",
    items_of,
    _score,
    CustomOptions,
    metric="score",
    is_judged=lambda options, _: options.score == "judge",
)
