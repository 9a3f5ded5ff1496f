"""Fixtures of toy data sets."""

from __future__ import annotations

from tests.toy_stream import encoder, picture

__all__ = ["encoder", "picture"]
