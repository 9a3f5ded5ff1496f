"""Who answers: one engine, one in a process for each GPU, or a model behind an endpoint."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Final, Protocol

from vipllava.files.pools import run_jobs
from vipllava.inference.engine_settings import EngineSettings
from vipllava.processes import compute_on_cpu
from vipllava.types import ConfigError, Failure, Request, VipLlavaError

if TYPE_CHECKING:
    from vipllava.inference.endpoint import Endpoint

logger = logging.getLogger(__name__)

_BATCHES_AT_ONCE: Final = 16
"""Enough for the engine to put questions of similar length together, few enough to hold."""
_BATCHES_PER_JOB: Final = 4
"""The same for several processes: four jobs wait for each of them."""

Texts = list[str | Failure]


class BatchEngine(Protocol):
    """What answers a list of questions; :class:`vipllava.inference.engine.Engine` does."""

    def answer(
        self, requests: Sequence[Request], *, max_new_tokens: int = 64, batch_size: int = 16
    ) -> list[str]:
        """Return one text per request, in their order."""
        ...


def answer_each(
    engine: BatchEngine, requests: Sequence[Request], max_new_tokens: int, batch_size: int
) -> Texts:
    """Answer questions; one that the engine refuses costs only its own answer."""
    sizes = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    try:
        return list(engine.answer(requests, **sizes))
    except ConfigError:
        raise
    except VipLlavaError as error:
        if len(requests) == 1:
            logger.warning("%s", error)
            return [Failure(str(error))]
    middle = len(requests) // 2  # so that of 256 questions and a bad one 16 are asked alone
    return [
        *answer_each(engine, requests[:middle], **sizes),
        *answer_each(engine, requests[middle:], **sizes),
    ]


@dataclass(frozen=True)
class EngineAnswerer:
    """Answers in batches of questions of similar length, in this process."""

    engine: BatchEngine
    max_new_tokens: int = 64
    batch_size: int = 16
    several_images: bool = False

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[int, str | Failure]]:
        """Yield the texts in order; images are held a few batches at a time."""
        start, pending = 0, iter(requests)
        while chunk := list(islice(pending, _BATCHES_AT_ONCE * self.batch_size)):
            texts = answer_each(self.engine, chunk, self.max_new_tokens, self.batch_size)
            yield from enumerate(texts, start)
            start += len(chunk)


@dataclass(frozen=True)
class EndpointAnswerer:
    """Answers by a model behind an address; a request that fails costs its own answer."""

    endpoint: Endpoint
    max_new_tokens: int = 64
    several_images: bool = True

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[int, str | Failure]]:
        """Yield the texts as they come; as many images are held as are asked about at once."""
        for number, reply in self.endpoint.answers(requests, max_new_tokens=self.max_new_tokens):
            yield number, reply if isinstance(reply, Failure) else reply.text


@dataclass(frozen=True)
class EnginePool:
    """Answers in several processes, each with an engine and, on CUDA, a GPU of its own.

    Questions are handed out a few batches at a time, each once: to whom is left to who is free.
    """

    settings: EngineSettings
    num_processes: int
    max_new_tokens: int = 64
    batch_size: int = 16
    several_images: bool = False

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[int, str | Failure]]:
        """Yield the texts as they come."""
        work = _Work(self.settings, self.max_new_tokens, self.batch_size)
        size = _BATCHES_PER_JOB * self.batch_size
        for start, texts in run_jobs(work, _jobs(requests, size), self.num_processes):
            yield from enumerate(texts, start)


Job = tuple[int, list[Request]]


def _jobs(requests: Iterable[Request], size: int) -> Iterator[Job]:
    start, pending = 0, iter(requests)
    while chunk := list(islice(pending, size)):
        yield start, chunk
        start += len(chunk)


class _Work:
    """What a process does; it opens its engine with the first job."""

    def __init__(self, settings: EngineSettings, max_new_tokens: int, batch_size: int) -> None:
        self.settings, self.sizes = settings, (max_new_tokens, batch_size)
        self.engine: BatchEngine | None = None

    def __call__(self, job: Job) -> tuple[int, Texts]:
        if self.engine is None:
            self.engine = replace(self.settings, device=_own_device(self.settings.device)).open()
        start, requests = job
        return start, answer_each(self.engine, requests, *self.sizes)


def _own_device(device: str) -> str:
    """Return the GPU of this process, by its number among those of the pool."""
    import torch

    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    (*_, number) = multiprocessing.current_process()._identity
    return f"cuda:{(number - 1) % torch.cuda.device_count()}"


def find_num_processes(device: str) -> int:
    """Return one for each GPU that ``device`` leaves open, else one."""
    import torch

    return max(1, torch.cuda.device_count()) if device in ("auto", "cuda") else 1


def make_answerer(
    settings: EngineSettings, num_processes: int | None, max_new_tokens: int, batch_size: int
) -> EngineAnswerer | EnginePool:
    """Open an engine, or a pool of them; None takes one for each GPU."""
    number = find_num_processes(settings.device) if num_processes is None else num_processes
    if number > 1:
        return EnginePool(settings, number, max_new_tokens, batch_size)
    from vipllava.inference.devices import resolve_device

    if resolve_device(settings.device).type == "cpu":
        compute_on_cpu()
    return EngineAnswerer(settings.open(), max_new_tokens, batch_size)
