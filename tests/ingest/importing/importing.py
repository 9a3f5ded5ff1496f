"""Importing in tests: what was written, and what was refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ingest.importing.exports import Picture
from vipllava.files.atomic import UNFINISHED
from vipllava.ingest.importing.run import ImportSummary, import_annotations
from vipllava.ingest.importing.source import ImportingError, ImportOptions
from vipllava.ingest.importing.templates import Templates


def imported(
    root: Path, form: str, source: Path, *, category: str | None = None, split: str | None = None,
    images: Path | None = None, box_form: str | None = None, crowds: bool = True,
    question: tuple[str, ...] = ("What is {region}?",), answer: str = "{category}", **more: Any,
) -> tuple[ImportSummary, list[dict[str, Any]]]:  # fmt: skip
    """Import into ``root/data/mine``; return the summary and the records."""
    options = ImportOptions(images, category, split, box_form, crowds)
    output = root / "data" / "mine"
    summary = import_annotations(
        form, source, output, data_root=root / "data", options=options,
        templates=Templates(question, answer), **more,
    )  # fmt: skip
    lines = (output / "records.jsonl").read_text("utf-8").splitlines()
    return summary, [json.loads(line) for line in lines]


def refused(root: Path, form: str, source: Path, **more: Any) -> str:
    """Return why an import was refused; nothing is written then."""
    with pytest.raises(ImportingError) as caught:
        imported(root, form, source, **more)
    assert not (root / "data" / "mine").exists()
    assert not list(root.rglob(f"*{UNFINISHED}"))
    return str(caught.value)


def manifest_of(summary: ImportSummary) -> dict[str, Any]:
    """Return the manifest that was written."""
    return yaml.safe_load(summary.manifest.read_text("utf-8"))


def things(records: list[dict[str, Any]]) -> dict[str, list[tuple[str, list[float]]]]:
    """Return what records say, by picture: the answers with their boxes."""
    found: dict[str, list[tuple[str, list[float]]]] = {}
    for record in records:
        answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
        named = Path(record["image"]).name
        found.setdefault(named, []).extend(zip(answers, record["bboxes"], strict=True))
    return found


def seen(scene: tuple[Picture, ...]) -> dict[str, list[tuple[str, list[float]]]]:
    """Return what a person saw in the tool, likewise."""
    return {
        picture.name: [(name, pytest.approx(list(box), abs=0.01)) for name, box in picture.things]
        for picture in scene
    }
