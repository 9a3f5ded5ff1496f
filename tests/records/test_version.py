"""The version of stored records."""

from __future__ import annotations

from typing import Any

import pytest

from vipllava.records.fields import check_version
from vipllava.types import RecordError


def test_published_records_are_version_1():
    check_version({"id": 1}, "toy/a")
    check_version({"schema_version": 1}, "toy/a")


@pytest.mark.parametrize("version", [0, 2, "1", True, None, 1.0])
def test_other_versions_are_refused(version: Any):
    with pytest.raises(RecordError, match=r"toy/a: field `schema_version` is .*reads version 1\."):
        check_version({"schema_version": version}, "toy/a")
