"""``vipllava import``: every tool's export to pictures with marks, by the commands it names."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import typer

from tests.ingest.importing.exports import (
    GREEN,
    KITCHEN,
    SCENE,
    Picture,
    brush_of_mask,
    coco,
    label_studio,
    labelme,
    labelme_mask,
    ls_result,
    ls_task,
    lvis,
    put_json,
    put_pictures,
    put_yolo,
    ring_mask,
    turned,
    via_2,
)
from tests.ingest.importing.test_formats import EXPORTS
from tests.training.toy_training import LIGHTNING_WARNINGS
from vipllava import cli
from vipllava.commands import import_data, job
from vipllava.config.composing import compose_job
from vipllava.ingest.importing import FORMATS
from vipllava.ingest.importing.run import MAX_REGIONS
from vipllava.records.image_decode import decode_image
from vipllava.shards.manifest import load_manifest
from vipllava.stream.sample_encoder import SampleSource, plan_sample
from vipllava.types import Region
from vipllava.visual_prompts.policies import POLICIES
from vipllava.visual_prompts.render import render_plan
from vipllava.visual_prompts.rle import rle_of_mask

pytestmark = LIGHTNING_WARNINGS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "import.md").read_text("utf-8")

RECTANGLES = replace(
    POLICIES["published"]["regions"], shapes=("rectangle",), fixed_alpha=255, constant_style=True,
    distinguishable=False,
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIPLLAVA_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "export").mkdir()
    return tmp_path


def followed(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """Return the commands that the import named last."""
    lines = capsys.readouterr().out.partition("next:\n")[2].splitlines()
    return [shlex.split(line)[1:] for line in lines]


def box_around(changed: np.ndarray) -> list[int]:
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def check_overlays(scene: tuple[Picture, ...], manifest: Path, data_root: Path) -> None:
    """Draw rectangles as training would: they go around what was green in the tool's picture."""
    source = SampleSource.open(load_manifest(manifest, manifest.parent), data_root, seed=0)
    assert len(source) == len(scene)
    for position, picture in enumerate(scene):
        sample = source.sample(position)
        assert sample.image is not None
        image = decode_image(sample.image, sample.key, upright=sample.upright)
        assert image.size == picture.size  # as the tool showed it
        policies = {"regions": RECTANGLES}
        plan, turns = plan_sample(sample, image.size, policies, np.random.default_rng(0))
        assert len(plan.prompts) == len(picture.things) == len(turns) // 2
        green = np.abs(np.array(image).astype(int) - GREEN).max(axis=2) < 30
        for prompt, (name, box) in zip(plan.prompts, picture.things, strict=True):
            drawn = np.array(render_plan(image, replace(plan, prompts=(prompt,))))
            changed = (drawn != np.array(image)).any(axis=2)
            x1, y1, x2, y2 = box
            assert green[y1:y2, x1:x2].all()
            assert box_around(changed) == pytest.approx(box, abs=3)  # half a line's width
            assert not changed[y1 + 4 : y2 - 4, x1 + 4 : x2 - 4].any()
            answer = turns[2 * prompt.region + 1].text
            assert answer.removesuffix("_(thing)") == name


@pytest.mark.parametrize("export", EXPORTS)
def test_the_commands_lead_to_marks_on_the_right_things(
    place: Path, export: str, capsys: pytest.CaptureFixture[str]
):
    form, put = EXPORTS[export]
    source = put(place / "export", SCENE)
    assert cli.main(["import", form, str(source), "--output", "data/mine"]) == 0
    build, look = followed(capsys)
    assert build == ["shards", "build", "data/mine/mine.yaml"]
    assert cli.main([*build, "--num-workers", "0"]) == 0
    assert "samples 2 of 2 records" in " ".join(capsys.readouterr().out.split())
    check_overlays(SCENE, place / "data/mine/mine.yaml", place / "data")
    if export in FORMATS:
        assert cli.main([*look, "--output", "page.html"]) == 0
        assert (place / "page.html").read_text().count("<article") == 2


@pytest.mark.skipif("rle" not in {field.name for field in fields(Region)}, reason="no run lengths")
@pytest.mark.parametrize("form", ["coco", "labelme", "label-studio"])
def test_a_mask_keeps_its_hole(place: Path, form: str, capsys: pytest.CaptureFixture[str]):
    box = (150, 20, 190, 70)
    mask = ring_mask(KITCHEN.size, box)
    given = coco((KITCHEN,))
    given["annotations"] = [{**given["annotations"][0], "segmentation": rle_of_mask(mask)}]
    brush = ls_result(KITCHEN, "brushlabels", "cup", {"rle": brush_of_mask(mask)}, "r0")
    exports = {
        "coco": given,
        "labelme": labelme(KITCHEN, labelme_mask("cup", mask)),
        "label-studio": [ls_task(1, KITCHEN, brush)],
    }
    put_pictures(place / "export")
    source = put_json(place / "export" / "kitchen.json", exports[form])
    assert cli.main(["import", form, str(source), "--output", "data/mine"]) == 0
    build, _ = followed(capsys)
    assert cli.main([*build, "--num-workers", "0"]) == 0
    manifest = load_manifest(place / "data/mine/mine.yaml", place)
    sample = SampleSource.open(manifest, place / "data", seed=0).sample(0)
    assert sample.image is not None
    image = decode_image(sample.image, sample.key)
    policies = {"regions": replace(RECTANGLES, shapes=("mask",))}
    plan, _ = plan_sample(sample, image.size, policies, np.random.default_rng(0))
    drawn = np.array(render_plan(image, plan))
    assert np.array_equal((drawn != np.array(image)).any(axis=2), mask)


@pytest.mark.parametrize("export", ["coco", "labelme", "via-2", "label-studio", "yolo"])
def test_lying_pictures(place: Path, export: str, capsys: pytest.CaptureFixture[str]):
    form, put = EXPORTS[export]
    scene = turned(6)
    source = put(place / "export", scene)
    assert cli.main(["import", form, str(source), "--output", "elsewhere/mine"]) == 0
    build, _ = followed(capsys)
    assert build[-2:] == ["--data-root", str(place / "elsewhere")]
    assert cli.main([*build, "--num-workers", "0"]) == 0
    check_overlays(scene, place / "elsewhere/mine/mine.yaml", place / "elsewhere")


def test_two_steps_of_training(place: Path, capsys: pytest.CaptureFixture[str]):
    put_pictures(place / "photos")
    source = put_json(place / "instances.json", coco())
    words = ["--output", "data/mine", "--images", "photos", "--per-annotation", "--spaces"]
    words += ["--question", "What is {region}?", "--answer", "A {category}."]
    assert cli.main(["import", "coco", str(source), *words]) == 0
    build, _ = followed(capsys)
    assert cli.main([*build, "--num-workers", "0"]) == 0
    overrides = [
        "stage=task", "model=tiny", "trainer=cpu", "stage.checkpoint=null", "trainer.max_steps=2",
        "data.manifest=data/mine/mine.yaml", "stage.global_batch_size=2", "data.num_workers=0",
        "callbacks=quiet", "callbacks.samples=null", "name=mine", "stage.epochs=2",
    ]  # fmt: skip
    job.train(compose_job(overrides))
    rows = (place / "runs/mine/csv/metrics.csv").read_text().splitlines()
    assert len(rows) >= 3


def test_what_is_said(place: Path, capsys: pytest.CaptureFixture[str]):
    given = coco()
    given["images"].append({"id": 99, "file_name": "empty.jpg", "width": 5, "height": 5})
    given["annotations"][0]["bbox"] = [150, 20, 60, 50]
    given["annotations"][0]["segmentation"] = []
    given["annotations"] += [{**given["annotations"][1], "id": 500 + n} for n in range(8)]
    put_pictures(place / "export")
    source = put_json(place / "export" / "instances.json", given)
    assert cli.main(["import", "coco", str(source), "--output", "data/mine"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for text in (
        "data set mine records 3 of 11 regions pictures 2, 1 without a region left out",
        "categories fork 9, cup 2",
        "pixels upright: no picture has an EXIF orientation",
        "boxes read as x, y, width, height.",
        "warning box-clipped (1): a box partly outside its image. instances.json, image 11, "
        "annotation 100: its box reaches 10 pixels out of its 200 x 120 picture",
        "all are listed in",
    ):
        assert text in said


def test_as_json(place: Path, capsys: pytest.CaptureFixture[str]):
    put_pictures(place / "export")
    source = put_json(place / "export" / "instances.json", coco())
    assert cli.main(["import", "coco", str(source), "--output", "data/mine", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((place / "data/mine/lint.json").read_text())
    assert report["categories"] == {"cup": 2, "fork": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["voc"], "error: format voc: unknown; known: coco, labelme"),
        (["yolo"], "is of COCO, not of YOLO: `vipllava import coco"),
        (["coco", "--split", "val"], "error: --split val means nothing for COCO"),
        (["coco", "--exif", "sideways"], "Invalid value for --exif: 'sideways' is not one of"),
        (["coco", "--box-form", "x"], "Invalid value for --box-form: 'x' is not one of xywh, xyxy"),
        (["coco", "--question", "{x}"], "question is '{x}'; there is no {x} here, but {region}"),
        (["coco", "--images", "nowhere"], "error: --images nowhere is no folder"),
        (["coco", "--name", "a/b"], "error: --name a/b; expected letters"),
    ],
)
def test_what_is_refused(
    place: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    put_pictures(place / "export")
    source = put_json(place / "export" / "instances.json", coco())
    form, *options = words
    assert cli.main(["import", form, str(source), "--output", "data/mine", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (place / "data").exists()


def test_faults_name_options_as_they_are_typed(place: Path, capsys: pytest.CaptureFixture[str]):
    given = coco()
    given["images"][0]["file_name"] = "lost.jpg"
    put_pictures(place / "export")
    source = put_json(place / "export" / "instances.json", given)
    assert cli.main(["import", "coco", str(source), "--output", "data/mine"]) == 2
    said = capsys.readouterr().err
    assert "name its folder with --images DIR" in said
    assert "or pass --max-bad-rate (a share, now 0)" in said


@pytest.mark.parametrize("export", EXPORTS)
def test_a_build_names_the_command(place: Path, export: str, capsys: pytest.CaptureFixture[str]):
    form, put = EXPORTS[export]
    (place / "data" / "export").mkdir(parents=True)
    source = put(place / "data" / "export", SCENE)
    manifest = {
        "schema_version": 2, "name": "mine", "stage": "task", "licence": "none",
        "shards": "mine/*.tar", "annotation_file": source.relative_to(place / "data").as_posix(),
    }  # fmt: skip
    path = put_json(place / "mine.yaml", manifest)
    assert cli.main(["shards", "build", str(path), "--num-workers", "0"]) == 2
    said = capsys.readouterr().err
    assert f"is of {FORMATS[form].title}, and holds no records; they are made of it by" in said
    assert f"`vipllava import {form} data/export" in said.replace(f"{place}/", "")


def test_the_page(place: Path):
    """docs/import.md, as it stands: its commands, one after the other, in a folder of a user."""
    put_pictures(place / "photos")
    put_pictures(place / "coco" / "val2017")
    for picture in SCENE:
        put_json(place / "photos" / f"{Path(picture.name).stem}.json", labelme(picture))
    put_json(place / "annotations" / "instances.json", coco())
    put_json(place / "annotations" / "lvis_v1_val.json", lvis())
    put_json(place / "via_project.json", via_2())
    put_json(place / "project-1.json", label_studio())
    put_yolo(place / "dataset")
    blocks = re.findall(r"(?ms)^```bash\n(.*?)^```", PAGE)
    commands = [shlex.split(line, comments=True) for line in "".join(blocks).splitlines()]
    assert len(commands) == 11
    for words in commands:
        assert cli.main(words[1:]) == 0, words
    said = (place / "data" / "parts" / "records.jsonl").read_text()
    assert "Name <bbox1>." in said
    assert '"A fork."' in said


def test_the_page_names_all_formats_and_files():
    rows = re.findall(r"(?m)^\| `([a-z-]+)` \| (the JSON|a JSON|project|export|`data)", PAGE)
    assert {name for name, _ in rows} == set(FORMATS)
    assert f"`--max-regions` ({MAX_REGIONS})" in PAGE
    for name, form in FORMATS.items():
        counted = {None: "depends"}.get(form.frame, f"{form.frame} pixels")
        assert re.search(rf"(?m)^\| (`[a-z-]+`, )?`{name}`(, `[a-z-]+`)? \| {counted} \|", PAGE)


def test_the_commands_list_is_the_registrys():
    assert tuple(FORMATS) == import_data.FORMATS
    command = typer.main.get_command(cli.app).commands["import"]  # type: ignore[attr-defined]
    assert ", ".join(FORMATS) in command.params[0].help
