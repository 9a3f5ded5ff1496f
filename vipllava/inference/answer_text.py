"""The text of an answer while its tokens come.

Joined, the pieces are the whole text whatever the pieces were: never half a character, nothing
that may be the start of a stop string, and no blanks at the ends.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from operator import itemgetter

from vipllava.conversation import ConversationEncoder
from vipllava.conversation.pieces import Before
from vipllava.inference.protocol import TokenLogprob

_HALF = "\ufffd"  # what a tokenizer writes for bytes that are no character, or not yet


class Detokenizer:
    """Texts of tokens; those of a single one are remembered."""

    def __init__(self, encoder: ConversationEncoder) -> None:
        self.encoder = encoder
        self._texts: dict[int, str] = {}

    def text(self, ids: Sequence[int], before: Before = Before.TEXT) -> str:
        """Return the text of ids behind what stands before them."""
        if len(ids) > 1 or before is not Before.TEXT:
            return self.encoder.decode(ids, before)
        return self.token_text(ids[0])

    def token_text(self, token: int) -> str:
        """Return the text of one token behind other text."""
        found = self._texts.get(token)
        if found is None:
            found = self._texts[token] = self.encoder.decode([token])
        return found


class AnswerText:
    """The text of one answer.

    Args:
        detokenizer: the model's.
        before: what stands before the answer.
        stops: texts that end it, and are not part of it: the template's and the request's.
        streams: whether pieces are asked for before the end; else nothing is worked out until
            then, unless there are stops.
    """

    def __init__(
        self, detokenizer: Detokenizer, before: Before, stops: tuple[str, ...], streams: bool
    ) -> None:
        self._detokenizer, self._before, self._stops = detokenizer, before, stops
        self._is_eager = streams or bool(stops)
        self._lead = detokenizer.encoder.template.assistant_lead
        self._window: list[int] = []  # tokens whose text is not in `_text` yet
        self._text = ""
        self._given = 0  # letters of it that were given out, or are blanks in front of it
        self._has_begun = False  # whether a letter that is no blank has come
        self._end: int | None = None  # where the answer ends, once that is known
        self._is_whole = False  # it ended, and not at a stop string
        self._logprobs: list[tuple[int, TokenLogprob]] = []  # with where their texts start

    def add(self, token: int, logprob: TokenLogprob | None = None) -> bool:
        """Take the next token; return whether a stop string has ended the answer."""
        self._window.append(token)
        if logprob is not None:
            self._logprobs.append((len(self._text), logprob))
        if not self._is_eager:
            return False
        piece = self._detokenizer.text(self._window, self._before)
        if piece.endswith(_HALF):
            return False
        return self._append(piece)

    def finish(self) -> None:
        """Take it that no token follows."""
        if self._end is None and self._window:
            self._append(self._detokenizer.text(self._window, self._before))
        self._is_whole = self._end is None
        if self._end is None:
            self._end = len(self._text)

    @property
    def met_stop(self) -> bool:
        """Whether a stop string has ended the answer."""
        return self._end is not None and not self._is_whole

    def take(self) -> tuple[str, tuple[TokenLogprob, ...]]:
        """Return what is new since the last time, as far as it is certain."""
        text, limit = self._text, self._end
        if limit is None:
            limit = 0 if self._lead else len(text) - self._num_doubtful()
        if not self._has_begun:
            self._given = len(text) - len(text.lstrip())
            self._has_begun = self._given < limit
        piece = text[self._given : limit].rstrip() if self._has_begun else ""
        self._given += len(piece)
        if not self._logprobs:
            return piece, ()
        # A token belongs to the piece that its text begins in, blanks that are taken off as well.
        ready = len(self._logprobs)
        if not self._is_whole:
            until = self._given if self._end is None else self._end
            ready = bisect_left(self._logprobs, until, key=itemgetter(0))
        logprobs = tuple(each for _, each in self._logprobs[:ready])
        del self._logprobs[:ready]
        return piece, logprobs

    def _append(self, piece: str) -> bool:
        self._window.clear()
        self._before = Before.TEXT
        old = len(self._text)
        self._text += piece
        if self._lead:
            if len(self._text) < len(self._lead) and self._lead.startswith(self._text):
                return False
            self._text = self._text.removeprefix(self._lead)
            self._lead, old = "", 0
        found = (self._text.find(s, max(0, old - len(s) + 1)) for s in self._stops)
        ends = [at for at in found if at >= 0]
        if ends:
            self._end = min(ends)
        return bool(ends)

    def _num_doubtful(self) -> int:
        """Return the letters at the end that a stop string may begin with."""
        longest = 0
        for stop in self._stops:
            sizes = range(min(len(stop) - 1, len(self._text)), longest, -1)
            longest = next((k for k in sizes if self._text.endswith(stop[:k])), longest)
        return longest
