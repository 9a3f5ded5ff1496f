"""Three tiny conversations and the batches made of them; the models are of ``tiny_sources``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vipllava.stream.collate import Collator, EncodedSample
from vipllava.types import IGNORE_INDEX, Batch, Encoded

IMAGE = 259
PAD = 260


def encoded_sample(
    ids: Sequence[int], labels: Sequence[int], pixels: torch.Tensor | None, key: str = "set/0"
) -> EncodedSample:
    """Return a sample with these ids and labels."""
    columns = (np.array(column, dtype=np.int64) for column in (ids, labels))
    encoded = Encoded(*columns, int(pixels is not None))
    return EncodedSample(key, encoded, pixels, dataset=key.split("/")[0])


def three_samples(seed: int = 0) -> list[EncodedSample]:
    """Return one with a picture, one of text only, one with a picture; 4, 7 and 2 labels.

    Another seed gives other ids and pixels in the same places.
    """
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 259, (count,), generator=generator).tolist()

    samples: list[EncodedSample] = []
    shapes = ((True, 3, 5, 4), (False, 6, 0, 7), (True, 2, 3, 2))
    for number, (has_image, head, tail, answer) in enumerate(shapes):
        prompt = [1, *ids(head), *([IMAGE] * 4 if has_image else []), *ids(tail)]
        target = ids(answer)
        labels = [IGNORE_INDEX] * len(prompt) + target
        pixels = torch.randint(0, 256, (3, 28, 28), generator=generator, dtype=torch.uint8)
        samples.append(
            encoded_sample(
                prompt + target, labels, pixels if has_image else None, key=f"set/{number}"
            )
        )
    return samples


def batch_of(rows: Sequence[Sequence[EncodedSample]], padding: int = 2) -> Batch:
    """Collate rows; ``padding`` is added to the longest."""
    longest = max(sum(sample.encoded.length for sample in row) for row in rows)
    return Collator(PAD, image_size=28, pack_length=longest + padding)(rows)
