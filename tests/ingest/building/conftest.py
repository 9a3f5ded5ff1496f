"""What several tests of building shards share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ingest.building.toy_build import NUM, toy_records, write_list
from tests.toy_data import encode_picture


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """The toy records with their pictures."""
    root = tmp_path / "data"
    write_list(root, toy_records())
    (root / "pictures").mkdir()
    for number in range(NUM):
        (root / "pictures" / f"{number}.jpg").write_bytes(encode_picture(seed=number))
    return root
