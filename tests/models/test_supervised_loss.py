"""The loss equals transformers' own and reaches every part it has to."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tests.models.tiny_batches import IMAGE, batch_of, encoded_sample, three_samples
from vipllava.checkpoints.loading import build_model
from vipllava.models.building import ModelSpec
from vipllava.models.freezing import set_trainable
from vipllava.models.supervised_loss import embed_inputs, supervised_loss_sum
from vipllava.models.towers import CLIP, normalise_pixels
from vipllava.types import IGNORE_INDEX, PADDING_SEGMENT, VipLlavaError


@pytest.fixture(scope="module", params=["language_model", "tied_language_model", "phi3"])
def model(request, tiny_sources):
    spec = ModelSpec(
        vision_tower=tiny_sources.vision_tower,
        language_model=getattr(tiny_sources, request.param),
        feature_layers=(-1, -2, 1),
        chat_template="llava_v1",
        image_size=28,
    )
    return build_model(spec)


def _reference(model, samples):
    """transformers' logits of every sample alone, and the plain sum of the loss."""
    total = torch.zeros(())
    for sample in samples:
        image = sample.pixel_values
        pixels = (
            None
            if image is None
            else normalise_pixels(image[None], torch.float32, CLIP.preprocessing)
        )
        input_ids = torch.tensor(sample.encoded.input_ids)[None]
        logits = model(
            input_ids=input_ids,
            pixel_values=pixels,
            attention_mask=torch.ones_like(input_ids),
        ).logits[0]
        total = total + functional.cross_entropy(
            logits[:-1], torch.tensor(sample.encoded.labels[1:]), reduction="sum"
        )
    return total


def test_equals_transformers_on_padded_rows(model):
    samples = three_samples()
    batch = batch_of([[sample] for sample in samples])

    loss_sum, num_supervised = supervised_loss_sum(model, batch)
    theirs = model(
        input_ids=batch.input_ids,
        attention_mask=(batch.segment_ids != PADDING_SEGMENT).long(),
        pixel_values=normalise_pixels(batch.pixel_values, torch.float32, CLIP.preprocessing),
        labels=batch.labels,
    ).loss

    assert num_supervised == batch.num_supervised == 13
    torch.testing.assert_close(loss_sum / num_supervised, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss_sum, _reference(model, samples), rtol=1e-6, atol=1e-6)


def test_first_position_of_a_segment_is_no_target(model):
    ids = [1, 5, 6, 7]
    everything = encoded_sample(ids, ids, None)
    separate, num_separate = supervised_loss_sum(model, batch_of([[everything], [everything]]))
    packed, num_packed = supervised_loss_sum(model, batch_of([[everything, everything]]))

    assert num_separate == num_packed == 6
    torch.testing.assert_close(packed, separate, rtol=1e-6, atol=1e-6)


def test_text_only_batch_gives_the_projector_zero_gradients(model):
    set_trainable(model, ["projector"])
    samples = [three_samples()[1]]
    model.zero_grad()

    loss_sum, _ = supervised_loss_sum(model, batch_of([samples]))
    loss_sum.backward()

    torch.testing.assert_close(loss_sum.detach(), _reference(model, samples), rtol=1e-6, atol=1e-6)
    for parameter in model.model.multi_modal_projector.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    for parameter in model.model.vision_tower.parameters():
        assert parameter.grad is None


def test_batch_without_supervision_has_zero_loss_and_a_graph(model):
    set_trainable(model, ["projector", "language_model"])
    sample = three_samples()[0]
    ignored = [IGNORE_INDEX] * sample.encoded.length
    unsupervised = encoded_sample(sample.encoded.input_ids, ignored, sample.pixel_values)
    model.zero_grad()

    loss_sum, num_supervised = supervised_loss_sum(model, batch_of([[unsupervised]]))
    loss_sum.backward()

    assert (loss_sum.item(), num_supervised) == (0.0, 0)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trainable)


def test_frozen_tower_records_no_graph(model):
    set_trainable(model, ["projector"])
    outputs = []
    hook = model.model.vision_tower.encoder.layers[-1].register_forward_hook(
        lambda module, args, output: outputs.append(output)
    )
    supervised_loss_sum(model, batch_of([[three_samples()[0]]]))
    hook.remove()

    assert [output.requires_grad for output in outputs] == [False]


def test_wrong_number_of_image_tokens_names_the_sample(model):
    sample = three_samples()[0]
    ids = [t for t in sample.encoded.input_ids if t != IMAGE] + [IMAGE] * 3
    short = encoded_sample(ids, sample.encoded.labels[:-1], sample.pixel_values)

    with pytest.raises(VipLlavaError, match=r"3 image tokens, but 4 .*\['set/0'\]"):
        supervised_loss_sum(model, batch_of([[short]]))


def test_normalise_pixels_is_clips():
    pixels = torch.tensor([0, 255, 128], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 3, 1, 3)

    values = normalise_pixels(pixels, torch.float32, CLIP.preprocessing)

    expected = [
        [(v - mean) / std for v in (0.0, 1.0, 128 / 255)]
        for mean, std in (
            (0.48145466, 0.26862954),
            (0.4578275, 0.26130258),
            (0.40821073, 0.27577711),
        )
    ]
    torch.testing.assert_close(values, torch.tensor(expected).view(1, 3, 1, 3))
    assert normalise_pixels(pixels, torch.bfloat16, CLIP.preprocessing).dtype == torch.bfloat16


def test_embeddings_hold_the_features_in_row_order(model):
    samples = three_samples()
    batch = batch_of([[samples[0]], [samples[2]]])
    embeddings = embed_inputs(model, batch)
    features = model.get_image_features(
        pixel_values=normalise_pixels(batch.pixel_values, torch.float32, CLIP.preprocessing)
    ).pooler_output

    for row in (0, 1):
        places = batch.input_ids[row] == IMAGE
        torch.testing.assert_close(embeddings[row][places], features[row])
