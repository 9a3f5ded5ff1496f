"""The stream of training: global batches in a fixed order, divided over ranks by position.

    order (order.py)        which samples, in which order           pure in (seed, epoch)
    plan (batching.py)      which of them make a global batch       pure in (seed, epoch)
    share (StepSampler)     this rank's rows of it                  by position only
    samples (in workers)    read, marked, encoded, collated
    StepLoader              stamps the denominator, counts what was consumed

Ranks and accumulation only divide: row ``p`` of a global batch goes to rank ``p % world_size``, and
a rank's rows are cut into ``accumulate`` micro-batches. The loader's unit is one rank's share of
one optimizer step, because the loss's denominator, the supervised tokens of the whole global batch,
must be known before the first backward pass of the step.

The last global batch of an epoch may be smaller. It has as many micro-batches on every rank as any
other (DeepSpeed counts them), so where it does not divide, rows of it are repeated with every label
ignored: each sample is learnt from exactly as often as the mix says, and no micro-batch is empty.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain, islice, pairwise
from typing import Any, Final

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vipllava.processes import signals_held, start_worker
from vipllava.stream.batching import BatchPlan, Cursor, GlobalBatch, Row
from vipllava.stream.collate import Collator, EncodedSample
from vipllava.stream.prefetch import ShardPrefetcher
from vipllava.stream.quarantine import BadSample, QuarantineLog
from vipllava.stream.ranks import Ranks
from vipllava.stream.visual_prompt_dataset import VisualPromptDataset
from vipllava.types import Batch, CheckpointError, ConfigError, VipLlavaError

log = logging.getLogger(__name__)

STATE_VERSION: Final = 2


@dataclass(frozen=True, slots=True)
class StepShare:
    """One rank's part of one optimizer step, still as items."""

    micro_batches: tuple[tuple[Row, ...], ...] = ()  # rows per micro-batch
    # Per micro-batch how many of its last rows are repeats without labels.
    repeats: tuple[int, ...] = ()
    num_samples: int = 0  # samples of the global batch, all ranks together
    after: Cursor = field(default_factory=Cursor)  # the place behind this step
    progress: float = 0.0  # share of the epoch's samples consumed when it is done
    error: Exception | None = None  # why there is no such part and none behind it


class StepSampler(Sampler[StepShare]):
    """This rank's share of every global batch, in ``accumulate`` micro-batches.

    Raises:
        ConfigError: the global batch does not divide by ranks and micro-batches.
    """

    def __init__(
        self, plan: BatchPlan, *, accumulate: int = 1, world_size: int = 1, rank: int = 0
    ) -> None:
        if plan.rows_per_batch % (accumulate * world_size):
            raise ConfigError(
                f"a global batch of {plan.rows_per_batch} does not divide by accumulate="
                f"{accumulate} x world_size={world_size}"
            )
        self.plan = plan
        self.accumulate = accumulate
        self.world_size = world_size
        self.rank = rank
        self.start = Cursor()
        self._prepared: Iterator[StepShare] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration (Lightning calls this)."""
        if epoch != self.start.epoch:
            self.start = Cursor(epoch)

    def __len__(self) -> int:
        """Return the optimizer steps that an epoch does not exceed."""
        return self.plan.max_steps()

    def share(self, batch: GlobalBatch) -> StepShare:
        """Return this rank's part of a global batch."""
        rows = batch.rows
        per_rank = max(-(-len(rows) // self.world_size), self.accumulate)
        places = range(self.rank, per_rank * self.world_size, self.world_size)
        # Sizes differ by at most one; equal in every full batch.
        cuts = [per_rank * number // self.accumulate for number in range(self.accumulate + 1)]
        parts = [places[a:b] for a, b in pairwise(cuts)]
        return StepShare(
            micro_batches=tuple(tuple(rows[p % len(rows)] for p in part) for part in parts),
            repeats=tuple(sum(p >= len(rows) for p in part) for part in parts),
            num_samples=sum(map(len, rows)),
            after=batch.after,
            progress=batch.progress,
        )

    def prepare(self) -> None:
        """Make the first share of the next iteration, which may have to plan a window of packs."""
        shares = self._shares()
        self._prepared = chain(list(islice(shares, 1)), shares)

    def __iter__(self) -> Iterator[StepShare]:
        """Yield this rank's shares of the epoch, from ``start`` on; an error is the last."""
        # A generator: torch makes more iterators than it goes through.
        prepared, self._prepared = self._prepared, None
        yield from self._shares() if prepared is None else prepared

    def _shares(self) -> Iterator[StepShare]:
        try:
            yield from map(self.share, self.plan.batches(self.start))
        except Exception as error:  # noqa: BLE001 - a rank that raised alone would leave the others
            yield StepShare(error=_sendable(error))


def _sendable(error: Exception) -> Exception:
    """Return an error that can be sent to another process, as not every one can."""
    if isinstance(error, VipLlavaError):
        return error
    return RuntimeError("".join(traceback.format_exception(error)))


@dataclass(slots=True)
class _Step:
    """What a worker makes of a share; an error travels as a value, torch would rewrite it."""

    share: StepShare
    batches: list[Batch]
    bad_samples: list[BadSample]
    truncated: list[str] = field(default_factory=list[str])  # samples that did not fit whole
    error: Exception | None = None
    num_supervised: int = 0

    def pin_memory(self) -> _Step:
        """Pin the batches (torch calls this in a thread of its own)."""
        self.batches = [batch.pin_memory() for batch in self.batches]
        return self


class _StepDataset(Dataset[Any]):
    """A rank's share of a step to its micro-batches; runs in the workers."""

    def __init__(self, dataset: VisualPromptDataset, collator: Collator) -> None:
        self.dataset = dataset
        self.collator = collator

    def __getitem__(self, share: StepShare) -> _Step:
        step = _Step(share, [], [], error=share.error)
        try:
            for rows, num_repeats in zip(share.micro_batches, share.repeats, strict=True):
                step.batches.append(self._batch(rows, num_repeats, step))
        except Exception as error:  # noqa: BLE001 - a rank that raised alone would leave the others
            step.error = _sendable(error)
        step.num_supervised = sum(batch.num_supervised for batch in step.batches)
        return step

    def _batch(self, rows: tuple[Row, ...], num_repeats: int, step: _Step) -> Batch:
        in_pack = self.collator.pack_length is not None
        packs: list[list[EncodedSample]] = []
        for row in rows:
            loaded = [self.dataset.load(item, in_pack=in_pack) for item in row]
            is_repeat = len(packs) >= len(rows) - num_repeats
            packs.append([s.without_labels() if is_repeat else s for s, _ in loaded])
            if not is_repeat:
                step.bad_samples += [bad for _, bad in loaded if bad is not None]
                step.truncated += [s.key for s, _ in loaded if s.encoded.is_truncated]
        batch = self.collator(packs)
        batch.num_repeats = sum(map(len, rows[len(rows) - num_repeats :]))
        return batch


class StepLoader:
    """Micro-batches in order, each stamped with the global batch's supervised tokens.

    Has a length, so Lightning fetches nothing ahead and ``state_dict`` counts what was consumed.
    The number of workers never changes what comes out.

    Lightning forgets to load the state of a loader that was made before the checkpoint was read
    (asking for ``estimated_stepping_batches`` makes it). So the data module saves and loads it,
    too; loading twice is loading once.

    Args:
        dataset: finished samples.
        sampler: plan and division.
        collator: makes the rows.
        num_workers: processes that make samples; torch gives each one thread. 0 makes them here.
        ranks: of the job; they sum numbers in every step, and end together.
        quarantine_log: where quarantined samples are written and counted.
        prefetcher: has remote shards fetched before the workers reach them.
        pin_memory: pin batches for the copy to a GPU.
        persistent_workers: keep the processes from one epoch to the next.

    Attributes:
        seconds_waited: how long the workers were waited for, all in all.
        began: the place where the step of the last micro-batch begins.
        num_truncated: samples since the job began that the length limit shortened, of all ranks.
    """

    def __init__(
        self,
        dataset: VisualPromptDataset,
        sampler: StepSampler,
        collator: Collator,
        *,
        num_workers: int = 0,
        ranks: Ranks | None = None,
        quarantine_log: QuarantineLog | None = None,
        prefetcher: ShardPrefetcher | None = None,
        pin_memory: bool = False,
        persistent_workers: bool = True,
    ) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.ranks = ranks or Ranks()
        self.quarantine_log = quarantine_log or QuarantineLog(None, dataset.policy)
        self.prefetcher = prefetcher
        self.seconds_waited = 0.0
        self.began = Cursor()
        self.num_truncated = 0
        self._loader: DataLoader[Any] = DataLoader(
            _StepDataset(dataset, collator),
            sampler=sampler,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=persistent_workers and num_workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=start_worker,
            # Its own generator: the loader would else draw from the global one on every epoch.
            generator=torch.Generator().manual_seed(0),
        )
        self._place = Cursor()  # of the step that is handed out
        self._micro_batches = 0  # of it that were handed out
        self._resume: tuple[Cursor, int] | None = None

    def __len__(self) -> int:
        """Return the micro-batches that an epoch does not exceed on this rank."""
        return len(self.sampler) * self.sampler.accumulate

    def __iter__(self) -> Iterator[Batch]:
        """Yield the epoch's micro-batches; after ``load_state_dict``, those not yet consumed.

        Raises:
            VipLlavaError: the first bad sample, or storage that failed for too long, with place and
                remedy; on every rank, so that none waits for the one that met it.
        """
        self._place, offset = Cursor(self.sampler.start.epoch), 0
        if self._resume is not None and self._resume[0].epoch == self._place.epoch:
            self._place, offset = self._resume
        self._resume, self._micro_batches = None, offset
        self.sampler.start = self._place
        self._prefetch()
        for step in self._steps():
            total = self._agree(step)
            self.began = self._place
            batches: list[Batch] = step.batches
            for number, batch in enumerate(batches[offset:], offset + 1):
                batch.num_supervised_global = total
                batch.progress = None if self.sampler.plan.exact else step.share.progress
                self._micro_batches = number
                if number == len(batches):
                    self._place, self._micro_batches = step.share.after, 0
                yield batch
            offset = 0
            self._prefetch()

    def _steps(self) -> Iterator[_Step]:
        steps: Iterator[_Step] | None = None
        while True:
            began = time.perf_counter()
            try:
                if steps is None:
                    self.sampler.prepare()  # storage may be waited for, and signals be heard
                    with signals_held():
                        steps = iter(self._loader)
                step = next(steps, None)  # raises where a worker was killed
            except Exception as error:  # noqa: BLE001 - told to the others, and raised, in _agree
                step = _Step(StepShare(), [], [], error=error)
            self.seconds_waited += time.perf_counter() - began
            if step is None:
                return
            yield step

    def _prefetch(self) -> None:
        if self.prefetcher is not None:
            self.prefetcher.consumed(self._place.epoch, self._place.samples)

    def _agree(self, step: _Step) -> int:
        """Return the global batch's supervised tokens, or fail on all ranks together."""
        num_mine = len(step.bad_samples) + self.quarantine_log.take_pending()
        error, step.error = step.error, None  # frame and error would hold each other
        try:
            self.quarantine_log.write(step.bad_samples)
        except VipLlavaError as unwritten:
            error = error or unwritten
        mine = (step.num_supervised, num_mine, len(step.truncated), int(error is not None))
        total, num_faults, num_truncated, num_failed = self.ranks.sum(mine)
        if num_failed:
            self.ranks.end_together(error)
        self.quarantine_log.count(num_faults, step.share.num_samples)
        if step.truncated and not self.num_truncated:
            log.warning(
                "%s does not fit into max_length and is shortened, the first of this run: more are "
                "only counted; `vipllava lint` names them all", step.truncated[0],
            )  # fmt: skip
        self.num_truncated += num_truncated
        return total

    def close(self) -> None:
        """End the workers; the next iteration starts new ones.

        Left to the garbage collector this takes five seconds of waiting.
        """
        # torch has no public way; Lightning does the same to the loaders it knows.
        iterator: Any = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            setattr(self._loader, "_iterator", None)  # noqa: B010 - private to torch's type

    def state_dict(self) -> dict[str, Any]:
        """Return what has been consumed, and of which data: a few numbers."""
        place, micro_batch = self._resume or (self._place, self._micro_batches)
        if place.epoch != self.sampler.start.epoch:  # the next one was announced, and has not begun
            place, micro_batch = Cursor(self.sampler.start.epoch), 0
        return {
            "version": STATE_VERSION,
            **self.identity(),
            **asdict(place),
            "micro_batch": micro_batch,
            "num_faults": self.quarantine_log.total,
            "num_samples_seen": self.quarantine_log.num_samples,
            "num_truncated": self.num_truncated,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind ``state`` at the next iteration of its epoch.

        Raises:
            CheckpointError: the state is of other data, another order or another version, or
                stands within a step; names each difference.
        """
        now = {"version": STATE_VERSION, **self.identity()}
        if different := list_differences(state, now):
            raise CheckpointError(
                "the data of this run is not that of the checkpoint; resume with the same data, "
                "seed and global batch, or start a new run:\n- " + "\n- ".join(different)
            )
        micro_batch = int(state["micro_batch"])
        if micro_batch >= self.sampler.accumulate:
            raise CheckpointError(
                f"the checkpoint stands {micro_batch} micro-batches into an optimizer step, this "
                f"run has {self.sampler.accumulate} per step; resume with the same ranks and "
                "micro-batch, or from a checkpoint at the end of a step"
            )
        place = Cursor(**{name: int(state[name]) for name in asdict(Cursor())})
        self.sampler.set_epoch(place.epoch)
        self._resume = (place, micro_batch)
        self.quarantine_log.total = int(state["num_faults"])
        self.quarantine_log.num_samples = int(state["num_samples_seen"])
        self.num_truncated = int(state.get("num_truncated", 0))  # older checkpoints have none

    def identity(self) -> dict[str, Any]:
        """Return what the stream depends on, see :func:`stream_identity`."""
        return stream_identity(self.dataset, self.sampler.plan)


def list_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe each value of ``now`` that was saved as another one."""
    return [
        f"{name}: saved {saved.get(name)!r}, now {value!r}"
        for name, value in now.items()
        if saved.get(name) != value
    ]


def stream_identity(dataset: VisualPromptDataset, plan: BatchPlan) -> dict[str, Any]:
    """Return what decides a stream: data, seed and plan, as plain values."""
    return {
        "data": {s.name: s.shards.fingerprint for s in dataset.sources},
        "seed": dataset.sample_encoder.seed,
        **plan.identity(),
    }
