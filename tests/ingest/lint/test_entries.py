"""One record by itself: what only some policies, encoders or limits bring about."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.ingest.lint.corpus import (
    BOX,
    BOX2,
    HEIGHT,
    MARKED,
    RECORDS,
    WIDTH,
    codes,
    lint_one,
    picture,
    published_policies,
    record_of,
    sample_encoder,
    stored,
)
from tests.toy_data import said
from vipllava.conversation.encode import ConversationEncoder
from vipllava.ingest.lint.findings import LintLimits
from vipllava.models.towers import CLIP
from vipllava.types import IGNORE_INDEX, ConfigError, Encoded, Turn
from vipllava.visual_prompts.policies import ShapeRanges, VisualPromptPolicy

TINY = ([50, 50, 52, 52], [90, 90, 92, 92], [50, 90, 52, 92], [90, 50, 92, 52])
NUM_MARKS = {
    "refcocog": 1, "refcocog-gpt4v": 1, "vg_rel": 2, "vg_rel-gpt4v": 2, "flickr30k": 3, "v7w": 4,
    "pointQA_twice": 1, "regions": 2,
}  # fmt: skip


def everywhere(policy: VisualPromptPolicy) -> dict[str, VisualPromptPolicy]:
    return dict.fromkeys(published_policies(), policy)


def with_tiny_boxes(kind: str) -> dict[str, Any]:
    record = record_of(kind)
    if kind == "flickr30k":
        record["bbox"] = [[TINY[0], TINY[1]], [TINY[2]], []]
    elif kind == "vcr":
        record["meta"]["boxes"] = [[*box, 0.5] for box in TINY[:3]]
    else:
        record["bboxes"] = list(TINY[: len(record["bboxes"])])
    if kind == "v7w":
        record["answer"] = TINY[3]
    return record


@pytest.mark.parametrize("kind", MARKED)
def test_small_marks_of_every_kind(encoder: ConversationEncoder, kind: str) -> None:
    thin = ShapeRanges(rectangle_width=(1, 1), constant_rectangle_width=1, alpha=(255, 255))
    shapes = VisualPromptPolicy(shapes=("rectangle",), ranges=thin)
    samples = sample_encoder(encoder, everywhere(shapes))
    findings = lint_one(with_tiny_boxes(kind), samples, image=picture())
    assert set(codes(findings)) == {"mark-small"}
    if kind != "vcr":  # mentions one or two, as drawn
        assert len(findings) == NUM_MARKS[kind]
    assert "the mark is 3.0 pixels long in the input of 336" in findings[0].message
    limits = LintLimits(min_mark_pixels=3)
    assert lint_one(with_tiny_boxes(kind), samples, image=picture(), limits=limits) == []


def test_a_mark_is_measured_in_the_input(encoder: ConversationEncoder) -> None:
    prompts = [{"shape": "rectangle", "width": 1, "alpha": 255}, {"shape": "arrow"}]
    record = record_of(
        "regions", bboxes=[[50, 50, 60, 55], BOX2], segmentations=..., visual_prompts=prompts
    )
    for size, expected in ((336, []), (122, ["mark-small"]), (123, [])):
        samples = sample_encoder(encoder, size=size)  # 11 pixels of 336
        assert codes(lint_one(record, samples, image=picture())) == expected


@pytest.mark.parametrize("kind", MARKED)
def test_faint_marks_of_every_kind(encoder: ConversationEncoder, kind: str) -> None:
    samples = sample_encoder(encoder, everywhere(VisualPromptPolicy(fixed_alpha=5)))
    findings = lint_one(record_of(kind), samples, image=picture())
    assert set(codes(findings)) == {"mark-contrast"}
    if kind != "vcr":
        assert len(findings) == NUM_MARKS[kind]
    limits = LintLimits(min_contrast=0)
    assert lint_one(record_of(kind), samples, image=picture(), limits=limits) == []


def test_the_level_of_contrast(encoder: ConversationEncoder) -> None:
    image = stored(Image.new("RGB", (WIDTH, HEIGHT), (100, 150, 200)), "PNG")
    prompt = {"shape": "mask", "colour": [112, 140, 205], "alpha": 255}
    record = record_of("regions", visual_prompts=[prompt, {"shape": "arrow", "colour": "red"}])
    samples = sample_encoder(encoder)

    def look(limit: float) -> list[str]:
        limits = LintLimits(min_contrast=limit, min_image_contrast=0)
        findings = lint_one(record, samples, image=image, extension="png", limits=limits)
        return [finding.message for finding in findings]

    assert look(12) == []
    assert look(12.1) == [
        "region 0, marked `with the mask`: rgb (112, 140, 205) at opacity 255 changes the image "
        "by 12 levels (min_contrast=12.1); use another colour or more opacity"
    ]


@pytest.mark.parametrize("kind", [kind for kind in MARKED if kind != "v7w"])
def test_answers_that_name_the_colour(encoder: ConversationEncoder, kind: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "refcocog": {"answer": "a red cup"},
        "refcocog-gpt4v": {"conversations": said("Who is <bbox>?", "Redford in RED.")},
        "vg_rel": {"answer": "man, riding, red horse"},
        "vg_rel-gpt4v": {"conversations": said("Is <bbox0> near <bbox1>?", "A red one.")},
        "flickr30k": {"grounding": "two red men <bbox0> hold a rope <bbox1> ."},
        "vcr": {"answer_choices": [["it", "is", "red"], ["b"], ["c"], ["d"]]},
        "pointQA_twice": {"answer": "red"},
        "regions": {"conversations": said("Is <bbox0> near <bbox1>?", "A red one.")},
    }
    unnamed = VisualPromptPolicy(shapes=("rectangle",), colour="red", name_colour=False)
    record = record_of(kind, **changes[kind])
    samples = sample_encoder(encoder, everywhere(unnamed))
    # Without names all regions are the same rectangle.
    same = ["same-words"] * (NUM_MARKS.get(kind, 1) > 1)
    seen = set()
    for epoch in range(4):
        found = codes(lint_one(record, samples, image=picture(), epoch=epoch))
        seen |= set(found) - {"same-words"}
        if kind != "vcr":
            assert found == ["answer-names-colour", *same]
    assert seen == {"answer-names-colour"}
    named = sample_encoder(encoder, everywhere(replace(unnamed, colour="blue")))
    assert "answer-names-colour" not in codes(lint_one(record, named, image=picture()))


def test_a_colour_that_the_question_names(encoder: ConversationEncoder) -> None:
    red = VisualPromptPolicy(shapes=("rectangle",), colour="red")
    samples = sample_encoder(encoder, everywhere(red))
    record = record_of("refcocog-gpt4v", conversations=said("Who is <bbox>?", "A red man."))
    assert lint_one(record, samples, image=picture()) == []


class ShiftedLabels(ConversationEncoder):
    """Supervises a token too few."""

    def encode(self, turns: Sequence[Turn], key: str = "") -> Encoded:
        encoded = super().encode(turns, key)
        labels = encoded.labels.copy()
        labels[np.flatnonzero(labels != IGNORE_INDEX)[0]] = IGNORE_INDEX
        return replace(encoded, labels=labels)


class NoLabels(ConversationEncoder):
    """Supervises nothing."""

    def encode(self, turns: Sequence[Turn], key: str = "") -> Encoded:
        encoded = super().encode(turns, key)
        return replace(encoded, labels=np.full_like(encoded.labels, IGNORE_INDEX))


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize(
    ("faulty", "code"), [(ShiftedLabels, "label-proof"), (NoLabels, "unsupervised")]
)
def test_labels(
    encoder: ConversationEncoder, faulty: type[ConversationEncoder], code: str, kind: str
) -> None:
    samples = sample_encoder(faulty(*encoder.__reduce__()[1]))
    image = None if kind == "text_only" else picture()
    findings = lint_one(RECORDS[kind], samples, image=image)
    assert codes(findings) == [code]


@pytest.mark.parametrize(
    ("texts", "code", "message"),
    [
        (("Why?", "word " * 500), "truncated", "and turn 2 or the token that ends it is cut off"),
        (("word " * 500, "Yes."), "unsupervised", "which leaves no token of the answer"),
        (("Why?", "Yes.", "And?", "word " * 500), "truncated", "0 of 4 turns do not fit"),
    ],
)
def test_what_is_cut_off(
    encoder: ConversationEncoder, texts: tuple[str, ...], code: str, message: str
) -> None:
    arguments = encoder.__reduce__()[1]
    samples = sample_encoder(ConversationEncoder(*arguments[:-2], 1024, "cut"))
    record = record_of("image_level", conversations=said(*texts))
    (finding,) = lint_one(record, samples, image=picture())
    assert finding.code == code
    assert message in finding.message


def test_a_picture_that_a_crop_cuts_off(encoder: ConversationEncoder) -> None:
    from vipllava.stream.image_transform import ImageTransform

    samples = sample_encoder(encoder)
    samples.transform = ImageTransform(224, "square", CLIP.preprocessing)
    corner = [[0, 20, 40, 230], BOX2]  # a square crop of 336 x 252 starts at column 42
    prompts = [{"shape": "rectangle", "width": 1, "alpha": 255}, {"shape": "rectangle"}]
    record = record_of("regions", bboxes=corner, segmentations=..., visual_prompts=prompts)
    findings = lint_one(record, samples, image=picture())
    assert [(f.code, f.message.split(";")[0].split(": ")[1]) for f in findings] == [
        (
            "mark-small",
            "the mark is 0.0 pixels long in the input of 224 (min_mark_pixels=4)",
        )
    ]


def test_a_policy_that_the_job_lacks(encoder: ConversationEncoder) -> None:
    samples = sample_encoder(encoder, {"vcr": VisualPromptPolicy()})
    findings = lint_one(record_of("v7w"), samples, image=picture())
    assert [(f.code, f.message) for f in findings] == [
        ("record-invalid", "unknown visual-prompt policy `v7w`; known: vcr")
    ]


def test_the_kind_of_the_manifest_counts(encoder: ConversationEncoder) -> None:
    samples = sample_encoder(encoder)
    record = record_of("regions")
    assert lint_one(record, samples, image=picture(), kind="regions") == []
    found = codes(lint_one(record, samples, image=picture(), kind="image_level"))
    unread = ["field-unread"] * 2  # boxes and masks
    assert found == [*unread, *["placeholder-without-region"] * 2]
    assert codes(lint_one(record, samples, image=picture(), kind="text_only")) == [
        *unread, *["placeholder-without-region"] * 2, "record-invalid",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", RECORDS)
def test_looking_changes_nothing_and_repeats_itself(
    encoder: ConversationEncoder, kind: str
) -> None:
    record = record_of(kind)
    before = copy.deepcopy(record)
    samples = sample_encoder(encoder, everywhere(VisualPromptPolicy(fixed_alpha=5)))
    image = None if kind == "text_only" else picture()
    first, second = (lint_one(record, samples, image=image) for _ in range(2))
    assert first == second
    assert record == before


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return where all parts of a JSON value stand."""
    parts: Any = ()
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    return [place, *(p for name, part in parts for p in places(part, (*place, name)))]


ODD = (
    None, True, 0, -1, 1.5, float("nan"), float("inf"), 1e308, -1e308, "", "x", "<bbox0>", "\ud800",
    "<bbox99>", [], [[]], {}, {"a": 1}, [1, 2, 3, 4], [[1, 2], [3, 4], [5, 6]], "<bbox>",
)  # fmt: skip


@pytest.mark.parametrize("kind", RECORDS)
def test_no_record_is_too_odd_to_be_looked_at(encoder: ConversationEncoder, kind: str) -> None:
    rng = np.random.default_rng(0)
    samples, image = sample_encoder(encoder), None if kind == "text_only" else picture()
    for place in places(RECORDS[kind])[1:]:
        for odd in rng.choice(len(ODD), size=3):
            record = record_of(kind)
            holder: Any = record
            for name in place[:-1]:
                holder = holder[name]
            holder[place[-1]] = copy.deepcopy(ODD[odd])
            for finding in lint_one(record, samples, image=image):
                assert finding.message


# Limits.


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, ["box-clipped", "polygon-degenerate"]),
        ({"max_outside_pixels": 6}, ["polygon-degenerate"]),
        ({"min_polygon_area": 0.2}, ["box-clipped"]),
        ({"max_outside_pixels": 6, "min_polygon_area": 0}, []),
    ],
)
def test_limits_of_geometry(
    encoder: ConversationEncoder, limits: dict[str, float], expected: list[str]
) -> None:
    speck = [60, 60, 60.5, 60, 60.5, 60.5, 60, 60.5]
    record = record_of(
        "regions",
        bboxes=[[-6, 20, 120, 110], BOX],
        segmentations=[[speck], None],
        visual_prompts=[{"shape": "rectangle", "alpha": 255}] * 2,
    )
    samples = sample_encoder(encoder)
    findings = lint_one(record, samples, image=picture(), limits=LintLimits(**limits))
    assert codes(findings) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_contrast": 256}, "min_contrast is 256; expected a number from 0 to 255"),
        ({"min_mark_pixels": -1}, "min_mark_pixels is -1; expected a number from 0$"),
        ({"min_mark_pixels": "4"}, "min_mark_pixels is '4'"),
        ({"min_mark_pixels": True}, "min_mark_pixels is True"),
        ({"min_polygon_area": float("nan")}, "min_polygon_area is nan"),
        ({"max_outside_pixels": float("inf")}, "max_outside_pixels is inf"),
        (
            {"min_contrast": -1, "min_mark_pixels": None},
            "(?s)min_mark_pixels is None.*min_contrast is -1",
        ),
        ({"min_size": 4}, "lint has no limit min_size; known: min_mark_pixels, min_contrast, max_"),
    ],
)
def test_limits_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LintLimits.from_mapping(values)


def test_default_limits() -> None:
    assert LintLimits.from_mapping({"min_contrast": 9}) == LintLimits(4.0, 9, 1.0, 1.0)
