"""ViP-Bench in its official layout: questions in, the official answer file and scores out.

Layout: ``{bbox,human}/{questions.jsonl,images/}``, ``source_image/``, ``vip-bench-meta-data.json``.
The answer file, ``{"v1_<question_id>": text}``, is what the public evaluation server takes.
Per capability the score is the sum over its items / items x 100 (capabilities overlap); the total
is the mean over all items. An item without a verdict is a recorded failure, never a zero.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from vipllava.evaluation.bench import Answered, Asked, Bench, BenchData, BenchTable
from vipllava.evaluation.judge import Judge, NoVerdictError, match_offline, split_ground_truth
from vipllava.evaluation.statistics import mean_estimate
from vipllava.records.image_decode import decode_image
from vipllava.types import RecordError, Request, Turn, VipLlavaError

META_DATA: Final = "vip-bench-meta-data.json"
SPLITS: Final = ("bbox", "human")
CAPABILITIES: Final = ("rec", "ocr", "know", "math", "rel", "lang")


@dataclass(frozen=True, slots=True)
class Item:
    """One question of one split."""

    key: str  # ``v1_<question_id>``, as in meta data and answer file
    image: Path  # path of the marked image
    text: str  # the question in this split's wording
    answer: str  # the ground truth, with ``<AND>`` and ``<OR>``
    capability: tuple[str, ...]  # of :data:`CAPABILITIES`, those that it needs
    split: str  # of :data:`SPLITS`


def read_items(folder: Path, split: str) -> list[Item]:
    """Read one split, checking everything before the first question is asked.

    Raises:
        RecordError: listing what is missing or malformed, with file, line and id.
    """
    if split not in SPLITS:
        raise RecordError(f"unknown split `{split}` of ViP-Bench; known: {', '.join(SPLITS)}")
    meta = _read_meta(folder / META_DATA)
    path = folder / split / "questions.jsonl"
    items: dict[str, Item] = {}
    problems: list[str] = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line, object_pairs_hook=_distinct)
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


def ask(items: Iterable[Item], *, upright: bool = True) -> Iterator[Asked[Item]]:
    """Ask every question in its split's wording; ``upright``: images turned as EXIF says."""
    for item in items:
        name = f"{item.key} ({item.image})"
        image = decode_image(item.image.read_bytes(), name, upright=upright)
        turn = Turn("user", item.text, has_image=True)
        yield Asked(item, {"answer": Request(image, (turn,), item.key)})


def score(answered: Sequence[Answered[Item]], judge: Judge) -> dict[str, Any]:
    """Grade the answers of one split.

    Returns:
        ``total`` (mean x 100) with its 95 % interval ``low``, ``high``; ``by_capability`` with
        ``score`` and ``num_items``; ``num_items`` graded, ``num_failures`` and ``failures``
        (key: reason); ``verdicts`` (key: 0.0..1.0).
    """
    verdicts: dict[str, float] = {}
    failures: dict[str, str] = {}
    for each in answered:
        try:
            verdicts[each.key] = judge(each.item.text, each.item.answer, each.texts["answer"])
        except NoVerdictError as error:
            failures[each.key] = str(error)
    graded = {
        name: [verdicts[a.key] for a in answered if name in a.item.capability and a.key in verdicts]
        for name in CAPABILITIES
    }
    values = [100 * verdict for verdict in verdicts.values()]
    images = [str(each.item.image) for each in answered if each.key in verdicts]
    total = mean_estimate(values, images, bounds=(0.0, 100.0))
    return {
        "total": total.value,
        "low": total.low,
        "high": total.high,
        "num_items": total.num_items,
        "num_failures": len(failures),
        "by_capability": {
            name: {"score": 100 * sum(found) / len(found), "num_items": len(found)}
            for name, found in graded.items()
            if found
        },
        "failures": failures,
        "verdicts": verdicts,
    }


def _read(data: BenchData) -> Iterator[Asked[Item]]:
    splits = [read_items(data.folder, split) for split in SPLITS]
    chosen = (item for items in splits for item in items[: data.limit])
    return ask(chosen, upright=data.manifest.apply_exif_orientation)


def _by_split(answered: Sequence[Answered[Item]]) -> dict[str, list[Answered[Item]]]:
    return {split: [a for a in answered if a.item.split == split] for split in SPLITS}


def _files(answered: Sequence[Answered[Item]]) -> dict[str, str]:
    """Return the official answer files."""
    files: dict[str, str] = {}
    for split, part in _by_split(answered).items():
        texts = {each.key: each.texts["answer"] for each in part}
        files[f"answers-{split}.json"] = json.dumps(texts, indent=2, ensure_ascii=False) + "\n"
    return files


def _score(answered: Sequence[Answered[Item]]) -> dict[str, Any]:
    splits = {split: score(part, match_offline) for split, part in _by_split(answered).items()}
    return {"judge": "offline matcher", "splits": splits}


def _table(results: Mapping[str, Any]) -> BenchTable:
    splits: Mapping[str, Any] = results["splits"]

    def cell(split: Mapping[str, Any], capability: str) -> str:
        found = split["by_capability"].get(capability)
        return f"{found['score']:.1f} ({found['num_items']})" if found else "-"

    names = dict.fromkeys(name for split in splits.values() for name in split["by_capability"])
    return BenchTable(
        f"ViP-Bench, {results['judge']} (0-100; total with 95 % interval)",
        ("capability", *splits),
        [(name, *(cell(split, name) for split in splits.values())) for name in names],
        ("total", *map(_total, splits.values())),
    )


def _total(result: Mapping[str, Any]) -> str:
    if result["total"] is None:
        return "-"
    text = f"{result['total']:.1f}"
    if result["low"] is not None:
        text += f" ({result['low']:.1f}-{result['high']:.1f})"
    failed = f", {result['num_failures']} without verdict" if result["num_failures"] else ""
    return f"{text}, {result['num_items']} items{failed}"


def _read_meta(path: Path) -> dict[str, dict[str, Any]]:
    try:
        meta: object = json.loads(_read_text(path), object_pairs_hook=_distinct)
    except ValueError as error:
        raise RecordError(f"{path} is not JSON: {error}") from error
    if not isinstance(meta, dict) or not meta:
        raise RecordError(f"{path} must be an object of items, e.g. `v1_0`")
    items = cast("dict[str, Any]", meta)
    if odd := [key for key, item in items.items() if not isinstance(item, dict)]:
        raise RecordError(f"{path}: {', '.join(odd[:5])} must be objects with answer, capability")
    return items


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a repeated key; the json module would silently keep the last."""
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"`{twice}` occurs twice")
    return dict(pairs)


def _read_item(
    line: object, meta: Mapping[str, Mapping[str, Any]], folder: Path, split: str
) -> Item:
    """Build one item; every complaint is a ValueError, to which the caller adds file and line."""
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
    return Item(key, image, question["text"], answer, tuple(capability), split)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecordError(
            f"cannot read {path}: {reason}; ViP-Bench has UTF-8 texts in the layout "
            "{bbox,human}/{questions.jsonl,images/} and vip-bench-meta-data.json"
        ) from error


VIP_BENCH: Final = Bench("vip_bench", _read, _score, _table, _files)
