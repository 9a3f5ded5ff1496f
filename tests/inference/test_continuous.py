"""transformers' continuous batching with pictures, on the CPU: the texts of ``generate``."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine
from typing import Any

import pytest
import torch
import transformers

from tests.inference.tiny_engine import asked, generated_text, make_engine, mixed_requests
from vipllava.inference import continuous
from vipllava.inference.engine import Engine
from vipllava.inference.features import ImageFeatures, Picture
from vipllava.inference.local_engine import LocalEngine
from vipllava.inference.picture_ids import PictureIds
from vipllava.inference.protocol import (
    Delta,
    EngineStopped,
    Generation,
    Sampling,
    collect,
)
from vipllava.types import ConfigError, Request, VipLlavaError

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
    pytest.skip("older releases leave attention to nobody else", allow_module_level=True)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Within a minute, or it hangs."""
    return asyncio.run(asyncio.wait_for(work, 60))


@pytest.fixture(scope="module")
def local(engine):
    local = LocalEngine(engine, continuous=True, max_batch_size=6)
    yield local
    run(local.close())
    assert type(engine.model.get_input_embeddings()) is torch.nn.Embedding
    names = {thread.name for thread in threading.enumerate()}
    assert not {name for name in names if name.startswith("vipllava") or "generation" in name}


def test_fifty_mixed_requests_in_two_orders(engine, local):
    requests = mixed_requests(50)
    lengths = [(3, 25, 11, 1, 40)[n % 5] for n in range(50)]
    expected = [generated_text(engine, r, n) for r, n in zip(requests, lengths, strict=True)]
    generations = [
        Generation(request, Sampling(max_new_tokens=n))
        for request, n in zip(requests, lengths, strict=True)
    ]
    for order in (1, -1):
        answers = run(collect(local, generations[::order]))
        assert [answer.text for answer in answers[::order]] == expected
        reasons = {answer.finish_reason for answer in answers}
        assert reasons <= {"stop", "length"}
    # Twelve slots and more pictures than that: some have had the rows of others.


def test_streaming_stops_and_cancelling(engine, local):
    request = mixed_requests(1)[0]
    whole = engine.answer([request], max_new_tokens=30)[0]
    stop = next(c for c in whole[2:] if c.isascii() and c.isprintable() and c not in whole[:2])
    generations = [
        Generation(Request(request.image, request.turns, f"k{n}"), sampling)
        for n, sampling in enumerate(
            [Sampling(30), Sampling(30, stop=(stop,)), Sampling(400), Sampling(400)]
        )
    ]

    async def main() -> None:
        found: dict[str, list[Delta]] = {each.request.key: [] for each in generations}
        async for delta in local.generate(generations):
            found[delta.key].append(delta)
            if delta.key == "k2" and len(found["k2"]) == 3:
                local.cancel("k2")
                local.cancel("k3")
        texts = {key: "".join(d.text for d in deltas) for key, deltas in found.items()}
        assert texts["k0"] == whole
        assert len(found["k0"]) > 5
        assert texts["k1"] == whole.split(stop)[0].strip()
        reasons = [found[f"k{n}"][-1].finish_reason for n in range(4)]
        assert reasons == ["length", "stop", "cancelled", "cancelled"]
        assert found["k1"][-1].usage.completion_tokens < 30

    run(main())
    answers = run(collect(local, asked(mixed_requests(3), max_new_tokens=8)))
    assert [answer.text for answer in answers] == engine.answer(mixed_requests(3), max_new_tokens=8)


def test_what_it_cannot_do_goes_to_micro_batches(engine, local):
    requests = mixed_requests(4)
    samplings = [
        Sampling(max_new_tokens=9),
        Sampling(max_new_tokens=9, temperature=1.5, seed=4),
        Sampling(max_new_tokens=6, num_beams=3),
        Sampling(max_new_tokens=4, logprobs=1),
    ]
    pairs = zip(requests, samplings, strict=True)
    generations = [Generation(request, sampling) for request, sampling in pairs]
    pairs = zip(requests, samplings, strict=True)
    expected = [engine.answer([request], sampling=sampling)[0] for request, sampling in pairs]
    # Again and again: two threads have one network.
    for _ in range(20):
        answers = run(collect(local, generations))
        assert [answer.text for answer in answers] == expected
        assert len(answers[3].logprobs) == 4


def test_a_picture_asked_about_again_keeps_its_ids(engine, local):
    before = engine.features.num_misses
    requests = asked(mixed_requests(2), max_new_tokens=3)
    for _ in range(3):
        run(collect(local, requests))
    assert engine.features.num_misses - before <= 2


class TestPictureIds:
    @pytest.fixture
    def features(self) -> ImageFeatures:
        return ImageFeatures(
            lambda pixels: pixels.float().mean((1, 2, 3)).view(-1, 1, 1).expand(-1, 4, 32), 0
        )

    def test_rows_change_hands_and_ids_do_not(self, engine: Engine, features):
        pictures = [Picture.of(torch.full((3, 2, 2), n, dtype=torch.uint8)) for n in range(3)]
        ids = PictureIds(engine.model, features, num_slots=2)
        embed = engine.model.get_input_embeddings()
        first, second = ids.take(pictures[0]), ids.take(pictures[1])
        assert first is not None
        assert second is not None
        assert ids.take(pictures[0]) == first
        assert ids.take(pictures[2]) is None  # both are in use
        ids.give_back(pictures[0])
        assert ids.take(pictures[2]) is None
        ids.give_back(pictures[0])
        third = ids.take(pictures[2])
        assert third is not None
        everything = [*first, *second, *third]
        assert len(set(everything)) == 12
        assert min(everything) >= engine.model.config.text_config.vocab_size
        assert max(everything) < 2**31

        found = embed(torch.tensor([[5, *second], [6, *third]]))
        words = embed.words(torch.tensor([5, 6]))
        assert torch.equal(found[:, 0], words)
        assert found[0, 1:].unique().tolist() == [1.0]
        assert found[1, 1:].unique().tolist() == [2.0]
        ids.close()
        assert engine.model.get_input_embeddings() is embed.words


def test_auto_on_the_host_is_micro_batches(engine):
    local = LocalEngine(engine, continuous="auto")
    assert type(local._worker).__name__ == "MicroBatches"
    run(local.close())


@pytest.fixture
def on_cuda(engine, monkeypatch):
    """Have ``auto`` take the engine for one on CUDA; all else stays on the CPU."""

    class Cuda:
        type = "cuda"

    class Pretends:
        def __init__(self) -> None:
            self.device = Cuda()

        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

    make = continuous._make_manager
    monkeypatch.setattr(continuous, "_make_manager", lambda _, size: make(engine, size))
    return Pretends()


def test_auto_takes_it_where_it_answers_as_generate_does(on_cuda, caplog):
    with caplog.at_level(logging.INFO, "vipllava"):
        local = LocalEngine(on_cuda, continuous="auto", max_batch_tokens=1000)
    assert type(local._worker).__name__ == "ContinuousBatches"
    assert "its answers were found equal to those of generate()" in caplog.text
    run(local.close())


def test_auto_leaves_it_where_it_answers_otherwise(on_cuda, caplog, monkeypatch):
    take = PictureIds.take

    def wrong(self: PictureIds, picture: Picture) -> range | None:
        ids = take(self, picture)
        self._rows.mul_(-1)
        return ids

    monkeypatch.setattr(PictureIds, "take", wrong)
    local = LocalEngine(on_cuda, continuous="auto", max_batch_tokens=1000)
    assert type(local._worker).__name__ == "MicroBatches"
    assert (
        "micro-batches instead of continuous batching: continuous batching answers" in caplog.text
    )
    requests = asked(mixed_requests(2), max_new_tokens=4)
    answers = run(collect(local, requests))
    assert [each.text for each in answers] == on_cuda.answer(mixed_requests(2), max_new_tokens=4)
    run(local.close())
    with pytest.raises(VipLlavaError, match="where generate\\(\\) answers"):
        LocalEngine(on_cuda, continuous=True, max_batch_tokens=1000)


def test_what_does_not_go_with_it_is_named(parts):
    model, tokenizer = parts
    engine = make_engine((model, tokenizer))
    model.set_attn_implementation("eager")
    try:
        with pytest.raises(ConfigError, match="does not go with attn_implementation='eager'"):
            LocalEngine(engine, continuous=True)
    finally:
        model.set_attn_implementation("sdpa")


def test_a_request_that_cannot_be_handed_over_ends_alone(engine, local, monkeypatch, caplog):
    real, calls = local._worker._manager.add_request, []

    def add_request(*given: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("no such prompt")
        real(*given, **options)

    monkeypatch.setattr(local._worker._manager, "add_request", add_request)

    async def main() -> None:
        requests = asked(mixed_requests(2), max_new_tokens=3)
        with pytest.raises(VipLlavaError, match="no such prompt"):
            await collect(local, requests[:1])
        (answer,) = await collect(local, requests[:1])
        assert answer.text == generated_text(engine, requests[0].request, 3)
        assert not local._worker._running

    run(main())


def test_a_manager_that_fails_ends_all_streams(parts, caplog):
    engine = make_engine(parts)
    local = LocalEngine(engine, continuous=True)
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 5:
            raise RuntimeError("device-side assert")

    hook = engine.model.model.language_model.register_forward_pre_hook(fail)

    async def main() -> None:
        requests = asked(mixed_requests(3), max_new_tokens=50)
        with pytest.raises(VipLlavaError, match=r"device-side assert|has ended"):
            await collect(local, requests)
        while local._outbox.failure is None:  # its thread is seen to have ended soon
            await asyncio.sleep(0.01)
        with pytest.raises(EngineStopped, match="model has failed"):
            await collect(local, requests[:1])
        await local.close()

    try:
        run(main())
    finally:
        hook.remove()


def test_closed_while_answers_run(parts):
    local = LocalEngine(make_engine(parts), continuous=True, max_batch_size=2)

    async def main() -> None:
        streams = [local.generate([each]) for each in asked(mixed_requests(3), max_new_tokens=400)]
        await asyncio.gather(*(anext(stream) for stream in streams[:2]))
        waiting = asyncio.create_task(anext(streams[2]))
        await asyncio.sleep(0)
        await local.close()
        with pytest.raises(EngineStopped):
            await waiting
        for stream in streams[:2]:
            with pytest.raises(EngineStopped, match="the engine was closed"):
                async for _ in stream:
                    pass

    run(main())
