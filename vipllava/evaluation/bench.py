"""What a benchmark is: one :class:`Bench`, from reading its data to the table on the terminal.

    asked    = bench.read(data)          items with what is asked about each, one at a time
    answered = ask_all(asked, engine)    texts in place of images
    files    = bench.files(answered)     kept, whatever scoring says
    results  = bench.score(answered)     results.json
    table    = bench.table(results)      printed

:mod:`vipllava.evaluation.run` does these five for any benchmark. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from vipllava.types import ConfigError, Request, Sample, VipLlavaError

if TYPE_CHECKING:
    from vipllava.shards.manifest import Manifest
    from vipllava.visual_prompts.policies import VisualPromptPolicy

Item = TypeVar("Item")


@dataclass(frozen=True)
class NoOptions:
    """Options of a benchmark that has none."""


@dataclass(frozen=True, slots=True)
class BenchData:
    """What a benchmark reads its items from.

    Attributes:
        manifest: its data set.
        data_root: folder that the manifest's paths are relative to.
        policies: visual-prompt policies by name.
        seed: of wordings and marks.
        limit: only the first so many items (of each split); None: all.
        options: a value of :attr:`Bench.options`.
    """

    manifest: Manifest
    data_root: Path
    policies: Mapping[str, VisualPromptPolicy]
    seed: int = 42
    limit: int | None = None
    options: Any = field(default_factory=NoOptions)

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
    """One item and what the model is asked about it.

    Attributes:
        item: what scoring needs of it. Kept until the end, so it holds no image.
        requests: one per way of asking, e.g. with and without marks; the names are the
            benchmark's own.
    """

    item: Item
    requests: Mapping[str, Request]


@dataclass(frozen=True, slots=True)
class Answered(Generic[Item]):
    """One item with the model's answers.

    Attributes:
        key: of its first request.
        item: as in :class:`Asked`.
        texts: one per way of asking.
    """

    key: str
    item: Item
    texts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class BenchTable:
    """What is printed at the end.

    Attributes:
        title: above the table.
        columns: their names; the first is aligned left, the others right.
        rows: one text per column.
        total: a last row, set apart; empty: none.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    total: Sequence[str] = ()


def answers_as_jsonl(answered: Sequence[Answered[Any]]) -> dict[str, str]:
    """Return ``answers.jsonl``: a line per item with its key and its texts."""
    return {"answers.jsonl": jsonl({"key": each.key, **each.texts} for each in answered)}


def jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return one JSON object per line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@dataclass(frozen=True, slots=True)
class Bench(Generic[Item]):
    """A benchmark.

    Attributes:
        name: as ``bench.name`` and ``results.json`` have it.
        read: returns the items in order. It may be a generator, so that images are held a few
            batches at a time; what it checks before its first item costs no loading of a model.
        score: turns all answers into what ``results.json`` holds; plain values.
        table: turns those into what is printed.
        files: names and contents of the files beside ``results.json``.
        options: a frozen dataclass of the settings that only this benchmark has. Its defaults are
            theirs; its ``__post_init__`` raises a ConfigError for an impossible value.
    """

    name: str
    read: Callable[[BenchData], Iterable[Asked[Item]]]
    score: Callable[[Sequence[Answered[Item]]], dict[str, Any]]
    table: Callable[[Mapping[str, Any]], BenchTable]
    files: Callable[[Sequence[Answered[Item]]], Mapping[str, str]] = answers_as_jsonl
    options: type = NoOptions
