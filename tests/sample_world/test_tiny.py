"""The policies of the tiny model, read from their configuration files."""

from __future__ import annotations

from pathlib import Path

import pytest

from vipllava.sample_world.tiny import load_tiny_policies
from vipllava.types import VipLlavaError


def test_policies_that_are_not_there_are_an_error_that_says_where_to_run(tmp_path: Path):
    with pytest.raises(VipLlavaError, match=r"published\.yaml: .*; run this from a checkout"):
        load_tiny_policies(tmp_path)
