"""One conversation in a terminal: the chat itself, its sampling, and where its overlay lies."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from PIL import Image

from vipllava.inference.protocol import Sampling
from vipllava.inference.session import overlay_beside
from vipllava.serve.terminal.output import Output
from vipllava.types import VipLlavaError

if TYPE_CHECKING:
    from vipllava.inference.model import Reply, SamplingOptions
    from vipllava.inference.session import Chat

MENTION: Final = re.compile(r"\{\d{1,6}\}")


@dataclass
class Talk:
    """What questions and commands work on.

    Attributes:
        chat: image, marks and turns.
        out: where answers go.
        sampling: of the next answers.
        open_image: opens what ``/image`` names.
        save_path: where the conversation is written to when it ends, if anywhere.
    """

    chat: Chat
    out: Output
    sampling: Sampling
    open_image: Callable[[str], Image.Image]
    save_path: Path | None = None
    has_ended: bool = False
    hinted: bool = False
    _folder: Path | None = field(default=None, repr=False)

    @property
    def options(self) -> SamplingOptions:
        """The sampling as keywords of a question."""
        given = {each.name: getattr(self.sampling, each.name) for each in fields(self.sampling)}
        return cast("SamplingOptions", given)

    @property
    def overlay_path(self) -> Path:
        """Where the overlay lies: beside the saved conversation, else in a temporary folder."""
        if self.save_path is not None:
            return overlay_beside(self.save_path)
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="vipllava-chat-"))
        return self._folder / "overlay.png"

    def write_overlay(self) -> Path | None:
        """Write what the model sees; None where it sees nothing.

        Raises:
            VipLlavaError: it cannot be written.
        """
        overlay = self.chat.overlay
        if overlay is None:
            return None
        path = self.overlay_path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            overlay.save(path, "PNG")
        except OSError as error:
            raise VipLlavaError(f"{path}: cannot be written: {error.strerror}") from error
        return path

    def show(self) -> None:
        """Draw what the model sees, and say where it lies."""
        overlay, path = self.chat.overlay, self.write_overlay()
        if overlay is None or path is None:
            self.out.hint("no image: /image PATH opens one")
            return
        self.out.picture(overlay, path)

    def ask(self, question: str) -> Reply:
        """Ask, and write the answer as it comes; return it whole.

        Raises:
            VipLlavaError: see :meth:`vipllava.inference.model.Model.ask`.
        """
        names_marks = MENTION.search(question) is not None
        if self.chat.marks and not (self.hinted or names_marks):
            words = self.chat.words[0]
            self.out.hint(f"name a mark in the question by its number: {{0}} is `{words}`")
        self.hinted = self.hinted or names_marks or bool(self.chat.marks)
        pieces = self.chat.stream(question, **self.options)
        try:
            with pieces:
                for piece in pieces:
                    self.out.piece(piece)
            if not pieces.reply.text:
                self.out.piece("\n")  # an answer is a line at least
        finally:
            self.out.end_line()
        return pieces.reply

    def begin_anew(self, begin: Callable[[], None]) -> None:
        """Begin another conversation; one that is to be saved is written before it is forgotten.

        Args:
            begin: forgets it.

        Raises:
            VipLlavaError: it cannot be written, and goes on; or what ``begin`` raises.
        """
        path = self.save_path if self.chat.turns else None
        if path is not None:
            self.save(path)
        begin()
        if path is not None:
            self.save_path = None
            self.out.hint(f"{path} has the conversation up to here: /save PATH writes the new one")

    def end(self) -> None:
        """Write the conversation where that was asked for; an empty one replaces no file.

        Raises:
            VipLlavaError: see :meth:`save`.
        """
        path = self.save_path
        if path is None:
            return
        if self.chat.turns or not path.exists():
            self.save(path)
        else:
            self.out.hint(f"{path} stays as it was: nothing was said")

    def save(self, path: Path) -> None:
        """Write the conversation as it is now, as JSON, and what the model sees beside it.

        Raises:
            VipLlavaError: it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.chat.save(path)
        except OSError as error:
            raise VipLlavaError(f"{path}: cannot be written: {error.strerror}") from error
        beside = "" if self.chat.image is None else f" and {overlay_beside(path)}"
        self.out.hint(f"saved: {path}{beside}")
