"""The version of stored records, and the way up.

A record in a shard carries ``schema_version``; one without (the published lists, tars made by other
tools) is version 1. Whoever changes what a field of a stored record means raises the number and
adds the step from the version before to ``_UPGRADES``: old tars stay readable as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from vipllava.types import RecordError

RECORD_VERSION: Final = 1
VERSION_FIELD: Final = "schema_version"
_UPGRADES: Final[dict[int, Callable[[Mapping[str, Any]], Mapping[str, Any]]]] = {}


def upgrade_record(record: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Raise an older record to the present version; a present one is returned as it is.

    Args:
        record: never changed.
        where: data set and key, for messages.

    Raises:
        RecordError: the version is none, or newer than this release.
    """
    version = record.get(VERSION_FIELD, 1)
    if type(version) is not int or not 1 <= version <= RECORD_VERSION:
        raise RecordError(
            f"{where}: field `{VERSION_FIELD}` is {version!r}; this release reads versions 1 to "
            f"{RECORD_VERSION}. Update the package, or build the shard again with this one"
        )
    while version < RECORD_VERSION:
        record = _UPGRADES[version](record)
        version += 1
    return record
