"""Rows that join and leave a batch say what ``generate`` says of each alone."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

from tests.inference.tiny_engine import (
    asked,
    generated_ids,
    generated_text,
    make_engine,
    mixed_requests,
    question,
)
from tests.tiny_model import tiny_parts, tiny_spec
from vipllava.checkpoints.loading import build_model, load_tokenizer
from vipllava.inference.decoding import Row
from vipllava.inference.engine import Engine
from vipllava.inference.kv_slots import KVSlots
from vipllava.inference.protocol import Sampling, Usage


def rows_of(engine: Engine, count: int, **sampling: Any) -> list[Row]:
    requests = asked(mixed_requests(count), **sampling)
    return [engine.row(engine.prompt(each), streams=False) for each in requests]


def run(engine: Engine, rows: list[Row], at_once: int) -> None:
    """As many at a time, each joined as soon as there is room."""
    batch, waiting = engine.decoding(), list(rows)
    while waiting or batch.rows:
        if waiting and len(batch.rows) < at_once:
            batch.join([waiting.pop(0)])
        if batch.rows:
            batch.step()


def test_fifty_mixed_requests_in_three_orders(engine):
    requests = mixed_requests(50)
    lengths = [(3, 25, 11, 1, 40)[n % 5] for n in range(50)]
    expected = [generated_ids(engine, r, n) for r, n in zip(requests, lengths, strict=True)]
    assert len({tuple(ids) for ids in expected}) > 30

    for order in (range(50), range(49, -1, -1), random.Random(0).sample(range(50), 50)):
        rows: dict[int, Row] = {}
        for n in order:
            (generation,) = asked([requests[n]], max_new_tokens=lengths[n])
            rows[n] = engine.row(engine.prompt(generation), streams=False)
        run(engine, list(rows.values()), at_once=7)
        assert [rows[n].generated for n in range(50)] == expected
        assert {rows[n].finish_reason for n in range(50)} <= {"stop", "length"}


def test_a_short_answer_does_not_wait_for_a_long_one(engine):
    long, short, other = rows_of(engine, 3, max_new_tokens=30)
    short._limit = other._limit = 2
    batch = engine.decoding()
    batch.join([long, short])
    batch.step()
    assert (short.finish_reason, long.finish_reason) == ("length", None)
    assert batch.rows == [long]
    batch.join([other])
    batch.step()
    assert batch.rows == [long]
    assert (len(long.generated), len(other.generated)) == (3, 2)  # one step was for both


def test_a_row_goes_on_where_it_left(engine):
    whole = rows_of(engine, 4, max_new_tokens=12)
    run(engine, whole, at_once=1)

    rows = rows_of(engine, 4, max_new_tokens=12)
    batch = engine.decoding()
    batch.join(rows)
    for _ in range(3):
        batch.step()
    batch.leave({rows[0], rows[2]})
    batch.step()
    assert [len(row.generated) for row in rows] == [4, 5, 4, 5]
    batch.join([rows[2]])
    batch.step()
    batch.join([rows[0]])
    while batch.rows:
        batch.step()
    assert [row.generated for row in rows] == [row.generated for row in whole]


def test_rows_that_cannot_be_read_leave_nothing_behind(engine):
    rows, expected = rows_of(engine, 3, max_new_tokens=4), rows_of(engine, 3, max_new_tokens=4)
    run(engine, expected, at_once=3)
    batch, layer = engine.decoding(), engine.model.model.language_model.layers[1]
    for num_running in (0, 1):
        hook = layer.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            batch.join(rows[num_running:])
        hook.remove()
        assert batch.rows == rows[:num_running]
        if not num_running:
            assert batch.num_columns == 0
            batch.join(rows[:1])
    batch.join(rows[1:])
    while batch.rows:
        batch.step()
    assert [row.generated for row in rows] == [row.generated for row in expected]


def test_usage_and_reasons(engine):
    request = mixed_requests(1)[0]
    ids = generated_ids(engine, request, 12)
    (row,) = rows_of(engine, 1, max_new_tokens=5)
    run(engine, [row], at_once=1)
    num_prompt = len(engine.encoder.encode_generation_prompt(request.turns))
    assert (row.finish_reason, row.usage) == ("length", Usage(num_prompt, 5))
    text = engine.encoder.decode_answer(ids)
    stop = next(c for c in text[2:] if c.isascii() and c.isprintable() and c not in text[:2])
    (row,) = rows_of(engine, 1, max_new_tokens=12, stop=(stop,))
    run(engine, [row], at_once=1)
    assert row.finish_reason == "stop"
    assert row.take()[0] == text.split(stop, 1)[0].strip()
    assert row.usage.completion_tokens < 12


@pytest.mark.parametrize("language_model", ["phi3", "mistral", "qwen2", "tied_language_model"])
def test_other_language_models(tiny_sources, language_model):
    sources = copy.copy(tiny_sources)
    object.__setattr__(sources, "language_model", getattr(tiny_sources, language_model))
    engine = make_engine(tiny_parts(sources))
    texts = [generated_text(engine, request, 9) for request in mixed_requests(6)]
    assert engine.answer(mixed_requests(6), max_new_tokens=9, batch_size=3) == texts


@pytest.mark.parametrize(
    ("language_model", "changes"),
    [
        ("mistral", {"sliding_window": 9}),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["full_attention", "sliding_attention"],
            },
        ),
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_windows(tiny_sources, language_model, changes, attention):
    from transformers import AutoConfig, AutoModelForCausalLM

    sources = copy.copy(tiny_sources)
    object.__setattr__(sources, "language_model", getattr(tiny_sources, language_model))
    model, tokenizer = tiny_parts(sources)
    config = AutoConfig.from_pretrained(sources.language_model, **changes)
    config.vocab_size = model.config.text_config.vocab_size
    windowed: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    windowed.model.load_state_dict(model.model.language_model.state_dict())
    free = make_engine((model, tokenizer)).answer(mixed_requests(6), max_new_tokens=9)
    model.model.language_model = windowed.model
    model.config.text_config = windowed.config
    model.set_attn_implementation(attention)

    engine = make_engine((model, tokenizer))
    texts = [generated_text(engine, request, 9) for request in mixed_requests(6)]
    assert texts != free  # prompts are longer than the window
    assert engine.answer(mixed_requests(6), max_new_tokens=9, batch_size=3) == texts


def test_attention_with_additive_masks(tiny_sources, engine):
    spec = tiny_spec(tiny_sources)
    tokenizer = load_tokenizer(spec)
    model = build_model(spec, tokenizer, seed=1)
    model.set_attn_implementation("eager")
    found = make_engine((model, tokenizer)).answer(mixed_requests(6), max_new_tokens=9)
    assert found == engine.answer(mixed_requests(6), max_new_tokens=9)


def test_outputs_that_are_no_numbers_end_their_own_row_only(engine):
    rows = rows_of(engine, 3, max_new_tokens=6)
    expected = rows_of(engine, 3, max_new_tokens=6)
    run(engine, expected, at_once=3)
    batch = engine.decoding()
    batch.join(rows)
    spoilt = engine.model.lm_head.register_forward_hook(
        lambda _module, _inputs, logits: logits.index_fill(0, torch.tensor([1]), float("nan"))
    )
    batch.step()
    spoilt.remove()
    while batch.rows:
        batch.step()
    assert [row.finish_reason for row in rows] == ["length", "error", "length"]
    assert "'q1': behind" in str(rows[1].error)
    assert "no numbers any more, computed in float32" in str(rows[1].error)
    assert [rows[n].generated for n in (0, 2)] == [expected[n].generated for n in (0, 2)]


def test_a_row_that_cannot_be_drawn_for_ends_alone(engine):
    rows = rows_of(engine, 3, max_new_tokens=6, temperature=1.0, seed=5)
    expected = rows_of(engine, 3, max_new_tokens=6, temperature=1.0, seed=5)
    run(engine, expected, at_once=3)
    object.__setattr__(rows[1].prompt.sampling, "top_p", "most")
    run(engine, rows, at_once=3)
    assert rows[1].finish_reason == "error"
    assert "request 'q1' cannot be answered" in str(rows[1].error)
    assert [rows[n].generated for n in (0, 2)] == [expected[n].generated for n in (0, 2)]


def test_the_newest_tokens_slot_may_hold_no_number_of_who_was_there(engine):
    # What a slot held before is masked, which is a product with zero.
    rows = rows_of(engine, 2, max_new_tokens=6)
    batch = engine.decoding()
    batch.join(rows)
    with torch.inference_mode():
        batch._slots.layers[0].keys[1] = float("nan")
    batch.step()
    assert [row.finish_reason for row in rows] == [None, "error"]
    (late,) = rows_of(engine, 1, max_new_tokens=4)
    batch.join([late])
    while batch.rows:
        batch.step()
    assert rows[0].finish_reason == late.finish_reason == "length"


class TestSlots:
    @pytest.fixture
    def slots(self, engine) -> KVSlots:
        return KVSlots(engine.model.config.text_config, 512)

    def fill(self, slots: KVSlots, first: int, rows: int, length: int) -> torch.Tensor:
        states = torch.randn(rows, 2, length, 8)
        slots.begin_prefill(first)
        for layer in range(2):
            keys, values = slots.update(states, -states, layer)
            assert keys is states
            assert torch.equal(values, -states)
        return states

    def test_room_grows_and_shrinks_and_keeps_what_is_in_it(self, slots):
        slots.reserve(1, 10)
        first = self.fill(slots, 0, 1, 10)
        assert slots.layers[0].keys.shape == (4, 2, 64, 8)
        slots.reserve(5, 70)
        second = self.fill(slots, 1, 4, 70)
        assert slots.layers[0].keys.shape == (8, 2, 128, 8)
        for layer in slots.layers:
            assert torch.equal(layer.keys[0, :, :10], first[0])
            assert torch.equal(layer.values[1:5, :, :70], -second)
            assert not layer.keys[0, :, 10:].any()
        slots.reserve(5, 500)
        slots.reserve(5, 300)
        assert slots.num_columns == 512
        slots.reserve(5, 100, shrinks=True)
        assert slots.num_columns == 128
        assert torch.equal(slots.layers[1].keys[1:5, :, :70], second)

    def test_a_step_writes_each_row_at_its_own_place(self, slots):
        slots.reserve(3, 10)
        self.fill(slots, 0, 3, 4)
        new = torch.randn(3, 2, 1, 8)
        slots.begin_step(torch.tensor([4, 2, 7]), 8)
        keys, values = slots.update(new, -new, 0)
        assert keys.shape == values.shape == (3, 2, 8, 8)
        for row, place in enumerate((4, 2, 7)):
            assert torch.equal(keys[row, :, place], new[row, :, 0])
            assert torch.equal(values[row, :, place], -new[row, :, 0])
        assert slots.get_mask_sizes(1, 0) == (8, 0)

    def test_what_there_was_is_left_where_there_is_no_more_memory(self, slots, monkeypatch):
        slots.reserve(2, 10)
        states = self.fill(slots, 0, 2, 10)
        fit = type(slots.layers[0]).fit

        def refuse(layer: Any) -> None:
            if layer is slots.layers[1] and layer.plan.shape[1] > 64:
                raise torch.OutOfMemoryError("CUDA out of memory")
            fit(layer)

        monkeypatch.setattr(type(slots.layers[0]), "fit", refuse)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                slots.reserve(2, 100)
            slots.reserve(2, 20)
            assert slots.num_columns == 64
            for layer in slots.layers:
                assert layer.keys.shape == (4, 2, 64, 8)
                assert torch.equal(layer.keys[:2, :, :10], states)

    def test_rows_move_and_are_wiped(self, slots):
        slots.reserve(2, 10)
        states = self.fill(slots, 0, 2, 4)
        slots.move(1, 0, 4)
        slots.wipe(1)
        assert torch.equal(slots.layers[1].values[0, :, :4], -states[1])
        assert not slots.layers[1].keys[1].any()
        slots.drop()
        assert slots.num_columns == 0
        assert slots.layers[0].keys is None


def test_beams_are_those_of_generate(engine):
    requests = mixed_requests(4)
    texts = [generated_text(engine, request, 8, num_beams=3) for request in requests]
    assert texts != [generated_text(engine, request, 8) for request in requests]
    sampling = Sampling(max_new_tokens=8, num_beams=3)
    assert engine.answer(requests, batch_size=2, sampling=sampling) == texts


def test_draws_do_not_depend_on_neighbours(engine):
    sampling = Sampling(max_new_tokens=10, temperature=1.5, top_p=0.95, seed=11)
    requests = mixed_requests(8)
    alone = [engine.answer([request], sampling=sampling)[0] for request in requests]
    assert alone != engine.answer(requests, max_new_tokens=10)
    assert engine.answer(requests[::-1], batch_size=3, sampling=sampling) == alone[::-1]
    other = Sampling(max_new_tokens=10, temperature=1.5, top_p=0.95, seed=12)
    assert engine.answer(requests, sampling=other) != alone


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_done(engine):
    from vipllava.inference.protocol import PromptTooLong

    with pytest.raises(PromptTooLong, match=r"'far' has 5\d\d tokens, and the model's 512"):
        engine.answer([question(), question("far", "x" * 500)], max_new_tokens=9)
