"""The pictures that people opened, in memory: their files as they came, nothing on the disk.

A picture has a name that nobody can guess; who knows it may look at it and ask about it. What was
used least recently makes room, so a page left open for a week may have to open its picture again.
Files are decoded when they are looked at; a few stay decoded.
"""

from __future__ import annotations

import hashlib
import io
import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, TypeVar

from PIL import Image

from vipllava.records.image_decode import decode_image, image_size, not_of_a_record
from vipllava.serve.page.work import PictureWork
from vipllava.serve.pictures import as_png
from vipllava.types import RecordError, VipLlavaError, VisualPromptPlan
from vipllava.visual_prompts.render import render_plan

_LONGEST_SHOWN: Final = 2560
"""Pixels of the longer side of what a browser shows; marks are in pixels of the picture itself."""
_SMALL: Final = 512 * 512
"""So many pixels and fewer are shown without loss."""
_PIXEL: Final = 4
"""Bytes in which Pillow holds three colours."""
_THUMBNAIL: Final = 160

Kept = TypeVar("Kept")


@dataclass(frozen=True, slots=True)
class PictureLimits:
    """What may be opened, and how much is kept."""

    most_bytes: int = 20 * 2**20  # of one file
    most_pixels: int = 50_000_000  # of one picture
    kept_bytes: int = 512 * 2**20  # of all files
    decoded_bytes: int = 400 * 2**20  # of pictures that stay decoded, four bytes a pixel
    kept_drawn: int = 2000  # plans of drawn pictures
    kept_points: int = 2_000_000  # of all plans, some 100 bytes each


@dataclass(frozen=True, eq=False, slots=True)
class Picture:
    """An opened picture, whose file the store has for as long as there is room."""

    name: str  # unguessable
    size: tuple[int, int]  # width and height of the upright picture, pixels
    sha256: str  # of the file's bytes

    @property
    def num_bytes(self) -> int:
        """What it takes when it is decoded."""
        return self.size[0] * self.size[1] * _PIXEL


@dataclass(frozen=True, slots=True)
class Drawn:
    """A picture with marks; drawn when somebody looks at it."""

    picture: Picture
    plan: VisualPromptPlan
    num_points: int


class PictureGone(VipLlavaError):
    """A picture is no longer kept."""


class PictureStore:
    """Opened pictures and what is drawn on them; safe to use from several threads."""

    def __init__(
        self, limits: PictureLimits | None = None, work: PictureWork | None = None
    ) -> None:
        self.limits, self.work = limits or PictureLimits(), work or PictureWork()
        self._lock = threading.Lock()
        self._files: OrderedDict[str, tuple[Picture, bytes]] = OrderedDict()
        self._decoded: OrderedDict[str, Image.Image] = OrderedDict()
        self._drawn: OrderedDict[str, Drawn] = OrderedDict()
        self._num_bytes = self._num_points = 0

    def open(self, data: bytes) -> Picture:
        """Decode a file and keep the picture.

        Raises:
            RecordError: no picture, or too large.
        """
        limits = self.limits
        if len(data) > limits.most_bytes:
            raise RecordError(
                f"the file has {len(data)} bytes; this page takes at most {limits.most_bytes}",
                "image-too-large",
            )
        with not_of_a_record():
            width, height = image_size(data, key="the picture")
        if width * height > limits.most_pixels:
            raise RecordError(
                f"the picture has {width} x {height} pixels; this page takes at most "
                f"{limits.most_pixels // 10**6} megapixels",
                "image-too-large",
            )
        with not_of_a_record():
            image = decode_image(data, "the picture")
        return self._keep(image, data, hashlib.sha256(data).hexdigest())

    def keep(self, image: Image.Image, sha256: str) -> Picture:
        """Keep an upright RGB picture whose file is not at hand."""
        return self._keep(image, as_png(image), sha256)

    def _keep(self, image: Image.Image, data: bytes, sha256: str) -> Picture:
        picture = Picture(secrets.token_urlsafe(18), image.size, sha256)
        with self._lock:
            self._files[picture.name] = picture, data
            self._num_bytes += len(data)
            while self._num_bytes > self.limits.kept_bytes and len(self._files) > 1:
                _, (old, dropped) = self._files.popitem(last=False)
                self._num_bytes -= len(dropped)
                self._decoded.pop(old.name, None)
                for name in [n for n, drawn in self._drawn.items() if drawn.picture is old]:
                    self._num_points -= self._drawn.pop(name).num_points
        self._keep_decoded(picture, image)
        return picture

    def _keep_decoded(self, picture: Picture, image: Image.Image) -> None:
        with self._lock:
            self._decoded[picture.name] = image
            sizes = [each.width * each.height * _PIXEL for each in self._decoded.values()]
            num_bytes = sum(sizes)
            for size in sizes[:-1]:
                if num_bytes > self.limits.decoded_bytes:
                    self._decoded.popitem(last=False)
                    num_bytes -= size

    def picture(self, name: str) -> Picture:
        """Return a picture by its name.

        Raises:
            PictureGone: it is not, or no longer, here.
        """
        return self._get(self._files, name)[0]

    def image(self, picture: Picture) -> Image.Image:
        """Return the upright RGB pixels, to be left unchanged.

        Raises:
            PictureGone: it is no longer here.
        """
        _, data = self._get(self._files, picture.name)
        with self._lock:
            if (found := self._decoded.get(picture.name)) is not None:
                self._decoded.move_to_end(picture.name)
                return found
        image = decode_image(data, "the picture")
        self._keep_decoded(picture, image)
        return image

    def shown(self, picture: Picture) -> tuple[bytes, str]:
        """Return what a browser shows of it, and its type: perhaps smaller, never turned.

        Raises:
            PictureGone: it is no longer here.
        """
        image = self.image(picture)
        if image.width * image.height <= _SMALL:
            return as_png(image), "image/png"
        if max(image.size) > _LONGEST_SHOWN:
            image = image.copy()
            image.thumbnail((_LONGEST_SHOWN, _LONGEST_SHOWN), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        return buffer.getvalue(), "image/jpeg"

    def keep_drawn(self, picture: Picture, plan: VisualPromptPlan) -> str:
        """Keep a picture with marks; returns its name, the same for the same marks."""
        name = hashlib.sha256(f"{picture.name}\n{plan!r}".encode()).hexdigest()[:40]
        num_points = sum(len(s.points) for prompt in plan.prompts for s in prompt.strokes)
        with self._lock:
            if name not in self._drawn:
                self._num_points += num_points
            self._drawn[name] = Drawn(picture, plan, num_points)
            self._drawn.move_to_end(name)
            while len(self._drawn) > 1 and (
                len(self._drawn) > self.limits.kept_drawn
                or self._num_points > self.limits.kept_points
            ):
                self._num_points -= self._drawn.popitem(last=False)[1].num_points
        return name

    def draw(self, name: str) -> Image.Image:
        """Return a picture with marks by its name: the pixels that a model is shown.

        Raises:
            PictureGone: it is not, or no longer, here.
        """
        drawn = self._get(self._drawn, name)
        return render_plan(self.image(drawn.picture), drawn.plan)

    def drawn_png(self, name: str) -> bytes:
        """Return :meth:`draw` without loss."""
        return as_png(self.draw(name))

    def _get(self, kept: OrderedDict[str, Kept], name: str) -> Kept:
        with self._lock:
            if name not in kept:
                raise PictureGone("the picture is no longer here: open it again")
            kept.move_to_end(name)
            return kept[name]


def small_jpeg(image: Image.Image) -> bytes:
    """Return a thumbnail."""
    small = image.copy()
    small.thumbnail((2 * _THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
