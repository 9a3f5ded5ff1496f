"""The values of a composed job, for checks that go on where some of them are wrong."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from vipllava.config.hardware import Hardware
from vipllava.config.schema import read
from vipllava.types import ConfigError


class JobValues:
    """A composed job whose values read as None where they cannot be read.

    The schema check has reported those already; a check that needs one of them is skipped.

    Args:
        cfg: the composed job.
        machine: the hardware to check against.
    """

    def __init__(self, cfg: DictConfig, machine: Hardware) -> None:
        self.cfg = cfg
        self.machine = machine

    @property
    def is_evaluation(self) -> bool:
        """Whether the job is one of ``conf/evaluate.yaml``."""
        return "bench" in self.cfg

    def get(self, path: str, kind: type | tuple[type, ...] = object) -> Any:
        """Return the value at ``path`` if it can be read and is of ``kind``, else None."""
        try:
            value = read(self.cfg, path)
        except (ConfigError, KeyError, TypeError, AttributeError):
            return None
        return value if isinstance(value, kind) else None

    def number(self, path: str) -> int | None:
        """Return the whole number of at least 1 at ``path``, else None."""
        value = self.get(path, int)
        return None if isinstance(value, bool) or value is None or value < 1 else value
