"""Items to predictions: each is marked, told and asked once, and on disk as soon as it is answered.

    items -> mark_item -> encode_item -> answerer -> Journal -> predictions in the items' order

What the folder holds already is not asked again; a failed request is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from vipllava.evaluation.bench import Answerer, Item, Marks, Prediction
from vipllava.evaluation.encodings import Coordinates, Encoding, encode_item, encode_truth
from vipllava.evaluation.journal import Journal, predictions_path
from vipllava.evaluation.marking import check_regions, mark_item
from vipllava.evaluation.perturbation import UNCHANGED, Perturbation
from vipllava.records.image_decode import decode_image
from vipllava.types import Failure, RecordError, Request, VipLlavaError

if TYPE_CHECKING:
    from PIL import Image

    from vipllava.visual_prompts.policies import VisualPromptPolicy


@dataclass(frozen=True, slots=True)
class Protocol:
    """How items are asked: together with the item it decides about the request."""

    policies: Mapping[str, VisualPromptPolicy]
    seed: int
    marks: tuple[Marks, ...] = ("kept",)
    encoding: Encoding = "overlay"
    coordinates: Coordinates | None = None
    resize: tuple[int, int] | None = None
    perturb: Perturbation = UNCHANGED


def ask_items(
    items: Iterable[Item],
    protocol: Protocol,
    make_answerer: Callable[[], Answerer],
    journal: Journal,
) -> dict[Marks, list[Prediction]]:
    """Ask what the journal has no answer to.

    Args:
        items: read as the answerer gets on.
        protocol: how they are asked.
        make_answerer: called once the first question is there, and not if there is none.
        journal: has earlier answers and gets the new ones.

    Returns:
        Per marking the predictions in the items' order, not scored. An item whose marks can go
        nowhere is not among those of ``moved``.

    Raises:
        RecordError: two items have one key.
        VipLlavaError: an item cannot be asked with such marks, or the journal has answers to
            items that are not there.
    """
    asking = _Asking(protocol, journal)
    requests = asking.requests(items)
    if (first := next(requests, None)) is not None:
        for number, answer in make_answerer().answer(chain((first,), requests)):
            asking.take(number, answer)
    journal.close()
    predictions: dict[Marks, list[Prediction]] = {}
    for marks in protocol.marks:
        found = journal.read(marks)
        if unknown := [key for key in found if key not in asking.order]:
            raise VipLlavaError(
                f"{predictions_path(journal.folder, marks)} has answers to {len(unknown)} items "
                f"that the benchmark does not have, e.g. {', '.join(unknown[:3])}: delete those "
                "lines, or evaluate into another folder with name=NEW_NAME"
            )
        predictions[marks] = [found[key] for key in asking.order if key in found]
    return predictions


class _Asking:
    """Which request belongs to which prediction."""

    def __init__(self, protocol: Protocol, journal: Journal) -> None:
        self.protocol, self.journal = protocol, journal
        self.order: dict[str, None] = {}  # keys of the items
        self.waiting: dict[int, Prediction] = {}  # by the number of the request

    def requests(self, items: Iterable[Item]) -> Iterator[Request]:
        answered = {
            marks: {key for key, each in self.journal.read(marks).items() if each.has_answer}
            for marks in self.protocol.marks
        }
        number = 0
        for item in items:
            if item.key in self.order:
                raise RecordError(f"two items have the key {item.key}; each needs one of its own")
            self.order[item.key] = None
            missing: list[Marks] = [m for m in self.protocol.marks if item.key not in answered[m]]
            for prediction, request in prepared(item, self.protocol, missing):
                if request is None:
                    self.journal.append(prediction)
                    continue
                self.waiting[number] = prediction
                number += 1
                yield request

    def take(self, number: int, answer: str | Failure) -> None:
        prediction = self.waiting.pop(number)
        if isinstance(answer, Failure):
            self.journal.append(prediction.failed(answer.reason))
        else:
            self.journal.append(replace(prediction, answer=answer))


def prepared(
    item: Item, protocol: Protocol, markings: Sequence[Marks]
) -> Iterator[tuple[Prediction, Request | None]]:
    """Yield what is asked; without a request the prediction says why it cannot be."""
    for marks in markings:  # all of them, before a model is opened for the first
        check_regions(item, marks, protocol.perturb)
    image: Image.Image | None = None
    read = False
    for marks in markings:
        prediction = Prediction(
            item.key, item.image_id, marks, "", None, item.groups, record_id=item.sample.record_id
        )
        try:
            if not read:
                image, read = item_image(item), True
            size = (0, 0) if image is None else image.size
            marked = mark_item(
                item, size, protocol.policies, protocol.seed, marks, protocol.perturb
            )
            if marked is None:
                continue
            request = encode_item(
                image, marked, item.key, protocol.encoding, protocol.coordinates,
                protocol.resize,
            )  # fmt: skip
            request = protocol.perturb.compress(request)
            truth = encode_truth(image, marked, protocol.encoding, protocol.coordinates)
        except RecordError as error:
            yield prediction.failed(str(error)), None
            continue
        shapes = [prompt.shape for prompt in marked.words.prompts][:1]
        yield (
            replace(
                prediction,
                question=request.turns[-1].text,
                ground_truth=truth,
                groups=(*item.groups, *shapes),
            ),
            request,
        )


def item_image(item: Item) -> Image.Image | None:
    """Return an item's image as it is drawn on, if it has one.

    Raises:
        RecordError: it does not open; names the item.
    """
    sample = item.sample
    if sample.image is None:
        return None
    return decode_image(sample.image, f"{sample.dataset}/{sample.key}", upright=sample.upright)


def requests_of(items: Iterable[Item], protocol: Protocol) -> Iterator[Request]:
    """Yield what items are asked.

    Raises:
        RecordError: one cannot be asked; says why.
    """
    for item in items:
        for prediction, request in prepared(item, protocol, protocol.marks):
            if request is None:
                raise RecordError(str(prediction.failure))
            yield request
