"""What Tab offers: commands, shapes, colours, options, file names and the words of marks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from vipllava.serve.terminal.commands import COMMANDS, PARAMETERS
from vipllava.serve.terminal.harmless import harmless
from vipllava.serve.terminal.options import PLACES
from vipllava.serve.terminal.talk import Talk
from vipllava.visual_prompts.shapes import PALETTE, SHAPES

_LOOKS: Final = (*SHAPES, *PALETTE, "width=", "alpha=", "seed=", "colour=")


class ChatCompleter(Completer):
    """Completes a line of the chat.

    Args:
        talk: whose marks a question may name.
    """

    def __init__(self, talk: Talk) -> None:
        self._talk = talk
        self._paths = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        """Yield what the word at the cursor may become."""
        text = document.text_before_cursor
        name, blank, rest = text.partition(" ")
        if not text.startswith("/"):
            return self._mentions(text)
        if not blank:
            return (
                Completion(f"/{each} " if COMMANDS[each].usage else f"/{each}", -len(text),
                           display=f"/{each}", display_meta=COMMANDS[each].help)
                for each in COMMANDS if each.startswith(name[1:])
            )  # fmt: skip
        name = name[1:]
        if name in ("image", "save") or (name == "rle" and " " not in rest.lstrip()):
            return self._paths.get_completions(Document(rest.lstrip()), complete_event)
        if name == "params":
            return _words((f"{each}=" for each in PARAMETERS), rest)
        return _words(_LOOKS if name in PLACES else (), rest)

    def _mentions(self, text: str) -> Iterator[Completion]:
        start = max(text.rfind("@"), text.rfind("{"))
        if start < 0:
            return
        typed = text[start + 1 :].lower()
        for number, words in enumerate(self._talk.chat.words):
            if str(number).startswith(typed) or typed in words:
                yield Completion(f"{{{number}}}", start - len(text), display_meta=harmless(words))


def _words(known: Iterable[str], rest: str) -> Iterator[Completion]:
    typed = rest.rpartition(" ")[2]
    return (Completion(each, -len(typed)) for each in known if each.startswith(typed))
