"""Requests that an engine refuses cost no other answer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from vipllava.evaluation.answerers import EngineAnswerer
from vipllava.types import ConfigError, Failure, Request, Turn, VipLlavaError


class Refuses:
    """Answers with the key, and refuses some requests, as an engine does."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def answer(
        self, requests: Sequence[Request], *, max_new_tokens: int = 64, batch_size: int = 16
    ) -> list[str]:
        if max_new_tokens < 1:
            raise ConfigError("max_new_tokens=0 must be at least 1")
        if long := [request.key for request in requests if request.key in ("3", "40")]:
            raise VipLlavaError(f"request {long[0]} has 9000 tokens")
        self.sizes.append(len(requests))
        return [request.key for request in requests]


def test_a_request_that_is_refused_costs_no_other_answer():
    requests = [Request(None, [Turn("user", "?")], str(number)) for number in range(60)]
    engine = Refuses()
    found = dict(EngineAnswerer(engine, batch_size=2).answer(iter(requests)))
    assert sorted(found) == list(range(60))
    assert found[3] == Failure("request 3 has 9000 tokens")
    assert found[40] == Failure("request 40 has 9000 tokens")
    assert all(found[n] == str(n) for n in range(60) if n not in (3, 40))
    assert sum(engine.sizes) == 58
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        next(EngineAnswerer(engine, max_new_tokens=0).answer(requests))
