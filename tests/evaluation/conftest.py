"""A model on disk, as a stage leaves it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_model import save_tiny_export


@pytest.fixture(scope="module")
def export(tiny_sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the export of a tiny random network and return its folder."""
    return save_tiny_export(tiny_sources, tmp_path_factory.mktemp("model") / "export")
