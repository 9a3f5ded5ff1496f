"""Data sets and the stream of training without configuration files, for notebooks and scripts.

``import vipllava as vl`` offers what is here and the package's own classes, see docs/api.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vipllava.checkpoints.loading import load_tokenizer
from vipllava.commands.inspect import look_at
from vipllava.config.batch import accumulation_steps
from vipllava.conversation.encode import TooLong
from vipllava.files.cache import ShardCache
from vipllava.files.retries import ONCE
from vipllava.models.building import ModelSpec, read_tower_config
from vipllava.models.towers import preprocessing_of
from vipllava.report.inspected import InspectedSample, RefusedSample
from vipllava.shards.manifest import MANIFEST_VERSION, Manifest, load_manifest, parse_manifest
from vipllava.stream.batching import Batching
from vipllava.stream.image_transform import ImageAspect, ImageTransform
from vipllava.stream.loader import StepLoader, StepSampler
from vipllava.stream.order import MixEntry, SampleOrder, parse_mix, plan_parts
from vipllava.stream.pack_planner import plan_batches
from vipllava.stream.quarantine import BadSamplePolicy, OnFault
from vipllava.stream.sample_encoder import SampleEncoder, SampleSource
from vipllava.stream.visual_prompt_dataset import VisualPromptDataset
from vipllava.training.job import conversation_encoder
from vipllava.types import ConfigError, Sample
from vipllava.visual_prompts.policies import POLICIES, VisualPromptPolicy


class Dataset(SampleSource):
    """One data set: its length, its samples by position, and what a model will see of each."""

    def __getitem__(self, position: int) -> Sample:
        """Return a parsed sample, still without marks.

        Raises:
            IndexError: there is none at this position.
            TypeError: ``position`` is no whole number.
            RecordError: the record breaks its kind.
        """
        if not isinstance(position, int):
            raise TypeError(f"position is {position!r}: take several by [data[i] for i in ...]")
        if not 0 <= position < len(self):
            raise IndexError(f"there is no sample {position} among {len(self)}")
        return self.sample(position)

    def trace(
        self, position: int, encoder: SampleEncoder, epoch: int = 0
    ) -> InspectedSample | RefusedSample:
        """Return what the stream makes of a sample: image with marks, tokens, which carry loss.

        A sample that training would refuse comes with the reason.

        Args:
            position: in shard order.
            encoder: see :func:`sample_encoder`.
            epoch: marks and words are others in each.
        """
        return look_at(self._seeded(encoder.seed), encoder, position, epoch)

    def _seeded(self, seed: int) -> SampleSource:
        return SampleSource(self.shards, self.record_kind, self.policy, seed, self.upright)


def open_dataset(
    source: Manifest | str | Path,
    root: str | Path = "data",
    *,
    manifests_dir: str | Path = "data_manifests",
    cache_dir: str | Path | None = None,
    cache_gb: float = 100.0,
    seed: int = 42,
) -> Dataset:
    """Open a data set.

    Args:
        source: a manifest, the path of one (``my_data.yaml``), a folder of tars, or the name of a
            manifest in ``manifests_dir``.
        root: folder or URL that a manifest's paths are relative to; a folder of tars needs none.
        manifests_dir: the folder of the known manifests.
        cache_dir: where tars at an address are kept; needed for those only.
        cache_gb: size of that cache, 10^9 bytes.
        seed: of the wordings of ``dataset[position]``; a stream has its encoder's.

    Raises:
        ManifestError: there is no such manifest, or it is not valid; lists the known ones.
        ShardError: the tars are missing, damaged, or not what the manifest says.
    """
    if isinstance(source, Manifest):
        manifest = source
    elif Path(source).is_dir():
        root = source
        values = {"stage": "task", "licence": "unknown", "shards": "*.tar"}
        values |= {"schema_version": MANIFEST_VERSION, "name": Path(source).resolve().name}
        manifest = parse_manifest(values, where=str(source))
    else:
        manifest = load_manifest(source, manifests_dir)
    if manifest.made_by == "sample_world":
        from vipllava.sample_world.build import ensure_sample_world

        ensure_sample_world(root)
    cache = None if cache_dir is None else ShardCache(Path(cache_dir), int(cache_gb * 10**9), ONCE)
    return Dataset.open(manifest, root, seed, cache=cache)


def sample_encoder(
    model: ModelSpec,
    *,
    tokenizer: Any = None,
    policies: Mapping[str, VisualPromptPolicy] | str = "published",
    image_aspect: ImageAspect = "pad",
    max_length: int = 2048,
    too_long: TooLong = "drop_turns",
    seed: int = 42,
) -> SampleEncoder:
    """Return what makes ids, labels and pixels for a model; loads no weights.

    Args:
        model: decides about template, image size and placeholders.
        tokenizer: the model's, with its image token; loaded if it is not given.
        policies: visual-prompt policies by name, or the name of a set in ``POLICIES``.
        image_aspect: how images become square: ``pad``, ``resize`` or ``square`` (cropped).
        max_length: greatest number of ids of a sample, the image's included.
        too_long: what becomes of longer conversations: they lose whole exchanges (``drop_turns``),
            are ``cut`` off as in the released training, or are an ``error``.
        seed: of wordings and marks, and of the order of a stream.

    Raises:
        CheckpointError: there is no tokenizer or no tower at the model's sources.
        ConfigError: the values contradict each other, or there is no such set of policies.
    """
    if isinstance(policies, str):
        if policies not in POLICIES:
            raise ConfigError(f"policies={policies!r} is not one of {', '.join(POLICIES)}")
        policies = POLICIES[policies]
    tokenizer = tokenizer or load_tokenizer(model)
    encoder = conversation_encoder(model, tokenizer, model.chat_template, max_length, too_long)
    preprocessing = preprocessing_of(read_tower_config(model))
    transform = ImageTransform(model.image_size, image_aspect, preprocessing)
    return SampleEncoder(policies, encoder, transform, seed)


def open_stream(
    datasets: Dataset | Sequence[Dataset],
    encoder: SampleEncoder,
    *,
    global_batch_size: int,
    micro_batch_size: int | None = None,
    mix: Mapping[str, Mapping[str, Any]] | None = None,
    samples_per_epoch: int | None = None,
    batching: Batching = "shuffled",
    pack_length: int = 4096,
    max_images_per_pack: int = 16,
    on_fault: OnFault = "error",
    num_workers: int = 0,
) -> StepLoader:
    """Return the stream of training in one process: the same batches as ``train.py`` makes.

    Iterating gives the micro-batches of the epoch of ``sampler.set_epoch``; after
    ``load_state_dict(state)`` it goes on behind what ``state_dict()`` says was consumed. For
    several processes, see :class:`vipllava.stream.datamodule.VisualPromptDataModule`.

    Args:
        datasets: one, or those of a mix.
        encoder: see :func:`sample_encoder`.
        global_batch_size: rows per optimizer step: samples, or packs.
        micro_batch_size: rows per batch; all of them if not given.
        mix: per data set ``epochs`` or ``weight``; each once if not given.
        samples_per_epoch: size of an epoch mixed by weight.
        batching: ``shuffled``, ``length_grouped`` or ``packed``.
        pack_length: ids of a pack.
        max_images_per_pack: images of a pack at most.
        on_fault: ``error``, or ``quarantine`` for substitutes.
        num_workers: processes that make samples; 0 makes them here.

    Raises:
        ConfigError: sizes that do not divide, or a mix of other data sets.
    """
    opened = [datasets] if isinstance(datasets, Dataset) else datasets
    accumulate = accumulation_steps(global_batch_size, micro_batch_size or global_batch_size, 1, 1)
    names = [each.name for each in opened]
    entries = parse_mix(mix) if mix else {name: MixEntry(epochs=1.0) for name in names}
    if sorted(entries) != sorted(names):
        raise ConfigError(f"mix={list(entries)} and datasets={names} must name each data set once")
    sources = [each._seeded(encoder.seed) for each in opened]
    samples = VisualPromptDataset(sources, encoder, BadSamplePolicy(on_fault))
    sizes = {each.name: each.shards.shard_sizes for each in opened}
    order = SampleOrder(plan_parts(sizes, entries, samples_per_epoch), encoder.seed)
    plan = plan_batches(
        batching,
        order,
        global_batch_size,
        samples,
        pack_length=pack_length,
        max_images=max_images_per_pack,
    )
    collator = encoder.collator(pack_length=pack_length if batching == "packed" else None)
    sampler = StepSampler(plan, accumulate=accumulate)
    return StepLoader(samples, sampler, collator, num_workers=num_workers)
