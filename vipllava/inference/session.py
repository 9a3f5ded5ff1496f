"""A conversation about one image: turns, and marks that may come at any time.

The image belongs to the first question, with all marks that there are now: as in training a
conversation has one image. A mark that comes later is seen in it from then on; what was said before
stays as it was said.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Unpack

from PIL import Image

from vipllava.files.atomic import new_file, write_json
from vipllava.inference.image_sources import ImageSource, open_image
from vipllava.inference.marked import Marked, draw_marks
from vipllava.types import Turn, VipLlavaError
from vipllava.visual_prompts.mark_fields import mark_to_fields
from vipllava.visual_prompts.marks import Mark, coloured

if TYPE_CHECKING:
    from vipllava.inference.model import Model, Reply, ReplyStream, SamplingOptions

_SAVED_VERSION: Final = 1


class Chat:
    """Several turns with a model; made by :meth:`vipllava.inference.model.Model.chat`.

    Args:
        model: answers.
        image: upright and RGB; None for a conversation without an image.
        marks: the first ones on it.

    Raises:
        MarkError: a mark lies outside of the image or cannot be drawn.
    """

    def __init__(
        self, model: Model, image: Image.Image | None = None, marks: Sequence[Mark] = ()
    ) -> None:
        self._model = model
        self._image = image
        self._marks: tuple[Mark, ...] = coloured(marks)
        self._marked: Marked = draw_marks(image, self._marks)
        self._turns: tuple[Turn, ...] = ()
        self._reply: Reply | None = None
        self._stream: weakref.ref[ReplyStream] | None = None  # one that is dropped is cancelled

    @property
    def image(self) -> Image.Image | None:
        """The image without marks; setting another one begins anew, see :meth:`show`."""
        return self._image

    @image.setter
    def image(self, source: ImageSource | None) -> None:
        self.show(source)

    @property
    def marks(self) -> tuple[Mark, ...]:
        """What is marked, in the order of the numbers that name it."""
        return self._marks

    @property
    def words(self) -> tuple[str, ...]:
        """By which words texts name each mark, e.g. ``within the red rectangle``."""
        return self._marked.words

    @property
    def overlay(self) -> Image.Image | None:
        """What the model sees: the image with its marks."""
        return self._marked.image

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What was said, the words of marks in place of their numbers."""
        return self._turns

    @property
    def reply(self) -> Reply | None:
        """The last reply; None before the first."""
        return self._reply

    def show(self, source: ImageSource | None, *, allow_urls: bool = False) -> None:
        """Begin anew about another image: without marks, without turns.

        Args:
            source: see :func:`vipllava.inference.image_sources.open_image`; None for no image.
            allow_urls: whether it may be an address.

        Raises:
            RecordError: it cannot be read; nothing has changed.
        """
        image = None if source is None else open_image(source, allow_urls=allow_urls)
        self._image, self._marks, self._marked = image, (), draw_marks(image)
        self.reset()

    def add(self, mark: Mark) -> str:
        """Mark something more, and return its words.

        If it names no colour it gets one that no mark of its shape has, and keeps it.

        Raises:
            MarkError: it lies outside of the image, or there are too many; nothing has changed.
            VipLlavaError: there is no image.
        """
        if self._image is None:
            raise VipLlavaError("there is no image to mark: show one first")
        self._put(coloured((*self._marks, mark)))
        return self.words[-1]

    def undo(self) -> None:
        """Take the last mark back.

        Raises:
            VipLlavaError: there is none.
        """
        if not self._marks:
            raise VipLlavaError("there is no mark to take back")
        self._put(self._marks[:-1])

    def clear(self) -> None:
        """Take all marks back."""
        self._put(())

    def reset(self) -> None:
        """Forget what was said; image and marks stay."""
        self._turns, self._reply, self._stream = (), None, None

    def ask(self, question: str, **sampling: Unpack[SamplingOptions]) -> Reply:
        """Ask, and return the reply.

        Args:
            question: ``{0}`` in it stands for the words of the first mark, and so on.
            sampling: see :meth:`vipllava.inference.model.Model.ask`, as what it raises.
        """
        stream = self.stream(question, **sampling)
        with stream:
            for _ in stream:
                pass
        return stream.reply

    def stream(self, question: str, **sampling: Unpack[SamplingOptions]) -> ReplyStream:
        """Ask, and return the pieces of the reply as they come.

        The turn counts as said once the reply has ended; one that is cancelled, or fails, was not.
        For the arguments see :meth:`ask`.

        Raises:
            VipLlavaError: the last reply has not ended, or see :meth:`ask`.
        """
        running = self._stream() if self._stream is not None else None
        if running is not None and not running.has_ended:
            raise VipLlavaError("the last reply has not ended: read its stream, or close it")
        before = self._turns
        turns = (*before, Turn("user", self._marked.said(question)))

        def keep(reply: Reply) -> None:
            if self._turns is before:  # else it began anew meanwhile
                self._turns, self._reply = (*turns, Turn("assistant", reply.text)), reply

        stream = self._model.stream_turns(self._marked, turns, keep, **sampling)
        self._stream = weakref.ref(stream)
        return stream

    def save(self, path: str | Path) -> None:
        """Write the conversation as JSON, and what the model sees beside it, ``-overlay.png``.

        Raises:
            OSError: it cannot be written.
        """
        path = Path(path)
        values: dict[str, Any] = {
            "version": _SAVED_VERSION,
            "image_size": None if self._image is None else list(self._image.size),
            "overlay": None,
            "regions": [mark_to_fields(mark) for mark in self._marks],
            "words": list(self.words),
            "turns": _as_fields(self._turns),
        }
        if self.overlay is not None:
            beside = overlay_beside(path)
            values["overlay"] = beside.name
            with new_file(beside) as unfinished:
                self.overlay.save(unfinished, "PNG")
        write_json(path, values)

    def _put(self, marks: tuple[Mark, ...]) -> None:
        self._marked = draw_marks(self._image, marks)
        self._marks = marks


def overlay_beside(path: Path) -> Path:
    """Return where what the model sees lies, beside a saved conversation."""
    return path.with_name(f"{path.stem}-overlay.png")


def _as_fields(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "text": turn.text} for turn in turns]
