"""Questions of every kind and marks of every shape and place, and how each door is asked them."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from tests.toy_data import encode_picture
from vipllava.inference.marked import mark_request
from vipllava.inference.protocol import Generation, Sampling
from vipllava.records.image_decode import decode_image
from vipllava.types import Turn
from vipllava.visual_prompts.mark_fields import mark_to_fields
from vipllava.visual_prompts.marks import MARKS, Mark

PLACES: Final = ("box", "polygon", "rle", "point", "stroke")
SIZE: Final = (96, 72)  # of the picture as a person sees it; it is stored on its side
_LOOKS: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"colour": "blue"},
    {"colour": (10, 200, 90), "alpha": 255},
    {"width": 4, "alpha": 60},
)


def picture(size: tuple[int, int] = SIZE, seed: int = 0) -> bytes:
    """Return a JPEG file that has to be turned by 90 degrees, of that size once it is."""
    return encode_picture(size[1], size[0], seed=seed, orientation=6)


def mask(size: tuple[int, int]) -> dict[str, Any]:
    """Return an ellipse in COCO's run lengths."""
    rows, columns = np.mgrid[: size[1], : size[0]]
    inside = ((columns / size[0] - 0.4) / 0.3) ** 2 + ((rows / size[1] - 0.5) / 0.35) ** 2 < 1
    flat = np.concatenate([[False], inside.T.ravel(), [False]])  # column by column
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return {"size": [size[1], size[0]], "counts": np.diff([0, *edges, inside.size]).tolist()}


def every_mark(size: tuple[int, int] = SIZE) -> list[Mark]:
    """Return a mark for each shape and each place that it may have, in several looks."""
    width, height = size
    triangle = [(0.2, 0.2), (0.7, 0.3), (0.4, 0.9)]
    places: dict[str, Any] = {
        "box": (0.1 * width, 0.2 * height, 0.6 * width, 0.75 * height),
        "polygon": [(x * width, y * height) for x, y in triangle],
        "rle": mask(size),
        "point": (0.55 * width, 0.45 * height),
        "stroke": [(0.15 * width, 0.8 * height), (0.5 * width, 0.3 * height), (0.8 * width, 60.0)],
    }
    looks = cycle(_LOOKS)
    return [
        kind(**{place: places[place]}, **next(looks))
        for kind in MARKS.values()
        for place in kind.places
    ]


@dataclass(frozen=True)
class Question:
    """A conversation whose last turn asks; texts may say ``{0}``."""

    turns: tuple[Turn, ...]
    sampling: Sampling
    file: bytes | None = None
    marks: tuple[Mark, ...] = ()

    def generation(self, key: str) -> Generation:
        image = None if self.file is None else decode_image(self.file, key)
        asked = mark_request(image, self.turns, self.marks, key=key)
        return Generation(asked.request, self.sampling)

    def body(self) -> dict[str, Any]:
        """Return a chat completion's fields, but the model's name."""
        messages: list[dict[str, Any]] = []
        for number, turn in enumerate(self.turns):
            content: Any = turn.text
            if self.file is not None and number == 0:
                uri = f"data:image/jpeg;base64,{base64.b64encode(self.file).decode()}"
                image = {"type": "image_url", "image_url": {"url": uri}}
                content = [image, {"type": "text", "text": turn.text}]
            messages.append({"role": turn.role, "content": content})
        body: dict[str, Any] = {
            "messages": messages,
            "max_tokens": self.sampling.max_new_tokens,
            "temperature": 0,
        }
        if self.sampling.stop:
            body["stop"] = list(self.sampling.stop)
        return body

    @property
    def regions(self) -> list[dict[str, Any]]:
        """The field of a server."""
        return [mark_to_fields(mark) for mark in self.marks]


def mixed_questions(count: int = 50) -> list[Question]:
    """Return questions with and without pictures, marks, earlier turns and stop texts."""
    marks = cycle(every_mark())
    found: list[Question] = []
    for n in range(count):
        sampling = Sampling(
            max_new_tokens=(1, 3, 8, 20)[n % 4], stop=("e", "SS") if n % 7 == 6 else ()
        )
        text = "Look at it. " * (n % 3)
        if n % 5 == 4:
            found.append(Question((Turn("user", f"{text}How many are {n}?"),), sampling))
            continue
        mine = tuple(replace(next(marks), colour=("red", "lime")[m]) for m in range(n % 3))
        mentions = " and ".join(f"{{{m}}}" for m in range(len(mine))) or "there"
        turns = [Turn("user", f"{text}What is {mentions}?", has_image=True)]
        if n % 6 == 5:
            turns += [Turn("assistant", "A cup."), Turn("user", "Is it?")]
        found.append(Question(tuple(turns), sampling, picture(seed=n % 9), mine))
    return found


def orders(count: int) -> Iterator[list[int]]:
    """Yield three orders of so many questions."""
    yield list(range(count))
    yield list(reversed(range(count)))
    yield random.Random(0).sample(range(count), count)


def read_png(data: bytes) -> Image.Image:
    """Return the pixels of a PNG file."""
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        return image.copy()


def read_uri(uri: str) -> Image.Image:
    """Return the pixels of a PNG's data URI."""
    return read_png(base64.b64decode(uri.removeprefix("data:image/png;base64,"), validate=True))


def options_of_marks(marks: Sequence[Mark], folder: Path) -> list[str]:
    """Return the options of ``vipllava chat`` for marks; masks become files of a folder."""
    options: list[str] = []
    for count, mark in enumerate(marks):
        (place,) = (name for name in PLACES if getattr(mark, name) is not None)
        value: Any = getattr(mark, place)
        if place == "rle":
            path = folder / f"mask{count}.json"
            path.write_text(json.dumps(mark_to_fields(mark)["rle"]))
            text = str(path)
        elif place == "polygon":
            text = ";".join(
                _numbers(number for point in ring for number in point) for ring in value
            )
        elif place == "stroke":
            text = _numbers(number for point in value for number in point)
        else:
            text = _numbers(value)
        options += [f"--{place}", text, "--shape", mark.shape.replace(" ", "-")]
        if mark.colour is not None:
            named = isinstance(mark.colour, str)
            options += ["--colour", str(mark.colour) if named else _numbers(mark.colour)]
        for name in ("width", "alpha"):
            if (value := getattr(mark, name)) is not None:
                options += [f"--{name}", str(value)]
    return options


def _numbers(values: Iterable[Any]) -> str:
    return ",".join(map(str, values))
