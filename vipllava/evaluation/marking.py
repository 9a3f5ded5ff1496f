"""What becomes of an item's marks: kept, removed, moved or recoloured.

kept        drawn as the policy samples them
removed     nothing is drawn, the words stay: what is right then was not read from a mark
moved       the same marks in the same words on other regions, where another answer is right
recoloured  other colours of the palette on the same strokes; the words say the new ones

A model that reads the mark follows it, falls to chance without it, and stays when it is recoloured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from vipllava.evaluation.bench import BenchData, Item, Marks, Moved
from vipllava.evaluation.matching import answer_tokens
from vipllava.evaluation.perturbation import UNCHANGED, Perturbation
from vipllava.keyed_random import generator_for
from vipllava.records import find_kind
from vipllava.records.kind import CONVERSATIONS, OTHERS, RecordKind
from vipllava.types import (
    RGB,
    BBox,
    ConfigError,
    DraftTurn,
    Mention,
    RecordError,
    Region,
    Sample,
    Turn,
    VisualPrompt,
    VisualPromptPlan,
)
from vipllava.visual_prompts.policies import VisualPromptPolicy
from vipllava.visual_prompts.shapes import PALETTE

if TYPE_CHECKING:
    from vipllava.shards.tars import Entry
    from vipllava.stream.sample_encoder import SampleSource


@dataclass(frozen=True, slots=True)
class MarkedItem:
    """An item with what is drawn and said; pixels and request come from it."""

    sample: Sample  # with the regions that are marked
    plan: VisualPromptPlan  # what is drawn
    words: VisualPromptPlan  # what the texts name, drawn or not
    turns: tuple[Turn, ...]  # the words of the marks, up to the user's last turn
    ground_truth: object
    answer: DraftTurn | None = None  # what the ground truth is the words of, if it has mentions


def mark_item(
    item: Item,
    size: tuple[int, int],
    policies: Mapping[str, VisualPromptPolicy],
    seed: int,
    marks: Marks,
    perturb: Perturbation = UNCHANGED,
) -> MarkedItem | None:
    """Plan and word an item; the same arguments give the same plan anywhere.

    Args:
        item: from a benchmark.
        size: width and height of its image, pixels.
        policies: visual-prompt policies by name.
        seed: of the marks.
        marks: what becomes of them.
        perturb: how they differ from what the policy samples.

    Returns:
        None if the marks are to be moved and can go nowhere.

    Raises:
        ConfigError: there are no regions, so that nothing becomes of any mark.
        RecordError: the regions cannot be told apart, or nothing is asked; names the item.
    """
    # With torch, which the checks of a job's settings do without.
    from vipllava.stream.sample_encoder import marks_generator, plan_sample

    sample = item.sample
    check_regions(item, marks, perturb)
    sample, policies = perturb.fix(sample, size, policies)

    def planned(
        marked: Sample, change: Callable[[VisualPromptPlan], VisualPromptPlan] | None = None
    ) -> tuple[Sample, VisualPromptPlan, tuple[Turn, ...]]:
        shifted = perturb.shift(marked, size, seed)
        rng = marks_generator(seed, 0, sample.dataset, sample.key)
        return shifted, *plan_sample(shifted, size, policies, rng, change)

    shown, plan, turns = planned(sample, _recolour if marks == "recoloured" else None)
    truth, answer = item.ground_truth, None
    if turns and turns[-1].role == "assistant":
        if truth is None:
            truth, answer = turns[-1].text, sample.turns[-1]
        turns = turns[:-1]
    if not turns or turns[-1].role != "user" or truth is None:
        raise RecordError(f"{item.key} cannot be asked: it has no user's question and its answer")
    words = plan
    if marks == "removed":
        plan = VisualPromptPlan(size)
    if marks == "moved":
        places = [
            place
            for place in item.moved
            if _is_elsewhere(place.regions, sample.regions)
            and not _same(place.ground_truth, answer if _names_marks(answer) else truth)
        ]
        if not places:
            return None
        rng = generator_for(seed, sample.dataset, sample.key, "moved")
        place = places[int(rng.integers(len(places)))]
        styles = zip(sample.regions, place.regions, strict=True)
        regions = tuple(replace(new, style_of=old.style_of) for old, new in styles)
        truth, answer = place.ground_truth, None
        if isinstance(truth, DraftTurn):
            # In the words of the kept marks, as the question.
            answer, asked = truth, sample.turns[: len(turns)]
            truth = planned(replace(sample, turns=(*asked, answer)))[2][-1].text
        # Styles are drawn before strokes, so that these marks look and read as the kept ones.
        shown, plan, _ = planned(replace(sample, regions=regions))
    return MarkedItem(shown, plan, words, turns, truth, answer if _names_marks(answer) else None)


def check_regions(item: Item, marks: Marks, perturb: Perturbation) -> None:
    """Raise ConfigError if there are no regions, so that nothing becomes of any mark."""
    if not item.sample.regions and (marks != "kept" or perturb.of_marks):
        what = "perturbed marks" if marks == "kept" else f"marks={marks}"
        raise ConfigError(
            f"{what}: {item.key} has no regions, its image carries its marks; such items can be "
            "asked with marks=kept only, and of what is perturbed with jpeg_quality"
        )


def _is_elsewhere(places: Sequence[Region], regions: Sequence[Region]) -> bool:
    """Return whether a mark shows another object: two boxes of one differ by a few pixels."""
    pairs = zip(places, regions, strict=True)
    return any(_overlap(new.bbox_xyxy, old.bbox_xyxy) < 0.5 for new, old in pairs)


def _overlap(first: BBox, second: BBox) -> float:
    """Return the intersection of two boxes over their union."""
    sides = [min(first[n + 2], second[n + 2]) - max(first[n], second[n]) for n in (0, 1)]
    shared = max(sides[0], 0) * max(sides[1], 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return shared / (areas - shared) if areas > shared else float(first == second)


def _names_marks(answer: DraftTurn | None) -> bool:
    return answer is not None and any(isinstance(part, Mention) for part in answer.parts)


def _same(first: object, second: object) -> bool:
    """Whether two answers are one; of those that name marks, whether they name the same."""
    texts = (
        "".join(map(str, each.parts)) if isinstance(each, DraftTurn) else str(each)
        for each in (first, second)
    )
    return len({answer_tokens(text, keep_articles=len(text) == 1) or text for text in texts}) == 1


def _recolour(plan: VisualPromptPlan) -> VisualPromptPlan:
    """Give every mark of a plan another colour of the palette.

    A named one gets the next name, so that no two meet; an unnamed one the colour farthest from it.
    """
    names = list(PALETTE)

    def recoloured(prompt: VisualPrompt) -> VisualPrompt:
        if prompt.colour_name is None:
            return replace(prompt, rgb=max(PALETTE.values(), key=partial(_distance, prompt.rgb)))
        name = names[(names.index(prompt.colour_name) + 1) % len(names)]
        return replace(prompt, colour_name=name, rgb=PALETTE[name])

    return replace(plan, prompts=tuple(map(recoloured, plan.prompts)))


def _distance(first: RGB, second: RGB) -> int:
    return sum((a - b) ** 2 for a, b in zip(first, second, strict=True))


def items_of(data: BenchData, *, record_kind: str | RecordKind | None = None) -> Iterator[Item]:
    """Yield an item for each sample of the manifest, its last turn being the right answer.

    If marks are to be moved, an item has as places what its record lists as ``others``, and the
    regions about which other records ask the same of the same image. These are looked for first,
    which reads the data set once more.
    """
    source = data.source(record_kind)
    same = _same_questions(source) if "moved" in data.marks else None
    for position in range(len(source))[: data.limit]:
        entry = source.shards.read(position)
        sample = source.parse(entry)
        moved = () if same is None else _places(source, entry, same)
        yield Item(f"{sample.dataset}/{sample.key}", sample, moved=tuple(moved))


def _same_questions(source: SampleSource) -> dict[str, list[int]]:
    """Return the positions of the records that ask the same of the same image, by what they ask."""
    asked: dict[str, list[int]] = {}
    for position in range(len(source)):
        asked.setdefault(_asked(source, source.shards.read(position)), []).append(position)
    return asked


def _asked(source: SampleSource, entry: Entry) -> str:
    """Return what a record asks, without its regions and their answer."""
    kind = find_kind(entry.record, source.record_kind, entry.image is not None)
    said = {name: entry.record.get(name) for name in kind.texts if name != "answer"}
    if isinstance(turns := said.get(CONVERSATIONS), list):
        said[CONVERSATIONS] = turns[:-1]
    image = hashlib.blake2b(entry.image or b"", digest_size=16).hexdigest()
    return json.dumps([image, kind.name, said])


def _places(
    source: SampleSource, entry: Entry, positions: Mapping[str, Sequence[int]]
) -> Iterator[Moved]:
    others = entry.record.get(OTHERS)
    if others is None:
        same = positions[_asked(source, entry)]
        others = [read.record for at in same if (read := source.shards.read(at)).key != entry.key]
    if not isinstance(others, list) or not all(isinstance(other, Mapping) for other in others):
        raise RecordError(
            f"{entry.shard}: {source.name}/{entry.key}: field `{OTHERS}` is {str(others)[:80]}; "
            "expected a list of objects, each with the fields of this record that differ"
        )
    count = len(source.parse(entry).regions)
    for other in others:
        # Of this record's key, so that what is drawn by chance about wordings is the same.
        placed = replace(entry, record={**entry.record, **other})
        if _asked(source, placed) != _asked(source, entry):
            raise RecordError(
                f"{entry.shard}: {source.name}/{entry.key}: one of `{OTHERS}` asks something else; "
                "give its regions and its answer only"
            )
        sample = source.parse(placed)
        if len(sample.regions) == count:
            answer = sample.turns[-1]
            truth = answer if _names_marks(answer) else "".join(map(str, answer.parts))
            yield Moved(sample.regions, truth)
