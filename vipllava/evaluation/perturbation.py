"""The same change of all marks and images, to see how far a score depends on it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from PIL import Image

from vipllava.keyed_random import generator_for
from vipllava.types import (
    ConfigError,
    FixedVisualPrompt,
    Region,
    Request,
    Sample,
    Shape,
    VipLlavaError,
)
from vipllava.visual_prompts.mask_pixels import moved_mask
from vipllava.visual_prompts.policies import VisualPromptPolicy, get_policy
from vipllava.visual_prompts.shapes import check_shape, named_colour

_OF_DRAWN_MARKS: Final = ("shape", "colour", "width", "alpha")


@dataclass(frozen=True, slots=True)
class Perturbation:
    """What is changed; None leaves it as the policy and the record have it.

    Attributes:
        shape: of every mark; the words follow.
        colour: a name of the palette, of every mark; the words say it.
        width: of lines, radius of points, in pixels of an image whose longer side is the policy's
            ``anchor``, as its own ranges.
        alpha: opacity of every mark, 1 to 255.
        jitter: up to this share of its width and height a region is moved, evenly in both, and not
            out of the image; another share moves it in the same direction.
        jpeg_quality: the image with its marks, as the model gets it, is compressed by JPEG of this
            quality, 1 to 100, with colours at half the resolution as usual.

    Raises:
        ConfigError: a value is out of bounds, or there is no such shape or colour.
    """

    shape: Shape | None = None
    colour: str | None = None
    width: int | None = None
    alpha: int | None = None
    jitter: float | None = None
    jpeg_quality: int | None = None

    def __post_init__(self) -> None:
        """Refuse what can be neither drawn nor compressed."""
        try:
            self._fixed(1)
            if self.shape is not None:
                check_shape(self.shape)
            if self.colour is not None:
                named_colour(self.colour)
        except VipLlavaError as error:
            raise ConfigError(str(error)) from None
        for name, kinds, low, high in (
            ("jitter", (int, float), 0, 1),
            ("jpeg_quality", (int,), 1, 100),
        ):
            value = getattr(self, name)
            if value is not None and not (type(value) in kinds and low <= value <= high):
                kind = "a number" if float in kinds else "a whole number"
                raise ConfigError(f"{name} is {value!r}; give {kind} from {low} to {high}")

    def check(self, encoding: str) -> None:
        """Raise ConfigError unless what is changed is drawn with this encoding."""
        given = [name for name in _OF_DRAWN_MARKS if getattr(self, name) is not None]
        if given and encoding != "overlay":
            raise ConfigError(
                f"encoding={encoding} with another {', '.join(given)} of the marks: it draws none; "
                "perturb jitter or jpeg_quality, or use encoding=overlay"
            )

    @property
    def of_marks(self) -> bool:
        """Whether it changes anything but the finished image."""
        return replace(self, jpeg_quality=None) != UNCHANGED

    def fix(
        self, sample: Sample, size: tuple[int, int], policies: Mapping[str, VisualPromptPolicy]
    ) -> tuple[Sample, Mapping[str, VisualPromptPolicy]]:
        """Return a sample with its marks fixed as given, and the policies that sample the rest.

        Args:
            sample: with regions.
            size: width and height of its image, pixels.
            policies: by the names that samples carry.
        """
        if all(getattr(self, name) is None for name in _OF_DRAWN_MARKS):
            return sample, policies
        policy = get_policy(policies, sample.policy)
        fixed = self._fixed(max(size) / policy.ranges.anchor)
        given = {name: v for name in _OF_DRAWN_MARKS if (v := getattr(fixed, name)) is not None}
        own = sample.fixed or (FixedVisualPrompt(),) * len(sample.regions)
        if self.colour is not None:
            # Marks that have lost what tells them apart are an item that cannot be asked.
            policies = {**policies, sample.policy: replace(policy, distinguishable=True)}
        return replace(sample, fixed=tuple(replace(each, **given) for each in own)), policies

    def shift(self, sample: Sample, size: tuple[int, int], seed: int) -> Sample:
        """Return a sample with its regions moved; the same seed and key move them alike."""
        if self.jitter is None:
            return sample
        rng = generator_for(seed, sample.dataset, sample.key, "jitter")
        shares = self.jitter * rng.uniform(-1, 1, size=(len(sample.regions), 2))
        pairs = zip(sample.regions, shares, strict=True)
        return replace(sample, regions=tuple(_shifted(each, by, size) for each, by in pairs))

    def compress(self, request: Request) -> Request:
        """Return a request with its images as JPEG leaves them."""
        if self.jpeg_quality is None or request.image is None:
            return request
        first, *more = (
            _as_jpeg(image, self.jpeg_quality) for image in (request.image, *request.more_images)
        )
        return replace(request, image=first, more_images=tuple(more))

    def _fixed(self, scale: float) -> FixedVisualPrompt:
        width = self.width
        if type(width) is int and width > 0:
            width = max(1, int(width * scale))
        return FixedVisualPrompt(self.shape, self.colour, width, self.alpha)


UNCHANGED: Final = Perturbation()


def _shifted(region: Region, shares: np.ndarray, size: tuple[int, int]) -> Region:
    x1, y1, x2, y2 = region.bbox_xyxy
    dx, dy = (
        float(np.clip(share * (high - low), min(0.0, -low), max(0.0, end - high)))
        for share, low, high, end in zip(shares, (x1, y1), (x2, y2), size, strict=True)
    )
    rings = tuple(tuple((x + dx, y + dy) for x, y in ring) for ring in region.polygons)
    rle = None if region.rle is None else moved_mask(region.rle, (dx, dy))
    return replace(region, bbox_xyxy=(x1 + dx, y1 + dy, x2 + dx, y2 + dy), polygons=rings, rle=rle)


def _as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality, subsampling="4:2:0")
    return Image.open(buffer).convert("RGB")
