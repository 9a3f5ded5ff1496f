"""Ids of one piece of a conversation, told apart by who wrote it and what stands before it.

A fast tokenizer does three things with a string that a conversation must control:

* It looks for its added tokens (``</s>``, ``<|eot_id|>``, ``<image>``) wherever they occur. Right
  in the template's own strings, wrong in what a person typed.
* It may put a space in front of a string (Llama's dummy prefix, as a normalizer or in Metaspace).
  Right at the start of a part, wrong behind a forced boundary. What happens behind an added token
  differs between tokenizers, so it is tried out, not assumed. Metaspace spares the prefix where a
  space stands already; sentencepiece, with which checkpoints were trained, does not: nor do we.
* It merges characters across any boundary that is only text.

So text goes through two bare copies of the tokenizer that know no added tokens: one adds the
dummy prefix, one does not. They share the vocabulary with the original and cost nothing. Special
tokens are looked up by the original, in strings of the template only.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any, Protocol, cast

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace

from vipllava.conversation.templates import ChatTemplate
from vipllava.types import ConfigError


class FastTokenizer(Protocol):
    """What is needed of a transformers tokenizer (any that the tokenizers library backs)."""

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The tokenizer of the tokenizers library."""
        ...


class Before(Enum):
    """What stands in front of a piece."""

    NOTHING = auto()
    """The piece starts a part: the conversation, or what follows the picture."""
    TOKEN = auto()
    """A special token."""
    TEXT = auto()
    """Text: the piece starts at a forced boundary."""


class PieceTokenizer:
    """Turns single pieces into ids, with nothing added and nothing merged across their ends.

    Args:
        tokenizer: a transformers tokenizer backed by the tokenizers library. It is never changed.
        template: its special tokens must each be one token of the tokenizer.
        image_token_id: id of the image placeholder.

    Raises:
        ConfigError: the tokenizer is a slow one, lacks a special token of the template, could
            produce a special token from typed text, or adds a prefix in an unknown way.
    """

    def __init__(
        self, tokenizer: FastTokenizer, template: ChatTemplate, image_token_id: int
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ConfigError(
                f"tokenizer {type(tokenizer).__name__} is not backed by the tokenizers library: "
                "load the fast tokenizer (AutoTokenizer.from_pretrained, a folder with "
                "tokenizer.json)"
            )
        self._backend = backend
        self._template = template
        self._added = frozenset(backend.get_added_tokens_decoder())
        self._at_start = _bare_copy(backend, keep_prefix=True)
        metaspace: Any = backend.pre_tokenizer
        self._spares_prefix = isinstance(metaspace, Metaspace) and (
            metaspace.prepend_scheme != "never"
        )
        self._inside = _bare_copy(backend, keep_prefix=False)
        self.token_ids = {token: self._special_id(token) for token in template.special_tokens}
        self._behind_token = self._inside  # until it is found out below
        self._check_typed_text(image_token_id)
        self._check_inside()
        self.bos_ids = self._find_bos_ids()
        self._behind_token = self._find_behind_token()
        self._fixed: dict[tuple[str, Before], tuple[list[int], Before]] = {}

    def typed(self, text: str, before: Before) -> list[int]:
        """Return the ids of text that somebody typed: no special token can come of it.

        Raises:
            ValueError: the text is not valid Unicode (it holds half of a surrogate pair).
        """
        if not text:
            return []
        if self._spares_prefix and before is Before.NOTHING and text[0] in " \u2581":
            text = f" {text}"
        try:
            return self._bare(before).encode(text, add_special_tokens=False).ids
        except TypeError:
            wrong = "it holds half of a surrogate pair, which no tokenizer reads"
            raise ValueError(wrong) from None

    def fixed(self, text: str, before: Before) -> tuple[list[int], Before]:
        """Return the ids of one of the template's own strings, and what then stands before.

        Its special tokens become tokens, with the tokenizer's own treatment of the white space
        around them (Phi-3's swallow the newline that follows). The answer is remembered; do not
        change the list.
        """
        if (text, before) not in self._fixed:
            self._fixed[text, before] = self._encode_fixed(text, before)
        return self._fixed[text, before]

    def _encode_fixed(self, text: str, before: Before) -> tuple[list[int], Before]:
        pieces = self._template.split_special_tokens(text)
        head = pieces[0] if pieces and pieces[0] not in self.token_ids else ""
        ids = self.typed(head, before)
        if tail := text[len(head) :]:
            with _undisturbed(self._backend):
                ids = ids + self._backend.encode(tail, add_special_tokens=False).ids
        if not ids:
            return ids, before
        return ids, Before.TOKEN if ids[-1] in self.token_ids.values() else Before.TEXT

    def optional_token_id(self, token: str) -> int | None:
        """Return the id of a special token, or None where the tokenizer has none of this name."""
        token_id = self._backend.token_to_id(token)
        return token_id if token_id in self._added else None

    def decode(self, ids: Sequence[int], before: Before = Before.TEXT) -> str:
        """Return the text of ``ids``, special tokens spelt out.

        Where the tokenizer puts a dummy prefix (at the start of a part, with some also behind a
        special token) it is taken off; elsewhere a leading space is kept.
        """
        anchor = self.typed("a", Before.TEXT) if self._bare(before) is self._inside else []
        text = self._backend.decode([*anchor, *ids], skip_special_tokens=False)
        return text[len(self._backend.decode(anchor, skip_special_tokens=False)) :]

    def round_trip(self, text: str, before: Before = Before.TEXT) -> str:
        """Return what the tokenizer makes of ``text``: itself, unless a normalizer rewrites it."""
        return self.decode(self.typed(text, before), before)

    def _special_id(self, token: str) -> int:
        token_id = self.optional_token_id(token)
        if token_id is None:
            added = self._backend.get_added_tokens_decoder().values()
            known = ", ".join(sorted(token.content for token in added))
            raise ConfigError(
                f"chat template {self._template.name!r} needs the special token {token!r}, which "
                f"this tokenizer lacks (it has: {known or 'none'}): choose the template that the "
                "language model was trained with"
            )
        return token_id

    def _check_typed_text(self, image_token_id: int) -> None:
        token = self._backend.id_to_token(image_token_id)
        if token is not None and image_token_id not in self._added:
            raise ConfigError(
                f"image_token_id={image_token_id} is the ordinary token {token!r} of this "
                "tokenizer: use the id of an added token, or one past the vocabulary"
            )
        # A tokenizer without byte fallback writes what it does not know as its unknown token.
        unknown = getattr(self._backend.model, "unk_token", None)
        for token_id, added in self._backend.get_added_tokens_decoder().items():
            is_mark = added.special or token_id in (image_token_id, *self.token_ids.values())
            if not is_mark or added.content == unknown:
                continue
            for before in (Before.NOTHING, Before.TEXT):
                if token_id in self._bare(before).encode(added.content).ids:
                    raise ConfigError(
                        f"typed text {added.content!r} becomes the special token {token_id} in "
                        "this tokenizer even as plain text: its model holds that token as a "
                        "word; use a tokenizer that keeps it out of its merges"
                    )

    def _check_inside(self) -> None:
        anchor = self.typed("a", Before.TEXT)
        twice = self._backend.decode([*anchor, *anchor], skip_special_tokens=False)
        once = self._backend.decode(anchor, skip_special_tokens=False)
        if twice != once + once or not once:
            raise ConfigError(
                f"this tokenizer writes 'aa', encoded in two pieces, as {twice!r}: it adds "
                "something to the start of every text in a way that is not known here"
            )

    def _find_bos_ids(self) -> list[int]:
        """Return what the tokenizer puts in front of a text: its BOS token, or nothing."""
        with _undisturbed(self._backend):
            added = self._backend.encode("a", add_special_tokens=True).ids
            alone = self._backend.encode("a", add_special_tokens=False).ids
        starts = range(len(added) - len(alone) + 1)
        start = next((i for i in starts if added[i : i + len(alone)] == alone), 0)
        return added[:start]

    def _find_behind_token(self) -> Tokenizer:
        """Return the copy that encodes text as the tokenizer does behind a special token."""
        if not self.token_ids:
            return self._inside
        token, token_id = next(iter(self.token_ids.items()))
        with _undisturbed(self._backend):
            ids = self._backend.encode(f"{token}a", add_special_tokens=False).ids
        if ids == [token_id, *self.typed("a", Before.NOTHING)]:
            return self._at_start
        return self._inside

    def _bare(self, before: Before) -> Tokenizer:
        if before is Before.TEXT:
            return self._inside
        return self._at_start if before is Before.NOTHING else self._behind_token


@contextmanager
def _undisturbed(tokenizer: Tokenizer) -> Generator[None]:
    """Switch off what earlier callers left on in a tokenizer (truncation, padding, splitting)."""
    backend = cast("Any", tokenizer)  # its type stubs leave these members half unknown
    truncation, padding = backend.truncation, backend.padding
    split = backend.encode_special_tokens
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    try:
        yield
    finally:
        backend.encode_special_tokens = split
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def _bare_copy(backend: Tokenizer, *, keep_prefix: bool) -> Tokenizer:
    """Return a copy without added tokens and post-processor that shares the model."""
    shell = Tokenizer(BPE())
    shell.normalizer = backend.normalizer
    shell.pre_tokenizer = backend.pre_tokenizer
    if not keep_prefix:
        # An edited JSON rather than edited objects: the objects are the tokenizer's own.
        state = cast("dict[str, Any]", json.loads(shell.to_str()))
        for part in ("normalizer", "pre_tokenizer"):
            state[part] = _without_prefix(state[part])
        shell = Tokenizer.from_str(json.dumps(state))
    shell.model = backend.model
    return shell


def _without_prefix(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the JSON of a normalizer or pre-tokenizer that adds nothing before a text."""
    if state is None or state["type"] == "Prepend":
        return None
    edited = dict(state)
    if state["type"] == "Metaspace":
        edited["prepend_scheme"] = "never"
    elif state["type"] == "ByteLevel":
        edited["add_prefix_space"] = False
    elif state["type"] == "Sequence":
        steps = "normalizers" if "normalizers" in state else "pretokenizers"
        kept = [_without_prefix(step) for step in state[steps]]
        edited[steps] = [step for step in kept if step is not None]
    return edited
