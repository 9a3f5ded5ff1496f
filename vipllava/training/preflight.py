"""A job looked over before it starts: its data, what it needs, what it will take.

``train.py preflight=true`` does all of it and stops; no weights are read, and the machine need not
be there. ``look_ahead`` says the main numbers at every start.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from omegaconf import DictConfig, OmegaConf

from vipllava.checkpoints.loading import load_tokenizer
from vipllava.config import hardware
from vipllava.config.hardware import SHM, SHM_REMEDY
from vipllava.config.schema import AUTO, spell
from vipllava.forecast import job as forecasts
from vipllava.forecast import memory as memory_forecast
from vipllava.forecast.architecture import Architecture, is_published, sizes_of_published
from vipllava.forecast.memory import Setup, device_memory
from vipllava.ingest.lint.findings import LintLimits
from vipllava.ingest.lint.run import lint_shards
from vipllava.models.building import ModelSpec
from vipllava.models.hub_models import UnreachableError
from vipllava.shards.manifest import is_remote, load_manifest
from vipllava.stream.datamodule import VisualPromptDataModule
from vipllava.stream.order import Part, SampleOrder, parse_mix, plan_parts
from vipllava.stream.visual_prompt_dataset import VisualPromptDataset
from vipllava.training import job
from vipllava.training.optim import uses_fused_adamw
from vipllava.types import CheckpointError, VipLlavaError

_PACK_FILL: Final = 0.97  # of a pack's tokens, as packing reaches


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What is known of a job before it starts."""

    setup: Setup  # how it trains
    plan: forecasts.RunPlan  # epochs, batch and device
    corpus: forecasts.Corpus  # an epoch of its data; assumed where they could not be opened
    forecast: forecasts.Forecast  # what it will need and take
    capacity: float | None  # bytes of a device, or None where that is not known
    host_capacity: float | None  # bytes of a node, beside its devices; None likewise
    num_blocks: int  # decoder blocks of the language model
    asked_checkpointing: bool | int | str  # ``stage.gradient_checkpointing``

    @property
    def lines(self) -> tuple[str, ...]:
        """The main numbers, for the log."""
        setup, expected = self.setup, self.forecast
        memory, host = expected.memory.total, expected.host.total
        trained = sum(row.num_trainable for row in expected.parameters)
        count = sum(row.num_parameters for row in expected.parameters)
        steps = "an unknown number of" if expected.num_steps is None else f"{expected.num_steps:,}"
        of_device = f" of {self.capacity / 2**30:.1f}" if self.capacity else ""
        lines = [
            f"forecast: {trained:,} of {count:,} parameters train; {steps} steps of "
            f"{expected.samples_per_step:,.0f} samples, about {expected.tokens_per_step:,.0f} "
            f"tokens and {expected.flops_per_step / 1e12:,.3g} TFLOP",
            f"forecast: {memory / 2**30:.1f} GiB a device{of_device} with {setup.strategy} and "
            f"rows of {setup.row_tokens} tokens, {host / 2**30:.1f} GiB of the node; a checkpoint "
            f"{expected.checkpoint_bytes / 1e9:.2f} GB, in all {expected.disk_bytes / 1e9:.2f} GB",
            f"{setup.num_recomputed(self.num_blocks)} of {self.num_blocks} decoder blocks are "
            f"recomputed (stage.gradient_checkpointing={spell(self.asked_checkpointing)})",
        ]
        if expected.hours is not None:
            lines.append(f"forecast: {expected.hours:.1f} hours at an MFU of {self.plan.mfu:.0%}")
        if self.capacity is not None and memory > self.capacity:
            would = "`preflight=true` says which micro-batch and strategy would"
            lines.append(f"forecast: this may not fit; {would}")
        if (problem := _host_problem(self)) is not None:
            lines.append(f"forecast: {problem}")
        return tuple(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightReport(Outlook):
    """What a preflight found."""

    title: str  # stage, model and machine
    # The strategy and micro-batch that fit; None if nothing does, or for want of ``capacity``.
    choice: forecasts.Choice | None
    largest: int | None  # micro-batch that fits the job's own strategy; None likewise
    all_recomputed: float  # bytes of a device if all blocks are recomputed
    none_recomputed: float  # bytes of a device if none is
    num_proved: int  # samples whose labels were proved
    num_linted: int  # samples that lint looked at
    free_disk: float  # bytes where the run will be written
    notes: tuple[str, ...]  # what a reader should know
    problems: tuple[str, ...]  # what would stop the job, each with its remedy


def examine(cfg: DictConfig) -> PreflightReport:
    """Look a job over whose plan is checked.

    Raises VipLlavaError where config or tokenizer of a model whose sizes do not ship are missing.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    missing, notes, problems = job.forget_missing_checkpoint(cfg), list[str](), list[str]()
    if missing is not None:
        notes.append(
            f"it starts from {missing}, which is not there yet: run the stage before it first"
        )
    spec = job.model_spec(cfg)
    tokenizer, architecture = _look_at_model(spec, notes, problems)
    corpus, num_proved, num_linted = None, 0, 0
    try:
        if tokenizer is not None:
            datamodule = job.build_datamodule(cfg, tokenizer, spec)
            corpus, num_proved = look_at_data(cfg, datamodule)
            num_linted = lint_data(cfg, datamodule, notes, problems)
    except VipLlavaError as error:
        problems.append(str(error))
    if corpus is None:
        corpus = assumed_corpus(cfg, architecture.tower.num_patches)
        notes.append(
            "the data could not be looked at: lengths are the recipe's, sizes the manifests'"
        )
    outlook = _forecast(cfg, spec, architecture, corpus)
    setup, expected, capacity = outlook.setup, outlook.forecast, outlook.capacity
    every, rows = replace(setup, recomputed_blocks=None), outlook.plan.global_rows
    choice = largest = None
    if capacity is not None:
        choosable = every if cfg.stage.gradient_checkpointing == AUTO else setup
        choice = forecasts.choose_strategy(architecture, choosable, capacity, rows)
        largest = forecasts.largest_micro_batch(architecture, choosable, capacity, rows)
        reason = _want_of_memory(outlook, capacity, choice, largest)
        if expected.memory.total > capacity:
            problems.append(reason)
        elif not forecasts.fits(expected.memory, capacity):
            notes.append(f"it may just fit, or not: {reason}")
    if (problem := _host_problem(outlook)) is not None:
        problems.append(problem)
    free = _free_disk(Path(cfg.run_dir))
    if free < expected.disk_bytes:
        # Another machine's disk is not this one's.
        (problems if _is_here(cfg) else notes).append(
            f"run_dir={cfg.run_dir} has {free / 1e9:.1f} GB free; checkpoints and export need "
            f"{expected.disk_bytes / 1e9:.1f} GB: free some, or pass paths.runs=FOLDER"
        )
    known: dict[str, Any] = {each.name: getattr(outlook, each.name) for each in fields(outlook)}
    return PreflightReport(
        **known,
        title=f"{cfg.stage.name} of {cfg.model.name} on {cfg.machine.name}",
        choice=choice,
        largest=largest,
        all_recomputed=device_memory(architecture, every).total,
        none_recomputed=device_memory(architecture, replace(setup, recomputed_blocks=0)).total,
        num_proved=num_proved,
        num_linted=num_linted,
        free_disk=free,
        notes=tuple(notes),
        problems=tuple(problems),
    )


def look_ahead(
    cfg: DictConfig,
    tokenizer: Any,
    datamodule: VisualPromptDataModule | None = None,
    spec: ModelSpec | None = None,
) -> Outlook:
    """Decide what is left open how a job trains, and forecast it.

    Without a data module lengths are the recipe's and sizes the manifests'. The ``spec`` is of the
    network as it will be built; by itself the configuration's.
    """
    spec = spec or job.model_spec(cfg)
    architecture = job.job_architecture(spec, tokenizer)
    if datamodule is None:
        corpus = assumed_corpus(cfg, architecture.tower.num_patches)
    else:
        corpus = _measured_corpus(cfg, datamodule, datamodule.dataset or datamodule.open_dataset())
    return _forecast(cfg, spec, architecture, corpus)


def shared_memory_warning(cfg: DictConfig, image_size: int, free: int | None) -> str | None:
    """Say that a job's batches in flight find no room in shared memory; None if they do.

    Images are ``image_size`` pixels a side, a byte a value; ``free`` is in bytes, if there is any.
    """
    processes, workers = int(cfg.trainer.devices), int(cfg.data.num_workers)
    # A loader process hands over an optimizer step of its process; a row of a pack has several.
    packed = cfg.data.batching == "packed"
    per_row = max(1.0, cfg.stage.pack_length / cfg.stage.mean_length) if packed else 1.0
    rows = cfg.data.global_batch_size / (processes * int(cfg.trainer.num_nodes))
    images, ahead = int(rows * per_row), 2  # torch's prefetch_factor
    need = processes * workers * ahead * images * 3 * image_size**2
    if free is None or need <= free:
        return None
    return (
        f"{SHM} has {free / 1e6:.1f} MB free, and batches in flight take {need / 1e6:.1f} MB "
        f"({processes} processes x {workers} workers x {ahead} ahead x {images} images of "
        f"{image_size} x {image_size}): a loader process may die of it: {SHM_REMEDY}"
    )


def _look_at_model(
    spec: ModelSpec, notes: list[str], problems: list[str]
) -> tuple[Any | None, Architecture]:
    """Return tokenizer and sizes; of published parts the sizes alone where no file can be had."""
    try:
        tokenizer = load_tokenizer(spec)
        return tokenizer, job.job_architecture(spec, tokenizer)
    except CheckpointError as error:
        if not is_published(spec):
            raise
        (notes if isinstance(error, UnreachableError) else problems).append(str(error))
    notes.append(
        "the network's sizes are those that ship with this package; not looked at: tokenizer, "
        "labels, lint, and whether the weights are there and whole"
    )
    return None, sizes_of_published(spec)


def _forecast(
    cfg: DictConfig, spec: ModelSpec, architecture: Architecture, corpus: forecasts.Corpus
) -> Outlook:
    present = () if cfg.trainer.accelerator in ("cpu", "mps") else hardware.detect().cuda
    on_devices = cfg.trainer.accelerator == "cuda" or bool(present)
    capacity = None
    if cfg.machine.memory_gb is not None:
        capacity = forecasts.device_capacity(float(cfg.machine.memory_gb))
    elif present:
        capacity = min(device.memory_gib for device in present) * 2**30
    packed = cfg.data.batching == "packed"
    samples_per_row = 1.0
    if packed:
        by_length = _PACK_FILL * int(cfg.data.pack_length) / corpus.mean_tokens
        by_images = int(cfg.data.max_images_per_pack) / max(corpus.images_per_sample, 1e-9)
        samples_per_row = max(1.0, min(by_length, by_images))
    row_tokens = int(cfg.data.pack_length) if packed else corpus.longest
    adapter, quantization = cfg.tuning.adapter, cfg.tuning.quantization
    asked = cfg.stage.gradient_checkpointing
    setup = Setup(
        trainable=tuple(cfg.stage.trainable),
        workload=cfg.machine.workload,
        strategy=cfg.strategy.name,
        precision=cfg.trainer.precision,
        num_devices=int(cfg.trainer.devices) * int(cfg.trainer.num_nodes),
        micro_batch_size=int(cfg.data.micro_batch_size),
        row_tokens=row_tokens,
        row_images=samples_per_row * corpus.images_per_sample if packed else 1.0,
        row_supervised=corpus.supervised_share * row_tokens,
        recomputed_blocks=None if asked is True or asked == AUTO else int(asked),
        attention=spec.attn_implementation,
        adapter_rank=0 if adapter is None else int(adapter.r),
        adapter_dropout=adapter is not None and float(adapter.dropout) > 0,
        weights_dtype=cfg.machine.weights_dtype,
        bits=None if quantization is None else int(quantization.bits),
        double_quantization=quantization is None or bool(quantization.double_quantization),
        fused_optimizer=uses_fused_adamw("cuda" if on_devices else "cpu", cfg.trainer.precision),
    )
    # Every process has to decide alike: what is not written down may differ between nodes.
    known = cfg.machine.memory_gb is not None or int(cfg.trainer.num_nodes) == 1
    if asked == AUTO and capacity is not None and known:
        fewest = forecasts.fewest_recomputed(architecture, setup, capacity)
        setup = replace(setup, recomputed_blocks=fewest)
    kept = int(OmegaConf.select(cfg, "callbacks.checkpoint.keep_last", default=1))
    plan = forecasts.RunPlan(
        epochs=int(cfg.stage.epochs),
        global_rows=int(cfg.data.global_batch_size),
        samples_per_row=samples_per_row,
        mfu=float(cfg.machine.mfu),
        device=cfg.machine.device or (present[0].name if present else None),
        num_checkpoints=kept + (cfg.validation.manifest is not None),  # the best one
        num_nodes=int(cfg.trainer.num_nodes),
        num_workers=int(cfg.data.num_workers),
        on_devices=on_devices,
    )
    return Outlook(
        setup=setup,
        plan=plan,
        corpus=corpus,
        forecast=forecasts.forecast(architecture, setup, corpus, plan),
        capacity=capacity,
        host_capacity=memory_forecast.machine_memory() if _is_here(cfg) else None,
        num_blocks=architecture.language_model.num_blocks,
        asked_checkpointing=asked,
    )


def _is_here(cfg: DictConfig) -> bool:
    on_cuda = cfg.trainer.accelerator == "cuda"
    return not on_cuda or len(hardware.detect().cuda) >= int(cfg.trainer.devices)


def _free_disk(folder: Path) -> float:
    folder = folder.expanduser().absolute()
    return float(shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free)


def _want_of_memory(
    outlook: Outlook, capacity: float, choice: forecasts.Choice | None, largest: int | None
) -> str:
    setup, needed = outlook.setup, outlook.forecast.memory.total
    remedies = [] if largest is None else [f"machine.micro_batch_size={largest}"]
    if choice is not None and choice.strategy != setup.strategy:
        size = min(choice.micro_batch_size, setup.micro_batch_size)
        remedies.append(f"strategy={choice.strategy} machine.micro_batch_size={size}")
    remedies = remedies or ["a larger machine, tuning=lora or tuning=qlora (docs/machines.md)"]
    return (
        f"machine.micro_batch_size={setup.micro_batch_size} with strategy={setup.strategy} needs "
        f"about {needed / 2**30:.1f} GiB a device, which has {capacity / 2**30:.1f}: use "
        + ", or ".join(remedies)
    )


def _host_problem(outlook: Outlook) -> str | None:
    host, capacity = outlook.forecast.host, outlook.host_capacity
    if capacity is None or host.total <= capacity:
        return None
    size, what, remedy = max(
        (host.processes, "processes and loaders", "data.num_workers=1"),
        (host.copies, "copies of weights at the start", "strategy=zero3"),
        (host.trained, "what stays while it trains", "strategy=zero3, tuning=lora"),
        (host.saving, "a checkpoint or the export", "tuning=lora"),
        key=lambda part: part[0],
    )
    return (
        f"strategy={outlook.setup.strategy} needs about {host.total / 2**30:.1f} GiB of the node's "
        f"memory ({what}: {size / 2**30:.1f}), which has {capacity / 2**30:.1f}: use {remedy}, or "
        "a machine with more of it"
    )


def look_at_data(
    cfg: DictConfig, datamodule: VisualPromptDataModule
) -> tuple[forecasts.Corpus, int]:
    """Open the shards, prove the first labels and measure an epoch; return how many were proved."""
    datamodule.setup("fit")
    dataset = datamodule.dataset
    assert dataset is not None
    image_tokens = datamodule.conversation_encoder.image_seq_length
    texts = estimated = supervised = 0
    share = 0.0
    for item, encoded in datamodule.proved:
        texts += encoded.length - encoded.num_images * image_tokens
        shards = dataset.sources[item.part].shards
        estimated += int(shards.text_tokens(np.array([item.position]))[0])
        supervised += encoded.num_supervised
        share = max(share, encoded.num_supervised / encoded.length)
    # The index estimates lengths for a real vocabulary; this tokenizer's are known for a few.
    ratio = texts / estimated if estimated else 1.0
    of_text = supervised / texts if texts else None
    corpus = _measured_corpus(cfg, datamodule, dataset, ratio, share or None, of_text)
    return corpus, len(datamodule.proved)


def _measured_corpus(
    cfg: DictConfig,
    datamodule: VisualPromptDataModule,
    dataset: VisualPromptDataset,
    ratio: float = 1.0,
    supervised_share: float | None = None,
    supervised_text: float | None = None,
) -> forecasts.Corpus:
    """Measure an epoch by the indices of its shards, whose texts' lengths the ratio corrects.

    Unless measured, the share of a dense sample's tokens that carries loss is the stage's.
    """
    sizes = {source.name: source.shards.shard_sizes for source in dataset.sources}
    parts = plan_parts(sizes, datamodule.mix_entries, datamodule.samples_per_epoch)
    epoch = SampleOrder(parts, datamodule.seed, window_samples=datamodule.window_samples).epoch(0)
    num_images = np.empty(len(epoch), dtype=np.int64)
    for number, source in enumerate(dataset.sources):
        chosen = epoch.part == number
        num_images[chosen] = source.shards.has_image(epoch.position[chosen])
    placeholders = num_images * datamodule.conversation_encoder.image_seq_length
    texts = ratio * (dataset.estimate_lengths(epoch) - placeholders)
    lengths = np.minimum(placeholders + texts, int(cfg.stage.max_length)).astype(np.float64)
    mean_text = float((lengths - placeholders).clip(min=0).mean())
    return forecasts.Corpus(
        datasets=_shares(parts),
        mean_tokens=float(lengths.mean()),
        mean_squared_tokens=float((lengths**2).mean()),
        images_per_sample=float(num_images.mean()),
        longest=int(np.ceil(lengths.max())),
        supervised_share=supervised_share or float(cfg.stage.supervised_share),
        mean_supervised=(supervised_text or _supervised_text(cfg)) * mean_text,
    )


def assumed_corpus(cfg: DictConfig, image_tokens: int) -> forecasts.Corpus:
    """Return the recipe's lengths and the manifests' sizes, for data that cannot be opened."""
    mix: Any = parse_mix(cfg.data.mix) if cfg.data.mix else {cfg.data.manifest: None}
    manifests = {name: load_manifest(name, cfg.data.manifests_dir) for name in mix}
    sizes = {m.name: m.num_samples or m.approximate_samples or 0 for m in manifests.values()}
    shares = tuple(forecasts.DataSetShare(name, size, size) for name, size in sizes.items())
    if cfg.data.mix and all(sizes.values()):
        entries = {manifests[name].name: entry for name, entry in mix.items()}
        parts = plan_parts({n: (s,) for n, s in sizes.items()}, entries, cfg.data.samples_per_epoch)
        shares = _shares(parts)
    mean = float(cfg.stage.mean_length)
    return forecasts.Corpus(
        datasets=shares,
        mean_tokens=mean,
        mean_squared_tokens=mean**2,
        images_per_sample=1.0,
        longest=min(int(cfg.stage.longest_length), int(cfg.stage.max_length)),
        supervised_share=float(cfg.stage.supervised_share),
        mean_supervised=_supervised_text(cfg) * max(0.0, mean - image_tokens),
    )


def _shares(parts: Iterable[Part]) -> tuple[forecasts.DataSetShare, ...]:
    return tuple(forecasts.DataSetShare(p.name, p.num_samples, p.num_per_epoch) for p in parts)


def _supervised_text(cfg: DictConfig) -> float:
    """Return the share of texts' tokens that carries loss, about: captions whole, of talks half."""
    return 1.0 if cfg.stage.chat_template == "plain" else 0.5


def lint_data(
    cfg: DictConfig, datamodule: VisualPromptDataModule, notes: list[str], problems: list[str]
) -> int:
    """Lint a few samples of each data set, add to notes and problems, and return how many."""
    values: Any = OmegaConf.to_container(cfg.lint, resolve=True)
    limits, root, count = LintLimits.from_mapping(values), datamodule.data_root, 0
    for manifest in datamodule.manifests:
        if is_remote(str(root)) or any(map(is_remote, manifest.patterns)):
            notes.append(f"{manifest.name} lies at an address and was not linted")
            continue
        found = lint_shards(
            manifest, root, datamodule.sample_encoder, limits, int(cfg.seed), num_samples=64
        )
        count += found.num_checked
        severities = {finding.code: finding.severity for finding in found.findings}
        for severity, into in (("error", problems), ("warning", notes)):
            counts = found.counts.items()
            counted = [f"{n} {code}" for code, n in counts if severities.get(code) == severity]
            if counted:
                into.append(
                    f"lint of {found.num_checked} samples of {manifest.name}: "
                    f"{', '.join(counted)}; `vipllava lint --data {manifest.name}` shows each"
                )
    return count
