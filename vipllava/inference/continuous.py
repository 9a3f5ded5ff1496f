"""Greedy answers by transformers' continuous batching: paged keys and values, prefixes shared.

It takes ids only; pictures have ids of their own (:mod:`vipllava.inference.picture_ids`). Its one
generator is shared by all requests, and among equal likelihoods it draws where ``generate`` takes
the first; so what is drawn, searched with beams or told with log probabilities goes to
micro-batches beside it, over the same weights.
"""

from __future__ import annotations

import functools
import heapq
import logging
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import transformers
from PIL import Image
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from vipllava.inference.choosing import OF_THE_DEVICE
from vipllava.inference.engine import Engine
from vipllava.inference.micro_batches import affordable_tokens
from vipllava.inference.picture_ids import PictureIds
from vipllava.inference.protocol import Delta, EngineStopped, Generation, Sampling
from vipllava.inference.streams import Job, Outbox, Worker
from vipllava.types import ConfigError, Request, Turn, VipLlavaError, first_line

logger = logging.getLogger(__name__)

_SPARE_SLOTS: Final = 16  # for pictures of requests that have ended
_MEMORY_SHARE: Final = 0.6  # of what is free on a GPU; micro-batches take of the rest
_HOST_TOKENS: Final = 512  # read at once on a host, where transformers makes a mask of them all
_PAGE: Final = 256
_POLL_S: Final = 0.1
_START_S: Final = 300.0  # for the check's answers: kernels may have to be compiled first
_CHECK_TOKENS: Final = 16


@dataclass(slots=True)
class _Running:
    job: Job
    num_seen: int = 0  # tokens that were handed over


class ContinuousBatches:
    """transformers' manager behind the workers' protocol.

    Args:
        engine: its model gets another embedding until this ends.
        outbox: takes the deltas.
        max_batch_size: answers that run together.
        open_others: opens who answers what this does not, when it is first needed.

    Raises:
        ConfigError: the model's attention, or where it lies, does not go with it.
    """

    def __init__(
        self,
        engine: Engine,
        outbox: Outbox,
        max_batch_size: int,
        open_others: Callable[[], Worker],
    ) -> None:
        check_model(engine)
        self.outbox = outbox
        self._engine, self._max_rows = engine, max_batch_size
        self._open_others, self._others = open_others, None
        self._condition = threading.Condition()
        self._waiting: list[Job] = []  # a heap
        self._running: dict[str, _Running] = {}
        self._num_asked = 0
        self._is_stopping = False
        with ExitStack() as stack:
            num_slots = max_batch_size + _SPARE_SLOTS
            self._pictures = PictureIds(engine.model, engine.features, num_slots)
            stack.callback(self._pictures.close)
            stack.enter_context(_one_at_a_time(engine.model.model.language_model))
            self._manager = _make_manager(engine, max_batch_size)
            self._undo = stack.pop_all()
        self._threads = [
            threading.Thread(target=work, name=f"vipllava-model-{name}", daemon=True)
            for name, work in (("feed", self._feed), ("read", self._read))
        ]
        self._threads[0].start()

    def submit(self, job: Job) -> None:
        """Take a request whose prompt is encoded."""
        row = job.row
        assert row is not None
        sampling = row.prompt.sampling
        if not sampling.is_greedy or sampling.num_beams > 1 or sampling.logprobs is not None:
            if self._others is None:
                self._others = self._open_others()
            self._others.submit(job)
            return
        with self._condition:
            heapq.heappush(self._waiting, job)
            self._condition.notify()

    def wake(self) -> None:
        """Look at once for requests that were cancelled."""
        if self._others is not None:
            self._others.wake()
        with self._condition:
            gone = [job for job in self._waiting if job.is_cancelled]
            self._waiting = [job for job in self._waiting if not job.is_cancelled]
            heapq.heapify(self._waiting)
            for name, running in list(self._running.items()):
                if running.job.is_cancelled:
                    self._manager.cancel_request(name)
                    self._forget(name)
                    gone.append(running.job)
            for job in gone:
                if job.row is not None:
                    job.row.end("cancelled")
            self._send(gone)
            self._condition.notify()

    def stop(self) -> None:
        """End soon."""
        if self._others is not None:
            self._others.stop()
        with self._condition:
            self._is_stopping = True
            for name in list(self._running):  # else the manager would finish them first
                self._manager.cancel_request(name)
                self._forget(name)
            self._condition.notify()

    def join(self) -> None:
        """Wait until the threads have ended."""
        if self._others is not None:
            self._others.join()
        for thread in self._threads:
            if thread is not threading.current_thread() and thread.ident is not None:
                thread.join()

    def _feed(self) -> None:
        """Hand requests to the manager, in their order, as long as there is room."""
        try:
            # A thread is a daemon where the one that starts it is: else a process that forgets to
            # close this would wait for it for ever.
            self._manager.start()
            self._threads[1].start()
            while (job := self._next()) is not None:
                try:
                    self._ask(job)
                except OF_THE_DEVICE:
                    raise
                except Exception as defect:  # noqa: BLE001  # of this request alone; logged there
                    self._give_up(job, defect)
        except BaseException as error:  # whatever it was: nobody may wait for ever
            logger.exception("continuous batching has failed")
            self._fail(error)
        finally:
            self._manager.stop(block=True)
            if self._others is not None:
                self._others.join()
            self._undo.close()

    def _next(self) -> Job | None:
        """Wait for a request that may join; None when there will be none."""
        with self._condition:
            while not self._is_stopping:
                if self._waiting and len(self._running) < self._max_rows:
                    return heapq.heappop(self._waiting)
                self._condition.wait()
        return None

    def _give_up(self, job: Job, defect: Exception) -> None:
        with self._condition:
            for name in [name for name, each in self._running.items() if each.job is job]:
                self._forget(name)
            assert job.row is not None
            job.row.fail(defect)
            self._send([job])

    def _ask(self, job: Job) -> None:
        row = job.row
        assert row is not None
        ids, picture = list(row.prompt.ids), row.prompt.picture
        if picture is not None:
            own = self._pictures.take(picture)
            assert own is not None  # there are more slots than rows
            start = ids.index(self._engine.model.config.image_token_id)
            ids[start : start + len(own)] = own
        with self._condition:  # so that who cancels or stops sees it
            self._num_asked += 1
            name = f"{self._num_asked}"
            self._running[name] = _Running(job)
            if job.is_cancelled or self._is_stopping:
                self._forget(name)
                row.end("cancelled")
                self._send([job])
                return
            self._manager.add_request(
                ids,
                request_id=name,
                max_new_tokens=row.prompt.sampling.max_new_tokens,
                streaming=True,
            )

    def _read(self) -> None:
        """Take what the manager has worked out."""
        try:
            while not self._is_stopping:
                found = list(self._results())
                with self._condition:
                    self._send([job for each in found if (job := self._take(each)) is not None])
                    self._condition.notify()
                if not found and not self._manager.is_running() and not self._is_stopping:
                    raise RuntimeError("the thread of continuous batching has ended")
        except BaseException as error:
            logger.exception("continuous batching has failed")
            self._fail(error)

    def _results(self) -> Iterator[Any]:
        result = self._manager.get_result(timeout=_POLL_S)
        while result is not None:
            yield result
            result = self._manager.get_result(timeout=0)

    def _take(self, result: Any) -> Job | None:
        """Return whose answer has gone on, or ended."""
        running = self._running.get(result.request_id)
        if running is None:  # it was cancelled, or has met a stop string
            return None
        job = running.job
        assert job.row is not None
        for token in result.generated_tokens[running.num_seen :]:
            running.num_seen += 1
            if job.row.finish_reason is None:
                job.row.push(token)
        if job.row.finish_reason is None and result.error is not None:
            said = f"request {job.key!r} was given up by continuous batching: {result.error}"
            job.row.end("error", VipLlavaError(said))
        if job.row.finish_reason is not None:
            if not result.is_finished():
                self._manager.cancel_request(result.request_id)
            self._forget(result.request_id)
        return job

    def _forget(self, name: str) -> None:
        row = self._running.pop(name).job.row
        if row is not None and row.prompt.picture is not None:
            self._pictures.give_back(row.prompt.picture)

    def _send(self, jobs: list[Job]) -> None:
        # A job may stand there twice, with two tokens; then the first time has both.
        deltas = [(job, job.delta()) for job in dict.fromkeys(jobs)]
        self.outbox.send((job, delta) for job, delta in deltas if delta is not None)

    def _fail(self, error: BaseException) -> None:
        said = f"{type(error).__name__}: {first_line(error)}"
        self.outbox.end(EngineStopped(f"the engine's model has failed ({said}): start again"))
        self.stop()


def check_model(engine: Engine) -> None:
    """Raise ConfigError where a model does not go with continuous batching."""
    attention = engine.model.config.text_config._attn_implementation
    if attention != "sdpa" and not attention.startswith("flash_attention"):
        raise ConfigError(
            f"continuous batching does not go with attn_implementation={attention!r}: use sdpa or "
            "flash_attention_2"
        )
    if len(set((getattr(engine.model, "hf_device_map", None) or {}).values())) > 1:
        raise ConfigError("continuous batching wants the model on one device, not on several")


@contextmanager
def _one_at_a_time(module: Any) -> Generator[None]:
    """Have threads wait for each other before a module's forward pass.

    transformers' decorators keep an option of a call, that of causal masks among them, in the
    module's config while it runs: two at once read each other's, and may leave it there.
    """
    forward, lock = module.forward, threading.Lock()

    @functools.wraps(forward)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return forward(*args, **kwargs)

    module.forward = alone
    try:
        yield
    finally:
        del module.forward
        if module.forward != forward:  # it had been replaced before, by accelerate say
            module.forward = forward


def _make_manager(engine: Engine, max_batch_size: int) -> Any:
    settings: dict[str, Any] = {"page_size": _PAGE, "auto_switch_to_flash": False}
    if engine.device.type == "cuda":
        settings["max_memory_percent"] = _MEMORY_SHARE
    else:
        most = min(max_batch_size * engine.max_positions, affordable_tokens(engine))
        settings |= {"num_blocks": 2 + -(-most // _PAGE), "max_batch_tokens": _HOST_TOKENS}
    config = GenerationConfig(
        do_sample=False,
        eos_token_id=list(engine.encoder.stop_token_ids),
        pad_token_id=engine.tokenizer.pad_token_id,
    )
    # It has a handler of its own, and tells every choice of these settings.
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.WARNING)
    attention = engine.model.config._attn_implementation
    manager = engine.model.init_continuous_batching(
        generation_config=config, continuous_batching_config=ContinuousBatchingConfig(**settings)
    )
    if engine.model.config._attn_implementation != attention:
        engine.model.set_attn_implementation(attention)
        raise ConfigError(
            f"continuous batching of transformers {transformers.__version__} leaves the model's "
            "attention to nobody else: install 5.23 or later"
        )
    manager.warmup()
    return manager


def open_continuous(
    engine: Engine, outbox: Outbox, max_batch_size: int, open_others: Callable[[], Worker]
) -> ContinuousBatches:
    """Open continuous batching, and see that it answers as ``generate`` does.

    Raises:
        VipLlavaError: it does not, or cannot be had; what was tried is closed.
    """
    asked = [Generation(each, Sampling(max_new_tokens=_CHECK_TOKENS)) for each in _questions()]
    prompts = [engine.prompt(each) for each in asked]
    expected = [row.take()[0] for row in engine.search([engine.row(each) for each in prompts])]
    probe = _Probe()
    try:
        worker = ContinuousBatches(engine, probe, max_batch_size, open_others)
    except VipLlavaError:
        raise
    except Exception as error:  # of a library whose interface changes between releases
        said = f"{type(error).__name__}: {first_line(error)}"
        raise VipLlavaError(f"continuous batching cannot be had ({said})") from error
    jobs = [Job(n, each.key, probe.stream, engine.row(each)) for n, each in enumerate(prompts)]
    try:
        found = probe.answers(worker, jobs)
        for question, wanted, text in zip(asked, expected, found, strict=True):
            if wanted != text:
                raise VipLlavaError(
                    f"continuous batching answers {text!r} where generate() answers {wanted!r} to "
                    f"{question.request.turns[-1].text!r} about a picture"
                )
    except BaseException:
        worker.stop()
        worker.join()
        raise
    worker.outbox = outbox
    return worker


def _questions() -> list[Request]:
    """Small pictures that differ, and questions of several lengths about them."""
    places = np.indices((48, 64))
    questions = ("What is this?", "Describe the picture in one sentence, please.", "Which colour?")
    requests: list[Request] = []
    for n in range(6):
        shades = [places[n % 2] * (4 - n % 3), places.sum(0) * 2, np.full((48, 64), 40 * n)]
        image = Image.fromarray(np.stack(shades, axis=-1).astype(np.uint8))
        turns = [Turn("user", questions[n % 3], has_image=True)]
        requests.append(Request(image, turns, f"check-{n}"))
    return requests


class _Probe(Outbox):
    """Takes the check's deltas without an event loop."""

    def __init__(self) -> None:
        super().__init__()
        self.stream: Any = None  # that nobody reads
        self._events: queue.Queue[Delta | EngineStopped] = queue.Queue()

    def send(self, deltas: Any) -> None:
        for _, delta in deltas:
            self._events.put(delta)

    def end(self, failure: EngineStopped) -> None:
        super().end(failure)
        self._events.put(failure)

    def answers(self, worker: Worker, jobs: list[Job]) -> list[str]:
        """Return the jobs' answers."""
        texts, num_left = {job.key: "" for job in jobs}, len(jobs)
        for job in jobs:
            worker.submit(job)
        while num_left:
            try:
                event = self._events.get(timeout=_START_S)
            except queue.Empty:
                raise VipLlavaError(
                    f"continuous batching gave nothing for {_START_S:g} s"
                ) from None
            if isinstance(event, EngineStopped):
                raise VipLlavaError(f"continuous batching does not run here: {event}")
            if event.error is not None:
                raise event.error
            texts[event.key] += event.text
            num_left -= event.finish_reason is not None
        return list(texts.values())
