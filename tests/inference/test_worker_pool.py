"""A process per device: each request its answer or its error, whatever becomes of a process."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.fake_engine import MAX_POSITIONS, open_fake
from tests.tiny_model import save_tiny_export
from vipllava.files.pools import WorkerDied
from vipllava.inference.engine_settings import EngineSettings, LocalEngineSettings
from vipllava.inference.protocol import (
    Delta,
    EngineStopped,
    Generation,
    Sampling,
    SamplingError,
    TokenLogprob,
    Usage,
    collect,
)
from vipllava.inference.worker_pool import WorkerPool, device_names
from vipllava.inference.worker_process import Link
from vipllava.types import ConfigError, Request, Turn, VipLlavaError

ROOT = Path(__file__).resolve().parents[2]
BOUND_S = 60


def test_a_link_is_not_closed_amid_a_message():
    seen: list[str] = []

    class Pipe:
        def send_bytes(self, message: bytes) -> None:
            closing.start()
            closing.join(0.05)
            seen.append("sent")

        def close(self) -> None:
            seen.append("closed")

    link = Link(Pipe())  # pyright: ignore[reportArgumentType]
    closing = threading.Thread(target=link.close)
    link.send("ask", 1)
    closing.join()
    assert seen == ["sent", "closed"]


def question(text: str, image: Image.Image | None = None, key: str = "") -> Generation:
    return Generation(
        Request(image, [Turn("user", text, has_image=image is not None)], key or text), Sampling()
    )


def run(
    use: Callable[[WorkerPool], Coroutine[Any, Any, Any]], *devices: str, **options: Any
) -> Any:
    """Return what is made of a pool, whose processes have ended then."""

    async def main() -> Any:
        pool = WorkerPool(open_fake, devices or ("left", "right"), **options)
        try:
            return await use(pool)
        finally:
            await pool.close()
            await pool.close()

    try:
        return asyncio.run(main())
    finally:
        assert [each for each in psutil.Process().children() if "spawn_main" in _line(each)] == []


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


async def ask(pool: WorkerPool, *asked: Generation) -> list[Delta]:
    async with asyncio.timeout(BOUND_S):
        return [delta async for delta in pool.generate(asked)]


async def say(pool: WorkerPool, text: str, key: str = "") -> str:
    """Return an answer's text, after its device."""
    (answer,) = await collect(pool, [question(text, key=key)])
    return answer.text.partition(": ")[2]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(BOUND_S):
        while not condition():
            await asyncio.sleep(0.01)


def last(deltas: list[Delta], key: str) -> Delta:
    (found,) = [each for each in deltas if each.key == key and each.finish_reason is not None]
    return found


def test_deltas_are_those_of_the_worker_s_engine():
    async def use(pool: WorkerPool) -> None:
        assert pool.max_positions is None
        assert await ask(pool, question("hi")) == [
            Delta("hi", "left:", logprobs=(TokenLogprob("left:", -0.5),)),
            Delta("hi", " hi", logprobs=(TokenLogprob(" hi", -0.5),)),
            Delta("hi", finish_reason="stop", usage=Usage(2, 2)),
        ]
        assert pool.max_positions == MAX_POSITIONS
        assert pool.states == {"left": "ready", "right": "ready"}
        await pool.check()
        found = await ask(pool, question("refuse"), question("b"))
        error = last(found, "refuse").error
        assert type(error) is SamplingError
        assert (str(error), error.option) == ("top_p=7: expected a share", "top_p")
        assert last(found, "b").finish_reason == "stop"
        pixels = np.random.default_rng(0).integers(0, 256, (500, 700, 3), dtype=np.uint8)
        (answer,) = await collect(pool, [question("image", Image.fromarray(pixels))])
        assert answer.text.endswith(hashlib.sha256(pixels.tobytes()).hexdigest())
        assert await say(pool, "torch") == "False"

    run(use)


def test_the_least_busy_worker_is_asked():
    async def use(pool: WorkerPool) -> None:
        waiting = pool.generate([question("wait", key=str(number)) for number in range(5)])
        seen: set[str] = set()
        while len(seen) < 5:
            seen.add((await anext(waiting)).key)
        found = [await collect(pool, [question(f"q{number}")]) for number in range(3)]
        assert [answer.text for (answer,) in found] == ["right: q0", "right: q1", "right: q2"]
        await waiting.aclose()
        answers = await collect(pool, [question(f"q{number}") for number in range(40)])
        assert Counter(each.text.partition(":")[0] for each in answers) == {"left": 20, "right": 20}
        assert [each.text.split()[1] for each in answers] == [f"q{number}" for number in range(40)]

    run(use)


def test_cancel_and_leaving_reach_the_worker():
    async def use(pool: WorkerPool) -> None:
        asked = [question("wait", key=key) for key in "abc"]
        found: list[Delta] = []
        async for delta in pool.generate(asked):
            found.append(delta)
            if {each.key for each in found} == {"a", "b", "c"}:
                for key in ("a", "b", "c", "nobody"):
                    pool.cancel(key)
        assert {last(found, key).finish_reason for key in "abc"} == {"cancelled"}
        deltas = pool.generate(asked)
        await anext(deltas)
        await deltas.aclose()
        # Its keys are free again, and both workers are.
        assert last(await ask(pool, question("hi", key="a")), "a").finish_reason == "stop"
        assert [len(each.running) for each in pool._workers] == [0, 0]

    run(use)


def test_cancel_before_a_worker_is_there():
    async def use(pool: WorkerPool) -> list[Delta]:
        deltas = pool.generate([question("wait", key="a"), question("b")])
        first = asyncio.ensure_future(anext(deltas))
        await until(lambda: "a" in pool._asked)
        pool.cancel("a")
        return [await first, *[delta async for delta in deltas]]

    found = run(use)
    assert last(found, "a") == Delta("a", finish_reason="cancelled")
    assert last(found, "b").finish_reason == "stop"


def test_a_worker_that_dies_costs_its_own_requests(caplog: pytest.LogCaptureFixture):
    async def use(pool: WorkerPool) -> None:
        waiting = pool.generate([question("wait", key="left"), question("wait", key="right")])
        seen: list[Delta] = []
        while {each.key for each in seen} != {"left", "right"}:
            seen.append(await anext(waiting))
        # Both are as busy: the first one is asked.
        (error,) = [each.error for each in await ask(pool, question("die"))]
        assert type(error) is WorkerDied
        assert str(error) == (
            "left: its process was ended by SIGKILL (for want of memory most likely) while it "
            "answered; ask again"
        )
        async for delta in waiting:
            if delta.key == "left":
                break
        assert isinstance(delta.error, WorkerDied)
        assert (await anext(waiting)).text == "on "
        await waiting.aclose()
        assert await say(pool, "hi") == "hi"
        await until(lambda: pool.states == {"left": "ready", "right": "ready"})
        found = await collect(pool, [question("a"), question("b")])
        assert {each.text for each in found} == {"left: a", "right: b"}

    with caplog.at_level(logging.WARNING):
        run(use)
    assert caplog.messages == [
        "left: its process was ended by SIGKILL (for want of memory most likely); started again "
        "(1 of 3)"
    ]


def test_what_waits_is_answered_by_the_next_process():
    async def use(pool: WorkerPool) -> None:
        assert last(await ask(pool, question("die")), "die").finish_reason == "error"
        with pytest.raises(VipLlavaError, match=r"no worker is ready \(only: starting\)"):
            await pool.check()
        assert await say(pool, "hi") == "hi"

    run(use, "only")


def test_a_worker_is_started_again_a_few_times_only(caplog: pytest.LogCaptureFixture):
    async def use(pool: WorkerPool) -> None:
        for _ in range(4):  # an answer between deaths forgives them
            await ask(pool, question("die"))
            await say(pool, "hi")
        waiting = asyncio.ensure_future(ask(pool, *(question("exit", key=k) for k in "abc")))
        for found in ("a", "b", "c"):
            assert "exit code 3" in str(last(await waiting, found).error)
        await ask(pool, question("exit"))
        await until(lambda: pool.states == {"only": "ended"})
        for call in (pool.check(), ask(pool, question("hi"))):
            with pytest.raises(EngineStopped, match="no worker is left on only: the log says"):
                await call

    with caplog.at_level(logging.WARNING):
        run(use, "only", max_restarts=1)
    assert caplog.messages[-1] == (
        "only: its process ended with exit code 3; this device is given up"
    )


def test_what_waits_for_a_device_that_is_given_up_is_told():
    async def use(pool: WorkerPool) -> None:
        await pool.start()
        dying = asyncio.ensure_future(ask(pool, question("die")))
        await until(lambda: pool.states == {"only": "ended"} or "die" not in pool._asked)
        await dying
        with pytest.raises(EngineStopped):
            await ask(pool, question("hi"))

    run(use, "only", max_restarts=0)


@pytest.mark.parametrize("text", ["stop", "defect"])
def test_an_engine_that_stops_or_is_broken_is_opened_anew(
    text: str, caplog: pytest.LogCaptureFixture
):
    async def use(pool: WorkerPool) -> None:
        before = await say(pool, "pid")
        found = last(await ask(pool, question(text)), text)
        assert found.finish_reason == "error"
        assert await say(pool, "pid") != before

    with caplog.at_level(logging.WARNING):
        run(use, "only")
    assert "only: its process ended with exit code 1; started again (1 of 3)" in caplog.messages
    assert ("only: its engine has stopped" in caplog.text) == (text == "stop")


@pytest.mark.parametrize(
    ("device", "kind", "message"),
    [
        ("missing", ConfigError, "device='missing' is not there"),
        ("deadly", WorkerDied, "deadly: its process was ended by SIGKILL.* while it opened"),
    ],
)
def test_an_engine_that_does_not_open(device: str, kind: type[Exception], message: str):
    async def use(pool: WorkerPool) -> None:
        with pytest.raises(kind, match=message):
            await pool.start()
        with pytest.raises(EngineStopped, match="was closed"):
            await ask(pool, question("hi"))

    run(use, "fine", device)


def test_close_does_not_wait_for_an_engine_that_opens():
    async def use(pool: WorkerPool) -> None:
        starting = asyncio.ensure_future(pool.start())
        await until(lambda: len(pool._workers) == 2)
        await pool.close()
        with pytest.raises(asyncio.CancelledError):
            await starting

    run(use, "slow", "fine")


def test_close_ends_what_runs():
    async def use(pool: WorkerPool) -> None:
        deltas = pool.generate([question("wait", key=key) for key in "abc"])
        await anext(deltas)
        await pool.close()
        found = [delta async for delta in deltas]
        assert {last(found, key).finish_reason for key in "abc"} == {"cancelled"}

    run(use)


def test_two_requests_with_one_key():
    async def use(pool: WorkerPool) -> None:
        with pytest.raises(VipLlavaError, match="several requests have the key 'a'"):
            await ask(pool, question("a"), question("a"))
        assert await say(pool, "a") == "a"

    run(use, "only")


def test_an_image_that_cannot_be_read_any_more_is_its_request_s(tmp_path: Path):
    async def use(pool: WorkerPool) -> None:
        found = await ask(pool, question("image", broken), question("b"))
        assert "request 'image' cannot be handed to only" in str(last(found, "image").error)
        assert last(found, "b").finish_reason == "stop"
        assert pool._workers[0].running == {}

    path = tmp_path / "a.png"
    Image.effect_noise((200, 200), 50).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with Image.open(path) as broken:
        run(use, "only")


@pytest.mark.parametrize(("devices", "num_threads"), [("a", "6"), ("ab", "3"), ("abcd", "1")])
def test_workers_share_the_cores(devices: str, num_threads: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)

    async def use(pool: WorkerPool) -> None:
        assert await say(pool, "threads") == num_threads

    run(use, *devices)


def test_the_parent_s_log_has_what_workers_log(caplog: pytest.LogCaptureFixture):
    async def use(pool: WorkerPool) -> None:
        await say(pool, "log")

    with caplog.at_level(logging.WARNING):
        run(use, "only")
    (record,) = caplog.records
    assert (record.getMessage(), record.processName) == ("said by only", "vipllava only")


def test_workers_do_not_hear_what_asks_the_parent_to_stop():
    async def use(pool: WorkerPool) -> None:
        before = await say(pool, "pid")
        for number in (signal.SIGINT, signal.SIGHUP):
            os.kill(int(before), number)
        # Of this process it would be the pool's own.
        subprocess.run(["kill", "-TERM", before], check=True)
        assert await say(pool, "pid") == before

    run(use, "only")


_PARENT = """
import asyncio
from tests.fake_engine import open_fake
from vipllava.inference.worker_pool import WorkerPool

async def main():
    pool = WorkerPool(open_fake, ["a", "b"])
    await pool.start()
    print(*(each.process.pid for each in pool._workers), flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_workers_end_with_a_parent_that_is_killed():
    command = [sys.executable, "-c", _PARENT]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [psutil.Process(int(each)) for each in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.kill()
    ends = time.monotonic() + BOUND_S
    while any(each.is_running() and each.status() != "zombie" for each in workers):
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("0", ("cuda:0",)),
        ("0, 2", ("cuda:0", "cuda:2")),
        ("cuda:1,cuda:0", ("cuda:1", "cuda:0")),
        ("cpu,cpu", ("cpu", "cpu")),
    ],
)
def test_names_of_devices(text: str, names: tuple[str, ...]):
    assert device_names(text) == names


@pytest.mark.parametrize("text", ["", "0,", "0,0", "0,cuda:0"])
def test_devices_that_are_none(text: str):
    with pytest.raises(ConfigError, match=f"devices={text}: expected different ones"):
        device_names(text)


def test_a_pool_without_devices():
    with pytest.raises(ConfigError, match="devices is empty"):
        WorkerPool(open_fake, [])


@pytest.mark.slow
def test_two_workers_with_a_model_answer_as_one_engine(tiny_sources: Any, tmp_path: Path):
    from vipllava.inference.engine import Engine

    export = save_tiny_export(tiny_sources, tmp_path / "export")
    pictures = np.random.default_rng(0).integers(0, 256, (12, 40, 60, 3), dtype=np.uint8)
    requests = [
        Request(
            Image.fromarray(pixels),
            [Turn("user", "Look at it. " * (n % 3) + f"What is {n}?", has_image=True)],
            f"q{n}",
        )
        for n, pixels in enumerate(pictures)
    ]
    expected = Engine.from_checkpoint(export, "cpu").answer(requests, max_new_tokens=6)
    assert len(set(expected)) > 3

    async def main() -> tuple[list[str], set[str]]:
        opener = LocalEngineSettings(EngineSettings(str(export)))
        pool = WorkerPool(opener, ["cpu", "cpu"])
        asked = [Generation(each, Sampling(max_new_tokens=6)) for each in requests]
        try:
            answers = await collect(pool, asked)
            assert pool.max_positions == 512
            assert pool.states == {"cpu (worker 0)": "ready", "cpu (worker 1)": "ready"}
            endless = [replace(each, sampling=Sampling(max_new_tokens=200)) for each in asked]
            deltas = pool.generate(endless)
            await anext(deltas)
            await deltas.aclose()
            again = await collect(pool, asked[:2])
        finally:
            await pool.close()
        return [each.text.strip() for each in answers], {each.text.strip() for each in again}

    texts, again = asyncio.run(main())
    assert texts == expected
    assert again <= set(expected)
