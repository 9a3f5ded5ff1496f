"""The examples of docs/data.md, run as they stand there."""

from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

from tests.records.drafting import draft
from tests.toy_data import SIDE, encode_picture, make_manifest
from tests.visual_prompts.policy_files import load_policies
from vipllava.conversation.encode import ConversationEncoder
from vipllava.files.pools import run_jobs
from vipllava.ingest.lint.findings import LintLimits
from vipllava.ingest.lint.run import lint_shards
from vipllava.keyed_random import generator_for
from vipllava.models.towers import CLIP
from vipllava.records import KINDS, kind_of, parse_record, with_kinds
from vipllava.shards.manifest import MANIFEST_VERSION, Manifest
from vipllava.shards.tars import write_shards
from vipllava.stream.datamodule import VisualPromptDataModule
from vipllava.stream.image_transform import ImageTransform
from vipllava.stream.sample_encoder import (
    SampleEncoder,
    SampleSource,
    marks_generator,
    plan_sample,
)
from vipllava.training.preflight import look_at_data
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


RECORD: dict[str, Any] = {
    "id": "signs-3",
    "bboxes": [[20, 20, 120, 110], [150, 40, 300, 200]],
    "segmentations": [[[25, 25, 115, 30, 110, 105, 22, 100]], None],
    "written": ["STOP", "No parking"],
}


@pytest.fixture
def signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manifest]:
    """The worked example: its file where Python finds it, its manifest read."""
    (module,), (lines,) = blocks("python"), blocks("yaml")
    (tmp_path / "signs.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        yield make_manifest(**yaml.safe_load(lines))
    finally:
        KINDS.pop("signs", None)
        sys.modules.pop("signs", None)


def test_the_worked_example_of_a_new_kind(signs: Manifest) -> None:
    assert signs.record_kind == "signs"
    assert kind_of(RECORD) == "signs"
    sample = parse(RECORD)
    said, words = texts(sample)
    assert said[1::2] == ["STOP", "No parking"]
    assert words[0] in said[0]
    assert words[1] in said[2]
    assert [turn.has_image for turn in sample.turns] == [True, False, False, False]
    assert len({texts(parse(RECORD, draw))[0][0] for draw in range(30)}) == 3
    with pytest.raises(RecordError, match=r"d/k: field `written\[1\]` is ''; expected what is"):
        parse({**RECORD, "written": ["STOP", ""]})


def write(folder: Path, *records: dict[str, Any]) -> None:
    samples = [(f"s{number}", record, IMAGE, "jpg") for number, record in enumerate(records)]
    write_shards(samples, folder / "toy", check_images=False)


def test_its_lengths_are_estimated_and_forecast(
    signs: Manifest, tmp_path: Path, encoder: ConversationEncoder
) -> None:
    write(tmp_path, RECORD, {**RECORD, "written": ["STOP", "x" * 360]})
    (tmp_path / "toy.yaml").write_text(
        f"schema_version: {MANIFEST_VERSION}\nname: toy\nstage: finetune\nlicence: none\n"
        f"shards: toy/*.tar\n{blocks('yaml')[0]}"
    )
    data = VisualPromptDataModule(
        "toy", tmp_path, tmp_path, load_policies(), encoder,
        ImageTransform(SIDE, "pad", CLIP.preprocessing), 1, 2,
        num_workers=0,
    )  # fmt: skip
    cfg = OmegaConf.create({"stage": {"max_length": 2048, "supervised_share": 0.5}})
    corpus, num_proved = look_at_data(cfg, data)
    assert data.dataset is not None
    (source,) = data.dataset.sources
    # 4 + 10 letters and a space to each; 4 + 360; 3.6 bytes a token.
    assert source.shards.text_tokens(np.arange(2)).tolist() == [5, 102]
    samples = SampleEncoder(
        load_policies(), encoder, ImageTransform(SIDE, "pad", CLIP.preprocessing), data.seed
    )
    lengths = [samples.encode_text(source.sample(n))[1].length for n in range(2)]
    assert num_proved == 2
    assert corpus.mean_tokens == pytest.approx(np.mean(lengths))
    assert corpus.longest > 360


def test_lint_looks_at_it(signs: Manifest, tmp_path: Path, encoder: ConversationEncoder) -> None:
    outside = {**RECORD, "bboxes": [[330, 20, 400, 110], [300, 40, 340, 200]]}
    crossing = {**RECORD, "segmentations": [None, [[160, 50, 290, 190, 290, 50, 160, 190]]]}
    odd = {**RECORD, "segmentations": [[[25, 25, 115]], None]}
    leftover = {**RECORD, "written": ["STOP", "<bbox0>"]}
    write(tmp_path, RECORD, outside, crossing, odd, leftover)
    samples = SampleEncoder(
        load_policies(), encoder, ImageTransform(336, "pad", CLIP.preprocessing), seed=0
    )
    report = lint_shards(signs, tmp_path, samples, LintLimits(min_contrast=0), seed=0)
    assert [(finding.key, finding.code) for finding in report.findings] == [
        ("s1", "box-outside"),
        ("s1", "box-clipped"),
        ("s2", "polygon-self-crossing"),
        ("s3", "polygon-invalid"),
        ("s4", "placeholder-without-region"),
    ]


def test_worker_processes_know_it(
    signs: Manifest, tmp_path: Path, encoder: ConversationEncoder
) -> None:
    write(tmp_path, RECORD)
    source = SampleSource.open(signs, tmp_path, seed=0)
    (drafted,) = run_jobs(with_kinds(draft), [RECORD], 1)
    assert drafted == ("signs", "STOP")
    sent = pickle.dumps(source)
    del KINDS["signs"], sys.modules["signs"]  # as in a spawned process
    assert pickle.loads(sent).sample(0) == source.sample(0)
    assert kind_of(RECORD) == "signs"
