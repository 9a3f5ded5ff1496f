"""What a benchmark is: one :class:`Bench`, from reading its data to the table on the terminal.

item        = next(bench.items(data))         an image, its regions, a question, the right answer
request     = marked and encoded item         see asking.py, marking.py, encodings.py
prediction  = answer to the request           a line of predictions.jsonl as soon as it is there
predictions = bench.score(predictions, data)  with scores
metrics     = bench.summarise(predictions)    metrics.json
table       = bench.table(metrics)            printed
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, cast, get_args

from vipllava.inference.endpoint import Reply
from vipllava.types import (
    ConfigError,
    DraftTurn,
    Failure,
    Region,
    Request,
    Sample,
    VipLlavaError,
)

if TYPE_CHECKING:
    from vipllava.evaluation.correctness import Grader
    from vipllava.records import RecordKind
    from vipllava.report.evaluation_page import Figure
    from vipllava.shards.manifest import Manifest
    from vipllava.stream.sample_encoder import SampleSource
    from vipllava.visual_prompts.policies import VisualPromptPolicy

Marks = Literal["kept", "removed", "moved", "recoloured"]
"""What becomes of an item's marks; see :mod:`vipllava.evaluation.marking`."""
ALL_MARKS: Final[tuple[Marks, ...]] = get_args(Marks)


@dataclass(frozen=True)
class NoOptions:
    """Options of a benchmark that has none."""


@dataclass(frozen=True, slots=True)
class Moved:
    """Where else the marks of an item can go."""

    regions: tuple[Region, ...]  # as many as the item's, in its order
    # The right answer then; a draft is worded as the question is, because it names marks.
    ground_truth: Any | DraftTurn


@dataclass(frozen=True, slots=True)
class Item:
    """One question about one image, still without marks or wording."""

    key: str  # unique in the benchmark
    # Image, regions and the conversation. A last turn of the assistant's is the right answer, not
    # asked. Without regions nothing is drawn: the image may carry its marks.
    sample: Sample
    ground_truth: Any = None  # plain JSON, as the score needs it; None: the answer turn's text
    groups: tuple[str, ...] = ()  # what tables group by, e.g. capabilities
    moved: tuple[Moved, ...] = ()

    @property
    def image_id(self) -> str:
        """A name of the image's bytes: items of one image are not independent."""
        return hashlib.blake2b(self.sample.image or b"", digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class Prediction:
    """An item as it was asked, with the model's text; a line of ``predictions.jsonl``."""

    key: str
    image: str  # :attr:`Item.image_id`
    marks: Marks
    question: str  # the last user turn as it was worded
    ground_truth: Any
    groups: tuple[str, ...] = ()
    answer: str | None = None  # the model's text; None: there is none, and ``failure`` says why
    score: float | None = None  # the higher the better; None: not scored, or ``failure`` says why
    more: Mapping[str, float] = field(default_factory=dict[str, float])  # other figures, by name
    failure: str | None = None
    # Of a judge: the verdict of each run, of which the score is the mean, and its reply.
    verdicts: tuple[float, ...] = ()
    replies: tuple[Reply, ...] = ()
    record_id: str | int | None = None  # the ``id`` of the list that it comes from, if it has one
    # By figures whose total is no mean but a function of sums: see :data:`.scoring.STATISTICS`.
    sums: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])

    @property
    def has_answer(self) -> bool:
        """Whether it need not be asked again."""
        return self.answer is not None

    def row(self) -> dict[str, Any]:
        """Return its line of the file as an object."""
        row = {name: getattr(self, name) for name in _FIELDS}
        row |= {**self.more, "groups": list(self.groups), "failure": self.failure}
        if self.replies:
            row |= {"verdicts": list(self.verdicts), "replies": [asdict(r) for r in self.replies]}
        if self.record_id is not None:
            row["id"] = self.record_id
        if self.sums:
            row["sums"] = {name: list(of) for name, of in self.sums.items()}
        return row

    @classmethod
    def from_row(cls, row: Any) -> Prediction:
        """Read what :meth:`row` returned.

        Raises:
            ValueError: it is no object, or a field is missing or of another type.
        """
        if not isinstance(row, dict):
            raise ValueError("is no object")
        given = dict(cast("dict[str, Any]", row))
        names = (*_FIELDS, "groups", "failure")
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"has no {', '.join(missing)}; it has {', '.join(given)}")
        fields = {name: given.pop(name) for name in names}
        verdicts, replies = given.pop("verdicts", []), given.pop("replies", [])
        record_id, sums = given.pop("id", None), given.pop("sums", {})
        wrong = [n for n in ("key", "image") if not (isinstance(fields[n], str) and fields[n])]
        wrong += [n for n in ("question",) if not isinstance(fields[n], str)]
        wrong += [n for n in ("answer", "failure") if not isinstance(fields[n], str | None)]
        wrong += ["marks"] * (fields["marks"] not in ALL_MARKS)
        wrong += ["score"] * (fields["score"] is not None and not _is_number(fields["score"]))
        groups: Any = fields["groups"]
        if not isinstance(groups, list) or not all(isinstance(group, str) for group in groups):
            wrong.append("groups")
        wrong += ["id"] * (not isinstance(record_id, str | int | None))
        wrong += ["sums"] * (not isinstance(sums, dict))
        wrong += [name for name, value in given.items() if not _is_number(value)]
        if wrong:
            said = (f"{name} ({row[name]!r})" for name in wrong)
            raise ValueError(f"has another kind of value in {', '.join(said)}")
        try:
            judged = tuple(map(float, verdicts)), tuple(Reply(**reply) for reply in replies)
        except (TypeError, ValueError) as error:
            raise ValueError(f"has verdicts or replies that are none ({error})") from error
        fields |= {"groups": tuple(groups), "verdicts": judged[0], "replies": judged[1]}
        fields |= {"record_id": record_id, "sums": sums}
        return cls(**fields, more=given)

    def unscored(self) -> Prediction:
        """Return it as it was before it got a score."""
        return replace(self, score=None, more={}, sums={}, failure=None, verdicts=(), replies=())

    def failed(self, reason: str) -> Prediction:
        """Return it with the reason why it has no score."""
        return replace(self.unscored(), failure=reason)


_FIELDS: Final = ("key", "image", "marks", "question", "answer", "ground_truth", "score")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(cast("float", value))


class Answerer(Protocol):
    """Answers questions: an engine here, or a model behind an address."""

    @property
    def several_images(self) -> bool:
        """Whether it takes a request's ``more_images``."""
        ...

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[int, str | Failure]]:
        """Yield the number of each request, as it was read, with the text; in any order.

        Requests are read as they are worked on: each holds an image.
        """
        ...


_READ_BY: Final = (
    "name", "format", "record_kind", "kind_module", "policy", "apply_exif_orientation",
)  # fmt: skip
"""Of a manifest: the name is part of every random key, the others make samples of the content."""


@dataclass(frozen=True, slots=True)
class BenchData:
    """What a benchmark reads its items from."""

    manifest: Manifest  # its data set; paths are relative to ``data_root``
    data_root: Path
    policies: Mapping[str, VisualPromptPolicy]  # visual-prompt policies by name
    seed: int = 42  # of wordings and marks
    limit: int | None = None  # only the first so many items (of each split), or None
    options: Any = field(default_factory=NoOptions)  # a value of :attr:`Bench.options`
    marks: tuple[Marks, ...] = ("kept",)
    judge: Grader | None = None  # of free answers, if one is given

    def source(self, record_kind: str | RecordKind | None = None) -> SampleSource:
        """Open the manifest's shards, read as another kind of record where one is given."""
        from vipllava.stream.sample_encoder import SampleSource

        source = SampleSource.open(self.manifest, self.data_root, self.seed)
        if record_kind is not None:
            source.record_kind = record_kind
        return source

    @property
    def fingerprint(self) -> str | None:
        """Of the content of the shards or the folder; None without either."""
        if self.manifest.shards:
            return self.source().shards.fingerprint
        if self.manifest.folder is None:
            return None
        from vipllava.checkpoints.folders import content_digest

        return content_digest(self.folder)

    @property
    def protocol(self) -> dict[str, Any]:
        """What of the manifest decides how the data are read, which its content does not show."""
        return {name: getattr(self.manifest, name) for name in _READ_BY}

    def samples(self, record_kind: str | RecordKind | None = None) -> Iterator[Sample]:
        """Yield the first ``limit`` samples in shard order: no shuffling, no substitutes."""
        return islice(self.source(record_kind), self.limit)

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
class BenchTable:
    """What is printed at the end, and shown by the page."""

    title: str  # above the table
    columns: Sequence[str]  # their names; the first is aligned left, the others right
    rows: Sequence[Sequence[str]]  # a text per column
    total: Sequence[str] = ()  # a last row, set apart, or empty
    notes: Sequence[str] = ()  # lines below it
    figures: Sequence[Figure] = ()  # what the page draws: the first one is the benchmark's score


@dataclass(frozen=True, slots=True)
class Published:
    """A published figure, to stand beside a score."""

    model: str
    figures: Mapping[str, float]  # by metric, in the unit of the publication
    source: str  # where it was published
    judge: str | None = None  # the model that graded it; None where none does


Scorer = Callable[[Sequence[Prediction], BenchData], Sequence[Prediction]]
"""Returns the predictions with their scores: each for itself (:func:`.scoring.per_item`), or all
together, as corpus measures and judges do. One that cannot be scored gets a ``failure``. Those
without an answer are not among them."""


def jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return one JSON object per line."""
    texts = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    return "".join(f"{text}\n" for text in texts)


def no_files(predictions: Sequence[Prediction], model: str) -> Mapping[str, str]:
    """Return nothing: ``predictions.jsonl`` is all there is."""
    return {}


def _never(options: Any, has_judge: bool) -> bool:
    return False


def released_lines(predictions: Sequence[Prediction], model: str) -> Mapping[str, str]:
    """Return the lines that the released scripts write, for those who read them."""
    rows: list[dict[str, Any]] = []
    for each in predictions:
        if each.answer is not None:
            said = json.dumps([model, each.key, each.answer])
            rows.append(
                {
                    "question_id": each.key if each.record_id is None else each.record_id,
                    "prompt": each.question,
                    "text": each.answer.strip(),
                    # Any that is unique will do; the same answer has the same one in every run.
                    "answer_id": hashlib.blake2b(said.encode(), digest_size=11).hexdigest(),
                    "model_id": model,
                    "metadata": {},
                }
            )
    return {"answers.jsonl": jsonl(rows)}


def _summarise(predictions: Sequence[Prediction], chance: float | None) -> dict[str, Any]:
    from vipllava.evaluation.summary import summarise

    return summarise(predictions, chance)


def _table(bench: Bench, metrics: Mapping[str, Any]) -> BenchTable:
    from vipllava.evaluation.summary import score_table

    return score_table(bench, metrics)


@dataclass(frozen=True, slots=True)
class Bench:
    """A benchmark."""

    name: str  # as ``bench.name`` and ``metrics.json`` have it
    # yields the items in order, best one at a time: images are held a few batches long. What it
    # checks before its first item costs no loading of a model.
    items: Callable[[BenchData], Iterable[Item]]
    score: Scorer
    # a frozen dataclass of the settings that only this benchmark has; its ``__post_init__`` raises
    # a ConfigError for an impossible value
    options: type = NoOptions
    metric: str = "accuracy"  # what the score is called
    # All predictions, of all markings and scored, to what ``metrics.json`` holds; plain values.
    summarise: Callable[[Sequence[Prediction], float | None], dict[str, Any]] = _summarise
    table: Callable[[Bench, Mapping[str, Any]], BenchTable] = _table  # metrics to what is printed
    # names and contents of further files, e.g. official answer files, from the predictions with
    # their marks kept and what the model is called
    files: Callable[[Sequence[Prediction], str], Mapping[str, str]] = released_lines
    chance: float | None = None  # of a guess; None: that of always saying the commonest answer
    resize: tuple[int, int] | None = None  # of the image, once its marks are drawn; None leaves it
    published: tuple[Published, ...] = ()
    # Asks nothing: it scores, by key, what these benchmarks of the same checkpoint have answered.
    joins: tuple[str, ...] = ()
    # Whether the score is a judge's, by the benchmark's options and whether there is a judge; with
    # True there has to be one.
    is_judged: Callable[[Any, bool], bool] = _never
