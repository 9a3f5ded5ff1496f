"""Every broken record is an error that names data set, key, field, what was found and expected."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from tests.records.test_kinds import BOX, BOX2, IMAGE, RECORDS, parse, said
from vipllava.keyed_random import generator_for
from vipllava.records import parse_record
from vipllava.types import RecordError

NAN = float("nan")


def required_fields() -> list[tuple[str, str]]:
    optional = {"id", "image", "segmentations", "visual_prompts", "meta"}
    pairs = [(kind, name) for kind, record in RECORDS.items() for name in set(record) - optional]
    return sorted([*pairs, ("refcocog", "segmentations"), ("refcocog-gpt4v", "segmentations")])


@pytest.mark.parametrize(("kind", "name"), required_fields())
def test_a_missing_field(kind: str, name: str) -> None:
    record = {k: v for k, v in RECORDS[kind].items() if k != name}
    image = None if kind == "text_only" else IMAGE
    rng = generator_for("test")
    with pytest.raises(RecordError, match=rf"^d/k: field `{name}` is missing; expected .*has: "):
        parse_record(record, key="k", dataset="d", image=image, kind=kind, rng=rng)


@pytest.mark.parametrize(("kind", "name"), required_fields())
@pytest.mark.parametrize("value", [None, 3.5, {}, [None]])
def test_a_field_of_another_type(kind: str, name: str, value: object) -> None:
    with pytest.raises(RecordError, match=rf"^d/k: field .*{name}"):
        parse(kind, **{name: value})


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([30, 5, 5, 40], "`bboxes[0]` is [30, 5, 5, 40]; expected x1 <= x2 .* reversed"),
        ([5, 40, 30, 5], "reversed; if it says x, y, width and height, write [5, 40, 35, 45]"),
        ([5, 5, 5, 40], "this one is empty"),
        ([64, 5, 90, 40], "expected a box inside the 64 x 48 image"),
        ([-9, -9, 0, 40], "expected a box inside the 64 x 48 image"),
        ([5, 5, NAN, 40], "a box [x1, y1, x2, y2] in pixels"),
        ([5, 5, float("inf"), 40], "a box [x1, y1, x2, y2] in pixels"),
        ([5, 5, "30", 40], "a box [x1, y1, x2, y2] in pixels"),
        ([5, 5, True, 40], "a box [x1, y1, x2, y2] in pixels"),
        ([5, 5, 30], "a box [x1, y1, x2, y2] in pixels"),
    ],
)
def test_boxes(box: list[Any], message: str) -> None:
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(RecordError, match=pattern):
        parse("refcocog", bboxes=[box])


def test_a_box_partly_outside_is_clipped() -> None:
    assert parse("refcocog", bboxes=[[-5, 10, 99, 99.5]]).regions[0].bbox_xyxy == (0, 10, 64, 48)


@pytest.mark.parametrize(
    ("polygon", "message"),
    [
        ([1, 1, 9, 9], "at least 3 points, not 2"),
        ([], "at least 3 points, not 0"),
        ([1, 1, 9, 9, 5], "an even count of coordinates, not 5"),
        ([1, 1, 9, 9, 5, NAN], "finite x, y coordinates"),
        ([1, 1, 9, "9", 5, 5], "finite x, y coordinates"),
        ([70, 1, 90, 1, 90, 9], "a polygon inside the 64 x 48 image"),
        ({"counts": "abc"}, "each a flat list x, y, x, y"),
        ({"counts": "abc"}, "at least 3 points; run lengths stand in place of that list, not in"),
    ],
)
def test_polygons(polygon: Any, message: str) -> None:
    with pytest.raises(RecordError, match=rf"^d/k: field `segmentations\[0\]\[0\].*{message}"):
        parse("refcocog", segmentations=[[polygon]])


def test_polygon_points_outside_move_to_the_edge() -> None:
    sample = parse("refcocog", segmentations=[[[-5, 5, 70, 5, 30, 60]]])
    assert sample.regions[0].polygons == (((0, 5), (64, 5), (30, 48)),)


@pytest.mark.parametrize(
    ("mask", "message", "fault"),
    [
        ({"size": [48, 64], "counts": [3000, 73]}, "0].counts` is 2 lengths of 3073 pixels in all; "
         "expected 48 x 64 = 3072 pixels, as size says", "mask-invalid"),
        ({"size": [48, 64], "counts": "T30"}, "0].counts` is 2 lengths of", "mask-invalid"),
        ({"size": [48, 64], "counts": "~"}, "0].counts` is b'~'; expected COCO's letters",
         "mask-invalid"),
        ({"size": [48, 64], "counts": [3073, -1]}, "0].counts[1]` is -1; ex", "mask-invalid"),
        ({"size": [48, 64], "counts": [3072]}, "0]` is a mask without a pixel", "mask-invalid"),
        ({"counts": "04"}, "0]` is an object of ['counts']; expected an object", "mask-invalid"),
        ({"size": [48, 60], "counts": [0, 2880]}, "0].size` is [48, 60]; expected [48, 64], height "
         "and width of the image", "mask-size"),
        ({"size": [64, 48], "counts": [0, 3072]}, "0].size` is [64, 48]; expected [48, 64], height "
         "and width of the image: these are width and height, or those before its EXIF rotation",
         "mask-size"),
        ({"size": [48], "counts": [0, 3072]}, "0].size` is [48]; expected [height, width] of",
         "mask-size"),
    ],
)  # fmt: skip
def test_run_lengths(mask: Any, message: str, fault: str) -> None:
    for kind, field in (("refcocog", "segmentations"), ("vcr", "segms")):
        changes = {field: [mask]}
        if kind == "vcr":
            changes = {"meta": {**RECORDS["vcr"]["meta"], field: [mask, [], []]}}
        with pytest.raises(RecordError, match=re.escape(f"d/k: field `{field}[{message}")) as e:
            parse(kind, **changes)
        assert e.value.fault == fault


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("refcocog", {"bboxes": [BOX, BOX2]}, "`bboxes` is a list of 2; .* 1 of them"),
        ("refcocog", {"segmentations": [[], []]}, "one list of polygons per box"),
        ("refcocog", {"answer": "  "}, "`answer` is '  '; expected a text, or a list of texts"),
        ("vg_rel", {"bboxes": [BOX]}, "a list of 1; .* 2 of them"),
        ("v7w", {"bboxes": [BOX, BOX2, BOX]}, "a list of 3; .* 4 of them"),
        ("v7w", {"answer": [1, 1, 2, 2]}, "one of the boxes"),
        ("v7w", {"bboxes": [BOX, BOX2, BOX, [70, 9, 70, 20]]}, "a box inside the 64 x 48 image"),
        ("vcr", {"answer_choices": [["a"]] * 3}, "`answer_choices` is a list of 3; .* 4 choices"),
        ("vcr", {"rationale_choices": [["a"]] * 5}, "`rationale_choices` is a list of 5"),
        ("vcr", {"answer_label": 4}, "an index from 0 to 3"),
        ("vcr", {"question": ["Is", [3], "?"]}, "`question` is 3; .* index from 0 to 2"),
        ("vcr", {"question": ["Is", [-1], "?"]}, "`question` is -1; .* index from 0 to 2"),
        ("vcr", {"question": ["Is", [], "?"]}, "at least one object index"),
        ("vcr", {"answer_choices": [["a"], ["b"], ["c"], [[7]]]}, r"choices\[3\]` is 7"),
        ("vcr", {"question": []}, "a list that mixes words"),
        ("vcr", {"meta": 1, "meta_dir": "x.json"}, "`meta` is 1"),
        ("vcr", {"meta": {"boxes": []}}, "one entry per object of class_names"),
        ("vcr", {"class_names": ["person"]}, "`boxes` is a list of 3; .*class_names .1."),
        ("flickr30k", {"grounding": "no phrase"}, "a caption with <bboxN> after its phrases"),
        ("flickr30k", {"grounding": "a <bbox5>"}, "`bbox`, which has 2"),
        ("flickr30k", {"bbox": [[], [BOX]]}, r"`bbox\[0\]` is \[\]; expected at least one box"),
        ("flickr30k", {"bbox": [BOX, [BOX]]}, r"`bbox\[0\]\[0\]` is 5"),
        ("regions", {"bboxes": [[0.1, 0.2, 0.5, 1]]}, "`bboxes` is .*these look like fractions"),
        ("image_level", {"conversations": said("<bbox0>?", "a")}, "no mark: .* no `bboxes`$"),
        (
            "image_level",
            {"conversations": said("<bbox>?", "a"), "boxes": [BOX]},
            "no `bboxes`; `boxes` is probably meant: call it `bboxes`$",
        ),
        ("regions", {"conversations": said("What is <bbox1>?", "x")}, "which has 1 boxes"),
        ("regions", {"visual_prompts": [None] * 2}, "one entry per box"),
        ("regions", {"visual_prompts": ["red"]}, "null or an object"),
        ("regions", {"visual_prompts": [{"color": "red"}]}, "only shape, colour, width, alpha"),
        ("regions", {"visual_prompts": [{"shape": "star"}]}, "unknown shape `star`; the shapes"),
        ("regions", {"visual_prompts": [{"colour": "pink"}]}, "unknown colour `pink`; the pal"),
        ("regions", {"visual_prompts": [{"colour": [1, 2, 256]}]}, "each from 0 to 255"),
        ("regions", {"visual_prompts": [{"width": 0}]}, "at least 1 pixel"),
        ("regions", {"visual_prompts": [{"width": 65}]}, "at most 64, the image's longer side"),
        ("regions", {"visual_prompts": [{"width": 10**400}]}, "at most 64, the image"),
        ("regions", {"visual_prompts": [{"alpha": 0}]}, "an opacity from 1 to 255"),
        ("image_level", {"conversations": said("<image>", "a", "<image>", "b")}, "turns .0, 2."),
        (
            "image_level",
            {"conversations": said("Hi", "<image> a")},
            r"s\[1\].value` has <image> in",
        ),
        ("regions", {"conversations": said("<image>", "in <image>")}, "has <image> in an answer"),
        ("regions", {"conversations": said("<image> or <image>", "a")}, "has <image> 2 times and"),
        ("image_level", {"conversations": []}, "at least one question and its answer"),
        ("image_level", {"conversations": said("only a question")}, "question and its answer"),
        ("image_level", {"conversations": [{"from": "user"}]}, "`conversations.0..from` is 'user'"),
        ("image_level", {"conversations": [{"from": "gpt"}]}, "`conversations.0..value` is None"),
        ("image_level", {"conversations": ["hi"]}, "an object {from, value}"),
        ("text_only", {"conversations": said("a", "b")[:1] * 2 + said("a", "b")}, "taking turns"),
    ],
)
def test_what_else_can_be_wrong(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=rf"^d/k: .*{message}"):
        parse(kind, **changes)


def test_a_bare_placeholder_is_unclear_among_several() -> None:
    changes = {"bboxes": [BOX, BOX2], "conversations": said("What is <bbox>?", "x")}
    with pytest.raises(RecordError, match="<bbox0> to <bbox1>"):
        parse("regions", **changes, segmentations=None, visual_prompts=None)


def test_vcr_without_its_metadata_says_where_it_belongs() -> None:
    record = {k: v for k, v in RECORDS["vcr"].items() if k != "meta"}
    with pytest.raises(RecordError, match=r"under `meta` .*'\./dataset/x\.json'"):
        parse_record(
            {**record, "meta_dir": "./dataset/x.json"},
            key="k",
            dataset="d",
            image=IMAGE,
            rng=generator_for("test"),
        )


@pytest.mark.parametrize("kind", [kind for kind in RECORDS if kind != "text_only"])
def test_a_missing_picture(kind: str) -> None:
    rng = generator_for("test")
    with pytest.raises(RecordError, match=r"^d/k: no image beside the record"):
        parse_record(RECORDS[kind], key="k", dataset="d", image=None, kind=kind, rng=rng)


def test_a_picture_beside_a_text_only_record() -> None:
    record = copy.deepcopy(RECORDS["text_only"])
    rng = generator_for("test")
    with pytest.raises(RecordError, match="an image lies beside a text-only record"):
        parse_record(record, key="k", dataset="d", image=IMAGE, kind="text_only", rng=rng)


def test_an_unknown_kind_lists_the_known() -> None:
    with pytest.raises(RecordError, match="unknown record kind `vqr`; known: auto, image_level"):
        parse_record({}, key="k", dataset="d", image=None, kind="vqr", rng=generator_for("t"))


def test_an_unreadable_picture_under_a_region_record() -> None:
    rng = generator_for("test")
    with pytest.raises(RecordError, match=r"^d/k: 4 bytes .* are no image"):
        parse_record(RECORDS["refcocog"], key="k", dataset="d", image=b"oops", rng=rng)


def test_numbers_beyond_any_coordinate_are_refused() -> None:
    with pytest.raises(RecordError, match=r"d/k: field `bboxes\[0\]` is .*; expected a box"):
        parse("refcocog", bboxes=[[0, 0, 10**400, 5]])
    unreadable = f"What is <bbox{'9' * 5000}>?"  # no number: text like any other
    turns = parse("regions", conversations=said(unreadable, "Yes")).turns
    assert turns[0].parts == (unreadable,)


def test_half_a_character_is_refused() -> None:
    with pytest.raises(RecordError, match=r"^d/k: a text .* half of a character, '\\ud83d'"):
        parse("regions", conversations=said("What is <bbox0>?", "A cat \ud83d"))
    assert parse("regions", conversations=said("What is <bbox0>?", "A cat \U0001f408"))


def test_a_message_does_not_repeat_megabytes() -> None:
    with pytest.raises(RecordError, match=r"^d/k: field `conversations` is missing") as caught:
        parse_record(
            {f"a{n}" * 100: 1 for n in range(1000)} | {"bboxes": [BOX]},
            key="k", dataset="d", image=IMAGE, rng=generator_for("t"),
        )  # fmt: skip
    assert len(str(caught.value)) <= 1010


def test_a_record_of_a_newer_release_is_refused() -> None:
    with pytest.raises(RecordError, match=r"^d/k: field `schema_version` is 9; this release reads"):
        parse("regions", schema_version=9)


@pytest.mark.parametrize("name", ["image_path", "file_name", "images", "img", "video", "picture"])
@pytest.mark.parametrize("text", ["<image>\nWhat?", "What?\n<image>", "See <image> here"])
def test_an_image_in_a_misspelt_field_is_never_missed(name: str, text: str) -> None:
    reason = rf"record no field `image`; `{name}` is probably meant: call it `image`$"
    with pytest.raises(RecordError, match=reason) as caught:
        parse("text_only", conversations=said(text, "A cup."), **{name: "a.jpg"})
    assert caught.value.fault == "image-missing"


@pytest.mark.parametrize("text", ["<image>\nWhat?", "What?\n<image>"])
def test_an_image_that_no_field_names(text: str) -> None:
    with pytest.raises(RecordError, match=r"name its file there, or remove the placeholder$"):
        parse("text_only", conversations=said(text, "A cup."), image=None)


def test_any_field_may_name_the_image() -> None:
    record = {"bboxes": [BOX], "where": "a.png", "conversations": said("<bbox0>?", "A cup.")}
    with pytest.raises(RecordError, match=r"no field `image`; `where` is probably meant"):
        parse_record(record, key="k", dataset="d", image=None, rng=generator_for("test"))


@pytest.mark.parametrize(
    ("identifier", "kind", "why"),
    [
        ("vcr-12", "vcr", "its id begins with `vcr-`"),
        ("refcocog-gpt4v-1", "refcocog-gpt4v", "its id begins with `refcocog-gpt4v-`"),
        ("mine", "regions", "it has `bboxes`"),
    ],
)
def test_auto_says_why_it_chose_a_kind(identifier: str, kind: str, why: str) -> None:
    record = {"id": identifier, "bboxes": [BOX]}
    message = rf"took it for `{kind}`, because {why}; if .* name its kind in the manifest, e\.g\."
    with pytest.raises(RecordError, match=message):
        parse_record(record, key="k", dataset="d", image=IMAGE, rng=generator_for("test"))
    with pytest.raises(RecordError) as caught:
        parse_record(
            record, key="k", dataset="d", image=IMAGE, kind=kind, rng=generator_for("test")
        )
    assert "auto" not in str(caught.value)
