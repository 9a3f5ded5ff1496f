"""What the ranks of a job tell each other about their data, so that they go on or end together.

A rank that raises alone leaves the others in a collective until its time limit, half an hour. So
every error of reading data, and every difference in what ranks found, is told to all of them at a
place that all of them reach.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vipllava.types import VipLlavaError


def gather_objects(value: Any) -> list[Any]:
    """Return a (picklable) value of every process, in their order; each has to call this."""
    distributed: Any = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of a job as one of them sees them; by default it is the only one."""

    rank: int = 0  # this process
    # Adds numbers up over all ranks; called by every rank.
    sum: Callable[[Sequence[int]], list[int]] = list
    # Returns a value of every rank, in their order; called by every rank.
    gather: Callable[[Any], list[Any]] = lambda value: [value]

    def end_together(self, error: Exception | None) -> None:
        """Raise on every rank if one has an error; called by every rank.

        Raises:
            Exception: ``error``, this rank's, as it is.
            VipLlavaError: it is another rank's; the message says which and what.
        """
        found = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        told = [f"rank {rank}: {text}" for rank, text in enumerate(found) if text is not None]
        if told:
            raise VipLlavaError("\n".join(("the data of other ranks cannot be used:", *told)))

    @contextmanager
    def together(self) -> Generator[None]:
        """Do something that may fail on one rank only, and fail on all of them if it does."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:  # noqa: BLE001 - whatever it is, the others must not wait
            error = raised
        self.end_together(error)

    def check_equal(self, mine: dict[str, Any], what: str) -> None:
        """Compare a description on all ranks.

        Raises:
            VipLlavaError: on every rank, if they differ; names each difference.
        """
        found = self.gather(mine)
        different = [
            f"rank {rank} has {name} {theirs.get(name)!r}, rank 0 {value!r}"
            for rank, theirs in enumerate(found)
            for name, value in found[0].items()
            if theirs.get(name) != value
        ]
        if different:
            raise VipLlavaError(
                f"the ranks do not have the same {what}: copy it from one machine to the others, "
                "indices included\n- " + "\n- ".join(different)
            )
