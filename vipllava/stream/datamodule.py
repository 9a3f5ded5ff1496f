"""Wiring of one training stage's data for Lightning. What happens is in the other modules."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final, get_args

import lightning
import torch

from vipllava.config.batch import accumulation_steps
from vipllava.conversation.encode import ConversationEncoder
from vipllava.conversation.label_proof import prove_labels
from vipllava.files.cache import ShardCache
from vipllava.files.retries import Patience
from vipllava.shards.manifest import Manifest, load_manifest
from vipllava.stream.batching import Batching, BatchPlan, Cursor, SampleBatches
from vipllava.stream.collate import Collator
from vipllava.stream.image_transform import ImageTransform
from vipllava.stream.loader import StepLoader, StepSampler, list_differences, stream_identity
from vipllava.stream.order import (
    WINDOW_SAMPLES,
    Item,
    MixEntry,
    Part,
    SampleOrder,
    parse_mix,
    plan_parts,
)
from vipllava.stream.pack_planner import SharedPlans, plan_batches
from vipllava.stream.prefetch import ShardPrefetcher
from vipllava.stream.quarantine import QUARANTINE_FILE, BadSamplePolicy, OnFault, QuarantineLog
from vipllava.stream.ranks import Ranks, gather_objects
from vipllava.stream.sample_encoder import SampleEncoder, SampleSource
from vipllava.stream.visual_prompt_dataset import VisualPromptDataset
from vipllava.types import Batch, CheckpointError, ConfigError, Encoded
from vipllava.visual_prompts.policies import VisualPromptPolicy

log = logging.getLogger(__name__)

_SLOW_SAMPLE_S: Final = 60.0
"""How much longer than storage is tried one sample may take to be measured."""


class HeldOutLoader:
    """One rank's batches of the first samples of a data set, for the loss between training steps.

    A stream as training has it, always the same: in shard order, with the marks and wordings of
    epoch 0. A sample that cannot be read is an error, on every rank: evaluation never substitutes.

    ``max_samples`` None takes all of them. The ``num_workers`` loader processes end with each pass.
    """

    def __init__(
        self,
        source: SampleSource,
        sample_encoder: SampleEncoder,
        collator: Collator,
        *,
        micro_batch_size: int,
        max_samples: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        ranks: Ranks | None = None,
        num_workers: int = 0,
    ) -> None:
        self.num_samples = len(source) if max_samples is None else min(max_samples, len(source))
        part = Part(source.name, tuple(source.shards.shard_sizes), self.num_samples)
        order = SampleOrder([part], sample_encoder.seed, shuffle=False)
        plan = SampleBatches(order, world_size * micro_batch_size)
        # Lightning does not see its sampler, whose epoch it would set.
        self._steps = StepLoader(
            VisualPromptDataset([source], sample_encoder),
            StepSampler(plan, world_size=world_size, rank=rank),
            collator,
            num_workers=num_workers,
            persistent_workers=False,
            ranks=ranks,
        )

    def __len__(self) -> int:
        """Return the number of batches; the same on every rank."""
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._steps)


@dataclass(frozen=True, slots=True)
class ReplayedMicroBatch:
    """One micro-batch of a step made again, and its samples each in a batch of its own."""

    rank: int  # that it was of
    number: int  # among the rank's micro-batches of the step
    batch: Batch  # as it was, but for samples repeated to fill it up, which had no labels
    items: tuple[Item, ...]  # its samples
    single_samples: tuple[Batch, ...]  # a batch of each of them


@dataclass(eq=False, repr=False)
class VisualPromptDataModule(lightning.LightningDataModule):
    """Training data of one stage."""

    manifest: str | Path | None  # name in ``manifests_dir``, or path of a manifest of one's own
    manifests_dir: str | Path  # folder of the known manifests
    data_root: str | Path  # folder or URL that the manifests' patterns are relative to
    policies: Mapping[str, VisualPromptPolicy]  # visual-prompt policies by name
    conversation_encoder: ConversationEncoder  # conversations to ids and labels
    image_transform: ImageTransform  # images to pixels
    micro_batch_size: int  # rows per rank and forward pass: samples, or packs
    global_batch_size: int  # rows per optimizer step
    # Several data sets instead of ``manifest``: per name or path ``epochs`` or ``weight``.
    mix: Mapping[str, Mapping[str, Any]] | None = None
    samples_per_epoch: int | None = None  # size of an epoch mixed by weight
    batching: Batching = "shuffled"  # ``shuffled``, ``length_grouped`` or ``packed``
    pack_length: int = 4096  # ids of a pack
    max_images_per_pack: int = 16  # images of a pack at most
    window_samples: int = WINDOW_SAMPLES  # samples that are shuffled among each other
    on_fault: OnFault = "error"  # ``error``, or ``quarantine`` for substitutes
    max_fault_rate: float = 0.001  # share of bad samples above which quarantine gives up
    run_dir: str | Path | None = None  # where ``quarantine.jsonl`` goes
    cache_dir: str | Path | None = None  # where remote shards are kept
    cache_gb: float = 100.0  # size of that cache, 10^9 bytes
    # How long a file is tried that cannot be read or fetched; then the job ends.
    storage_patience_minutes: float = 10.0
    seed: int = 42  # of order, wordings and marks
    num_workers: int = 4  # loader processes per rank
    pad_to_multiple_of: int = 1  # row lengths are rounded up to a multiple of this
    num_proved: int = 16  # how many of the first samples get their labels proved before training
    # Manifest of samples for the loss between training steps, or None.
    held_out: str | Path | None = None
    held_out_samples: int | None = 1000  # only the first so many of them; None: all
    held_out_batch_size: int = 8  # samples of them per rank and forward pass

    def __post_init__(self) -> None:
        """Read the manifests and check the values; raises ConfigError."""
        super().__init__()
        if self.batching not in get_args(Batching):
            known = ", ".join(get_args(Batching))
            raise ConfigError(f"batching={self.batching}: expected one of {known}")
        entries = parse_mix(self.mix) if self.mix else {str(self.manifest): MixEntry(epochs=1.0)}
        self.manifests = [load_manifest(name, self.manifests_dir) for name in entries]
        names = [manifest.name for manifest in self.manifests]
        self.mix_entries = dict(zip(names, entries.values(), strict=True))
        if len(self.mix_entries) < len(entries):
            raise ConfigError(f"the mix names a data set twice: {', '.join(entries)}")
        self.held_out_manifest = (
            None if self.held_out is None else load_manifest(self.held_out, self.manifests_dir)
        )
        self.sample_encoder = SampleEncoder(
            self.policies, self.conversation_encoder, self.image_transform, self.seed
        )
        self.collator = self.sample_encoder.collator(
            multiple_of=self.pad_to_multiple_of,
            pack_length=self.pack_length if self.batching == "packed" else None,
        )
        self.bad_sample_policy = BadSamplePolicy(self.on_fault, self.max_fault_rate)
        self.patience = Patience(max_attempts=None, total_s=60 * self.storage_patience_minutes)
        self.cache: ShardCache | None = None
        if self.cache_dir is not None:
            self.cache = ShardCache(Path(self.cache_dir), int(self.cache_gb * 10**9), self.patience)
        self.dataset: VisualPromptDataset | None = None
        self.proved: list[tuple[Item, Encoded]] = []
        self._loader: StepLoader | None = None
        self._restored: dict[str, Any] | None = None
        self._num_shared = 0

    def setup(self, stage: str) -> None:
        """Open the shards and prove the labels of the first samples.

        Raises:
            ShardError: the data are missing, damaged or not what the manifest says.
            RecordError: one of the first samples breaks its schema and the policy is ``error``.
            VipLlavaError: labels do not cover exactly the answers, or another rank has an error.
        """
        with self._ranks().together():
            if self.dataset is None:
                self.dataset = self._open_and_prove()

    def _open_and_prove(self) -> VisualPromptDataset:
        dataset = self.open_dataset()
        self.proved = []
        for item in self.first_items(dataset, self.num_proved):
            _, good, _ = dataset.measure(item)
            sample = dataset.sources[good.part].sample(good.position, good.epoch_pass)
            turns, encoded = self.sample_encoder.encode_text(sample, good.epoch_pass)
            key = f"{sample.dataset}/{sample.key}"
            prove_labels(self.conversation_encoder, turns, encoded, key=key)
            self.proved.append((good, encoded))
        for source in dataset.sources:
            log.info("%s: %d samples", source.name, len(source))
        log.info("labels of %d samples proved", len(self.proved))
        return dataset

    def open_dataset(self) -> VisualPromptDataset:
        """Open the shards; raises what :func:`vipllava.shards.tars.open_shards` raises."""
        sources = [self._open(manifest) for manifest in self.manifests]
        return VisualPromptDataset(sources, self.sample_encoder, self.bad_sample_policy)

    def _open(self, manifest: Manifest) -> SampleSource:
        return SampleSource.open(
            manifest, self.data_root, self.seed, cache=self.cache, patience=self.patience
        )

    def first_items(self, dataset: VisualPromptDataset, count: int) -> list[Item]:
        """Return samples of epoch 0 in the order in which training meets them.

        With packing it is the order before packing: nothing is planned for this.
        """
        order = self._order(dataset)
        if self.batching == "packed":
            return order.epoch(0).items(slice(count))
        batches = self._plan(dataset, order).batches(Cursor())
        return list(islice((item for batch in batches for (item,) in batch.rows), count))

    def train_dataloader(self) -> StepLoader:
        """Return this rank's loader; its length is the epoch's number of micro-batches."""
        trainer: Any = self.trainer
        if self.dataset is None or trainer is None:
            raise ConfigError("the data module has no trainer; use Trainer.fit(..., datamodule=)")
        per_node = trainer.world_size // trainer.num_nodes
        accumulate = accumulation_steps(
            self.global_batch_size, self.micro_batch_size, per_node, trainer.num_nodes
        )
        if trainer.accumulate_grad_batches != accumulate:
            raise ConfigError(
                f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}; a global "
                f"batch of {self.global_batch_size} with micro-batches of {self.micro_batch_size} "
                f"on {trainer.world_size} ranks needs {accumulate}"
            )
        path = None if self.run_dir is None else Path(self.run_dir) / QUARANTINE_FILE
        quarantine_log = QuarantineLog(path, self.bad_sample_policy)
        order = self._order(self.dataset)
        ranks = self._ranks()
        shared = self._shared_plans(ranks.rank) if trainer.world_size > 1 else None
        plan = self._plan(self.dataset, order, quarantine_log if ranks.rank == 0 else None, shared)
        ranks.check_equal(stream_identity(self.dataset, plan), "data")
        log.info(
            "%s batches of %d %s, %d samples an epoch",
            self.batching, self.global_batch_size,
            "packs" if self.batching == "packed" else "samples", len(order),
        )  # fmt: skip
        self._loader = StepLoader(
            self.dataset,
            StepSampler(
                plan, accumulate=accumulate, world_size=trainer.world_size, rank=trainer.global_rank
            ),
            self.collator,
            num_workers=self.num_workers,
            ranks=ranks,
            quarantine_log=quarantine_log,
            prefetcher=ShardPrefetcher([s.shards for s in self.dataset.sources], order),
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )
        if self._restored is not None:
            self._loader.load_state_dict(self._restored)
        return self._loader

    def val_dataloader(self) -> HeldOutLoader | list[Any]:
        """Return this rank's held-out batches; none if no manifest names any."""
        trainer: Any = self.trainer
        if self.held_out_manifest is None:
            return []
        ranks = self._ranks()
        with ranks.together():
            source = self._open(self.held_out_manifest)
        ranks.check_equal({source.name: source.shards.fingerprint}, "held-out data")
        loader = HeldOutLoader(
            source,
            self.sample_encoder,
            replace(self.collator, pack_length=None),
            ranks=ranks,
            micro_batch_size=self.held_out_batch_size,
            max_samples=self.held_out_samples,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            num_workers=self.num_workers,
        )
        log.info("%s: %d held-out samples", source.name, loader.num_samples)
        return loader

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Copy pinned batches while the device still computes; Lightning would wait for them."""
        return batch.to(device, non_blocking=True)

    def replay(
        self, place: Mapping[str, int], data: Mapping[str, Any], *, world_size: int, accumulate: int
    ) -> list[ReplayedMicroBatch]:
        """Make the micro-batches of one step again, of every rank.

        Args:
            place: where the step begins, see :attr:`vipllava.stream.loader.StepLoader.began`.
            data: the stream that it was of, see its ``identity``.
            world_size: ranks that it was divided among.
            accumulate: micro-batches of each.

        Raises:
            CheckpointError: the data are others now; names each difference.
            VipLlavaError: see :meth:`open_dataset`.
        """
        self.dataset = dataset = self.dataset or self.open_dataset()
        plan = self._plan(dataset, self._order(dataset))
        now = json.loads(json.dumps(stream_identity(dataset, plan)))
        if different := list_differences(data, now):
            raise CheckpointError(
                "the data are not those of the refused step; pass the overrides that the run "
                "had:\n- " + "\n- ".join(different)
            )
        if (batch := next(plan.batches(Cursor(**place)), None)) is None:
            raise CheckpointError(f"no step of the data begins at {dict(place)}")
        in_pack = self.batching == "packed"
        one_sample = replace(self.collator, pack_length=None)
        found: list[ReplayedMicroBatch] = []
        for rank in range(world_size):
            sampler = StepSampler(plan, accumulate=accumulate, world_size=world_size, rank=rank)
            share = sampler.share(batch)
            parts = zip(share.micro_batches, share.repeats, strict=True)
            for number, (rows, repeats) in enumerate(parts):
                if not (rows := rows[: len(rows) - repeats]):
                    continue
                packs = [[dataset.load(item, in_pack=in_pack)[0] for item in row] for row in rows]
                items = tuple(item for row in rows for item in row)
                singles = tuple(one_sample([[sample]]) for pack in packs for sample in pack)
                found.append(ReplayedMicroBatch(rank, number, self.collator(packs), items, singles))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what has been consumed, for Lightning's checkpoint."""
        return {} if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind what a checkpoint says was consumed.

        Some strategies load a checkpoint before the loader is made, others after.

        Raises:
            CheckpointError: it is of other data; names each difference.
        """
        self._restored = state_dict
        if self._loader is not None:
            self._loader.load_state_dict(state_dict)

    def teardown(self, stage: str) -> None:
        """End the loader's workers."""
        if self._loader is not None:
            self._loader.close()

    def _order(self, dataset: VisualPromptDataset) -> SampleOrder:
        sizes = {source.name: source.shards.shard_sizes for source in dataset.sources}
        parts = plan_parts(sizes, self.mix_entries, self.samples_per_epoch)
        return SampleOrder(parts, self.seed, window_samples=self.window_samples)

    def _plan(
        self,
        dataset: VisualPromptDataset,
        order: SampleOrder,
        quarantine_log: QuarantineLog | None = None,
        shared: SharedPlans | None = None,
    ) -> BatchPlan:
        return plan_batches(
            self.batching,
            order,
            self.global_batch_size,
            dataset,
            pack_length=self.pack_length,
            max_images=self.max_images_per_pack,
            shared=shared,
            on_faults=None if quarantine_log is None else quarantine_log.add,
        )

    def _shared_plans(self, rank: int) -> SharedPlans | None:
        if self.batching != "packed":
            return None
        self._num_shared += 1  # another loader must not read the plans of this one
        distributed: Any = torch.distributed
        # A connection of its own: who waits for an answer on the job's keeps others waiting.
        store = distributed.group.WORLD.get_group_store().clone()
        store = distributed.PrefixStore(f"packs-{self._num_shared}", store)
        return SharedPlans(store, rank=rank, timeout_s=self.patience.total_s + _SLOW_SAMPLE_S)

    def _ranks(self) -> Ranks:
        trainer: Any = self.trainer
        if trainer is None or trainer.world_size == 1:
            return Ranks()
        return Ranks(trainer.global_rank, self._all_reduce_sum, gather_objects)

    def _all_reduce_sum(self, values: Sequence[int]) -> list[int]:
        strategy: Any = self.trainer.strategy  # pyright: ignore[reportOptionalMemberAccess]
        total = torch.tensor(values, dtype=torch.int64, device=strategy.root_device)
        return [int(value) for value in strategy.reduce(total, reduce_op="sum").tolist()]
