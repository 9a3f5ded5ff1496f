"""A dataclass says what a field is in a comment beside or above it: on the pages, a table."""

from __future__ import annotations

import tokenize
from collections.abc import Iterator
from typing import Any

import griffe


def _comments(lines: list[str]) -> Iterator[tuple[int, int, str]]:
    """Yield line (from 1), column and text of every comment."""
    for token in tokenize.generate_tokens(iter([f"{line}\n" for line in lines]).__next__):
        if token.type == tokenize.COMMENT:
            yield *token.start, token.string.lstrip("# ")


class FieldComments(griffe.Extension):
    """Adds the section ``Attributes`` to the docstrings of classes whose fields have comments."""

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Complete one docstring."""
        docstring = cls.docstring
        fields = [
            member
            for member in cls.attributes.values()
            if member.lineno and not member.is_private and "instance-attribute" in member.labels
        ]
        if docstring is None or "Attributes:" in docstring.value or not fields:
            return
        lines = cls.lines_collection[cls.filepath]
        comments = {line: (column, text) for line, column, text in _comments(lines)}
        rows: list[str] = []
        for field in fields:
            if not (
                beside := [
                    comments[n][1]
                    for n in range(field.lineno or 0, (field.endlineno or 0) + 1)
                    if n in comments
                ]
            ):
                above = (field.lineno or 0) - 1
                while above in comments and not lines[above - 1][: comments[above][0]].strip():
                    beside.insert(0, comments[above][1])
                    above -= 1
            if beside:
                rows.append(f"    {field.name}: {' '.join(beside)}")
        if rows:
            docstring.value += "\n\nAttributes:\n" + "\n".join(rows)
