"""LVIS: COCO's layout over COCO's pictures, with synonyms and definitions of 1203 categories.

A picture is named by ``coco_url``, whose end is its folder and file (``val2017/000000000139.jpg``);
version 0.5 has a ``file_name``. Boxes are as of COCO, segmentations always polygons.
"""

from __future__ import annotations

from functools import partial

from vipllava.ingest.importing.coco import Layout, is_coco, is_lvis, read_coco
from vipllava.ingest.importing.source import ImportFormat

LVIS = ImportFormat(
    "lvis",
    "LVIS",
    partial(
        read_coco,
        layout=Layout(
            "LVIS",
            ("file_name", "coco_url"),
            (("def", "definition"), ("synset", "synset"), ("synonyms", "synonyms")),
        ),
    ),
    lambda head: is_coco(head) and is_lvis(head),
    "stored",
    "LVIS counts the pixels of COCO's pictures as they lie in the file",
    options=("box_form",),
)
