"""Images to the network's input: uint8, normalised later on the device. Three aspects:

* ``square``: short side to ``size``, centre crop (stage 1; what ``CLIPImageProcessor`` does).
* ``pad``: pad to a square in the mean colour, then resize (stages 2 and 3, inference).
* ``resize``: to ``size`` x ``size`` whatever the aspect (VCR evaluation).

The fast path resizes with torch's uint8 kernels, within one level of Pillow's. What is made on the
way is bounded, too: padded to a square, a strip of 60000 x 40 pixels would take 10 GB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from vipllava.records.image_decode import MAX_PIXELS
from vipllava.types import RGB, BBox, ConfigError, Preprocessing

ImageAspect = Literal["square", "pad", "resize"]

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ImageTransform:
    """Turns an image into uint8 [3, size, size]."""

    size: int  # side of the network's input, pixels
    aspect: ImageAspect
    preprocessing: Preprocessing  # of the vision tower: its resampling, and the padding's colour
    # More pixels are not made on the way: a strip is resized before it is padded, or cropped first.
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"image size is {self.size}; it must be positive")
        if self.aspect not in get_args(ImageAspect):
            known = ", ".join(get_args(ImageAspect))
            raise ConfigError(f"unknown image aspect `{self.aspect}`; known: {known}")

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Transform one RGB image; the result is contiguous uint8 [3, size, size]."""
        if self.aspect == "resize" and image.width < self.size < image.height:
            # Wider and lower at once: releases of Pillow differ in which pass comes first.
            return reference_transform(image, self.size, self.aspect, self.preprocessing)
        side = max(image.size)
        width, height = _resized_size(*image.size, self.size, self.aspect)
        if self.aspect == "square" and width * height > self.max_pixels:
            image = _middle(image)
            width, height = _resized_size(*image.size, self.size, self.aspect)
        pixels = np.array(image)
        if self.aspect == "pad":  # first: padding after resizing would shift the image
            rows = columns = side
            if side**2 > self.max_pixels:
                # The longer side is resized before the other one is padded. Of wide images the
                # result is the same; of tall ones columns come first else, which is a level of 255.
                if image.width == side:
                    pixels, columns = self._resize(pixels, image.height, self.size), self.size
                else:
                    pixels, rows = self._resize(pixels, self.size, image.width), self.size
            pixels = _pad(pixels, rows, columns, self.preprocessing.pad_colour)
        pixels = self._resize(pixels, height, width)
        top, left = (height - self.size) // 2, (width - self.size) // 2
        pixels = pixels[top : top + self.size, left : left + self.size]
        return torch.as_tensor(pixels).permute(2, 0, 1).contiguous()

    def _resize(self, pixels: Pixels, height: int, width: int) -> Pixels:
        """Resize [h, w, 3] to [height, width, 3]; columns first, as Pillow does, then rows."""
        if pixels.shape[:2] == (height, width):
            return pixels
        # A contiguous [height, width, 3] array is channels-last, torch's fast layout here.
        planes = torch.as_tensor(pixels).permute(2, 0, 1)[None]
        mode = self.preprocessing.resampling
        planes = F.interpolate(planes, size=(height, width), mode=mode, antialias=True)
        return planes[0].permute(1, 2, 0).numpy()

    def map_box(self, bbox: BBox, size: tuple[int, int]) -> BBox:
        """Return where a box of an image of a width and height comes to lie, in pixels.

        It is not clipped: ``square`` crops.
        """
        width, height = size
        left = top = 0
        if self.aspect == "pad":
            side = max(size)
            left, top = (side - width) // 2, (side - height) // 2
            width = height = side
        new_width, new_height = _resized_size(width, height, self.size, self.aspect)
        dx, dy = (new_width - self.size) // 2, (new_height - self.size) // 2
        x1, x2 = ((x + left) * (new_width / width) - dx for x in bbox[::2])
        y1, y2 = ((y + top) * (new_height / height) - dy for y in bbox[1::2])
        return x1, y1, x2, y2


def reference_transform(
    image: Image.Image, size: int, aspect: ImageAspect, preprocessing: Preprocessing
) -> torch.Tensor:
    """Do the same with Pillow alone, step by step: the measure of the fast path."""
    resampling = Image.Resampling[preprocessing.resampling.upper()]
    if aspect == "pad":
        side = max(image.size)
        canvas = Image.new("RGB", (side, side), preprocessing.pad_colour)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    image = image.resize(_resized_size(*image.size, size, aspect), resampling)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    return torch.as_tensor(np.array(image)).permute(2, 0, 1).contiguous()


def _middle(image: Image.Image) -> Image.Image:
    """Return the middle of a strip, which is all that a square crop shows of it.

    Of the same parity, so that its centre is the strip's; resized, the crop is the same to half a
    pixel.
    """
    long, short = max(image.size), min(image.size)
    margin = max(0, long - 8 * short) // 2
    across, down = (margin, 0) if image.width == long else (0, margin)
    return image.crop((across, down, image.width - across, image.height - down))


def _pad(pixels: Pixels, rows: int, columns: int, colour: RGB) -> Pixels:
    """Centre on a canvas; an odd pixel goes to the right or the bottom."""
    height, width = pixels.shape[:2]
    if (height, width) == (rows, columns):
        return pixels
    top, left = (rows - height) // 2, (columns - width) // 2
    canvas = np.empty((rows, columns, 3), dtype=np.uint8)
    # Whole rows at once: numpy broadcasts three bytes to an image ten times slower.
    band = np.tile(np.array(colour, dtype=np.uint8), columns).reshape(columns, 3)
    canvas[:top], canvas[top + height :] = band, band
    canvas[:, :left], canvas[:, left + width :] = band[:left], band[left + width :]
    canvas[top : top + height, left : left + width] = pixels
    return canvas


def _resized_size(width: int, height: int, size: int, aspect: ImageAspect) -> tuple[int, int]:
    if aspect != "square":
        return size, size
    longer = int(size * max(height, width) / min(height, width))
    return (longer, size) if width > height else (size, longer)
