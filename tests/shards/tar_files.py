"""Tars and old indices written by hand."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from vipllava.shards.tar_index import index_path, load_index


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """Write a plain tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_version_1(tar: Path, **changes: Any) -> Path:
    """Replace the index of a tar by one of version 1, as the first release wrote it."""
    path = index_path(tar)
    index = load_index(path, tar)
    rows = index.samples
    pictured = rows["image_block"] > 0
    meta = {
        "format": "vipllava-shard-index",
        "version": 1,
        "tar_size": index.tar_size,
        "head_crc": index.head_crc,
        **changes,
    }
    columns = {
        "key_bytes": index.keys,
        "key_ends": rows["key_end"].astype(np.int64),
        "record_offset": rows["record_block"].astype(np.int64) * 512,
        "record_size": rows["record_size"].astype(np.int32),
        "record_crc": rows["record_crc"],
        "image_offset": np.where(pictured, rows["image_block"].astype(np.int64) * 512, -1),
        "image_size": rows["image_size"].astype(np.int32),
        "image_crc": rows["image_crc"],
        "image_extension": np.where(pictured, rows["extension"], -1).astype(np.int8),
        "picture_size": np.stack([rows["width"], rows["height"]], axis=1).astype(np.int32),
    }
    np.savez(path, meta=np.array(json.dumps(meta)), **columns)
    return path
