"""What a benchmark is: one :class:`Bench`, from reading its data to the table on the terminal.

asked    = bench.read(data)          items with what is asked about each, one at a time
answered = ask_all(asked, engine)    texts in place of images
files    = bench.files(answered)     kept, whatever scoring says
results  = bench.score(answered)     results.json
table    = bench.table(results)      printed
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

from vipllava.types import ConfigError, Request, Sample, VipLlavaError

if TYPE_CHECKING:
    from vipllava.shards.manifest import Manifest
    from vipllava.visual_prompts.policies import VisualPromptPolicy

Item = TypeVar("Item")

_BATCHES_AT_ONCE: Final = 16
"""Enough for the engine to put questions of similar length together, few enough to hold."""


@dataclass(frozen=True)
class NoOptions:
    """Options of a benchmark that has none."""


@dataclass(frozen=True, slots=True)
class BenchData:
    """What a benchmark reads its items from."""

    manifest: Manifest  # its data set; paths are relative to ``data_root``
    data_root: Path
    policies: Mapping[str, VisualPromptPolicy]  # visual-prompt policies by name
    seed: int = 42  # of wordings and marks
    limit: int | None = None  # only the first so many items (of each split), or None
    options: Any = field(default_factory=NoOptions)  # a value of :attr:`Bench.options`

    def samples(self) -> Iterator[Sample]:
        """Yield the first ``limit`` samples in shard order: no shuffling, no substitutes."""
        from vipllava.stream.sample_encoder import SampleSource

        return islice(SampleSource.open(self.manifest, self.data_root, self.seed), self.limit)

    @property
    def folder(self) -> Path:
        """The manifest's folder.

        Raises:
            ConfigError: the manifest names none.
            VipLlavaError: it does not exist.
        """
        if self.manifest.folder is None:
            raise ConfigError(
                f"manifest `{self.manifest.name}` names no folder, which this benchmark reads; "
                "use one with `folder`"
            )
        folder = self.data_root / self.manifest.folder
        if not folder.is_dir():
            raise VipLlavaError(
                f"{folder} is missing; put the data of `{self.manifest.name}` there, or name "
                "another data root"
            )
        return folder


@dataclass(frozen=True, slots=True)
class Asked(Generic[Item]):
    """One item and what the model is asked about it."""

    item: Item  # what scoring needs of it. Kept until the end, so it holds no image.
    # one per way of asking, e.g. with and without marks, by the benchmark's names.
    requests: Mapping[str, Request]


@dataclass(frozen=True, slots=True)
class Answered(Generic[Item]):
    """One item with the model's texts, one per way of asking; ``key`` is its first request's."""

    key: str
    item: Item
    texts: Mapping[str, str]


class Answerer(Protocol):
    """Answers questions; :class:`vipllava.inference.engine.Engine` does, and so can a fake."""

    def answer(
        self, requests: Sequence[Request], *, max_new_tokens: int = 64, batch_size: int = 16
    ) -> list[str]:
        """Return one text per request, in their order."""
        ...


def ask_all(
    asked: Iterable[Asked[Item]], answerer: Answerer, *, max_new_tokens: int, batch_size: int
) -> list[Answered[Item]]:
    """Return every item with its answers, in order; images are held a few batches at a time."""
    items: list[tuple[str, Item, list[str]]] = []

    def requests() -> Iterator[Request]:
        for each in asked:
            ways = list(each.requests)
            items.append((each.requests[ways[0]].key, each.item, ways))
            yield from each.requests.values()

    pending, texts = requests(), list[str]()
    while chunk := list(islice(pending, _BATCHES_AT_ONCE * batch_size)):
        texts += answerer.answer(chunk, max_new_tokens=max_new_tokens, batch_size=batch_size)
    said = iter(texts)
    return [
        Answered(key, item, dict(zip(ways, islice(said, len(ways)), strict=True)))
        for key, item, ways in items
    ]


@dataclass(frozen=True, slots=True)
class BenchTable:
    """What is printed at the end."""

    title: str  # above the table
    columns: Sequence[str]  # their names; the first is aligned left, the others right
    rows: Sequence[Sequence[str]]  # a text per column
    total: Sequence[str] = ()  # a last row, set apart, or empty


def jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return one JSON object per line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def answers_as_jsonl(answered: Sequence[Answered[Any]]) -> dict[str, str]:
    """Return ``answers.jsonl``: a line per item with its key and its texts."""
    return {"answers.jsonl": jsonl({"key": each.key, **each.texts} for each in answered)}


@dataclass(frozen=True, slots=True)
class Bench(Generic[Item]):
    """A benchmark."""

    name: str  # as ``bench.name`` and ``results.json`` have it
    # returns the items in order. It may be a generator, so that images are held a few batches at a
    # time; what it checks before its first item costs no loading of a model.
    read: Callable[[BenchData], Iterable[Asked[Item]]]
    # turns all answers into what ``results.json`` holds; plain values
    score: Callable[[Sequence[Answered[Item]]], dict[str, Any]]
    table: Callable[[Mapping[str, Any]], BenchTable]  # turns those into what is printed
    # names and contents of the files beside ``results.json``
    files: Callable[[Sequence[Answered[Item]]], Mapping[str, str]] = answers_as_jsonl
    # a frozen dataclass of the settings that only this benchmark has; its ``__post_init__`` raises
    # a ConfigError for an impossible value
    options: type = NoOptions
