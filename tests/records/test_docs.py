"""The examples of docs/data.md, run as they stand there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.toy_data import encode_picture
from tests.visual_prompts.policy_files import load_policies
from vipllava import records as schemas
from vipllava.keyed_random import generator_for
from vipllava.records import KINDS, RecordKind, kind_of, parse_record
from vipllava.stream.sample_encoder import marks_generator, plan_sample
from vipllava.types import RecordError, Sample
from vipllava.visual_prompts.shapes import prompt_words

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
IMAGE = encode_picture(320, 240)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def parse(record: dict[str, Any], draw: int = 0) -> Sample:
    rng = generator_for("docs", draw)
    return parse_record(record, key="k", dataset="d", image=IMAGE, rng=rng)


def texts(sample: Sample) -> tuple[list[str], list[str]]:
    rng = marks_generator(0, 0, "d", "k")
    plan, turns = plan_sample(sample, (320, 240), load_policies(), rng)
    return [turn.text for turn in turns], [prompt_words(prompt) for prompt in plan.prompts]


def test_a_users_own_record() -> None:
    (example,) = blocks("json")
    said, words = texts(parse(json.loads(example)))
    assert words[0] == "with the red mask contour"
    assert said == [
        "Is the cup with the red mask contour full?",
        f"No, but the one {words[1]} is.",
    ]
    question = re.search(r"the question becomes `(.*?)`", PAGE, flags=re.DOTALL)
    assert question
    assert " ".join(question[1].split()) == said[0]


def test_the_table_names_every_kind() -> None:
    table = PAGE.split("| kind | fields")[1].split("\n\n")[0]
    assert re.findall(r"^\| `([\w-]+)` \|", table, flags=re.MULTILINE) == list(KINDS)


def test_the_worked_example_of_a_new_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    module, line = blocks("python")
    namespace: dict[str, Any] = {"__name__": "signs"}
    exec(compile(module, "docs/data.md", "exec"), namespace)
    added: dict[str, RecordKind] = eval(
        f"{{{line}}}", {"RecordKind": RecordKind, "parse_signs": namespace["parse_signs"]}
    )
    monkeypatch.setattr(schemas, "_PREFIXES", frozenset({"signs"}))
    for name, kind in added.items():
        monkeypatch.setitem(KINDS, name, kind)
    record = {
        "id": "signs-3",
        "bboxes": [[20, 20, 120, 110], [150, 40, 300, 200]],
        "written": ["STOP", "No parking"],
    }
    assert kind_of(record) == "signs"
    sample = parse(record)
    said, words = texts(sample)
    assert said[1::2] == ["STOP", "No parking"]
    assert words[0] in said[0]
    assert words[1] in said[2]
    assert [turn.has_image for turn in sample.turns] == [True, False, False, False]
    assert len({texts(parse(record, draw))[0][0] for draw in range(30)}) == 3
    with pytest.raises(RecordError, match=r"d/k: field `written\[1\]` is ''; expected what is"):
        parse({**record, "written": ["STOP", ""]})
