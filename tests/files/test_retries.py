"""How often and how long is tried, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vipllava.files.retries import (
    BrokenError,
    GivenUpError,
    Patience,
    Trial,
    retry,
)

QUICK = Patience(max_attempts=3, backoff_s=0)


def failing(times: int) -> Callable[[], str]:
    """Return work that breaks so often."""
    attempts: list[int] = []

    def work() -> str:
        attempts.append(1)
        if len(attempts) <= times:
            raise BrokenError(f"break {len(attempts)}") from OSError("the cause")
        return f"attempt {len(attempts)}"

    return work


def test_the_first_that_works_counts(caplog: pytest.LogCaptureFixture):
    assert retry(failing(2), Trial(QUICK), "a file") == "attempt 3"
    assert caplog.messages == [
        "a file: break 1; trying again in 0 s",
        "a file: break 2; trying again in 0 s",
    ]


def test_the_end_names_attempts_and_reason():
    with pytest.raises(
        GivenUpError, match=r"^a file: given up after 3 attempts in 0 s; the last one: break 3$"
    ) as caught:
        retry(failing(3), Trial(QUICK), "a file")
    assert str(caught.value.reason) == "the cause"


def test_other_errors_end_it():
    with pytest.raises(ZeroDivisionError):
        retry(lambda: 1 / 0, Trial(QUICK), "a file")


def test_pauses_double_and_follow_the_other_side():
    trial = Trial(Patience(max_attempts=9, backoff_s=1))
    pauses = [trial.pause_after_failure(BrokenError("", pause_s=s)) for s in (0, 0, 0, 30, 999)]
    assert pauses == [1, 2, 4, 30, 60]


def test_a_megabyte_counts_as_progress():
    trial = Trial(Patience(max_attempts=2, backoff_s=0))
    for megabytes in range(1, 6):
        assert trial.pause_after_failure(BrokenError("", size=megabytes << 20)) == 0
    assert trial.pause_after_failure(BrokenError("", size=5 << 20)) is None
