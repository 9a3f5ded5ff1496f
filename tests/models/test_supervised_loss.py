"""The loss equals transformers' own, packed or not, and reaches every part it has to."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from vipllava.models.building import ModelSpec, build_model
from vipllava.models.freezing import set_trainable
from vipllava.models.supervised_loss import embed_inputs, normalise_pixels, supervised_loss_sum
from vipllava.types import IGNORE_INDEX, PADDING_SEGMENT, Batch, VipLlavaError

IMAGE = 259
PAD = 260


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


def _samples():
    """Three conversations: with a picture, text only, with a picture."""
    generator = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(3, 259, (count,), generator=generator).tolist()

    samples = []
    for has_image, head, tail, answer in ((True, 3, 5, 4), (False, 6, 0, 7), (True, 2, 3, 2)):
        prompt = [1, *ids(head), *([IMAGE] * 4 if has_image else []), *ids(tail)]
        target = ids(answer)
        labels = [IGNORE_INDEX] * len(prompt) + target
        pixels = torch.randint(0, 256, (3, 28, 28), generator=generator, dtype=torch.uint8)
        samples.append((prompt + target, labels, pixels if has_image else None))
    return samples


def _collate(rows):
    """One batch of rows, each a list of samples packed one behind the other."""
    length = max(sum(len(ids) for ids, _, _ in row) for row in rows) + 2
    columns = {name: [] for name in ("input_ids", "labels", "position_ids", "segment_ids")}
    pixels = []
    for row in rows:
        padding = length - sum(len(ids) for ids, _, _ in row)
        columns["input_ids"].append([t for ids, _, _ in row for t in ids] + [PAD] * padding)
        columns["labels"].append(
            [t for _, labels, _ in row for t in labels] + [IGNORE_INDEX] * padding
        )
        columns["position_ids"].append(
            [p for ids, _, _ in row for p in range(len(ids))] + list(range(padding))
        )
        columns["segment_ids"].append(
            [k for k, (ids, _, _) in enumerate(row) for _ in ids] + [PADDING_SEGMENT] * padding
        )
        pixels += [image for _, _, image in row if image is not None]
    return Batch(
        **{name: torch.tensor(values) for name, values in columns.items()},
        pixel_values=torch.stack(pixels) if pixels else torch.zeros(0, 3, 28, 28).byte(),
        keys=tuple(f"set/{i}" for i in range(sum(len(row) for row in rows))),
    )


def _reference(model, samples):
    """transformers' logits of every sample alone, and the plain sum of the loss."""
    total = torch.zeros(())
    for ids, labels, image in samples:
        pixels = None if image is None else normalise_pixels(image[None], torch.float32)
        input_ids = torch.tensor([ids])
        logits = model(
            input_ids=input_ids,
            pixel_values=pixels,
            attention_mask=torch.ones_like(input_ids),
        ).logits[0]
        total = total + functional.cross_entropy(
            logits[:-1], torch.tensor(labels[1:]), reduction="sum"
        )
    return total


def test_equals_transformers_on_padded_rows(model):
    samples = _samples()
    batch = _collate([[sample] for sample in samples])

    loss_sum, num_supervised = supervised_loss_sum(model, batch)
    theirs = model(
        input_ids=batch.input_ids,
        attention_mask=(batch.segment_ids != PADDING_SEGMENT).long(),
        pixel_values=normalise_pixels(batch.pixel_values, torch.float32),
        labels=batch.labels,
    ).loss

    assert num_supervised == batch.num_supervised == 13
    torch.testing.assert_close(loss_sum / num_supervised, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss_sum, _reference(model, samples), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["eval", "train", "checkpointed"])
def test_packed_row_equals_separate_rows(model, mode):
    samples = _samples()
    set_trainable(model, ["projector", "language_model"])
    losses, gradients = [], []
    language_model = model.model.language_model
    if mode == "checkpointed":
        enable = (
            getattr(language_model, "activation_checkpointing_enable", None)
            or language_model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    model.train(mode != "eval")
    for rows in ([[sample] for sample in samples], [samples], [samples[:1], samples[1:]]):
        model.zero_grad()
        loss_sum, _ = supervised_loss_sum(model, _collate(rows))
        loss_sum.backward()
        losses.append(loss_sum.detach())
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    if mode == "checkpointed":
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
    model.eval()

    for other in (1, 2):
        torch.testing.assert_close(losses[other], losses[0], rtol=1e-6, atol=1e-6)
        assert gradients[other].keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[other][name], gradient, rtol=1e-4, atol=1e-5)


def test_first_position_of_a_segment_is_no_target(model):
    ids = [1, 5, 6, 7]
    everything = (ids, list(ids), None)
    separate, num_separate = supervised_loss_sum(model, _collate([[everything], [everything]]))
    packed, num_packed = supervised_loss_sum(model, _collate([[everything, everything]]))

    assert num_separate == num_packed == 6
    torch.testing.assert_close(packed, separate, rtol=1e-6, atol=1e-6)


def test_text_only_batch_gives_the_projector_zero_gradients(model):
    set_trainable(model, ["projector"])
    samples = [_samples()[1]]
    model.zero_grad()

    loss_sum, _ = supervised_loss_sum(model, _collate([samples]))
    loss_sum.backward()

    torch.testing.assert_close(loss_sum.detach(), _reference(model, samples), rtol=1e-6, atol=1e-6)
    for parameter in model.model.multi_modal_projector.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    for parameter in model.model.vision_tower.parameters():
        assert parameter.grad is None


def test_batch_without_supervision_has_zero_loss_and_a_graph(model):
    set_trainable(model, ["projector", "language_model"])
    ids, labels, image = _samples()[0]
    model.zero_grad()

    loss_sum, num_supervised = supervised_loss_sum(
        model, _collate([[(ids, [IGNORE_INDEX] * len(labels), image)]])
    )
    loss_sum.backward()

    assert (loss_sum.item(), num_supervised) == (0.0, 0)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trainable)


def test_frozen_tower_records_no_graph(model):
    set_trainable(model, ["projector"])
    outputs = []
    hook = model.model.vision_tower.register_forward_hook(
        lambda module, args, output: outputs.append(output.last_hidden_state)
    )
    supervised_loss_sum(model, _collate([[_samples()[0]]]))
    hook.remove()

    assert [output.requires_grad for output in outputs] == [False]


def test_wrong_number_of_image_tokens_names_the_sample(model):
    ids, labels, image = _samples()[0]
    short = ([t for t in ids if t != IMAGE] + [IMAGE] * 3, labels[:-1], image)

    with pytest.raises(VipLlavaError, match=r"3 image tokens, but 4 .*\['set/0'\]"):
        supervised_loss_sum(model, _collate([[short]]))


def test_normalise_pixels_is_clips():
    pixels = torch.tensor([0, 255, 128], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 3, 1, 3)

    values = normalise_pixels(pixels, torch.float32)

    expected = [
        [(v - mean) / std for v in (0.0, 1.0, 128 / 255)]
        for mean, std in (
            (0.48145466, 0.26862954),
            (0.4578275, 0.26130258),
            (0.40821073, 0.27577711),
        )
    ]
    torch.testing.assert_close(values, torch.tensor(expected).view(1, 3, 1, 3))
    assert normalise_pixels(pixels, torch.bfloat16).dtype == torch.bfloat16


def test_embeddings_hold_the_features_in_row_order(model):
    samples = _samples()
    batch = _collate([[samples[0]], [samples[2]]])
    embeddings = embed_inputs(model, batch.input_ids, batch.pixel_values)
    features = model.get_image_features(
        pixel_values=normalise_pixels(batch.pixel_values, torch.float32)
    ).pooler_output

    for row in (0, 1):
        places = batch.input_ids[row] == IMAGE
        torch.testing.assert_close(embeddings[row][places], features[row])
