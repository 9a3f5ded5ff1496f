"""Docstrings name things as ``:class:`X``` does in Sphinx; on the pages that is code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:mod|class|func|meth|data|attr):`~?([^`]+)`")


class PlainRoles(griffe.Extension):
    """Turns roles into code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
