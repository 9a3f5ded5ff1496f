"""Judges: a language model behind an endpoint is asked about answers, and its verdicts are read.

What is asked, and how a reply is read, is a :class:`JudgeQuestion`; each way of judging makes its
own (:mod:`vipllava.evaluation.correctness`). Here stands what they share: every reply is kept in
one file and never asked for again, a reply without a verdict is asked for again a few times, and
what has no verdict in the end is a failure, never a score.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from vipllava.files.append import AppendedLines
from vipllava.files.pools import run_tasks
from vipllava.inference.endpoint import Connection, Endpoint, Message, Reply
from vipllava.types import ConfigError, Failure, VipLlavaError

V = TypeVar("V")

_LONGEST_QUOTE: Final = 80


@dataclass(frozen=True, slots=True)
class JudgeQuestion(Generic[V]):
    """What a judge is asked about one item."""

    key: str  # of the item
    text: str  # the message
    read: Callable[[Reply], V | None]  # the verdict of a reply; None if it has none
    reminder: str = ""  # follows the text when a reply had no verdict


@dataclass(frozen=True, slots=True)
class Judged(Generic[V]):
    """One item's verdicts, one per run; fewer if there is a failure."""

    key: str
    verdicts: tuple[V, ...]
    replies: tuple[Reply, ...]  # what they were read from
    failure: Failure | None = None


class ReplyCache:
    """Replies by the content of what was asked, in one file of JSON lines.

    It is safe to kill, and to share between processes: of two replies to the same question the
    first in the file counts for all.
    """

    def __init__(self, path: Path) -> None:
        self._lines = AppendedLines(path)
        self._replies: dict[str, Reply] = {}
        self._read()

    def get(self, key: str) -> Reply | None:
        """Return the reply to what has this key, also one that another process has just kept."""
        if key not in self._replies:
            self._read()
        return self._replies.get(key)

    def put(self, key: str, reply: Reply) -> Reply:
        """Keep a reply; return the one that counts."""
        self._lines.append({"key": key, **asdict(reply)})
        self._read()
        return self._replies.get(key, reply)

    def _read(self) -> None:
        names = {each.name for each in fields(Reply)}
        for row in self._lines.new_rows():
            known = row.keys() == names | {"key"}
            if not (known and isinstance(row["key"], str) and isinstance(row["text"], str)):
                raise VipLlavaError(
                    f"{self._lines.path} is no cache of a judge's replies: it has a line with "
                    f"{', '.join(sorted(row))}; name another file"
                )
            key = row.pop("key")
            self._replies.setdefault(key, Reply(**row))


class Judge:
    """Asks a model behind an endpoint.

    Args:
        endpoint: of the judge.
        cache: a file that keeps its replies, or None to ask anew each time. With everything in
            it nothing is sent.
        runs: how often each question is asked, each time with the next seed.
        max_asks: how often a run asks until a reply has a verdict.
        max_tokens: longest reply.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        cache: Path | None,
        *,
        runs: int = 1,
        max_asks: int = 5,
        max_tokens: int = 3,
    ) -> None:
        if min(runs, max_asks, max_tokens) < 1:
            raise ConfigError(
                f"runs={runs}, max_asks={max_asks} and max_tokens={max_tokens} must be at least 1"
            )
        self.endpoint = endpoint
        self.runs = runs
        self.max_asks = max_asks
        self.max_tokens = max_tokens
        self._cache = None if cache is None else ReplyCache(cache)

    def judge(self, questions: Iterable[JudgeQuestion[V]]) -> Generator[Judged[V]]:
        """Yield the items' verdicts as they come.

        Raises:
            EndpointError: see :meth:`vipllava.inference.endpoint.Endpoint.answers`.
        """
        concurrency = self.endpoint.settings.concurrency
        yield from run_tasks(self.endpoint.connect(), self._judge, questions, concurrency)

    def described(self, judged: Iterable[Judged[Any]]) -> dict[str, Any]:
        """Return what belongs beside every score of these verdicts, as plain values.

        ``reported`` is what the endpoint said about itself: each pair of model and fingerprint.
        More than one means that the model changed between the first reply and the last.
        """
        said = {
            (reply.model, reply.system_fingerprint) for each in judged for reply in each.replies
        }
        return {
            **self.endpoint.settings.recorded(),
            "reported": [
                {"model": model, "system_fingerprint": fingerprint}
                for model, fingerprint in sorted(said, key=str)
            ],
            "max_tokens": self.max_tokens,
            "runs": self.runs,
            "max_asks": self.max_asks,
        }

    async def _judge(self, connection: Connection, question: JudgeQuestion[V]) -> Judged[V]:
        verdicts: list[V] = []
        replies: list[Reply] = []
        for run in range(self.runs):
            found = await self._run(connection, question, run)
            if isinstance(found, Failure):
                reason = f"run {run + 1} of {self.runs}: {found.reason}"
                return Judged(question.key, tuple(verdicts), tuple(replies), Failure(reason))
            verdicts.append(found[0])
            replies.append(found[1])
        return Judged(question.key, tuple(verdicts), tuple(replies))

    async def _run(
        self, connection: Connection, question: JudgeQuestion[V], run: int
    ) -> tuple[V, Reply] | Failure:
        text, last = question.text, ""
        for ask in range(self.max_asks):
            reply = await self._reply(connection, text, run, ask)
            if isinstance(reply, Failure):
                return reply
            verdict = question.read(reply)
            if verdict is not None:
                return verdict, reply
            last = f"`{reply.text[:_LONGEST_QUOTE]}`"
            if reply.finish_reason == "length":
                last += f", cut after {self.max_tokens} tokens (max_tokens)"
            text = question.text + question.reminder
        return Failure(f"no verdict in {self.max_asks} replies; the last one: {last}")

    async def _reply(
        self, connection: Connection, text: str, run: int, ask: int
    ) -> Reply | Failure:
        messages: list[Message] = [{"role": "user", "content": text}]
        seed = self.endpoint.settings.seed
        seed = None if seed is None else seed + run
        key = _content_hash(
            {
                **self.endpoint.settings.recorded(),
                "messages": messages,
                "max_tokens": self.max_tokens,
                "seed": seed,
                "run": run,
                "ask": ask,
            }
        )
        kept = self._cache and self._cache.get(key)
        if kept:
            return kept
        reply = await connection.ask(messages, max_tokens=self.max_tokens, seed=seed)
        if self._cache is None or isinstance(reply, Failure):
            return reply
        return self._cache.put(key, reply)


def _content_hash(asked: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
