"""What is perturbed, seen in the pixels and in the words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from tests.evaluation.answering import (
    GREY,
    POLICIES,
    Says,
    evaluated,
    grey_image,
    grey_sample,
    is_plain,
)
from vipllava.config.checks import check_config
from vipllava.config.composing import CONFIG_DIR, compose_job
from vipllava.evaluation.bench import Item, Marks, Moved
from vipllava.evaluation.benches.regions import REGIONS
from vipllava.evaluation.marking import MarkedItem, mark_item
from vipllava.evaluation.perturbation import Perturbation
from vipllava.evaluation.run import bench_problems
from vipllava.types import (
    ConfigError,
    DraftTurn,
    FixedVisualPrompt,
    Mention,
    RecordError,
    Region,
    Request,
    Sample,
)
from vipllava.visual_prompts.policies import POLICIES as PUBLISHED
from vipllava.visual_prompts.rle import check_rle, mask_of_rle

SIZE = (64, 48)
BOX = (8.0, 8.0, 40.0, 40.0)
RECTANGLES = {"refcocog": replace(POLICIES["refcocog"], shapes=("rectangle",), fixed_alpha=255)}


def marked(perturb: Perturbation, key: str = "a", marks: Marks = "kept") -> MarkedItem:
    moved = (Moved((Region((44.0, 10.0, 60.0, 40.0)),), "cup"),)
    item = Item(key, grey_sample(key, "star", BOX), moved=moved)
    found = mark_item(item, SIZE, RECTANGLES, 1, marks, perturb)
    assert found is not None
    return found


def asked(folder: Path, **given: Any) -> tuple[Request, str]:
    """Return the one request of an item, and the question in the file of predictions."""
    model = Says(lambda _: "star")
    items = [Item("toy/a", grey_sample("a", "star", BOX))]
    how = {"policies": RECTANGLES, "perturb": Perturbation(**given)}
    (found,) = evaluated(REGIONS, items, model, folder, **how)
    return model.asked[0], found.question


def test_shape_and_colour_are_drawn_and_said(tmp_path: Path):
    request, question = asked(tmp_path, shape="rectangle", colour="lime", width=90)
    assert question == request.turns[-1].text == "What is within the lime rectangle?"
    pixels = np.array(request.image)
    # 90 at the anchor of 336 are 17 pixels at 64: from both sides, all of the box.
    assert (pixels[8:41, 8:41] == (0, 255, 0)).all()
    assert (pixels[:8] == GREY).all()
    assert (pixels[:, 41:] == GREY).all()
    _, question = asked(tmp_path / "b", shape="mask contour", colour="gold")
    assert question == "What is with the gold mask contour?"


def test_width_is_at_the_anchor_and_at_least_a_pixel(tmp_path: Path):
    for width, drawn in ((1, 1), (11, 2), (21, 4)):
        request, _ = asked(tmp_path / str(width), width=width)
        row = np.array(request.image)[24]
        assert (row != GREY).any(axis=1).nonzero()[0].tolist() == [
            *range(8, 8 + drawn),
            *range(41 - drawn, 41),
        ]


def test_opacity(tmp_path: Path):
    request, _ = asked(tmp_path, alpha=51, colour="red", width=336)
    assert request.image is not None
    # 51 of 255 is a fifth of red over four fifths of grey.
    assert request.image.getpixel((20, 20)) == (123, 72, 72)


def test_what_the_record_fixes_is_overruled_and_the_rest_of_it_stays():
    sample = grey_sample("a", "star", BOX)
    fixed = (FixedVisualPrompt("ellipse", "blue", alpha=200),)
    item = Item("a", replace(sample, fixed=fixed))
    found = mark_item(item, SIZE, POLICIES, 1, "kept", Perturbation(shape="arrow", alpha=9))
    assert found is not None
    assert found.turns[0].text == "What is pointed to by the blue arrow?"
    assert found.plan.prompts[0].alpha == 9


def test_nothing_given_changes_nothing():
    before = marked(Perturbation())
    assert before == marked(Perturbation(jitter=0.0)) == marked(Perturbation(jpeg_quality=5))
    assert before.plan.prompts[0].strokes[0].points == (BOX[:2], BOX[2:])


def test_words_follow_removed_and_moved_marks():
    arrow = Perturbation(shape="arrow", colour="gold", jitter=0.5)
    for marks in ("removed", "moved"):
        found = marked(arrow, marks=marks)
        assert found.turns == marked(arrow).turns
        assert found.turns[0].text == "What is pointed to by the gold arrow?"
    assert marked(arrow, marks="removed").plan.prompts == ()
    assert marked(arrow, marks="moved").ground_truth == "cup"
    x1, y1, x2, y2 = marked(arrow, marks="moved").sample.regions[0].bbox_xyxy
    assert (x1, y1) != (44.0, 10.0)
    assert (x2 - x1, y2 - y1) == pytest.approx((16, 30))
    other = marked(Perturbation(colour="gold"), marks="recoloured")
    assert other.plan.prompts[0].colour_name == "red"  # the palette's next


def shift(key: str, jitter: float, seed: int = 1) -> tuple[float, float]:
    sample = grey_sample(key, "star", (20.0, 16.0, 44.0, 32.0))
    (region,) = Perturbation(jitter=jitter).shift(sample, SIZE, seed).regions
    x1, y1, x2, y2 = region.bbox_xyxy
    assert (x2 - x1, y2 - y1) == pytest.approx((24, 16))
    return x1 - 20, y1 - 16


def test_jitter_is_of_seed_and_key_and_of_the_regions_size():
    assert shift("a", 0.4) == shift("a", 0.4)
    assert len({shift("a", 0.4), shift("b", 0.4), shift("a", 0.4, seed=2)}) == 3
    half, whole = np.array(shift("a", 0.2)), np.array(shift("a", 0.4))
    assert whole == pytest.approx(2 * half)
    shifts = np.abs([shift(str(n), 0.4) for n in range(200)])
    assert (shifts.max(axis=0) <= (9.6, 6.4)).all()
    assert (shifts.max(axis=0) > (9, 6)).all()


@pytest.mark.parametrize("number", range(20))
def test_jitter_leaves_regions_and_masks_in_the_image(number: int):
    ring = ((2.0, 3.0), (50.0, 5.0), (30.0, 44.0))
    regions = (
        Region((2.0, 3.0, 50.0, 44.0), (ring,)),
        Region((0.0, 0.0, 64.0, 48.0)),
        Region((-4.0, 10.0, 30.0, 30.0)),
    )
    sample = replace(grey_sample(str(number), "star"), regions=regions)
    first, whole, outside = Perturbation(jitter=1).shift(sample, SIZE, 1).regions
    x1, y1, x2, y2 = first.bbox_xyxy
    assert x1 >= 0
    assert y1 >= 0
    assert x2 <= 64
    assert y2 <= 48
    moved = [(x - x1 + 2, y - y1 + 3) for x, y in first.polygons[0]]
    assert np.array(moved) == pytest.approx(np.array(ring))
    assert whole == regions[1]
    assert outside.bbox_xyxy[0] >= -4  # what was cut off is not cut off further


def test_a_mask_in_run_lengths_moves_with_its_box():
    mask = np.zeros((48, 64), bool)
    mask[10:30, 10:38] = True
    mask[15:20, 20:30] = False
    region = Region(BOX, rle=check_rle(mask, "mask"))
    for key in "abcdefgh":
        sample = replace(grey_sample(key, "star", BOX), regions=(region,))
        (moved,) = Perturbation(jitter=0.5).shift(sample, SIZE, 1).regions
        dx, dy = (moved.bbox_xyxy[n] - BOX[n] for n in (0, 1))
        assert abs(dx) + abs(dy) > 0
        assert moved.rle is not None
        expected = np.roll(mask, (round(dy), round(dx)), (0, 1))
        assert np.array_equal(mask_of_rle(moved.rle), expected)


def test_jpeg_is_of_the_image_with_its_marks(tmp_path: Path):
    mark = {"colour": "red", "width": 5, "alpha": 255}
    sharp, good, bad = (
        np.array(asked(tmp_path / str(n), **mark, jpeg_quality=n)[0].image).astype(int)
        for n in (None, 95, 5)
    )
    assert set(map(tuple, sharp.reshape(-1, 3).tolist())) == {GREY, (255, 0, 0)}
    errors = [np.abs(each - sharp).mean() for each in (good, bad)]
    assert 0 < errors[0] < errors[1]
    assert bad.shape == (48, 64, 3)
    again = asked(tmp_path / "again", **mark, jpeg_quality=5)[0].image
    assert (np.array(again) == bad).all()
    crops = Request(None, ())
    assert Perturbation(jpeg_quality=5).compress(crops) is crops


def several(policy: str) -> Item:
    regions = tuple(Region((10.0 * n, 5.0, 10.0 * n + 8, 40.0)) for n in range(4))
    parts = tuple(part for n in range(4) for part in (" ", Mention(n)))
    turns = (DraftTurn("user", parts, True), DraftTurn("assistant", ("x",)))
    return Item("k", Sample("k", "toy", grey_image(), regions, turns, policy))


@pytest.mark.parametrize("policy", ["v7w", "vcr", "refcocog"])
def test_marks_that_nothing_tells_apart_any_more_are_not_asked(policy: str):
    policies = PUBLISHED["evaluation"]
    found = mark_item(several(policy), SIZE, policies, 1, "kept", Perturbation(shape="triangle"))
    assert found is not None
    assert len({prompt.colour_name for prompt in found.plan.prompts}) == 4
    assert {prompt.shape for prompt in found.plan.prompts} == {"triangle"}
    same = Perturbation(shape="triangle", colour="red")
    with pytest.raises(RecordError, match="regions 0 and 1 would both be called `with the red tri"):
        mark_item(several(policy), SIZE, policies, 1, "kept", same)


@pytest.mark.parametrize("given", [{"alpha": 64}, {"jitter": 0.1}, {"shape": "arrow"}])
def test_marks_that_an_image_carries_cannot_be_perturbed(given: dict[str, Any], tmp_path: Path):
    turns = (DraftTurn("user", ("?",), True),)
    sample = replace(grey_sample("a", "star"), regions=(), turns=turns)
    items = [Item("toy/a", sample, "star")]
    with pytest.raises(ConfigError, match="perturbed marks: toy/a has no regions, its image carr"):
        evaluated(REGIONS, items, lambda _: "star", tmp_path, perturb=Perturbation(**given))
    model = Says(lambda _: "star")
    evaluated(REGIONS, items, model, tmp_path, perturb=Perturbation(jpeg_quality=50))
    assert is_plain(model.asked[0].image)  # JPEG leaves a flat grey as it is


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("perturb.shape=blob", "perturb.shape=blob: expected one of rectangle, ellipse, point"),
        (
            "perturb.colour=pink",
            "perturb.colour: unknown colour `pink`; the palette has: red, lime",
        ),
        ("perturb.width=0", "perturb.width=0: expected a whole number of at least 1"),
        ("perturb.alpha=256", "perturb.alpha=256: expected a whole number from 1 to 255"),
        ("perturb.jitter=1.5", "perturb.jitter=1.5: expected a number from 0 to 1"),
        ("perturb.jpeg_quality=0", "perturb.jpeg_quality=0: expected a whole number from 1 to 100"),
        (
            "perturb.jitter=0.1 perturb.alpha=9 encoding=set_of_mark",
            "encoding=set_of_mark with another alpha of the marks: it draws none",
        ),
    ],
)
def test_what_cannot_be_perturbed_is_refused(words: str, problem: str, tmp_path: Path):
    cfg = compose_job(
        [*words.split(), f"checkpoint={tmp_path}", f"paths.data_root={tmp_path}"],
        config_name="evaluate",
    )
    with pytest.raises(ConfigError, match=f"1 problem\n  - {problem}"):
        check_config(cfg, more=bench_problems(cfg))


def test_the_grid_that_comes_along():
    file = CONFIG_DIR / "hydra" / "sweeper" / "robustness.yaml"
    shapes, changes = (
        list(parsed.sweep_string_iterator())
        for parsed in OverridesParser.create().parse_overrides(
            [f"{key}={value}" for key, value in yaml.safe_load(file.read_text())["params"].items()]
        )
    )
    assert shapes == ["rectangle", "ellipse", "arrow", "point"]
    cells = [
        compose_job(["perturb.shape=arrow", f"perturb={change}"], config_name="evaluate")
        for change in changes
    ]
    assert [bench_problems(cell) for cell in cells] == [[]] * 6
    given = [{k: v for k, v in cell.perturb.items() if v is not None} for cell in cells]
    assert given == [
        {"shape": "arrow", **change}
        for change in ({}, {"width": 1}, {"alpha": 64}, {"colour": "purple"}, {"jitter": 0.3},
                       {"jpeg_quality": 10})
    ]  # fmt: skip


def test_a_wrong_value_is_refused_without_a_configuration_too():
    for given in ({"jitter": -0.1}, {"jpeg_quality": 9.5}, {"width": True}, {"alpha": 0}):
        with pytest.raises(ConfigError, match=f"{next(iter(given))} is .*; give a "):
            Perturbation(**given)
