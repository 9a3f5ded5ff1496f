"""Fixtures of toy data sets."""

from __future__ import annotations

from tests.toy_stream import picture

__all__ = ["picture"]
