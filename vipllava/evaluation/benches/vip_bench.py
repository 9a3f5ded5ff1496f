"""ViP-Bench in its official layout: questions in, the official answer file and scores out.

Layout: ``{bbox,human}/{questions.jsonl,images/}``, ``source_image/``, ``vip-bench-meta-data.json``.
The answer file, ``{"v1_<question_id>": text}``, is what the public evaluation server takes.
Per capability the score is the sum over its items / items x 100 (capabilities overlap); the total
is the mean over all items. An item without a verdict is a recorded failure, never a zero.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Final, cast

from PIL import Image

from vipllava.evaluation import summary
from vipllava.evaluation.bench import Bench, BenchData, BenchTable, Item, Prediction, Published
from vipllava.evaluation.correctness import judged_of, official_grades, official_table, run_totals
from vipllava.evaluation.matching import split_ground_truth
from vipllava.evaluation.scoring import SCORERS
from vipllava.evaluation.statistics import (
    Estimate,
    estimate_text,
    group_estimates,
    mean_estimate,
)
from vipllava.evaluation.summary import judge_notes, num_empty, published_notes
from vipllava.records.kind import NO_POLICY
from vipllava.report.evaluation_page import Figure
from vipllava.types import DraftTurn, RecordError, Sample, VipLlavaError

META_DATA: Final = "vip-bench-meta-data.json"
SPLITS: Final = ("bbox", "human")
CAPABILITIES: Final = ("rec", "ocr", "know", "math", "rel", "lang")


@dataclass(frozen=True, slots=True)
class Question:
    """One question of one split."""

    key: str  # ``v1_<question_id>``, as in meta data and answer file
    image: Path  # path of the marked image
    text: str  # the question in this split's wording
    answer: str  # the ground truth, with ``<AND>`` and ``<OR>``
    capability: tuple[str, ...]  # of :data:`CAPABILITIES`, those that it needs
    split: str  # of :data:`SPLITS`


def read_questions(folder: Path, split: str) -> list[Question]:
    """Read one split, checking everything before the first question is asked.

    Raises:
        RecordError: listing what is missing or malformed, with file, line and id.
    """
    if split not in SPLITS:
        raise RecordError(f"unknown split `{split}` of ViP-Bench; known: {', '.join(SPLITS)}")
    meta = _read_meta(folder / META_DATA)
    path = folder / split / "questions.jsonl"
    items: dict[str, Question] = {}
    problems: list[str] = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line, object_pairs_hook=distinct)
            item = _read_item(raw, meta, folder, split)
            if item.key in items:
                raise ValueError(f"question_id of {item.key} occurs twice")
            items[item.key] = item
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    if missing := sorted(set(meta) - set(items)):
        problems.append(f"{path}: no readable question for {', '.join(missing[:5])} of {META_DATA}")
    if problems:
        listing = "\n  ".join(problems[:20])
        raise RecordError(f"{len(problems)} problems in ViP-Bench at {folder}:\n  {listing}")
    return list(items.values())


def items(data: BenchData) -> Iterator[Item]:
    """Return the questions of both splits, in each split's wording, all checked."""
    splits = [read_questions(data.folder, split) for split in SPLITS]
    chosen = (question for questions in splits for question in questions[: data.limit])
    return (_item(each, upright=data.manifest.apply_exif_orientation) for each in chosen)


def _item(question: Question, *, upright: bool) -> Item:
    sample = Sample(
        key=f"{question.key} ({question.image})",
        dataset=question.split,
        image=_opaque(question.image.read_bytes()),
        regions=(),
        turns=(DraftTurn("user", (question.text,), has_image=True),),
        policy=NO_POLICY,
        upright=upright,
    )
    key = f"{question.split}/{question.key}"
    return Item(key, sample, question.answer, (question.split, *question.capability))


def _opaque(data: bytes) -> bytes:
    """Drop the alpha of an image, as the official script does; elsewhere white shows through."""
    try:
        with Image.open(BytesIO(data)) as image:
            if not image.has_transparency_data:
                return data
            opaque = BytesIO()
            image.convert("RGBA").convert("RGB").save(opaque, "PNG", exif=image.getexif())
            return opaque.getvalue()
    except (OSError, ValueError):  # said, with the item's name, by whoever decodes it
        return data


def _score(predictions: Sequence[Prediction], data: BenchData) -> Sequence[Prediction]:
    return SCORERS["offline" if data.judge is None else "judge"](predictions, data)


def summarise(predictions: Sequence[Prediction], chance: float | None = None) -> dict[str, Any]:
    """Return totals and scores by capability, 0 to 100, of every split.

    Returns:
        ``splits``: per split ``total`` (mean x 100) with its 95 % interval ``low``, ``high``;
        ``by_capability`` with ``score``, ``low``, ``high`` and ``num_items``, and
        ``by_combination`` of exactly those; ``num_items`` graded, ``num_failures`` and ``failures``
        (key: reason). Of a judge ``totals``, one of each run, and ``std``, their deviation.
        ``marks``, in shares of 1, as other benchmarks have it; splits are groups there.
    """
    splits = {split: [each for each in predictions if split in each.groups] for split in SPLITS}
    found = {split: _summarise(part) for split, part in splits.items() if part}
    return {"splits": found, "marks": summary.summarise(predictions)["marks"]}


def _summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    graded = [each for each in predictions if each.score is not None]
    values = [each.score for each in graded if each.score is not None]
    images = [each.image for each in graded]
    needed = [[name for name in CAPABILITIES if name in each.groups] for each in graded]
    by_capability = group_estimates(values, images, needed)
    by_combination = group_estimates(values, images, [[", ".join(names)] for names in needed])
    total = _times_100(mean_estimate(values, images))
    return {
        "total": total.pop("score"),
        **total,
        "num_failures": len(predictions) - len(graded),
        "num_empty": num_empty(predictions),
        **_of_runs(predictions),
        "by_capability": {
            name: _times_100(by_capability[name]) for name in CAPABILITIES if name in by_capability
        },
        "by_combination": {name: _times_100(found) for name, found in by_combination.items()},
        "failures": {_key(each): each.failure for each in predictions if each.score is None},
    }


def _of_runs(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return the totals of a judge's runs and their population deviation."""
    if not any(each.verdicts for each in predictions):
        return {}
    found = run_totals(map(judged_of, predictions))
    return {name: found[name] for name in ("totals", "std")}


def _key(prediction: Prediction) -> str:
    return prediction.key.rpartition("/")[2]


def _times_100(found: Estimate) -> dict[str, Any]:
    ends = {"score": found.value, "low": found.low, "high": found.high}
    times = {name: None if value is None else 100 * value for name, value in ends.items()}
    return {**times, "num_items": found.num_items}


def _files(predictions: Sequence[Prediction], model: str) -> dict[str, str]:
    """Return the official answer files, and a judge's grades with their tables."""
    files: dict[str, str] = {}
    for split in SPLITS:
        part = [each for each in predictions if split in each.groups]
        texts = {_key(each): each.answer for each in part if each.answer is not None}
        files[f"answers-{split}.json"] = _as_json(texts)
        judged = [replace(judged_of(each), key=_key(each)) for each in part if each.verdicts]
        if judged:
            result, runs = _summarise(part), f"{len(judged[0].verdicts)}runs"
            files[f"{split}-grade-{runs}.json"] = _as_json(official_grades(judged))
            for name, groups in (("cap", "by_capability"), ("cap-int", "by_combination")):
                files[f"{split}-{name}-score-{runs}.csv"] = official_table(result, groups, model)
    return files


def _as_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _table(bench: Bench, metrics: Mapping[str, Any]) -> BenchTable:
    splits: Mapping[str, Any] = metrics["splits"]

    names = dict.fromkeys(name for split in splits.values() for name in split["by_capability"])
    scores = [split["by_capability"] for split in splits.values()]
    return BenchTable(
        f"ViP-Bench, {bench.metric} (0-100, 95 %)",
        ("capability", *splits),
        [(name, *(_cell(of[name]) if name in of else "-" for of in scores)) for name in names],
        ("total", *(_cell(split | {"score": split["total"]}) for split in splits.values())),
        [*judge_notes(metrics), *published_notes(bench)],
        [
            Figure(name, each["total"], each["low"], each["high"], each["num_items"])
            for name, each in splits.items()
        ],
    )


def _cell(of: Mapping[str, Any]) -> str:
    ends = (
        None if value is None else value / 100 for value in map(of.get, ("score", "low", "high"))
    )
    failed = f", {of['num_failures']} without verdict" if of.get("num_failures") else ""
    failed += f", {of['num_empty']} empty answers" if of.get("num_empty") else ""
    runs = f", std {of['std']:.1f} over {len(of['totals'])} runs" if "std" in of else ""
    return f"{estimate_text(*ends)} of {of['num_items']}{failed}{runs}"


def _read_meta(path: Path) -> dict[str, dict[str, Any]]:
    try:
        meta: object = json.loads(_read_text(path), object_pairs_hook=distinct)
    except ValueError as error:
        raise RecordError(f"{path} is not JSON: {error}") from error
    if not isinstance(meta, dict) or not meta:
        raise RecordError(f"{path} must be an object of items, e.g. `v1_0`")
    items = cast("dict[str, Any]", meta)
    if odd := [key for key, item in items.items() if not isinstance(item, dict)]:
        raise RecordError(f"{path}: {', '.join(odd[:5])} must be objects with answer, capability")
    return items


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a repeated key; the json module would silently keep the last."""
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"`{twice}` occurs twice")
    return dict(pairs)


def _read_item(
    line: object, meta: Mapping[str, Mapping[str, Any]], folder: Path, split: str
) -> Question:
    """Build one question; a complaint is a ValueError, to which the caller adds file and line."""
    if not isinstance(line, dict):
        raise ValueError("not an object")
    question = cast("dict[str, Any]", line)
    if missing := [name for name in ("question_id", "image", "text") if name not in question]:
        raise ValueError(f"has no {', '.join(missing)}")
    identifier = question["question_id"]
    if isinstance(identifier, bool) or not isinstance(identifier, (int, str)):
        raise ValueError(f"question_id is {identifier!r}; expected a number or a text")
    key = f"v1_{str(identifier).removeprefix('v1_')}"
    if key not in meta:
        raise ValueError(f"{key} is not in {META_DATA}")
    item: Mapping[str, Any] = {"capability": None, "answer": None, **meta[key]}
    capability, answer = item["capability"], item["answer"]
    for name, value in {**question, "answer": answer}.items():
        if name in ("image", "text", "answer") and not (isinstance(value, str) and value.strip()):
            raise ValueError(f"{key}: {name} is {value!r}; expected a text")
    if not isinstance(capability, list) or not capability:
        raise ValueError(f"{key}: capability is {capability!r}; expected a list of names")
    if unknown := [name for name in capability if name not in CAPABILITIES]:
        known = ", ".join(CAPABILITIES)
        raise ValueError(f"{key} has unknown capabilities {unknown}; known: {known}")
    image = folder / split / "images" / question["image"]
    if not image.is_file():
        raise ValueError(f"{key}: there is no image {image}")
    try:
        split_ground_truth(answer)
    except VipLlavaError as error:
        raise ValueError(f"{key}: {error}") from error
    return Question(key, image, question["text"], answer, tuple(capability), split)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecordError(
            f"cannot read {path}: {reason}; ViP-Bench has UTF-8 texts in the layout "
            "{bbox,human}/{questions.jsonl,images/} and vip-bench-meta-data.json"
        ) from error


_PAPER: Final = "ViP-LLaVA, CVPR 2024"
_GPT_4: Final = "gpt-4-0613"
VIP_BENCH: Final = Bench(
    "vip_bench",
    items,
    _score,
    is_judged=lambda _, has_judge: has_judge,
    metric="offline matcher",
    summarise=summarise,
    table=_table,
    files=_files,
    published=(
        Published("ViP-LLaVA-7B", {"bbox": 48.4, "human": 48.3}, _PAPER, _GPT_4),
        Published("ViP-LLaVA-13B", {"bbox": 48.3, "human": 48.2}, _PAPER, _GPT_4),
    ),
)
