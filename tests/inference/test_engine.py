"""Answers are greedy, stop where the template says, and do not depend on the batch."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.engine_server import run_engine_server
from tests.inference.tiny_engine import TEMPLATE, make_engine, mixed_requests
from tests.tiny_model import save_tiny_export
from vipllava.checkpoints.export_meta import ExportMeta
from vipllava.checkpoints.hf_format import save_export
from vipllava.checkpoints.loading import build_model, load_tokenizer
from vipllava.conversation import ConversationEncoder, get_template
from vipllava.inference.decoding import Decoding
from vipllava.inference.endpoint import Endpoint, EndpointSettings, Reply
from vipllava.inference.engine import Engine
from vipllava.inference.protocol import PromptTooLong, Sampling
from vipllava.models.building import ModelSpec
from vipllava.models.towers import CLIP, normalise_pixels
from vipllava.types import ConfigError, Request, Turn, VipLlavaError


def _slow_greedy(engine: Engine, request: Request, num_tokens: int) -> list[int]:
    """One request, the whole forward pass again for every token: no cache, no padding."""
    ids = engine.encoder.encode_generation_prompt(request.turns).tolist()
    pixels = None
    if request.image is not None:
        pixels = normalise_pixels(
            engine.image_transform(request.image)[None], torch.float32, CLIP.preprocessing
        )
    generated: list[int] = []
    with torch.no_grad():
        while len(generated) < num_tokens:
            logits = engine.model(
                input_ids=torch.tensor([ids + generated]), pixel_values=pixels, use_cache=False
            ).logits
            generated.append(int(logits[0, -1].argmax()))
            if generated[-1] in engine.encoder.stop_token_ids:
                break
    return generated


def test_answers_equal_slow_decoding_and_do_not_depend_on_the_batch(parts):
    engine, requests = make_engine(parts), mixed_requests(11)
    expected = [
        engine.encoder.decode_answer(_slow_greedy(engine, request, 12)).strip()
        for request in requests
    ]
    assert len(set(expected)) > 5  # the model does look at its input

    for batch_size in (1, 4, 11):
        assert engine.answer(requests, max_new_tokens=12, batch_size=batch_size) == expected
    assert engine.answer(requests[::-1], max_new_tokens=12, batch_size=3) == expected[::-1]
    assert engine.answer([]) == []


def test_stops_at_the_templates_token(parts):
    engine, requests = make_engine(parts), mixed_requests(6)
    token = _slow_greedy(engine, requests[0], 4)[3]
    assert token not in _slow_greedy(engine, requests[0], 3)

    class Stopping(ConversationEncoder):
        stop_token_ids = (token,)

    stopping = make_engine(parts)
    stopping.encoder = Stopping(
        parts[1], TEMPLATE, image_token_id=259, image_seq_length=4, max_length=512
    )
    answers = stopping.answer(requests, max_new_tokens=12, batch_size=6)

    for request, answer in zip(requests, answers, strict=True):
        ids = _slow_greedy(engine, request, 12)
        kept = ids[: ids.index(token)] if token in ids else ids
        assert answer == engine.encoder.decode_answer(kept).strip()
    ids = _slow_greedy(engine, requests[0], 3)
    assert answers[0] == engine.encoder.decode_answer(ids).strip()


def test_stops_at_the_templates_string(parts):
    requests = mixed_requests(6)
    free = make_engine(parts).answer(requests, max_new_tokens=24)
    stop = next(c for c in free[0][3:] if c.isascii() and c.isprintable() and c not in free[0][:3])
    engine = make_engine(parts, replace(TEMPLATE, stop_strings=(stop,)))

    answers = engine.answer(requests, max_new_tokens=24, batch_size=6)
    alone = engine.answer(requests[:1], max_new_tokens=24)

    assert answers == [text.split(stop, 1)[0].strip() for text in free]
    assert alone == answers[:1]


def test_a_stop_string_ends_the_work(parts):
    request = mixed_requests(1)
    free = make_engine(parts).answer(request, max_new_tokens=24)[0]
    stop = next(c for c in free[3:] if c.isascii() and c.isprintable())
    engine = make_engine(parts, replace(TEMPLATE, stop_strings=(stop,)))

    calls = []
    hook = engine.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    engine.answer(request, max_new_tokens=24)
    hook.remove()
    assert len(calls) < 24


def test_from_checkpoint(parts, tmp_path):
    meta = ExportMeta(
        stage="finetune",
        chat_template="llava_v1",
        image_aspect="pad",
        image_size=28,
        image_seq_length=4,
        feature_layers=(-1, -2, 1),
        vision_tower="a",
        language_model="b",
    )
    save_export(*parts, tmp_path / "export", meta)

    engine = Engine.from_checkpoint(tmp_path / "export", device="cpu")

    assert engine.encoder.template.name == "llava_v1"
    assert engine.image_transform.aspect == "pad"
    assert engine.model.dtype == torch.float32
    expected = make_engine(parts, get_template("llava_v1")).answer(
        mixed_requests(3), max_new_tokens=6
    )
    assert engine.answer(mixed_requests(3), max_new_tokens=6) == expected


def test_picture_and_turns_must_agree(parts):
    image = Image.new("RGB", (4, 4))
    with pytest.raises(VipLlavaError, match="request 'q' has a picture, but 0 of its turns"):
        make_engine(parts).answer([Request(image, [Turn("user", "?")], "q")])
    with pytest.raises(VipLlavaError, match="request 'q' has no picture, but 1 of its turns"):
        make_engine(parts).answer([Request(None, [Turn("user", "?", has_image=True)], "q")])


def test_images_that_would_not_be_shown_are_refused(parts):
    image = Image.new("RGB", (4, 4))
    request = Request(image, [Turn("user", "?", has_image=True)], "q", (image, image))
    with pytest.raises(VipLlavaError, match="request 'q' has 3 images, and this model takes one"):
        make_engine(parts).answer([request])


def test_a_captioner_cannot_be_asked_without_a_picture(parts):
    request = Request(None, [Turn("user", "What is the capital of France?")], "q")
    with pytest.raises(VipLlavaError, match=r"request 'q' asks without a picture.*'plain'"):
        make_engine(parts, get_template("plain")).answer([request])


@pytest.mark.parametrize(
    ("letters", "room", "said"),
    [
        (500, range(1), "and the model's 512 positions are for it and its answer: shorten"),
        (10, range(1, 512), "of the model's 512 positions .* max_new_tokens=512: lower it, or"),
    ],
)
def test_too_long_a_prompt_names_the_request(parts, letters: int, room: range, said: str):
    request = Request(None, [Turn("user", "x" * letters)], "long")
    with pytest.raises(PromptTooLong, match=f"request 'long' has \\d+ tokens, .*{said}") as caught:
        make_engine(parts).answer([request], max_new_tokens=512)
    assert caught.value.room in room
    copied = pickle.loads(pickle.dumps(caught.value))  # as from a process of its own
    assert (str(copied), copied.room) == (str(caught.value), caught.value.room)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
def test_few_bits_in_the_blocks_only(tiny_sources, tmp_path, bits):
    from torch import nn

    pytest.importorskip("bitsandbytes")
    spec = ModelSpec(
        vision_tower=tiny_sources.vision_tower,
        language_model=tiny_sources.rows_of_64,
        feature_layers=(-1, -2, 1),
        chat_template="llava_v1",
        image_size=28,
    )
    tokenizer = load_tokenizer(spec)
    meta = ExportMeta("finetune", "llava_v1", "pad", 28, 4, (-1, -2, 1), "a", "b")
    save_export(build_model(spec, tokenizer), tokenizer, tmp_path / "export", meta)

    engine = Engine.from_checkpoint(tmp_path / "export", device="cpu", bits=bits)
    kinds = {
        n: type(m).__name__ for n, m in engine.model.named_modules() if isinstance(m, nn.Linear)
    }
    few = {"Linear4bit", "Linear8bitLt"}
    assert {n for n, kind in kinds.items() if kind in few} == {
        n for n in kinds if n.startswith("model.language_model.layers.")
    }
    assert len(engine.answer(mixed_requests(3), max_new_tokens=4)) == 3


def test_few_bits_must_be_four_or_eight(parts, tmp_path):
    save_export(
        *parts,
        tmp_path / "export",
        ExportMeta("finetune", "llava_v1", "pad", 28, 4, (-1, -2, 1), "a", "b"),
    )
    with pytest.raises(ConfigError, match="bits=3 must be 4 or 8"):
        Engine.from_checkpoint(tmp_path / "export", device="cpu", bits=3)


def test_the_engine_behind_an_endpoint_gives_the_same_texts(parts):
    engine, requests = make_engine(parts), mixed_requests(7)
    with run_engine_server(engine) as server:
        endpoint = Endpoint(EndpointSettings(server.address, "tiny", concurrency=3))
        found = dict(endpoint.answers(requests, max_new_tokens=6))
    texts = [each.text for _, each in sorted(found.items()) if isinstance(each, Reply)]
    assert texts == engine.answer(requests, max_new_tokens=6, batch_size=3)
    assert len(set(texts)) > 3


@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        {
            "model.vision_tower": "cpu",
            "model.multi_modal_projector": "cpu",
            "model.language_model.embed_tokens": "cpu",
            "model.language_model.layers.0": "cpu",
            "model.language_model.layers.1": "cpu",
            "model.language_model.norm": "cpu",
            "model.language_model.rotary_emb": "cpu",
            "lm_head": "cpu",
        },
    ],
)
def test_spread_over_devices(tiny_sources, tmp_path, device_map):
    pytest.importorskip("accelerate")
    export = save_tiny_export(tiny_sources, tmp_path / "export")
    whole = Engine.from_checkpoint(export, "cpu").answer(mixed_requests(4), max_new_tokens=6)
    engine = Engine.from_checkpoint(export, device_map=device_map, dtype="float32")
    assert engine.device == torch.device("cpu")
    assert hasattr(engine.model.model.language_model.layers[1], "_hf_hook")  # accelerate's
    assert engine.answer(mixed_requests(4), max_new_tokens=6, batch_size=3) == whole


def test_what_does_not_go_together_is_named(tiny_sources, tmp_path):
    export = save_tiny_export(tiny_sources, tmp_path / "export")
    with pytest.raises(ConfigError, match=r"device_map='auto' spreads whole.*not go with bits=4"):
        Engine.from_checkpoint(export, bits=4, device_map="auto")
    with pytest.raises(ConfigError, match="not go with device='cpu'"):
        Engine.from_checkpoint(export, "cpu", device_map="auto")
    pytest.importorskip("accelerate")
    with pytest.raises(ConfigError, match="device_map='round' is not known: use auto"):
        Engine.from_checkpoint(export, device_map="round")


def test_an_image_is_looked_at_once(parts):
    engine = make_engine(parts)
    requests = mixed_requests(6)  # four have images
    first = engine.answer(requests, max_new_tokens=3, batch_size=2)
    assert (engine.features.num_hits, engine.features.num_misses) == (0, 4)
    assert engine.answer(requests, max_new_tokens=3) == first
    assert (engine.features.num_hits, engine.features.num_misses) == (4, 4)
    assert engine.features.num_bytes == 4 * 4 * 32 * 4

    forgetful = make_engine(parts, feature_bytes=0)
    assert forgetful.answer([requests[0], requests[0]], max_new_tokens=3) == first[:1] * 2
    assert forgetful.features.num_bytes == 0


def test_options_of_sampling(parts):
    engine, requests = make_engine(parts), mixed_requests(2)
    drawn = Sampling(max_new_tokens=8, temperature=1.5, seed=1)
    assert engine.answer(requests, sampling=drawn) != engine.answer(requests, max_new_tokens=8)
    short = Sampling(max_new_tokens=2)
    assert engine.answer(requests, sampling=short) == engine.answer(requests, max_new_tokens=2)


def test_a_long_answer_holds_nobody_up(parts, monkeypatch):
    """Of a batch of two, the place of who ends is taken at once."""
    engine, requests = make_engine(parts), mixed_requests(6)
    token = _slow_greedy(engine, requests[0], 3)[2]
    together: list[int] = []
    step = Decoding.step

    def noted(self: Decoding):
        together.append(len(self.rows))
        return step(self)

    monkeypatch.setattr(Decoding, "step", noted)
    monkeypatch.setattr(type(engine.encoder), "stop_token_ids", (token,))
    engine.answer(requests, max_new_tokens=24, batch_size=2)
    assert 1 in together  # the last one
    assert together.index(1) >= together.count(2)
