"""The model's thread: deltas, their order and their end, whatever happens to whom."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine
from typing import Any

import pytest
import torch
from PIL import Image

from tests.inference.tiny_engine import (
    asked,
    generated_text,
    make_engine,
    mixed_requests,
    question,
)
from vipllava.inference.engine import Engine
from vipllava.inference.local_engine import LocalEngine, open_engine
from vipllava.inference.protocol import (
    Delta,
    EngineStopped,
    Generation,
    PromptTooLong,
    Sampling,
    collect,
)
from vipllava.types import ConfigError, Request, Turn, VipLlavaError


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Within a minute, or it hangs."""
    return asyncio.run(asyncio.wait_for(work, 60))


async def deltas_of(engine: LocalEngine, requests: list[Generation]) -> dict[str, list[Delta]]:
    found: dict[str, list[Delta]] = {each.request.key: [] for each in requests}
    async for delta in engine.generate(requests):
        found[delta.key].append(delta)
    return found


async def first_delta(stream) -> Delta:
    return await anext(aiter(stream))


def threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("vipllava-model")]


class Gate:
    """Holds the language model before a step until it is opened; counts the steps."""

    def __init__(self, engine: Engine) -> None:
        self.open, self.reached, self.calls = threading.Event(), threading.Event(), 0
        self.error: BaseException | None = None
        self.holds_from = 10**9
        self._hook = engine.model.model.language_model.register_forward_pre_hook(self._wait)

    def _wait(self, *_: Any) -> None:
        self.calls += 1
        if self.calls >= self.holds_from:
            self.reached.set()
            assert self.open.wait(30)
        if self.error is not None:
            raise self.error

    def remove(self) -> None:
        self._hook.remove()


@pytest.fixture
def gate(engine):
    gate = Gate(engine)
    yield gate
    gate.open.set()
    gate.remove()


def test_fifty_mixed_requests_whole_and_in_pieces(engine):
    requests = mixed_requests(50)
    lengths = [(3, 25, 11, 1, 40)[n % 5] for n in range(50)]
    expected = [generated_text(engine, r, n) for r, n in zip(requests, lengths, strict=True)]
    generations = [
        Generation(request, Sampling(max_new_tokens=n))
        for request, n in zip(requests, lengths, strict=True)
    ]

    async def main() -> None:
        local = LocalEngine(engine, max_batch_size=6, max_waiting=9)
        answers = await collect(local, generations)
        assert [answer.text for answer in answers] == expected
        reversed_answers = await collect(local, generations[::-1])
        assert [answer.text for answer in reversed_answers[::-1]] == expected
        # Several calls at once, as of a server's clients.
        halves = await asyncio.gather(
            deltas_of(local, generations[::2]), deltas_of(local, generations[1::2])
        )
        found = halves[0] | halves[1]
        assert ["".join(d.text for d in found[r.key]) for r in requests] == expected
        for deltas in found.values():
            assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
            assert deltas[-1].finish_reason in ("stop", "length")
            assert all(d.text for d in deltas[:-1])
            assert deltas[-1].usage is not None
        assert max(map(len, found.values())) > 5
        await local.close()

    run(main())
    assert threads() == []


def test_options_of_each_request_reach_its_own_answer(engine):
    request = mixed_requests(1)[0]
    whole = engine.answer([request], max_new_tokens=20)[0]
    stop = next(c for c in whole[2:] if c.isascii() and c.isprintable() and c not in whole[:2])
    hot = {"temperature": 1.5, "seed": 4, "max_new_tokens": 20}
    samplings = [
        Sampling(max_new_tokens=20),
        Sampling(max_new_tokens=20, stop=(stop,)),
        Sampling(**hot),
        Sampling(max_new_tokens=6, num_beams=3),
        Sampling(max_new_tokens=4, logprobs=2),
    ]
    generations = [
        Generation(Request(request.image, request.turns, f"k{n}"), sampling)
        for n, sampling in enumerate(samplings)
    ]

    async def main() -> None:
        local = open_engine(engine)
        greedy, stopped, drawn, beams, told = await collect(local, generations)
        assert greedy.text == whole
        assert (stopped.text, stopped.finish_reason) == (whole.split(stop)[0].strip(), "stop")
        assert drawn.text != whole
        assert drawn.text == engine.answer([request], sampling=Sampling(**hot))[0]
        assert beams.text == generated_text(engine, request, 6, num_beams=3)
        assert len(told.logprobs) == 4
        for logprob in told.logprobs:
            assert len(logprob.top) == 2
            assert logprob.top[0] == (logprob.token, logprob.logprob)  # greedy
        await local.close()

    run(main())


def test_cancelled_while_others_go_on(engine, gate):
    requests = asked(mixed_requests(3), max_new_tokens=12)
    whole = engine.answer(mixed_requests(3), max_new_tokens=12)
    gate.calls = 0

    async def main() -> None:
        local = LocalEngine(engine)
        found: dict[str, list[Delta]] = {each.request.key: [] for each in requests}
        async for delta in local.generate(requests):
            found[delta.key].append(delta)
            if delta.key == "q1" and len(found["q1"]) == 2:
                local.cancel("q1")
            local.cancel("nobody")
        assert found["q1"][-1].finish_reason == "cancelled"
        texts = ["".join(delta.text for delta in found[f"q{n}"]) for n in range(3)]
        assert [texts[0], texts[2]] == [whole[0], whole[2]]
        assert whole[1].startswith(texts[1])
        local.cancel("q1")  # it does not run any more
        # Who waits is ended, too, and has cost nothing.
        gate.calls, gate.holds_from = 0, 1
        running = asyncio.create_task(deltas_of(local, requests[:1]))
        await asyncio.to_thread(gate.reached.wait)
        waiting = asyncio.create_task(deltas_of(local, requests[1:]))
        await asyncio.sleep(0)
        local.cancel("q1")
        local.cancel("q2")
        gate.open.set()
        ended = {key: [d.finish_reason for d in deltas] for key, deltas in (await waiting).items()}
        assert ended == {"q1": ["cancelled"], "q2": ["cancelled"]}
        assert "".join(d.text for d in (await running)["q0"]) == whole[0]
        await local.close()

    run(main())


def test_cancelled_before_its_turn(engine, gate):
    requests = asked(mixed_requests(5), max_new_tokens=4)
    gate.calls, gate.holds_from = 0, 1

    async def main() -> None:
        local = LocalEngine(engine, max_waiting=2)
        stream = local.generate(requests)
        first = asyncio.create_task(anext(stream))
        await asyncio.to_thread(gate.reached.wait)  # the others wait
        local.cancel("q4")
        assert await first == Delta("q4", finish_reason="cancelled")
        gate.open.set()
        rest = [delta async for delta in stream]
        assert {d.key for d in rest if d.finish_reason} == {"q0", "q1", "q2", "q3"}
        assert not any(d.key == "q4" for d in rest)
        await local.close()

    run(main())


def test_who_leaves_the_stream_is_cancelled(engine, gate):
    requests = asked(mixed_requests(2), max_new_tokens=400)

    async def main() -> None:
        local = LocalEngine(engine)
        stream = local.generate(requests)
        await first_delta(stream)
        await stream.aclose()
        # The key is free again, and the model soon is.
        assert (await collect(local, asked(mixed_requests(1), max_new_tokens=3)))[0].text
        calls = gate.calls
        await asyncio.sleep(0.05)
        assert gate.calls == calls
        assert calls < 100
        await local.close()

    run(main())


def test_what_is_wrong_with_a_request_is_its_own_answer(engine):
    class Broken(Image.Image):
        def convert(self, *_: Any, **__: Any) -> Any:
            raise OSError("broken data stream")

    requests = [
        *asked(mixed_requests(2), max_new_tokens=6),
        Generation(question("long", "x" * 500), Sampling(max_new_tokens=6)),
        *asked(
            [Request(Broken(), [Turn("user", "?", has_image=True)], "broken")], max_new_tokens=6
        ),
        Generation(Request(None, [Turn("assistant", "?")], "roles"), Sampling(max_new_tokens=6)),
    ]

    async def main() -> None:
        local = LocalEngine(engine, max_waiting=1)
        found = await deltas_of(local, requests)
        texts = ["".join(d.text for d in found[key]) for key in ("q0", "q1")]
        assert texts == engine.answer(mixed_requests(2), max_new_tokens=6)
        (long,), (broken,), (roles,) = found["long"], found["broken"], found["roles"]
        assert long.finish_reason == broken.finish_reason == roles.finish_reason == "error"
        assert isinstance(long.error, PromptTooLong)
        assert "'long' has 5" in str(long.error)
        assert "512 positions" in str(long.error)
        assert (
            str(broken.error) == "request 'broken' cannot be encoded: OSError: broken data stream"
        )
        assert "roles are assistant" in str(roles.error)
        with pytest.raises(PromptTooLong):
            await collect(local, requests)
        await local.close()

    run(main())


def test_a_key_names_one_request(engine):
    (request,) = asked([question("k")], max_new_tokens=300)

    async def main() -> None:
        local = LocalEngine(engine)
        with pytest.raises(VipLlavaError, match="key 'k' names two requests"):
            await deltas_of(local, [request, request])
        stream = local.generate([request])
        await first_delta(stream)
        with pytest.raises(VipLlavaError, match="key 'k' names two requests"):
            await deltas_of(local, [request])
        await stream.aclose()
        assert await deltas_of(local, []) == {}
        await local.close()

    run(main())


def test_closed_while_answers_run(engine):
    requests = asked(mixed_requests(4), max_new_tokens=400)

    async def main() -> None:
        local = LocalEngine(engine, max_batch_size=2)
        streams = [local.generate([each]) for each in requests]
        await asyncio.gather(*(anext(stream) for stream in streams[:2]))
        rest = [asyncio.create_task(deltas_of(local, [each])) for each in requests[2:]]
        await asyncio.sleep(0)
        await local.close()
        for stream in streams[:2]:
            with pytest.raises(EngineStopped, match="the engine was closed"):
                async for _ in stream:
                    pass
        for task in rest:
            with pytest.raises(EngineStopped):
                await task
        with pytest.raises(EngineStopped, match="the engine was closed"):
            await collect(local, requests)
        await local.close()

    run(main())
    assert threads() == []


def test_a_model_that_fails_ends_all_streams(engine, gate, caplog):
    requests = asked(mixed_requests(3), max_new_tokens=50)

    async def main() -> None:
        local = LocalEngine(engine)
        gate.holds_from = 4
        tasks = [asyncio.create_task(deltas_of(local, [each])) for each in requests]
        await asyncio.to_thread(gate.reached.wait)
        gate.error = RuntimeError("device-side assert\nin a kernel")
        gate.open.set()
        failed = r"model has failed \(RuntimeError: device-side assert\): start again"
        for task in tasks:
            with pytest.raises(EngineStopped, match=failed):
                await task
        with pytest.raises(EngineStopped, match=failed):
            await collect(local, requests)
        await local.close()

    run(main())
    assert threads() == []
    assert "the thread of the model has failed" in caplog.text


def test_an_engine_that_nobody_closed_ends_with_it(engine):
    async def main() -> None:
        local = LocalEngine(engine)
        await collect(local, asked(mixed_requests(1), max_new_tokens=2))

    run(main())
    import gc

    gc.collect()
    assert threads() == []


def test_one_event_loop_after_the_other(engine):
    requests = asked(mixed_requests(2), max_new_tokens=5)
    local = LocalEngine(engine)
    whole = engine.answer(mixed_requests(2), max_new_tokens=5)
    for _ in range(2):
        assert [answer.text for answer in run(collect(local, requests))] == whole

    async def leave() -> None:
        await first_delta(local.generate(asked(mixed_requests(1), max_new_tokens=400)))

    run(leave())
    assert [answer.text for answer in run(collect(local, requests))] == whole
    run(local.close())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_makes_the_batch_smaller(engine, caplog, error):
    """Three rows are too many, whether they are read or continued."""

    def refuse(_module: Any, _inputs: Any, options: dict[str, Any]) -> None:
        if len(options["inputs_embeds"]) > 2:
            raise error

    requests = asked(mixed_requests(9), max_new_tokens=8)
    whole = engine.answer(mixed_requests(9), max_new_tokens=8)
    model = engine.model.model.language_model
    hook = model.register_forward_pre_hook(refuse, with_kwargs=True)

    async def main() -> None:
        local = LocalEngine(engine, max_batch_size=8)
        answers = await collect(local, requests)
        assert [answer.text for answer in answers] == whole
        await local.close()

    try:
        with caplog.at_level(logging.WARNING):
            run(main())
    finally:
        hook.remove()
    assert "from now on at most" in caplog.text


def test_a_request_too_large_even_alone_is_refused(engine, caplog):
    requests = asked([*mixed_requests(2), question("wide", "x" * 300)], max_new_tokens=6)
    whole = engine.answer(mixed_requests(2), max_new_tokens=6)

    def refuse(_module: Any, _inputs: Any, options: dict[str, Any]) -> None:
        if options["inputs_embeds"].shape[1] > 200:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model = engine.model.model.language_model
    hook = model.register_forward_pre_hook(refuse, with_kwargs=True)

    async def main() -> None:
        local = LocalEngine(engine)
        found = await deltas_of(local, requests)
        assert ["".join(d.text for d in found[key]) for key in ("q0", "q1")] == whole
        assert found["wide"][-1].finish_reason == "error"
        assert "request 'wide' does not fit into the memory of cpu" in str(found["wide"][-1].error)
        await local.close()

    try:
        run(main())
    finally:
        hook.remove()


def test_tokens_bound_what_runs_together(engine):
    sizes: list[int] = []
    model = engine.model.model.language_model
    hook = model.register_forward_pre_hook(
        lambda _module, _inputs, options: sizes.append(len(options["inputs_embeds"])),
        with_kwargs=True,
    )
    requests = asked([question(f"k{n}") for n in range(6)], max_new_tokens=20)

    async def main() -> None:
        # Each has some 40 ids and may have 20 more.
        local = LocalEngine(engine, max_batch_tokens=150)
        assert len(await collect(local, requests)) == 6
        await local.close()
        local = LocalEngine(engine, max_batch_tokens=1)
        assert len(await collect(local, requests)) == 6
        await local.close()

    try:
        run(main())
    finally:
        hook.remove()
    assert max(sizes) == 2


def test_an_image_asked_about_again_is_not_looked_at_again(parts):
    engine = make_engine(parts)
    requests = asked(mixed_requests(6), max_new_tokens=3)  # four have images

    async def main() -> None:
        local = LocalEngine(engine)
        await collect(local, requests)
        assert (engine.features.num_hits, engine.features.num_misses) == (0, 4)
        await collect(local, requests)
        assert (engine.features.num_hits, engine.features.num_misses) == (4, 4)
        await local.close()
        assert engine.features.num_bytes == 0

    run(main())


def test_who_reads_slowly_holds_nobody_up(engine):
    requests = asked(mixed_requests(2), max_new_tokens=60)

    async def main() -> None:
        local = LocalEngine(engine)
        slow = local.generate(requests[:1])
        first = await anext(slow)
        (answer,) = await collect(local, requests[1:])
        assert answer.text == engine.answer(mixed_requests(2)[1:], max_new_tokens=60)[0]
        rest = [delta async for delta in slow]
        whole = "".join(delta.text for delta in (first, *rest))
        assert whole == engine.answer(mixed_requests(1), max_new_tokens=60)[0]
        await local.close()

    run(main())


def test_sizes_must_mean_something(engine):
    with pytest.raises(ConfigError, match="max_batch_size=0, max_waiting=-1: must be at least 1"):
        LocalEngine(engine, max_batch_size=0, max_waiting=-1)
    assert threads() == []
