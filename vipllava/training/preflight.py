"""A job looked over before it starts: its data, what it needs, what it will take.

``train.py preflight=true`` does all of it and stops; nothing is trained, no weights are read, and
the machine that the job is for need not be there. ``look_ahead`` says the main numbers at every
start. Like :mod:`vipllava.training.run` this knows configuration objects; what it calls does not.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vipllava.config.schema import AUTO, spell
from vipllava.training.job import (
    build_datamodule,
    forget_missing_checkpoint,
    job_architecture,
    model_spec,
)
from vipllava.types import CheckpointError, VipLlavaError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vipllava.forecast.architecture import Architecture
    from vipllava.forecast.job import Choice, Corpus, Forecast, RunPlan
    from vipllava.forecast.memory import Setup
    from vipllava.models.building import ModelSpec
    from vipllava.stream.datamodule import VisualPromptDataModule

logger = logging.getLogger(__name__)

_PACK_FILL: Final = 0.97  # of a pack's tokens, as packing reaches


@dataclass(frozen=True, slots=True)
class PreflightReport:
    """What a preflight found.

    Attributes:
        title: stage, model and machine.
        setup: how the job trains.
        plan: epochs, batch and device.
        corpus: an epoch of its data; assumed where they could not be opened.
        forecast: what it will need and take.
        capacity: bytes of a device, or None where that is not known.
        choice: the strategy and micro-batch that fit; None if nothing does, or for want of
            ``capacity``.
        largest: micro-batch that fits the job's own strategy; None likewise.
        num_blocks: decoder blocks of the language model.
        all_recomputed: bytes of a device if all of them are recomputed.
        none_recomputed: bytes of a device if none is.
        num_proved: samples whose labels were proved.
        num_linted: samples that lint looked at.
        free_disk: bytes where the run will be written.
        host_capacity: bytes of a node, beside its devices; None where that is not known.
        notes: what a reader should know.
        problems: what would stop the job, each with its remedy.
    """

    title: str
    setup: Setup
    plan: RunPlan
    corpus: Corpus
    forecast: Forecast
    capacity: float | None
    choice: Choice | None
    largest: int | None
    num_blocks: int
    all_recomputed: float
    none_recomputed: float
    num_proved: int
    num_linted: int
    free_disk: float
    host_capacity: float | None
    notes: tuple[str, ...]
    problems: tuple[str, ...]


def examine(cfg: DictConfig) -> PreflightReport:
    """Look a job over; nothing is printed.

    Args:
        cfg: what Hydra composed from ``conf/train.yaml``, its plan checked.

    Raises:
        VipLlavaError: config or tokenizer of a model whose sizes do not ship cannot be had.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from vipllava.forecast.job import choose_strategy, fits, forecast, largest_micro_batch
    from vipllava.forecast.memory import device_memory
    from vipllava.training.preflight_data import assumed_corpus, lint_data, look_at_data

    missing, notes = forget_missing_checkpoint(cfg), list[str]()
    if missing is not None:
        notes.append(
            f"it starts from {missing}, which is not there yet: run the stage before it first"
        )
    spec, problems = model_spec(cfg), list[str]()
    tokenizer, architecture = _look_at_model(spec, notes, problems)
    datamodule, found = None, None
    try:
        if tokenizer is not None:
            datamodule = build_datamodule(cfg, tokenizer, spec)
            found = look_at_data(cfg, datamodule)
    except VipLlavaError as error:
        problems.append(str(error))
    num_proved = num_linted = 0
    if found is not None and datamodule is not None:
        corpus, num_proved = found
        num_linted, faults = lint_data(cfg, datamodule, notes)
        problems += faults
    else:
        corpus = assumed_corpus(cfg, architecture.tower.num_patches)
        notes.append(
            "the data could not be looked at: lengths are the recipe's, sizes the manifests'"
        )
    setup, plan = _setup(cfg, spec, architecture, corpus), _plan(cfg, corpus)
    expected = forecast(architecture, setup, corpus, plan)
    capacity = _capacity(cfg)
    choice = largest = None
    every = replace(setup, recomputed_blocks=None)
    if capacity is not None:
        choosable = every if cfg.stage.gradient_checkpointing == AUTO else setup
        choice = choose_strategy(architecture, choosable, capacity, plan.global_rows)
        largest = largest_micro_batch(architecture, choosable, capacity, plan.global_rows)
        reason = _want_of_memory(setup, expected, capacity, choice, largest)
        if expected.memory.total > capacity:
            problems.append(reason)
        elif not fits(expected.memory, capacity):
            notes.append(f"it may just fit, or not: {reason}")
    host_capacity = _host_capacity(cfg)
    if host_capacity is not None and expected.host.total > host_capacity:
        problems.append(_want_of_host(setup, expected, host_capacity))
    free = _free_disk(Path(cfg.run_dir))
    if free < expected.disk_bytes:
        # Another machine's disk is not this one's.
        (problems if _is_here(cfg) else notes).append(
            f"run_dir={cfg.run_dir} has {free / 1e9:.1f} GB free; checkpoints and export need "
            f"{expected.disk_bytes / 1e9:.1f} GB: free some, or pass paths.runs=FOLDER"
        )
    return PreflightReport(
        title=f"{cfg.stage.name} of {cfg.model.name} on {cfg.machine.name}",
        setup=setup,
        plan=plan,
        corpus=corpus,
        forecast=expected,
        capacity=capacity,
        choice=choice,
        largest=largest,
        num_blocks=architecture.language_model.num_blocks,
        all_recomputed=device_memory(architecture, every).total,
        none_recomputed=device_memory(architecture, replace(setup, recomputed_blocks=0)).total,
        num_proved=num_proved,
        num_linted=num_linted,
        free_disk=free,
        host_capacity=host_capacity,
        notes=tuple(notes),
        problems=tuple(problems),
    )


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is known of a job before it starts.

    Attributes:
        setup: how it will train.
        lines: its main numbers, for the log.
    """

    setup: Setup
    lines: tuple[str, ...]


def look_ahead(
    cfg: DictConfig,
    tokenizer: Any,
    datamodule: VisualPromptDataModule | None = None,
    spec: ModelSpec | None = None,
) -> Outlook:
    """Decide what is left open how a job trains, and say its main numbers.

    Args:
        cfg: what Hydra composed from ``conf/train.yaml``, checked.
        tokenizer: the model's.
        datamodule: the job's; its data are opened already or opened here. Without it lengths are
            the recipe's and sizes the manifests'.
        spec: the network as it will be built; by itself the configuration's.
    """
    from vipllava.forecast.job import forecast
    from vipllava.training.preflight_data import assumed_corpus, measured_corpus

    spec = spec or model_spec(cfg)
    architecture = job_architecture(spec, tokenizer)
    if datamodule is None:
        corpus = assumed_corpus(cfg, architecture.tower.num_patches)
    else:
        dataset = datamodule.dataset or datamodule.open_dataset()
        corpus = measured_corpus(cfg, datamodule, dataset)
    setup, plan = _setup(cfg, spec, architecture, corpus), _plan(cfg, corpus)
    num_blocks = architecture.language_model.num_blocks
    expected = forecast(architecture, setup, corpus, plan)
    capacity, memory = _capacity(cfg), expected.memory.total
    trained = sum(row.num_trainable for row in expected.parameters)
    count = sum(row.num_parameters for row in expected.parameters)
    steps = "an unknown number of" if expected.num_steps is None else f"{expected.num_steps:,}"
    host_capacity, host = _host_capacity(cfg), expected.host.total
    lines = [
        f"forecast: {trained:,} of {count:,} parameters train; {steps} steps of "
        f"{expected.samples_per_step:,.0f} samples, about {expected.tokens_per_step:,.0f} tokens "
        f"and {expected.flops_per_step / 1e12:,.3g} TFLOP",
        f"forecast: {memory / 2**30:.1f} GiB a device"
        + (f" of {capacity / 2**30:.1f}" if capacity else "")
        + f" with {setup.strategy} and rows of {setup.row_tokens} tokens, {host / 2**30:.1f} GiB "
        f"of the node; a checkpoint {expected.checkpoint_bytes / 1e9:.2f} GB, in all "
        f"{expected.disk_bytes / 1e9:.2f} GB",
        f"{setup.num_recomputed(num_blocks)} of {num_blocks} decoder blocks are recomputed "
        f"(stage.gradient_checkpointing={spell(cfg.stage.gradient_checkpointing)})",
    ]
    if expected.hours is not None:
        lines.append(f"forecast: {expected.hours:.1f} hours at an MFU of {plan.mfu:.0%}")
    if capacity is not None and memory > capacity:
        lines.append(
            "forecast: this may not fit; `preflight=true` says which micro-batch and strategy would"
        )
    if host_capacity is not None and host > host_capacity:
        lines.append(f"forecast: {_want_of_host(setup, expected, host_capacity)}")
    return Outlook(setup, tuple(lines))


# The job's values, from its configuration.


def _look_at_model(
    spec: ModelSpec, notes: list[str], problems: list[str]
) -> tuple[Any | None, Architecture]:
    """Return tokenizer and sizes; of published parts the sizes alone where no file can be had."""
    from vipllava.checkpoints.loading import load_tokenizer
    from vipllava.forecast.published import is_published, sizes_of_published
    from vipllava.models.hub_models import UnreachableError

    try:
        tokenizer = load_tokenizer(spec)
        return tokenizer, job_architecture(spec, tokenizer)
    except CheckpointError as error:
        if not is_published(spec):
            raise
        (notes if isinstance(error, UnreachableError) else problems).append(str(error))
    notes.append(
        "the network's sizes are those that ship with this package; not looked at: tokenizer, "
        "labels, lint, and whether the weights are there and whole"
    )
    return None, sizes_of_published(spec)


def _setup(cfg: DictConfig, spec: ModelSpec, architecture: Architecture, corpus: Corpus) -> Setup:
    from vipllava.forecast.job import fewest_recomputed
    from vipllava.forecast.memory import Setup
    from vipllava.training.optim import uses_fused_adamw

    adapter, quantization = cfg.tuning.adapter, cfg.tuning.quantization
    packed = cfg.data.batching == "packed"
    row_tokens = int(cfg.data.pack_length) if packed else corpus.longest
    asked = cfg.stage.gradient_checkpointing
    setup = Setup(
        trainable=tuple(cfg.stage.trainable),
        workload=cfg.machine.workload,
        strategy=cfg.strategy.name,
        precision=cfg.trainer.precision,
        num_devices=int(cfg.trainer.devices) * int(cfg.trainer.num_nodes),
        micro_batch_size=int(cfg.data.micro_batch_size),
        row_tokens=row_tokens,
        row_images=_samples_per_row(cfg, corpus) * corpus.images_per_sample if packed else 1.0,
        row_supervised=corpus.supervised_share * row_tokens,
        recomputed_blocks=None if asked is True or asked == AUTO else int(asked),
        attention=spec.attn_implementation,
        adapter_rank=0 if adapter is None else int(adapter.r),
        adapter_dropout=adapter is not None and float(adapter.dropout) > 0,
        weights_dtype=cfg.machine.weights_dtype,
        bits=None if quantization is None else int(quantization.bits),
        double_quantization=quantization is None or bool(quantization.double_quantization),
        fused_optimizer=uses_fused_adamw(
            "cuda" if _on_devices(cfg) else "cpu", cfg.trainer.precision
        ),
    )
    capacity = _capacity(cfg)
    # Every process has to decide alike: what is not written down may differ between nodes.
    known = cfg.machine.memory_gb is not None or int(cfg.trainer.num_nodes) == 1
    if asked == AUTO and capacity is not None and known:
        return replace(setup, recomputed_blocks=fewest_recomputed(architecture, setup, capacity))
    return setup


def _samples_per_row(cfg: DictConfig, corpus: Corpus) -> float:
    if cfg.data.batching != "packed":
        return 1.0
    by_length = _PACK_FILL * int(cfg.data.pack_length) / corpus.mean_tokens
    by_images = int(cfg.data.max_images_per_pack) / max(corpus.images_per_sample, 1e-9)
    return max(1.0, min(by_length, by_images))


def _plan(cfg: DictConfig, corpus: Corpus) -> RunPlan:
    from omegaconf import OmegaConf

    from vipllava.forecast.job import RunPlan

    device = cfg.machine.device
    if device is None and (present := _present_devices(cfg)):
        device = present[0].name
    kept = int(OmegaConf.select(cfg, "callbacks.checkpoint.keep_last", default=1))
    kept += cfg.validation.manifest is not None  # the best one
    return RunPlan(
        epochs=int(cfg.stage.epochs),
        global_rows=int(cfg.data.global_batch_size),
        samples_per_row=_samples_per_row(cfg, corpus),
        mfu=float(cfg.machine.mfu),
        device=device,
        num_checkpoints=kept,
        num_nodes=int(cfg.trainer.num_nodes),
        num_workers=int(cfg.data.num_workers),
        on_devices=_on_devices(cfg),
    )


def _on_devices(cfg: DictConfig) -> bool:
    """Whether the job trains on devices with memory of their own."""
    return cfg.trainer.accelerator == "cuda" or bool(_present_devices(cfg))


def _present_devices(cfg: DictConfig) -> Sequence[Any]:
    """Return this machine's CUDA devices where the job is for whatever machine it starts on."""
    from vipllava.config import hardware

    return () if cfg.trainer.accelerator in ("cpu", "mps") else hardware.detect().cuda


def _capacity(cfg: DictConfig) -> float | None:
    from vipllava.forecast.job import device_capacity

    if cfg.machine.memory_gb is not None:
        return device_capacity(float(cfg.machine.memory_gb))
    present = _present_devices(cfg)
    return min(device.memory_gib for device in present) * 2**30 if present else None


def _is_here(cfg: DictConfig) -> bool:
    """Whether this machine could be the one that the job is for."""
    from vipllava.config import hardware

    on_cuda = cfg.trainer.accelerator == "cuda"
    return not on_cuda or len(hardware.detect().cuda) >= int(cfg.trainer.devices)


def _host_capacity(cfg: DictConfig) -> float | None:
    from vipllava.forecast.memory import machine_memory

    return machine_memory() if _is_here(cfg) else None


def _free_disk(folder: Path) -> float:
    folder = folder.expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return float(shutil.disk_usage(folder).free)


# Memory.


def _want_of_memory(
    setup: Setup,
    expected: Forecast,
    capacity: float,
    choice: Choice | None,
    largest: int | None,
) -> str:
    needed = expected.memory.total
    remedies: list[str] = []
    if largest is not None:
        remedies.append(f"machine.micro_batch_size={largest}")
    if choice is not None and choice.strategy != setup.strategy:
        size = min(choice.micro_batch_size, setup.micro_batch_size)
        remedies.append(f"strategy={choice.strategy} machine.micro_batch_size={size}")
    if not remedies:
        remedies.append("a larger machine, tuning=lora or tuning=qlora (docs/machines.md)")
    return (
        f"machine.micro_batch_size={setup.micro_batch_size} with strategy={setup.strategy} needs "
        f"about {needed / 2**30:.1f} GiB a device, which has {capacity / 2**30:.1f}: use "
        + ", or ".join(remedies)
    )


def _want_of_host(setup: Setup, expected: Forecast, capacity: float) -> str:
    host = expected.host
    parts = {
        "processes and loaders": (host.processes, "data.num_workers=1"),
        "copies of weights at the start": (host.copies, "strategy=zero3"),
        "what stays while it trains": (host.trained, "strategy=zero3, tuning=lora"),
        "a checkpoint or the export": (host.saving, "tuning=lora"),
    }
    what = max(parts, key=lambda name: parts[name][0])
    size, remedy = parts[what]
    return (
        f"strategy={setup.strategy} needs about {host.total / 2**30:.1f} GiB of the node's memory "
        f"({what}: {size / 2**30:.1f}), which has {capacity / 2**30:.1f}: use {remedy}, or a "
        "machine with more of it"
    )
