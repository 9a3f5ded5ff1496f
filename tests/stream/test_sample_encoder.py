from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.toy_data import encode_picture, lying_sample, make_manifest, said, toy_samples
from tests.toy_stream import Build
from vipllava.conversation.encode import ConversationEncoder
from vipllava.conversation.label_proof import prove_labels
from vipllava.models.towers import CLIP
from vipllava.shards.tars import write_shards
from vipllava.stream.image_transform import ImageTransform
from vipllava.stream.order import Item
from vipllava.stream.sample_encoder import SampleEncoder, SampleSource
from vipllava.types import RecordError, Sample, VipLlavaError
from vipllava.visual_prompts.policies import VisualPromptPolicy
from vipllava.visual_prompts.render import render_plan
from vipllava.visual_prompts.rle import check_rle

REGION = {"bboxes": [[5, 5, 40, 30]], "conversations": said("<image>\nWhat is <bbox0>?", "yes")}


def test_pixels_and_words_come_from_one_plan(build_dataset: Build) -> None:
    dataset = build_dataset(toy_samples(10))
    named = set()
    for epoch in range(12):
        sample = dataset.sources[0].sample(0, epoch)
        turns, encoded = dataset.sample_encoder.encode_text(sample, epoch)
        finished = dataset.make(Item(0, epoch, 0))
        np.testing.assert_array_equal(finished.encoded.input_ids, encoded.input_ids)
        assert turns[0].text.startswith("What is ")
        named.add(turns[0].text)
        prove_labels(dataset.sample_encoder.conversation_encoder, turns, finished.encoded)
    assert len(named) > 6  # another mark in every epoch


def test_an_epoch_repeats_itself_to_the_bit(build_dataset: Build) -> None:
    dataset = build_dataset(toy_samples(5))
    for position in range(5):
        first, second = dataset.make(Item(0, 3, position)), dataset.make(Item(0, 3, position))
        np.testing.assert_array_equal(first.encoded.labels, second.encoded.labels)
        if first.pixel_values is None:
            assert position == 4  # text only
            assert first.encoded.num_images == 0
        else:
            assert second.pixel_values is not None
            assert torch.equal(first.pixel_values, second.pixel_values)
            assert first.pixel_values.shape == (3, 28, 28)


def test_marks_are_drawn(build_dataset: Build) -> None:
    dataset = build_dataset(toy_samples(2))
    sample = dataset.sources[0].sample(0)
    assert sample.image is not None
    marked = dataset.make(Item(0, 0, 0)).pixel_values
    plain = ImageTransform(28, "pad", CLIP.preprocessing)(_decoded(sample.image))
    assert marked is not None
    assert not torch.equal(marked, plain)
    untouched = dataset.make(Item(0, 0, 1)).pixel_values
    sample = dataset.sources[0].sample(1)
    assert sample.image is not None
    assert untouched is not None
    assert torch.equal(
        untouched, ImageTransform(28, "pad", CLIP.preprocessing)(_decoded(sample.image))
    )


def _decoded(data: bytes):
    from vipllava.records.image_decode import decode_image

    return decode_image(data, "k")


def test_iterating_keeps_the_order_and_the_words(tmp_path: Path) -> None:
    write_shards(toy_samples(12), tmp_path / "toy", max_samples=5)
    first, second = (list(SampleSource.open(make_manifest(), tmp_path, seed=1)) for _ in range(2))
    assert [sample.key for sample in first] == [key for key, *_ in toy_samples(12)]
    assert first == second


def test_a_manifest_may_name_the_policy(tmp_path: Path) -> None:
    write_shards(toy_samples(2), tmp_path / "toy")
    samples = SampleSource.open(make_manifest(policy="mine"), tmp_path, seed=1)
    assert {sample.policy for sample in samples} == {"mine"}


@pytest.mark.parametrize("upright", [True, False])
def test_boxes_marks_and_picture_are_in_the_frame_of_the_manifest(
    tmp_path: Path,
    encoder: ConversationEncoder,
    policies: dict[str, VisualPromptPolicy],
    upright: bool,
) -> None:
    stored, size = lying_sample(upright)
    write_shards([stored], tmp_path / "toy")
    transform = ImageTransform(28, "pad", CLIP.preprocessing)
    samples = SampleEncoder(policies, encoder, transform, seed=1)

    def sample_of(upright: bool) -> Sample:
        manifest = make_manifest(apply_exif_orientation=upright)
        return SampleSource.open(manifest, tmp_path, seed=1).sample(0)

    trace = samples.trace(sample_of(upright))
    assert trace.image is not None
    assert trace.image.size == trace.plan.size == size
    marked = render_plan(trace.image, trace.plan)
    left, top, right, bottom = stored[1]["bboxes"][0]
    change = np.abs(np.asarray(marked, dtype=int) - np.asarray(trace.image))
    assert change[top - 5 : bottom + 5, left - 5 : right + 5].any()
    turns, encoded = samples.encode_text(sample_of(upright))
    assert turns == trace.turns
    np.testing.assert_array_equal(encoded.input_ids, trace.encoded.input_ids)
    with pytest.raises(RecordError, match=r"expected a box inside the \d+ x \d+ image"):
        sample_of(not upright)


class Hungry(ImageTransform):
    """Takes more memory than there is."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.empty(1 << 60, dtype=torch.uint8)


def test_a_lack_of_memory_names_the_sample(build_dataset: Build) -> None:
    dataset = build_dataset(toy_samples(1))
    dataset.sample_encoder.transform = Hungry(28, "pad", CLIP.preprocessing)
    with pytest.raises(VipLlavaError, match=r"shard-000000\.tar: toy/s000: the memory does not"):
        dataset.make(Item(0, 0, 0))


def test_a_broken_record_names_file_and_record(build_dataset: Build) -> None:
    bad = {"id": 1, "conversations": said("<image>\nHi", "yes"), "bboxes": [[9, 9, 5, 5]]}
    dataset = build_dataset([*toy_samples(1), ("bad", bad, encode_picture(), "jpg")])
    with pytest.raises(RecordError, match=r"toy/shard-000000\.tar: toy/bad: field `bboxes\[0\]`"):
        dataset.make(Item(0, 0, 1))


def test_an_unreadable_picture_names_file_and_record(build_dataset: Build) -> None:
    record = {"id": 1, "image": "a.jpg", "conversations": said("<image>\nHi", "yes")}
    picture = encode_picture()
    dataset = build_dataset([("bad", record, picture[: len(picture) // 2], "jpg")])
    with pytest.raises(RecordError, match=r"shard-000000\.tar: toy/bad: .*replace the file"):
        dataset.make(Item(0, 0, 0))


def test_an_unknown_policy_lists_the_known(
    build_dataset: Build, encoder: ConversationEncoder
) -> None:
    dataset = build_dataset([("k", REGION, encode_picture(), "jpg")])
    dataset.sample_encoder = SampleEncoder(
        {}, encoder, ImageTransform(28, "pad", CLIP.preprocessing), seed=1
    )
    with pytest.raises(VipLlavaError, match=r"toy/k: unknown visual-prompt policy `regions`"):
        dataset.make(Item(0, 0, 0))


def test_a_conversation_over_the_limit(build_dataset: Build, encoder: ConversationEncoder) -> None:
    dataset = build_dataset([("k", REGION, encode_picture(), "jpg")])
    dataset.sample_encoder.conversation_encoder = ConversationEncoder(
        encoder.tokenizer, "llava_v1", 400, 4, 16
    )
    with pytest.raises(RecordError, match=r"toy/k.*max_length=16"):
        dataset.make(Item(0, 0, 0))


def test_run_lengths_are_stored_as_they_came_and_drawn(build_dataset: Build) -> None:
    ring = np.zeros((48, 64), bool)
    ring[5:30, 5:40] = True
    ring[12:22, 15:30] = False
    masks = [{"size": [48, 64], "counts": check_rle(ring, "mask").counts}]
    fixed = [{"shape": "mask", "colour": "red", "alpha": 255}]
    record = {**REGION, "segmentations": masks, "visual_prompts": fixed}
    dataset = build_dataset([("k", record, encode_picture(fmt="PNG"), "png")])
    (source,) = dataset.sources
    assert source.shards.read(0).record["segmentations"] == masks
    trace = dataset.sample_encoder.trace(source.sample(0))
    assert trace.image is not None
    drawn = np.asarray(render_plan(trace.image, trace.plan))
    assert (drawn[ring] == (255, 0, 0)).all()
    assert (drawn[~ring] == np.asarray(trace.image)[~ring]).all()
