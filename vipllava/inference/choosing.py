"""The next tokens of a batch: the likeliest, or drawn as each request says.

A draw takes one number from the request's own generator, and a row looks at no other row, so what
is drawn for a question does not depend on its neighbours.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import torch

from vipllava.inference.protocol import Sampling, TokenLogprob

T = TypeVar("T")
logger = logging.getLogger(__name__)

_LEAST: Final = torch.finfo(torch.float32).tiny
"""In place of what float32 would round to 0, or a GPU would."""
OF_THE_DEVICE: Final = (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError)
"""What is not one row's fault: the others have it, too."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What a step chose for one row."""

    token: int
    is_number: bool  # whether the network's outputs are numbers
    logprob: TokenLogprob | None = None
    error: Exception | None = None  # why nothing could be chosen; the other rows have their tokens


def generator_of(sampling: Sampling) -> random.Random | None:
    """Return what a request's draws come from; None where nothing is drawn."""
    return None if sampling.is_greedy else random.Random(sampling.seed)


def choose(
    logits: torch.Tensor,
    samplings: Sequence[Sampling],
    generators: Sequence[random.Random | None],
    token_text: Callable[[int], str],
) -> list[Choice]:
    """Choose a token for each row.

    Args:
        logits: float32 [rows, vocabulary].
        samplings: how, one for each row.
        generators: of :func:`generator_of`, one for each row.
        token_text: spells a token, for log probabilities.
    """
    highest, likeliest = logits.max(dim=-1)
    tokens, tops = likeliest.tolist(), highest.tolist()
    finite = [top - top == 0 for top in tops]
    errors: dict[int, Exception] = {}
    drawn = [row for row, each in enumerate(generators) if each is not None and finite[row]]
    if drawn:
        chosen = [samplings[row] for row in drawn]
        numbers = [draw.random() for row in drawn if (draw := generators[row]) is not None]

        def draw_some(places: Sequence[int]) -> list[int]:
            rows = [drawn[place] for place in places]
            of_these = logits if len(rows) == len(tokens) else logits[rows]
            return _draw(of_these, [chosen[k] for k in places], [numbers[k] for k in places])

        for row, token in zip(drawn, _each_or_error(draw_some, len(drawn)), strict=True):
            if isinstance(token, Exception):
                errors[row] = token
            else:
                tokens[row] = token
    told = [row for row, each in enumerate(samplings) if each.logprobs is not None and finite[row]]
    logprobs: dict[int, TokenLogprob] = {}
    if told:

        def tell_some(places: Sequence[int]) -> list[TokenLogprob]:
            return _logprobs(logits, [told[k] for k in places], tokens, samplings, token_text)

        for row, logprob in zip(told, _each_or_error(tell_some, len(told)), strict=True):
            if isinstance(logprob, Exception):
                errors.setdefault(row, logprob)
            else:
                logprobs[row] = logprob
    return [
        Choice(token, finite[row], logprobs.get(row), errors.get(row))
        for row, token in enumerate(tokens)
    ]


def _each_or_error(
    work: Callable[[Sequence[int]], list[T]], count: int
) -> list[T] | list[T | Exception]:
    """Do rows together; if that fails, each alone, so that one that cannot be done harms nobody."""
    try:
        return work(range(count))
    except OF_THE_DEVICE:
        raise
    except Exception:
        logger.exception("tokens cannot be chosen for rows together: a defect")
    found: list[T | Exception] = []
    for place in range(count):
        try:
            found += work([place])
        except OF_THE_DEVICE:
            raise
        except Exception as error:  # noqa: BLE001  # its request is told
            found.append(error)
    return found


def _draw(
    logits: torch.Tensor, samplings: Sequence[Sampling], numbers: Sequence[float]
) -> list[int]:
    """Draw one token a row: by temperature, then among the top k, then the top p of these."""
    size = logits.shape[-1]

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    temperature = column([max(each.temperature, _LEAST) for each in samplings])
    top_k = column([each.top_k or size for each in samplings])
    # Rounding must not cut what is to be kept whole.
    top_p = column([max(each.top_p, _LEAST) if each.top_p < 1 else 2.0 for each in samplings])
    values, tokens = logits.sort(dim=-1, descending=True, stable=True)
    shares = ((values - values[:, :1]) / temperature).softmax(dim=-1)
    if any(each.top_k for each in samplings):
        shares = shares * (torch.arange(size, device=logits.device) < top_k)
        shares = shares / shares.sum(dim=-1, keepdim=True)
    if any(each.top_p < 1 for each in samplings):
        shares = shares * (shares.cumsum(dim=-1) - shares < top_p)
    reached = shares.cumsum(dim=-1)
    places = (reached <= column(numbers) * reached[:, -1:]).sum(dim=-1, keepdim=True)
    # A product that rounds up to the whole is not to draw what was cut.
    last = (shares > 0).sum(dim=-1, keepdim=True) - 1
    return tokens.gather(-1, torch.minimum(places, last))[:, 0].tolist()


def _logprobs(
    logits: torch.Tensor,
    rows: Sequence[int],
    tokens: Sequence[int],
    samplings: Sequence[Sampling],
    token_text: Callable[[int], str],
) -> list[TokenLogprob]:
    """Return the log probabilities that rows ask for, of the network's own distribution."""
    shares = logits[list(rows)].log_softmax(dim=-1)
    own = torch.tensor([[tokens[row]] for row in rows], device=logits.device)
    chosen = shares.gather(-1, own)[:, 0].tolist()
    most = max(samplings[row].logprobs or 0 for row in rows)
    values, ids = (each.tolist() for each in shares.topk(min(most, shares.shape[-1]), dim=-1))
    found: list[TokenLogprob] = []
    for place, row in enumerate(rows):
        top = list(zip(ids[place], values[place], strict=True))[: samplings[row].logprobs]
        named = tuple((token_text(token), value) for token, value in top)
        found.append(TokenLogprob(token_text(tokens[row]), chosen[place], named))
    return found
