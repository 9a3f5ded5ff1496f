from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from tests.toy_data import encode_picture
from vipllava.models.towers import CLIP
from vipllava.records.image_decode import decode_image
from vipllava.stream.image_transform import (
    ImageAspect,
    ImageTransform,
    reference_transform,
)
from vipllava.types import ConfigError

SIZES = [(64, 48), (48, 64), (333, 500), (97, 31), (56, 56), (40, 40), (500, 20)]


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("aspect", ["square", "pad", "resize"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_fast_path_is_within_one_level_of_pillow(
    aspect: ImageAspect, width: int, height: int
) -> None:
    image = noise(width, height)
    fast = ImageTransform(56, aspect, CLIP.preprocessing)(image)
    plain = reference_transform(image, 56, aspect, CLIP.preprocessing)
    assert fast.dtype == torch.uint8
    assert fast.shape == plain.shape == (3, 56, 56)
    assert fast.is_contiguous()
    difference = (fast.int() - plain.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.1


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_square_is_what_clips_processor_does(width: int, height: int) -> None:
    processor = CLIPImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    )
    image = noise(width, height)
    expected = torch.as_tensor(np.asarray(processor(image, return_tensors="np")["pixel_values"][0]))
    pixels = reference_transform(image, 56, "square", CLIP.preprocessing).float() / 255
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (CLIP.preprocessing.mean, CLIP.preprocessing.std)
    )
    torch.testing.assert_close((pixels - mean) / std, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("width", "height", "most"),
    [*((*size, 0) for size in SIZES if size[0] >= size[1]), (701, 9, 0), (9, 701, 1), (3, 999, 1)],
)
def test_a_padded_strip_is_what_it_would_be_if_all_of_the_padding_were_made(
    width: int, height: int, most: int
) -> None:
    image = noise(width, height)
    whole = ImageTransform(56, "pad", CLIP.preprocessing)
    difference = (whole(image).int() - replace(whole, max_pixels=0)(image).int()).abs()
    assert difference.max() <= most


@pytest.mark.parametrize("size", [(480, 8), (701, 9), (9, 701), (999, 3), (300, 56), (64, 48)])
def test_a_cropped_strip_is_what_it_would_be_if_all_of_it_were_resized(
    size: tuple[int, int],
) -> None:
    smooth = noise(12, 12).resize(size, Image.Resampling.BICUBIC)
    whole = ImageTransform(56, "square", CLIP.preprocessing)
    difference = (whole(smooth).int() - replace(whole, max_pixels=0)(smooth).int()).abs()
    assert difference.max() <= 12
    assert difference.float().mean() < 1.5


@pytest.mark.parametrize("aspect", ["square", "pad", "resize"])
@pytest.mark.parametrize(
    "size", [(65_535, 1), (20_000, 1), (60_000, 40), (1, 65_535), (40, 60_000)]
)
def test_a_strip_takes_no_more_memory_than_a_photograph(
    aspect: ImageAspect, size: tuple[int, int]
) -> None:
    image = Image.new("RGB", size, (255, 0, 0))
    transform = ImageTransform(336, aspect, CLIP.preprocessing)
    transform(Image.new("RGB", (8, 8)))
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    try:
        pixels = transform(image)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert pixels.shape == (3, 336, 336)
    if aspect != "pad":
        assert pixels.amin(dim=(1, 2)).tolist() == [255, 0, 0]


def test_padding_is_centred_and_mean_coloured() -> None:
    image = Image.new("RGB", (4, 1), (255, 255, 255))
    pixels = ImageTransform(4, "pad", CLIP.preprocessing)(image)
    rows = pixels[:, :, 0].T.tolist()  # side 4, offset (4 - 1) // 2 = 1
    assert rows == [[122, 116, 104], [255, 255, 255], [122, 116, 104], [122, 116, 104]]


def test_an_equal_size_is_copied_exactly_and_the_picture_left_alone() -> None:
    image = noise(56, 56)
    before = np.array(image)
    pixels = ImageTransform(56, "pad", CLIP.preprocessing)(image)
    pixels.add_(1)
    np.testing.assert_array_equal(np.asarray(image), before)


def test_decoded_pictures_go_in() -> None:
    image = decode_image(encode_picture(), "k")
    assert ImageTransform(28, "pad", CLIP.preprocessing)(image).shape == (3, 28, 28)


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="unknown image aspect `crop`; known: square, pad"):
        ImageTransform(56, "crop", CLIP.preprocessing)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="image size is 0"):
        ImageTransform(0, "pad", CLIP.preprocessing)


@pytest.mark.parametrize("aspect", ["square", "pad", "resize"])
@pytest.mark.parametrize("size", [(640, 480), (427, 640), (500, 333), (60, 60)])
def test_a_mapped_box_is_where_the_pixels_are(aspect: ImageAspect, size: tuple[int, int]):
    picture = Image.new("RGB", size)
    box = (size[0] * 0.4, size[1] * 0.3, size[0] * 0.6, size[1] * 0.7)
    picture.paste((255, 255, 255), tuple(map(round, box)))
    transform = ImageTransform(168, aspect, CLIP.preprocessing)
    rows, columns = np.nonzero(transform(picture).numpy().min(axis=0) > 127)
    found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert found == pytest.approx(transform.map_box(box, size), abs=1.5)
