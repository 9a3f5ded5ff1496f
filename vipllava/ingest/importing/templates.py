"""Questions and answers about a region, with placeholders for what the export says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Final

from vipllava.ingest.importing.source import ImportingError
from vipllava.records.fields import IMAGE_PLACEHOLDER, REGION_PLACEHOLDER

REGION: Final = "region"
CATEGORY: Final = "category"
QUESTION: Final = "What is {region}?"
ANSWER: Final = "{category}"


@dataclass(frozen=True, slots=True)
class Templates:
    """Questions that take turns, and the answer.

    Raises:
        ImportingError: a template is empty, or is none.
    """

    questions: tuple[str, ...] = (QUESTION,)
    answer: str = ANSWER

    def __post_init__(self) -> None:
        for name, text in self._all():
            if not text.strip():
                raise ImportingError(f"{name} is empty; expected a text such as {QUESTION!r}")
            _placeholders(name, text)
            if IMAGE_PLACEHOLDER in text or REGION_PLACEHOLDER.search(text):
                raise ImportingError(
                    f"{name} is {text!r}; a region is written {{region}}, and the picture comes "
                    "with the first question by itself"
                )

    @property
    def placeholders(self) -> set[str]:
        """Return all that the templates name."""
        return {name for where, text in self._all() for name in _placeholders(where, text)}

    def check(self, attributes: Sequence[str], *, alone: bool) -> None:
        """Refuse what no region of an export has.

        Args:
            attributes: those that any of them has.
            alone: whether a record has one region only, so that a question need not name it.

        Raises:
            ImportingError: a template names anything else, or regions cannot be told apart.
        """
        known = (REGION, CATEGORY, *attributes)
        for where, text in self._all():
            for name in _placeholders(where, text):
                if name not in known:
                    listed = ", ".join(f"{{{each}}}" for each in known)
                    raise ImportingError(
                        f"{where} is {text!r}; there is no {{{name}}} here, but {listed}. A brace "
                        "itself is written twice"
                    )
        for text in self.questions:
            if not alone and REGION not in {*_placeholders("", text), *self._of_answer()}:
                raise ImportingError(
                    f"question is {text!r}, which does not say which region is meant, and the "
                    "answer does not, either; write {region} where its mark's words belong, or "
                    "import a record per annotation (per_annotation)"
                )

    def fill(self, number: int, region: int, values: Mapping[str, str]) -> tuple[str, str]:
        """Return question and answer.

        Args:
            number: of the region in the export: questions take turns.
            region: its number in the record.
            values: category and attributes.

        Raises:
            KeyError: the region has no value for a placeholder; names it.
        """
        given = {**values, REGION: f"<bbox{region}>"}
        question = self.questions[number % len(self.questions)]
        return question.format_map(given), self.answer.format_map(given)

    def needed(self, number: int) -> set[str]:
        """Return what is named for the region of a number, its mark aside."""
        question = self.questions[number % len(self.questions)]
        return {*_placeholders("", question), *self._of_answer()} - {REGION}

    def _of_answer(self) -> list[str]:
        return _placeholders("answer", self.answer)

    def _all(self) -> list[tuple[str, str]]:
        return [*(("question", text) for text in self.questions), ("answer", self.answer)]


def _placeholders(where: str, text: str) -> list[str]:
    names: list[str] = []
    try:
        for _, name, spec, conversion in Formatter().parse(text):
            if name is None:
                continue
            if not name or spec or conversion or set(name) & set(".["):
                raise ValueError(f"`{{{name}}}` names nothing: expected a name, e.g. {{category}}")
            names.append(name)
    except ValueError as error:
        raise ImportingError(
            f"{where} is {text!r}: {error}. A brace itself is written twice"
        ) from error
    return names
