"""One tiny model and its engine for each module."""

from __future__ import annotations

from typing import Any

import pytest

from tests.inference.tiny_engine import make_engine
from tests.tiny_model import tiny_parts
from vipllava.inference.engine import Engine


@pytest.fixture(scope="module")
def parts(tiny_sources: Any) -> Any:
    return tiny_parts(tiny_sources)


@pytest.fixture(scope="module")
def engine(parts: Any) -> Engine:
    return make_engine(parts)
