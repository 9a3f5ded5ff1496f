"""The records that travel between the rooms of this package, and its errors.

The way of a sample: a shard's record becomes a :class:`Sample`; its regions a
:class:`VisualPromptPlan`, which renderer and text both read; the finished :class:`Turn` texts
:class:`Encoded` ids and labels; several of those a :class:`Batch`. Imports no other room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, get_args

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from PIL import Image

IGNORE_INDEX = -100
"""Label of a position that carries no loss (PyTorch's ``cross_entropy`` convention)."""
PADDING_SEGMENT = -1
"""Segment id of padding positions in a :class:`Batch`."""

Role = Literal["user", "assistant"]
_ROLES = get_args(Role)
Shape = Literal[
    "rectangle", "ellipse", "point", "triangle", "mask", "mask contour", "arrow", "scribble"
]
RGB = tuple[int, int, int]
Point = tuple[float, float]
BBox = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels of the stored image."""
Polygon = tuple[Point, ...]
"""The vertices of one ring, in pixels of the stored image."""


class VipLlavaError(Exception):
    """Base of the errors a user can act on: the thing, its value and the remedy."""

    exit_code = 2  # of a command that ends with it

    def at(self, where: object) -> Self:
        """Return the same error with a place in front of its message."""
        placed = type(self)(f"{where}: {self}")
        placed.__dict__.update(self.__dict__)
        return placed


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; libraries add internals below it."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


class ConfigError(VipLlavaError):
    """The composed configuration cannot run; the message lists every problem."""


LONGEST_MESSAGE = 1000
"""Letters of a message about a record, which may quote a field that holds megabytes."""


class RecordError(VipLlavaError):
    """A record, image or annotation breaks its schema; the message names key and place."""

    def __init__(self, message: str, fault: str = "record-invalid") -> None:
        if len(message) > LONGEST_MESSAGE:  # the remedy is at its end
            half = LONGEST_MESSAGE // 2
            message = f"{message[:half]} [...] {message[-half:]}"
        super().__init__(message)
        self.fault = fault  # its class, e.g. ``box-empty``; :mod:`vipllava.ingest.lint` lists them


class StorageError(VipLlavaError):
    """What holds the data does not answer, or cannot be read: never a fault of a sample.

    It is tried again for a stated time and then ends the job, under any policy for bad samples.
    """


class CheckpointError(VipLlavaError):
    """A checkpoint or model folder is missing, broken, or belongs to another model."""


class Interrupted(VipLlavaError):
    """A run was asked to stop, has saved its state, and goes on with the same command.

    The exit code is 130 if a person asked for it, so that nothing puts the job back in the queue.
    """

    exit_code = 75  # ``EX_TEMPFAIL``: what a batch script asks for to put the job back in the queue

    def __init__(self, message: str, exit_code: int = 75) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How pixels become what a vision tower reads: resized, divided by 255, normalised."""

    mean: tuple[float, float, float]  # of red, green and blue, 0..1
    std: tuple[float, float, float]  # of red, green and blue, 0..1
    resampling: Literal["bicubic", "bilinear"] = "bicubic"  # filter of the resizing

    @property
    def pad_colour(self) -> RGB:
        """The mean in 8 bits, rounded down: what images are padded to a square with."""
        red, green, blue = (int(255 * value) for value in self.mean)
        return red, green, blue


class RunLengths(NamedTuple):
    """A mask as COCO stores it; :func:`vipllava.visual_prompts.rle.check_rle` makes them."""

    size: tuple[int, int]  # height and width of the stored image, pixels: in COCO's order
    counts: str  # the lengths, packed into letters


@dataclass(frozen=True, slots=True)
class Region:
    """One region of a picture that a mark may point at."""

    bbox_xyxy: BBox  # bounding box, pixels of the stored image
    polygons: tuple[Polygon, ...] = ()  # the mask as rings; empty when only the box is known
    # Index of an earlier region whose mark style this one repeats (all boxes of one Flickr30k
    # phrase look alike), or None for a style of its own.
    style_of: int | None = None
    # The mask as run lengths, in place of rings: exact, with its holes. Unpacked where it is drawn.
    rle: RunLengths | None = None

    def __post_init__(self) -> None:
        """Refuse what is no box or no mask; whether it lies in the picture is known later."""
        box: Any = self.bbox_xyxy
        rings: Any = self.polygons
        try:
            points: list[Any] = [point for ring in rings for point in ring]
            numbers: list[Any] = [*box, *(number for point in points for number in point)]
            fine = len(box) == 4 and all(len(point) == 2 for point in points)
            fine = fine and all(map(math.isfinite, numbers))
        except TypeError:
            fine = False
        if not fine:
            raise VipLlavaError(
                f"region {box}, polygons {rings}: expected four finite numbers x1, y1, x2, "
                "y2, and polygons as rings of finite points (x, y)"
            )
        rle: Any = self.rle
        if rle is not None and (rings or not isinstance(rle, RunLengths)):
            raise VipLlavaError(
                f"region {box}: a mask is given as polygons, or as RunLengths from check_rle; "
                f"got {len(rings)} polygons and {type(rle).__name__}"
            )


@dataclass(frozen=True, slots=True)
class Stroke:
    """One drawing primitive, fully determined: the renderer draws no random numbers."""

    # ``line`` (open polyline), ``polygon`` (closed), ``contour`` (closed, drawn with a square
    # brush), ``box`` or ``ellipse`` (``points`` are the top-left and bottom-right corners of the
    # bounds).
    kind: Literal["line", "polygon", "contour", "box", "ellipse"]
    points: tuple[Point, ...]  # pixels of the stored image
    width: int = 0  # of the line, or side of the brush, in pixels; 0 fills the primitive


@dataclass(frozen=True, slots=True)
class VisualPrompt:
    """One mark: what is drawn, and by which words the text names it."""

    region: int  # index into ``Sample.regions``
    shape: Shape
    rgb: RGB
    colour_name: str | None  # the palette's for ``rgb``, or None when the text must not name it
    alpha: int  # opacity, 0..255
    strokes: tuple[Stroke, ...]  # the primitives, painted in order as one layer


@dataclass(frozen=True, slots=True)
class VisualPromptPlan:
    """Every mark of one sample, sampled once and read by renderer and text alike."""

    size: tuple[int, int]  # width and height of the stored image, pixels
    prompts: tuple[VisualPrompt, ...] = ()  # the marks in drawing order; at most one per region
    article_rate: float = 1.0  # how often a mention says "the" before colour and shape


@dataclass(frozen=True, slots=True)
class FixedVisualPrompt:
    """What a user fixes about the mark of one region; None leaves it to sampling."""

    shape: Shape | None = None
    colour: str | RGB | None = None
    width: int | None = None
    alpha: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn; names of shapes and colours are looked up later."""
        colour: Any = self.colour
        rgb: Any = (0, 0, 0) if colour is None or isinstance(colour, str) else colour
        try:
            fine = len(rgb) == 3 and all(type(each) is int and 0 <= each <= 255 for each in rgb)
        except TypeError:
            fine = False
        if not fine:
            raise VipLlavaError(f"colour is {colour!r}; give a palette name or [r, g, b] of 0..255")
        for name, most, expected in (("width", math.inf, "of 1 or more"), ("alpha", 255, "1..255")):
            value: Any = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= most):
                raise VipLlavaError(f"{name} is {value!r}; give a whole number {expected}")


@dataclass(frozen=True, slots=True)
class Mention:
    """A place in a text that names the mark of a region, e.g. ``within the red rectangle``."""

    region: int


@dataclass(frozen=True, slots=True)
class DraftTurn:
    """One turn before its mentions are replaced by words."""

    role: Role  # who speaks
    parts: tuple[str | Mention, ...]  # texts and mentions, concatenated without separators
    has_image: bool = False  # whether the picture stands in front of this turn


@dataclass(frozen=True, slots=True)
class Turn:
    """One finished turn of a conversation; ``text`` never contains an image placeholder."""

    role: Role
    text: str
    has_image: bool = False

    def __post_init__(self) -> None:
        """Refuse who nobody is: LLaVA's files say ``human`` and ``gpt``."""
        text: Any = self.text
        if self.role not in _ROLES or not isinstance(text, str):
            raise VipLlavaError(
                f"turn ({self.role!r}, {self.text!r}): expected a role of {', '.join(_ROLES)} "
                "(in LLaVA's files human and gpt), and a text"
            )


@dataclass(frozen=True)
class Request:
    """One question for :class:`vipllava.inference.engine.Engine`."""

    image: Image.Image | None  # marks already drawn on it, or None for a text-only question
    # The conversation so far, the user's turn last; one has the image if and only if there is one.
    turns: Sequence[Turn]
    key: str = ""  # names the question in errors
    # Further images, shown behind it, e.g. crops; for models that take several.
    more_images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """In place of an answer or verdict: what came is none. Never a text, and never a zero."""

    reason: str  # one line, for people


@dataclass(frozen=True, slots=True)
class Sample:
    """One record, parsed and checked, still without marks or ids."""

    key: str  # the record's key in its shard; unique within the data set
    dataset: str  # the manifest's name; part of the random key
    image: bytes | None  # the encoded picture (JPEG, PNG, WebP), or None for a text-only record
    regions: tuple[Region, ...]  # the regions of the picture that the conversation mentions
    turns: tuple[DraftTurn, ...]  # the conversation, with mentions
    policy: str  # name of the visual-prompt policy that samples the marks
    fixed: tuple[FixedVisualPrompt, ...] = ()  # what the user fixed, one per region, or empty
    # Whether the picture is turned as its EXIF block says; regions are in these pixels.
    upright: bool = True
    record_id: str | int | None = None  # the ``id`` of the list that it comes from, if it has one


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids and labels of one conversation, born together."""

    input_ids: npt.NDArray[np.int64]  # int64 [length], image placeholders already expanded
    # int64 [length]; equal to ``input_ids`` where supervised, else ``IGNORE_INDEX``.
    labels: npt.NDArray[np.int64]
    num_images: int  # pictures in this conversation (0 or 1)
    num_dropped_turns: int = 0  # trailing turns of which the length limit left nothing
    is_cut: bool = False  # cut off at the limit, so that the last turn left may be a part of one

    @property
    def length(self) -> int:
        """Number of ids."""
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        """Number of positions that carry loss."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def is_truncated(self) -> bool:
        """Whether the conversation did not fit into the length limit."""
        return self.is_cut or self.num_dropped_turns > 0


@dataclass(slots=True)
class Batch:
    """One micro-batch: rows of one padded sample or several packed ones.

    There is no attention mask: ``position_ids`` restart at 0 with every segment (padding is a
    segment of its own), which is what transformers reads to keep packed samples apart.
    """

    input_ids: torch.Tensor  # int64 [rows, length], as the next three
    labels: torch.Tensor
    position_ids: torch.Tensor
    segment_ids: torch.Tensor  # ``PADDING_SEGMENT`` on padding
    pixel_values: torch.Tensor  # uint8 [num_images, 3, height, width]; normalised on the device
    # Supervised tokens of the whole global batch (all ranks and all accumulation steps): the
    # loss's denominator.
    num_supervised_global: int = 0
    # Share of the epoch's samples consumed when this step is done, 0..1; None where the number of
    # steps is known and says the same.
    progress: float | None = None
    keys: tuple[str, ...] = ()  # ``dataset/key`` of the samples in row order
    datasets: tuple[str, ...] = ()  # names of their data sets
    # How many of them, the last ones, only fill up an epoch's last global batch: samples that
    # another place of it has, without labels.
    num_repeats: int = 0

    @property
    def counted_keys(self) -> tuple[str, ...]:
        """Keys of the samples without the repeats."""
        return self.keys[: len(self.keys) - self.num_repeats]

    @property
    def num_supervised(self) -> int:
        """Positions of this micro-batch that carry loss."""
        return int((self.labels != IGNORE_INDEX).sum())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        for name in ("input_ids", "labels", "position_ids", "segment_ids", "pixel_values"):
            setattr(self, name, change(getattr(self, name)))
        return self

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Move every tensor to ``device`` in place and return the batch itself."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Pin every tensor (called by ``DataLoader(pin_memory=True)``)."""
        return self._each(lambda tensor: tensor.pin_memory())
