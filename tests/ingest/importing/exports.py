"""Small exports as the tools write them, about the same pictures: green things on grey.

A scene is what a person saw in the tool: upright pictures and boxes x1, y1, x2, y2 in their pixels.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

GREEN, GREY = (0, 200, 0), (120, 120, 120)
_BACK = {
    3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270,
}  # fmt: skip
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Picture:
    """An upright picture and its things."""

    name: str
    size: tuple[int, int]
    things: tuple[tuple[str, Box], ...]
    orientation: int = 0  # of its EXIF block; 0: it has none

    def encoded(self) -> bytes:
        """Return the file: its pixels lie as the EXIF block says."""
        image = Image.new("RGB", self.size, GREY)
        for _, (x1, y1, x2, y2) in self.things:
            ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), fill=GREEN)
        buffer, options = io.BytesIO(), {}
        if self.orientation:
            image = image.transpose(_BACK[self.orientation])
            options["exif"] = Image.Exif()
            options["exif"][0x0112] = self.orientation
        kind = "PNG" if self.name.endswith(".png") else "JPEG"
        if kind == "JPEG":
            options |= {"quality": 100, "subsampling": 0}
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    @property
    def stored(self) -> tuple[int, int]:
        """Width and height of the file's pixels."""
        return self.size[::-1] if self.orientation in (6, 8) else self.size


KITCHEN = Picture(
    "kitchen.jpg", (200, 120), (("cup", (150, 20, 190, 70)), ("fork", (8, 16, 48, 32)))
)
STREET = Picture("street.png", (160, 200), (("cup", (24, 104, 104, 184)),))
SCENE = (KITCHEN, STREET)


def turned(orientation: int) -> tuple[Picture, ...]:
    """Return the scene with its first picture lying on its side in the file."""
    return (Picture(KITCHEN.name, KITCHEN.size, KITCHEN.things, orientation), STREET)


def put_pictures(folder: Path, scene: tuple[Picture, ...] = SCENE) -> Path:
    """Write the pictures of a scene."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in scene:
        (folder / picture.name).write_bytes(picture.encoded())
    return folder


def put_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def ring_mask(size: tuple[int, int], box: Box) -> np.ndarray:
    """Return a mask [height, width] of a box with a hole in its middle."""
    mask = np.zeros(size[::-1], dtype=bool)
    x1, y1, x2, y2 = box
    mask[y1:y2, x1:x2] = True
    mask[y1 + 8 : y2 - 8, x1 + 8 : x2 - 8] = False
    return mask


# COCO and LVIS.


def coco(scene: tuple[Picture, ...] = SCENE, *, stored: bool = False) -> dict[str, Any]:
    """Return an instances file; ``stored``: its sizes are those of the files' pixels."""
    names = sorted({name for picture in scene for name, _ in picture.things})
    images, annotations = [], []
    for number, picture in enumerate(scene, start=11):
        width, height = picture.stored if stored else picture.size
        images.append(
            {"id": number, "file_name": picture.name, "width": width, "height": height,
             "license": 1, "date_captured": ""}
        )  # fmt: skip
        for name, (x1, y1, x2, y2) in picture.things:
            annotations.append(
                {
                    "id": 100 + len(annotations),
                    "image_id": number,
                    "category_id": 1 + names.index(name),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
                    "iscrowd": 0,
                }
            )
    categories = [
        {"id": 1 + number, "name": name, "supercategory": "kitchen"}
        for number, name in enumerate(names)
    ]
    return {
        "info": {"description": "toy", "version": "1.0"},
        "licenses": [{"id": 1, "name": "", "url": ""}],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def lvis(scene: tuple[Picture, ...] = SCENE) -> dict[str, Any]:
    """Return a file of version 1."""
    given = coco(scene)
    for image in given["images"]:
        name = image.pop("file_name")
        image |= {
            "coco_url": f"http://images.cocodataset.org/val2017/{name}",
            "flickr_url": "",
            "not_exhaustive_category_ids": [],
            "neg_category_ids": [7],
        }
    for annotation in given["annotations"]:
        del annotation["iscrowd"]
    for category in given["categories"]:
        name = category["name"]
        del category["supercategory"]
        category |= {
            "name": f"{name}_(thing)", "synset": f"{name}.n.01", "synonyms": [name, f"{name}_2"],
            "def": f"a {name} to use", "frequency": "f", "image_count": 2, "instance_count": 3,
        }  # fmt: skip
    return given


# LabelMe.


def labelme(picture: Picture, *shapes: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the file of a picture; without ``shapes`` its things, as rectangles."""
    width, height = picture.size
    rectangles = [shape(name, "rectangle", [box[:2], box[2:]]) for name, box in picture.things]
    return {
        "version": "5.4.1",
        "flags": {},
        "shapes": [*shapes] or rectangles,
        "imagePath": picture.name,
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
        **changes,
    }


def shape(label: str, kind: str, points: Any, **more: Any) -> dict[str, Any]:
    """Return a shape as version 5 writes it."""
    return {
        "label": label, "points": [list(point) for point in points], "group_id": None,
        "description": "", "shape_type": kind, "flags": {}, "mask": None, **more,
    }  # fmt: skip


def labelme_mask(label: str, mask: np.ndarray) -> dict[str, Any]:
    """Return a mask: a PNG of its box, whose corners are its points."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x1, y1, x2, y2 = columns[0], rows[0], columns[-1], rows[-1]
    buffer = io.BytesIO()
    Image.fromarray(mask[y1 : y2 + 1, x1 : x2 + 1].astype(np.uint8)).save(buffer, "PNG")
    points = [[float(x1), float(y1)], [float(x2), float(y2)]]
    return shape(label, "mask", points, mask=base64.b64encode(buffer.getvalue()).decode())


# VIA.


def via_region(name: str, box: Box) -> dict[str, Any]:
    x1, y1, x2, y2 = box
    return {
        "shape_attributes": {"name": "rect", "x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1},
        "region_attributes": {"object": name},
    }


def via_2(scene: tuple[Picture, ...] = SCENE) -> dict[str, Any]:
    """Return a project of version 2."""
    images = {
        f"{picture.name}{len(picture.encoded())}": {
            "filename": picture.name,
            "size": len(picture.encoded()),
            "regions": [via_region(*thing) for thing in picture.things],
            "file_attributes": {},
        }
        for picture in scene
    }
    region = {"object": {"type": "text", "description": "", "default_value": ""}}
    return {
        "_via_settings": {
            "ui": {},
            "core": {"buffer_size": 18, "filepath": {}, "default_filepath": ""},
            "project": {"name": "toy"},
        },
        "_via_img_metadata": images,
        "_via_attributes": {"region": region, "file": {}},
        "_via_data_format_version": "2.0.10",
        "_via_image_id_list": list(images),
    }


def put_via_csv(path: Path, scene: tuple[Picture, ...] = SCENE) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            "filename file_size file_attributes region_count region_id region_shape_attributes "
            "region_attributes".split()
        )
        for picture in scene:
            regions = [via_region(*thing) for thing in picture.things]
            for number, region in enumerate(regions):
                size, count = len(picture.encoded()), len(regions)
                cells = [json.dumps(region[n]) for n in ("shape_attributes", "region_attributes")]
                writer.writerow([picture.name, size, "{}", count, number, *cells])
        writer.writerow(["empty.jpg", 3, "{}", 0, 0, "{}", "{}"])
    return path


def via_3(scene: tuple[Picture, ...] = SCENE) -> dict[str, Any]:
    """Return a project of version 3."""
    metadata, options = {}, {"0": "cup", "1": "fork"}
    numbers = {name: number for number, name in options.items()}
    for view, picture in enumerate(scene, start=1):
        for name, (x1, y1, x2, y2) in picture.things:
            metadata[f"{view}_{len(metadata)}"] = {
                "vid": str(view), "flg": 0, "z": [], "xy": [2, x1, y1, x2 - x1, y2 - y1],
                "av": {"1": numbers[name]},
            }  # fmt: skip
    return {
        "project": {
            "pid": "__VIA_PROJECT_ID__", "rev": "__VIA_PROJECT_REV_ID__", "pname": "toy",
            "creator": "VGG Image Annotator", "vid_list": [str(n + 1) for n in range(len(scene))],
        },
        "config": {"file": {"loc_prefix": {"1": "", "2": "", "3": "", "4": ""}}, "ui": {}},
        "attribute": {
            "1": {
                "aname": "object", "anchor_id": "FILE1_Z0_XY1", "type": 4, "desc": "",
                "options": options, "default_option_id": "",
            },
        },
        "file": {
            str(n): {"fid": n, "fname": picture.name, "type": 2, "loc": 1, "src": picture.name}
            for n, picture in enumerate(scene, start=1)
        },
        "metadata": metadata,
        "view": {str(n + 1): {"fid_list": [str(n + 1)]} for n in range(len(scene))},
    }  # fmt: skip


# Label Studio.


def ls_value(size: tuple[int, int], box: Box) -> dict[str, Any]:
    """Return a rectangle in per cent."""
    width, height = size
    x1, y1, x2, y2 = box
    return {
        "x": 100 * x1 / width, "y": 100 * y1 / height, "width": 100 * (x2 - x1) / width,
        "height": 100 * (y2 - y1) / height, "rotation": 0,
    }  # fmt: skip


def ls_result(
    picture: Picture, kind: str, label: str, value: dict[str, Any], id: str
) -> dict[str, Any]:
    """Return one result of an annotation."""
    return {
        "id": id, "type": kind, "from_name": "label", "to_name": "image", "origin": "manual",
        "value": {**value, kind: [label]}, "image_rotation": 0,
        "original_width": picture.size[0], "original_height": picture.size[1],
    }  # fmt: skip


def ls_task(number: int, picture: Picture, *results: dict[str, Any]) -> dict[str, Any]:
    """Return a task; without ``results`` with the picture's things."""
    things = [
        ls_result(picture, "rectanglelabels", name, ls_value(picture.size, box), f"r{n}")
        for n, (name, box) in enumerate(picture.things)
    ]
    annotation = {
        "id": 50 + number, "completed_by": 1, "result": [*results] or things,
        "was_cancelled": False, "ground_truth": False, "created_at": "2026-01-02T10:00:00Z",
        "updated_at": "2026-01-02T10:00:00Z", "lead_time": 4.5,
    }  # fmt: skip
    return {
        "id": number, "annotations": [annotation], "predictions": [], "meta": {}, "project": 1,
        "data": {"image": f"/data/upload/1/1a2b3c4d-{picture.name}"},
        "file_upload": f"1a2b3c4d-{picture.name}",
    }  # fmt: skip


def label_studio(scene: tuple[Picture, ...] = SCENE) -> list[dict[str, Any]]:
    return [ls_task(number, picture) for number, picture in enumerate(scene, start=1)]


def label_studio_min(scene: tuple[Picture, ...] = SCENE) -> list[dict[str, Any]]:
    """Return the export JSON_MIN."""
    rows = []
    for task in label_studio(scene):
        (annotation,) = task["annotations"]
        regions = [
            {**r["value"], "original_width": r["original_width"],
             "original_height": r["original_height"]}
            for r in annotation["result"]
        ]  # fmt: skip
        rows.append(
            {**task["data"], "id": task["id"], "label": regions, "annotator": 1,
             "annotation_id": annotation["id"], "created_at": annotation["created_at"],
             "updated_at": annotation["updated_at"], "lead_time": 4.5}
        )  # fmt: skip
    return rows


def brush_of_mask(mask: np.ndarray) -> list[int]:
    """Return a mask in Label Studio's coding, all runs one value long or repeated.

    Red, green, blue and opacity of a pixel are equal here, as of its own ``mask2rle``.
    """
    values = np.repeat(mask.ravel().astype(np.uint8) * 255, 4)
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(values)], strict=True):
        left = int(stop - start)
        while left:
            run = min(left, 1 << 16)
            choice = next(n for n, size in enumerate((3, 4, 8, 16)) if run <= 1 << size)
            size = (3, 4, 8, 16)[choice]
            bits += f"1{choice:02b}{run - 1:0{size}b}{values[start]:08b}"
            left -= run
    bits += "0" * (-len(bits) % 8)
    return [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]


# YOLO.


def put_yolo(root: Path, scene: tuple[Picture, ...] = SCENE) -> Path:
    """Write a data set of one part, as ultralytics lays it out; returns its data.yaml."""
    names = ["cup", "fork"]
    put_pictures(root / "images" / "train", scene)
    (root / "labels" / "train").mkdir(parents=True)
    for picture in scene:
        width, height = picture.size
        lines = [
            f"{names.index(name)} {(x1 + x2) / 2 / width:.6f} {(y1 + y2) / 2 / height:.6f} "
            f"{(x2 - x1) / width:.6f} {(y2 - y1) / height:.6f}"
            for name, (x1, y1, x2, y2) in picture.things
        ]
        labels = root / "labels" / "train" / f"{Path(picture.name).stem}.txt"
        labels.write_text("\n".join(lines) + "\n")
    path = root / "data.yaml"
    path.write_text("path: .\ntrain: images/train\nval:\nnames:\n  0: cup\n  1: fork\n")
    return path
