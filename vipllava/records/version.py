"""The version of stored records.

A record without ``schema_version`` (published lists, tars of other tools) is of version 1, the only
one so far. Whoever changes what a field of a stored record means raises the number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from vipllava.types import RecordError

RECORD_VERSION: Final = 1
VERSION_FIELD: Final = "schema_version"


def check_version(record: Mapping[str, Any], where: str) -> None:
    """Raise RecordError, beginning with ``where``, unless this release knows the version."""
    version = record.get(VERSION_FIELD, RECORD_VERSION)
    if type(version) is not int or version != RECORD_VERSION:
        raise RecordError(
            f"{where}: field `{VERSION_FIELD}` is {version!r}; this release reads version "
            f"{RECORD_VERSION}. Update the package, or build the shard again with this one"
        )
