"""What a benchmark needs of a model: texts in, texts out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vipllava.inference.engine import Request


class Answerer(Protocol):
    """Answers questions; :class:`vipllava.inference.engine.Engine` does, and so can a fake."""

    def answer(
        self, requests: Sequence[Request], *, max_new_tokens: int = 64, batch_size: int = 16
    ) -> list[str]:
        """Return one text per request, in their order."""
        ...
