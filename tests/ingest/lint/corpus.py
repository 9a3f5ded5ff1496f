"""A clean record of every kind, pictures on which marks are seen, and ways to lint them."""

from __future__ import annotations

import copy
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tests.toy_data import make_manifest, said
from vipllava.conversation.encode import ConversationEncoder
from vipllava.ingest.lint.findings import Finding, LintLimits, LintReport
from vipllava.ingest.lint.run import lint_entry, lint_shards
from vipllava.models.towers import CLIP
from vipllava.shards.tar_index import index_path
from vipllava.shards.tars import Entry, ShardSet, index_shard
from vipllava.stream.image_transform import ImageTransform
from vipllava.stream.sample_encoder import SampleEncoder, SampleSource
from vipllava.visual_prompts.policies import VisualPromptPolicy, build_policies

WIDTH, HEIGHT = 336, 252
Members = list[tuple[str, bytes]]

BOX = [20, 20, 120, 110]
BOX2 = [150, 40, 300, 200]
BOX3 = [30, 130, 130, 240]
BOX4 = [200, 100, 330, 245]
RING = [25, 25, 115, 30, 110, 105, 60, 90, 22, 100]
RING2 = [160, 50, 290, 60, 280, 190, 170, 180]


def _points(flat: list[float]) -> list[list[float]]:
    return [[x, y] for x, y in zip(flat[::2], flat[1::2], strict=True)]


RECORDS: dict[str, dict[str, Any]] = {
    "image_level": {"id": "1", "image": "a.jpg", "conversations": said("<image>\nHi", "A dog.")},
    "text_only": {"id": "2", "conversations": said("Hi", "Hello.", "Bye", "Goodbye.")},
    "refcocog": {"id": "refcocog-1", "bboxes": [BOX], "segmentations": [[RING]], "answer": "a cup"},
    "refcocog-gpt4v": {
        "id": "refcocog-gpt4v-1",
        "bboxes": [BOX],
        "segmentations": [[RING, RING2]],
        "conversations": said("<image>\nWho is <bbox>?", "A man.", "Why?", "It says so <bbox>."),
    },
    "vg_rel": {"id": "vg_rel-1", "bboxes": [BOX, BOX2], "answer": "man, riding, horse"},
    "vg_rel-gpt4v": {
        "id": "vg_rel-gpt4v-1",
        "bboxes": [BOX, BOX2],
        "conversations": said("<image>\nIs <bbox1> near <bbox0>?", "Yes."),
    },
    "flickr30k": {
        "id": "flickr30k-1",
        "bbox": [[BOX, BOX3], [BOX2], [[5, 5, 5, 5]]],  # nobody speaks of the last
        "grounding": "two men <bbox0> hold a rope <bbox1> .",
    },
    "vcr": {
        "id": "vcr-1",
        "meta": {
            "boxes": [[*BOX, 0.9], [*BOX2, 0.8], [9, 9, 9, 9, 0.7]],
            "segms": [[_points(RING), [[1, 1], [2, 2], [3, 3]]], [_points(RING2)], []],
        },
        "class_names": ["person", "dog", "cup"],
        "question": ["Why", "is", [0], "looking", "up", "?"],
        "answer_choices": [["no"], [[1], "barks", "."], ["so"], ["it"]],
        "answer_label": 0,
        "rationale_choices": [["a"], ["b"], ["c"], [[0], "smiles"]],
        "rationale_label": 3,
    },
    "v7w": {
        "id": "v7w-1",
        "bboxes": [BOX, BOX2, BOX3, BOX4],
        "question": "Which is a dog?",
        "answer": BOX4,
    },
    "pointQA_twice": {
        "id": "pointQA_twice-1",
        "bboxes": [BOX],
        "general_question": "How many of these are there?",
        "answer": 2,
    },
    "regions": {
        "id": "mine",
        "bboxes": [BOX, BOX2],
        "segmentations": [[RING], None],
        "conversations": said("<image>\nWhat is <bbox0>?", "A cup.", "And <bbox1>?", "A dog."),
    },
}
MARKED = tuple(kind for kind in RECORDS if kind not in ("image_level", "text_only"))


def record_of(kind: str, **changes: Any) -> dict[str, Any]:
    """Return a copy of a clean record with some fields replaced; ``...`` removes one."""
    record = {**copy.deepcopy(RECORDS[kind]), **changes}
    return {name: value for name, value in record.items() if value is not ...}


def noise(seed: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Return noise around grey in blocks of 4 pixels; no mark comes near all of it."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (-(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    pixels = blocks.repeat(4, axis=0).repeat(4, axis=1)[:height, :width]
    return Image.fromarray(np.ascontiguousarray(pixels))


def stored(image: Image.Image, fmt: str = "JPEG", **options: Any) -> bytes:
    """Return an encoded picture."""
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def picture(seed: int = 0) -> bytes:
    """Return a clean JPEG."""
    return stored(noise(seed))


def members_of(
    key: str,
    record: Mapping[str, Any],
    image: bytes | None = None,
    extension: str = "jpg",
) -> Members:
    """Return the members of one sample."""
    members = [(f"{key}.json", json.dumps(record).encode())]
    return members if image is None else [*members, (f"{key}.{extension}", image)]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], *, index: bool = True) -> Path:
    """Write any members in any order, and the index unless it is left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    if index:
        index_shard(path)
    else:
        index_path(path).unlink(missing_ok=True)
    return path


def published_policies() -> dict[str, VisualPromptPolicy]:
    """Return the policies of ``conf/visual_prompts/published.yaml``."""
    path = Path(__file__).parents[3] / "conf" / "visual_prompts" / "published.yaml"
    raw = yaml.safe_load(path.read_text())
    return build_policies(raw["policies"], raw["ranges"])


def sample_encoder(
    encoder: ConversationEncoder,
    policies: Mapping[str, VisualPromptPolicy] | None = None,
    *,
    seed: int = 0,
    size: int = 336,
) -> SampleEncoder:
    """Return what the job would make samples with."""
    return SampleEncoder(
        policies or published_policies(),
        encoder,
        ImageTransform(size, "pad", CLIP.preprocessing),
        seed=seed,
    )


def lint(root: Path | str, samples: SampleEncoder, **options: Any) -> LintReport:
    """Lint ``toy/*.tar`` under ``root``."""
    manifest = make_manifest(**options.pop("manifest", {}))
    limits = options.pop("limits", LintLimits())
    return lint_shards(manifest, root, samples, limits, options.pop("seed", 0), **options)


def lint_one(
    record: Mapping[str, Any],
    samples: SampleEncoder,
    *,
    image: bytes | None,
    extension: str | None = "jpg",
    kind: str = "auto",
    limits: LintLimits | None = None,
    epoch: int = 0,
) -> list[Finding]:
    """Lint one record that lies in no tar."""
    entry = Entry("k", record, image, extension if image else None, Path("toy/x.tar"))
    source = SampleSource(ShardSet("toy", (), ()), kind, "auto", seed=samples.seed)
    return lint_entry(entry, source, samples, limits or LintLimits(), epoch)


def codes(findings: Iterable[Finding]) -> list[str]:
    """Return the codes, sorted."""
    return sorted(finding.code for finding in findings)


def found(report: LintReport) -> set[tuple[str, str]]:
    """Return key and code of every finding."""
    return {(finding.key, finding.code) for finding in report.findings}
