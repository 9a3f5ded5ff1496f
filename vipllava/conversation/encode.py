"""Conversations to ids, and the labels with them.

Four wishes pull against each other here:

1. Ids like those the released checkpoints were trained on. That code renders one string, cuts it
   at the picture and encodes each side as a string of its own (BOS once, Llama's dummy prefix
   space on each side).
2. Special-token text that a user typed stays text.
3. Exact labels in every turn, and the generation prompt always a prefix of the training ids. In
   one string that fails as soon as a token spans text and role string: with ``"it's  "`` before
   `` ASSISTANT:``, or a newline at the start of an answer behind Llama-3's ``\\n\\n``.
4. Role strings with the same ids always, whatever a user types around them.

The decision: **the conversation is never one string. It is a list of pieces, each encoded alone,
and the piece decides everything else.**

* A *fixed* piece is a maximal run of the template's own strings (system and first role string;
  the strings between two texts; the ending). Its ids are made once per encoder, by the
  tokenizer as it is, special tokens included.
* A *typed* piece is one text with its lead (the space behind ``ASSISTANT:``). It is encoded by a
  copy of the tokenizer without special tokens (2). An assistant's piece carries its end when the
  end is plain text (``\\n`` of ``plain``, ``###``): both are supervised, and ``".\\n"`` may be
  one token there.
* Boundaries between pieces are forced: no token spans two (3, 4). Labels need no search for
  offsets: a piece is supervised or it is not.
* A piece knows what stands before it. At the start of a part, that is at the start of the
  conversation and behind the picture, it gets the dummy prefix as a string of its own would;
  behind a special token what this tokenizer does there; behind a forced boundary none.

Tokenizers of this family never merge a character with a following space, so a boundary between
a role string and `` text``, or beside a special token, is one that the whole string would have
had too: for texts without special tokens, without blanks at their ends and without characters
that merge with the template's, the ids equal those of the released way (1). A test holds each
template to that.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from vipllava.conversation.pieces import Before, FastTokenizer, PieceTokenizer
from vipllava.conversation.templates import ChatTemplate, get_template
from vipllava.types import IGNORE_INDEX, ConfigError, Encoded, RecordError, Turn

Ids = Sequence[int] | npt.NDArray[np.int64]
TooLong = Literal["cut", "drop_turns", "error"]


class ConversationEncoder:
    """Encodes conversations with one tokenizer and one template; threads may share it.

    Args:
        tokenizer: a transformers tokenizer backed by the tokenizers library. It is not changed.
            One BOS is placed where the tokenizer adds one or the template spells it.
        template: the template or its name.
        image_token_id: id of every position that holds an image feature. Not a token of text.
        image_seq_length: number of these positions for one image.
        max_length: greatest number of ids of a training sample, the image's included.
        too_long: what becomes of a longer conversation. ``cut``: its end is cut off, labels too,
            be it within an answer, as the released checkpoints were trained. ``drop_turns``: it
            loses whole trailing pairs of question and answer; a first pair that is too long is an
            error. ``error``: it is an error.

    Raises:
        ConfigError: unknown template, impossible lengths, or a tokenizer that does not fit the
            template.
    """

    def __init__(
        self,
        tokenizer: FastTokenizer,
        template: ChatTemplate | str,
        image_token_id: int,
        image_seq_length: int,
        max_length: int,
        too_long: TooLong = "drop_turns",
    ) -> None:
        for name, value, least in (
            ("image_token_id", image_token_id, 0),
            ("image_seq_length", image_seq_length, 1),
            ("max_length", max_length, 2),
        ):
            if value < least:
                raise ConfigError(f"{name}={value} must be at least {least}")
        if too_long not in get_args(TooLong):
            known = ", ".join(get_args(TooLong))
            raise ConfigError(f"too_long={too_long}: expected one of {known}")
        self.tokenizer = tokenizer
        self.template = get_template(template) if isinstance(template, str) else template
        self.image_token_id = image_token_id
        self.image_seq_length = image_seq_length
        self.max_length = max_length
        self.too_long: TooLong = too_long
        self._pieces = PieceTokenizer(tokenizer, self.template, image_token_id)
        self._image_ids = [image_token_id] * image_seq_length
        self._opening_ids, self._opening_before = self._encode_opening()
        self._text_end, self._token_end = self.template.assistant_end, ""
        if self.template.ends_with_token:
            self._text_end, self._token_end = self._token_end, self._text_end
        self._closing = self._token_end + self.template.after_assistant
        self._to_user = self._closing + self.template.user_prefix_later
        self._to_assistant = self.template.user_end + self.template.assistant_prefix
        # Made now, so that the tokenizer is not touched again (threads may share the encoder).
        for text, before in itertools.product(
            (self._closing, self._to_user, self._to_assistant), Before
        ):
            self._pieces.fixed(text, before)

    @property
    def _settings(self) -> tuple[Any, ...]:
        sizes = self.image_token_id, self.image_seq_length, self.max_length
        return self.template, *sizes, self.too_long

    def __reduce__(self) -> tuple[Any, ...]:
        # From the arguments: each copy of the tokenizer would carry the vocabulary.
        return type(self), (self.tokenizer, *self._settings)

    @property
    def identity(self) -> str:
        """Hex digest of all that decides which ids a conversation gets."""
        parts = (self.tokenizer.backend_tokenizer.to_str(), *self._settings)
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end generation, ascending: the template's, and the tokenizer's own EOS."""
        ids = {self._pieces.optional_token_id(token) for token in self.template.stop_tokens}
        ids.add(getattr(self.tokenizer, "eos_token_id", None))
        return tuple(sorted(token_id for token_id in ids if token_id is not None))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end generation, where the template's end is not a token."""
        return self.template.stop_strings

    def encode(self, turns: Sequence[Turn], key: str = "") -> Encoded:
        """Return ids and labels of a training sample.

        A conversation over ``max_length`` is shortened as ``too_long`` says; it never loses its
        image.

        Args:
            turns: user and assistant in alternation, user first, assistant last; at most one
                image, in front of a user turn.
            key: the record's key, for errors.

        Raises:
            RecordError: the turns are not such a conversation; it is too long and may not be
                shortened, or would lose its image or all that is supervised; a text is not valid
                Unicode.
        """
        return self._encode(turns, key, self.max_length)

    def encode_whole(self, turns: Sequence[Turn], key: str = "") -> Encoded:
        """Return what :meth:`encode` returns where ``max_length`` is no limit."""
        return self._encode(turns, key, sys.maxsize)

    def _encode(self, turns: Sequence[Turn], key: str, limit: int) -> Encoded:
        _check_turns(turns, key, last_role="assistant")
        draft = _Draft(self._opening_ids, self._opening_before)
        is_cut = False
        for index in range(0, len(turns), 2):
            fitting = len(draft.ids), draft.before
            self._add_user(draft, turns, index, key)
            self._add_fixed(draft, self._to_assistant)
            self._add_answer(draft, turns, index + 1, key)
            closing_ids, _ = self._pieces.fixed(self._closing, draft.before)
            length = len(draft.ids) + len(closing_ids)
            if length <= limit:
                continue
            is_cut = self.too_long == "cut"
            if is_cut:
                self._add_fixed(draft, self._closing, self._token_end)
                draft.cut(limit)
                draft.starts = [start for start in draft.starts if start < limit]
            if self.too_long == "error" or (index == 0 and not (is_cut and draft.is_supervised)):
                raise self._too_long(turns[: index + 2], length, key)
            if not is_cut:
                draft.cut(*fitting)
                del draft.starts[index:]
            has_image = any(turn.has_image for turn in turns)
            if has_image and draft.ids.count(self.image_token_id) < self.image_seq_length:
                raise RecordError(
                    f"sample {key!r}: the picture stands in a turn that does not fit into "
                    f"max_length={limit} (turns 1 to {index + 2} of {len(turns)} "
                    f"need {length} ids); raise max_length, or move the picture to turn 1",
                    "too-long",
                )
            break
        if not is_cut:
            # What follows the last answer. Its end token is the one fixed piece that is supervised.
            self._add_fixed(draft, self._closing, self._token_end)
        return Encoded(
            input_ids=np.array(draft.ids, dtype=np.int64),
            labels=np.array(draft.labels, dtype=np.int64),
            num_images=sum(turn.has_image for turn in turns),
            num_dropped_turns=len(turns) - len(draft.starts),
            is_cut=is_cut,
        )

    def encode_generation_prompt(
        self, turns: Sequence[Turn], key: str = ""
    ) -> npt.NDArray[np.int64]:
        """Return the ids after which the model is to answer; int64 [length].

        They are the first ids of the training sample that the same turns and any answer make.
        ``max_length`` does not apply: how long a prompt may be is the model's matter.

        Args:
            turns: user and assistant in alternation, user first, user last.
            key: names the conversation in errors.

        Raises:
            RecordError: the turns are not such a conversation, or a text is not valid Unicode.
        """
        _check_turns(turns, key, last_role="user")
        draft = _Draft(self._opening_ids, self._opening_before)
        for index in range(0, len(turns), 2):
            self._add_user(draft, turns, index, key)
            self._add_fixed(draft, self._to_assistant)
            if index + 1 < len(turns):
                self._add_answer(draft, turns, index + 1, key)
        return np.array(draft.ids, dtype=np.int64)

    def decode(self, ids: Ids, before: Before = Before.TEXT) -> str:
        """Return the text of ids that hold no picture, special tokens spelt out.

        Args:
            ids: a stretch of ids; both ends at the boundaries of pieces.
            before: what stands before it. Where the tokenizer puts a dummy prefix space there,
                that space is no character of the text.
        """
        return self._pieces.decode([int(token_id) for token_id in ids], before)

    def what_stands_before(self, input_ids: Ids, position: int) -> Before:
        """Return what stands before ``position`` in a conversation's ids."""
        if position <= self._num_unwritten:
            return Before.NOTHING
        token_id = int(input_ids[position - 1])
        if token_id == self.image_token_id:
            return Before.NOTHING
        return Before.TOKEN if token_id in self._pieces.token_ids.values() else Before.TEXT

    def decode_answer(self, ids: Ids) -> str:
        """Return the answer in generated ids: up to the first stop, without the lead."""
        stops = set(self.stop_token_ids)
        kept = list(itertools.takewhile(lambda token_id: token_id not in stops, map(int, ids)))
        # Without a role string (plain) the answer starts a part.
        at_part = Before.NOTHING if not self._to_assistant else Before.TEXT
        text = self._pieces.decode(kept, self._pieces.fixed(self._to_assistant, at_part)[1])
        for stop in self.stop_strings:
            text = text.split(stop, 1)[0]
        return text.removeprefix(self.template.assistant_lead)

    def round_trip(self, text: str, before: Before = Before.TEXT) -> str:
        """Return ``text`` as the tokenizer writes it: equal, unless its normalizer rewrites it."""
        return self._pieces.round_trip(text, before)

    def _encode_opening(self) -> tuple[list[int], Before]:
        template = self.template
        ids, before = self._pieces.fixed(template.system + template.user_prefix, Before.NOTHING)
        bos = [self._pieces.token_ids[template.bos]] if template.bos else self._pieces.bos_ids
        # Where BOS is also the template's first token (SmolLM2's <|im_start|>) it stays one.
        if bos and ids[: len(bos)] == bos:
            bos = []
        # A BOS that the tokenizer adds is no part of the string: what follows still starts it.
        self._num_unwritten = 0 if template.bos else len(bos)
        return bos + ids, before

    def _add_user(self, draft: _Draft, turns: Sequence[Turn], index: int, key: str) -> None:
        template, turn = self.template, turns[index]
        if index:
            self._add_fixed(draft, self._to_user, self._token_end)
        draft.starts.append(len(draft.ids))
        text = "" if template.drops_user_text else turn.text
        if turn.has_image:
            draft.add(self._typed(template.user_lead, draft.before, index, key), Before.TEXT)
            draft.add(self._image_ids, Before.NOTHING)
            text = template.image_suffix + text if text else ""
        else:
            text = template.user_lead + text
        draft.add(self._typed(text, draft.before, index, key), Before.TEXT)

    def _add_answer(self, draft: _Draft, turns: Sequence[Turn], index: int, key: str) -> None:
        draft.starts.append(len(draft.ids))
        text = self.template.assistant_lead + turns[index].text + self._text_end
        draft.add(self._typed(text, draft.before, index, key), Before.TEXT, learn=True)

    def _add_fixed(self, draft: _Draft, text: str, supervised_token: str = "") -> None:
        ids, before = self._pieces.fixed(text, draft.before)
        if supervised_token:
            draft.add(ids[:1], before, learn=True)
            ids = ids[1:]
        draft.add(ids, before)

    def _typed(self, text: str, before: Before, index: int, key: str) -> list[int]:
        try:
            return self._pieces.typed(text, before)
        except ValueError as error:
            raise RecordError(f"sample {key!r}: text of turn {index + 1}: {error}") from None

    def _too_long(self, turns: Sequence[Turn], length: int, key: str) -> RecordError:
        """Return why the first turns, which need ``length`` ids, cannot be shortened."""
        limit = f"max_length={self.max_length}"
        if len(turns) > 2:
            return RecordError(
                f"sample {key!r}: turns 1 to {len(turns)} need {length} ids and {limit}; raise "
                "max_length, split the conversation, or pass too_long=drop_turns or too_long=cut",
                "too-long",
            )
        user, assistant = turns
        asked = "" if self.template.drops_user_text else user.text
        num_user = len(self._pieces.typed(asked, Before.TEXT))
        num_assistant = len(self._pieces.typed(assistant.text, Before.TEXT))
        num_image = self.image_seq_length if user.has_image else 0
        num_template = length - num_user - num_assistant - num_image
        is_cut = self.too_long == "cut"
        limit += ", which leaves no token of the answer" if is_cut else ""
        remedy = "or leave it out" if is_cut else "leave it out or pass too_long=cut"
        return RecordError(
            f"sample {key!r}: its first question and answer need {length} ids ({num_image} of "
            f"the picture, {num_user} of the question, {num_assistant} of the answer, "
            f"{num_template} of template {self.template.name!r}) and {limit}; raise max_length, "
            f"shorten the record{'' if is_cut else ','} {remedy}",
            "unsupervised" if is_cut else "too-long",
        )


class _Draft:
    """Ids and labels in the making, and what stands before the next piece."""

    def __init__(self, ids: list[int], before: Before) -> None:
        self.ids = list(ids)
        self.labels = [IGNORE_INDEX] * len(ids)
        self.before = before
        self.starts: list[int] = []  # where the text of each turn, or its image, begins

    @property
    def is_supervised(self) -> bool:
        """Whether a position carries loss."""
        return any(label != IGNORE_INDEX for label in self.labels)

    def cut(self, length: int, before: Before = Before.TEXT) -> None:
        """Keep the first ids."""
        del self.ids[length:], self.labels[length:]
        self.before = before

    def add(self, ids: list[int], before: Before, *, learn: bool = False) -> None:
        """Append a piece; an empty one changes nothing."""
        if ids:
            self.ids += ids
            self.labels += ids if learn else [IGNORE_INDEX] * len(ids)
            self.before = before


def _check_turns(turns: Sequence[Turn], key: str, last_role: str) -> None:
    """Raise RecordError unless roles alternate, user first, ``last_role`` last, one picture."""
    roles = [turn.role for turn in turns]
    expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(roles))]
    if not roles or roles != expected or roles[-1] != last_role:
        raise RecordError(
            f"sample {key!r}: the roles are {', '.join(roles) or 'none'}; they must alternate, "
            f"user first and {last_role} last"
        )
    with_image = [i + 1 for i, turn in enumerate(turns) if turn.has_image]
    if len(with_image) > 1:
        raise RecordError(f"sample {key!r}: turns {with_image} each have a picture; one may")
    if with_image and with_image[0] % 2 == 0:
        raise RecordError(
            f"sample {key!r}: the picture stands before turn {with_image[0]}, an assistant's; "
            "it belongs to a user turn"
        )
