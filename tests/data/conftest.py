"""Fixtures of toy data sets."""

from __future__ import annotations

from tests.toy_stream import build_dataset, encoder, picture, policies

__all__ = ["build_dataset", "encoder", "picture", "policies"]
