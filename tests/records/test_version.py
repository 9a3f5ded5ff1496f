"""The version of stored records."""

from __future__ import annotations

from typing import Any

import pytest

from vipllava.records import version as record_version
from vipllava.records.version import upgrade_record
from vipllava.types import RecordError


def test_published_records_are_version_1():
    record = {"id": 1}
    assert upgrade_record(record, "toy/a") is record
    assert upgrade_record({"schema_version": 1}, "toy/a") == {"schema_version": 1}


@pytest.mark.parametrize("version", [0, 2, "1", True, None, 1.0])
def test_other_versions_are_refused(version: Any):
    with pytest.raises(RecordError, match=r"toy/a: field `schema_version` is .*versions 1 to 1"):
        upgrade_record({"schema_version": version}, "toy/a")


def test_the_way_up_is_step_by_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(record_version, "RECORD_VERSION", 3)
    monkeypatch.setitem(record_version._UPGRADES, 1, lambda record: {**record, "two": True})
    monkeypatch.setitem(record_version._UPGRADES, 2, lambda record: {**record, "three": True})
    old = {"id": 1}
    assert upgrade_record(old, "toy/a") == {"id": 1, "two": True, "three": True}
    assert old == {"id": 1}
    assert upgrade_record({"schema_version": 2}, "toy/a") == {"schema_version": 2, "three": True}
