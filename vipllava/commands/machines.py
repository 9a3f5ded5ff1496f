"""``vipllava machines``: which machine a stage needs, for every real model and every trainer."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from vipllava.forecast.architecture import Architecture
    from vipllava.forecast.flops import Workload
    from vipllava.forecast.job import Corpus

MODELS: Final = ("7b", "13b", "llama3_8b", "phi3_mini")
_SINGLE: Final = (("RTX 4090", 24), ("A100", 80), ("H200", 141))
"""Devices and their GB: what ``trainer=1gpu`` is shown for: it takes whatever there is."""

_STAGES: Final = ("pretrain", "finetune")
_HEADERS: Final = (
    "trains",
    "machine",
    "strategy",
    "micro-batch",
    "largest",
    "recomputed",
    "GiB",
    "host GiB",
    "hours",
)
_GIB: Final = 2**30


@dataclass(frozen=True, slots=True)
class MachineRow:
    """One model, workload and machine.

    Attributes:
        model: of ``conf/model``.
        workload: what trains.
        machine: the trainer, and which device where that is open.
        strategy: the least sharded that fits; None if nothing does.
        micro_batch_size: that ``memory`` is of: the trainer's, or the largest if that is smaller.
        largest: micro-batch that fits; None if none does.
        recomputed: the fewest decoder blocks that have to be, for that micro-batch to fit.
        num_blocks: that the model has.
        memory: bytes of a device; where nothing fits, the least that was tried.
        capacity: bytes that the device has.
        host: bytes of a node beside its devices.
        hours: of the stage.
    """

    model: str
    workload: str
    machine: str
    strategy: str | None
    micro_batch_size: int
    largest: int | None
    recomputed: int | None
    num_blocks: int
    memory: float
    capacity: float
    host: float
    hours: float | None

    def cells(self) -> tuple[str, ...]:
        """Return the row as texts, one for each of the table's headers."""
        room = f"{self.memory / _GIB:.1f} of {self.capacity / _GIB:.1f}"
        fits = self.strategy is not None
        return (
            self.workload,
            self.machine,
            self.strategy or "does not fit",
            str(self.micro_batch_size),
            str(self.largest) if self.largest else "-",
            f"{self.recomputed} of {self.num_blocks}" if self.recomputed is not None else "-",
            room,
            f"{self.host / _GIB:.0f}" if fits else "-",
            f"{self.hours:.1f}" if fits and self.hours is not None else "-",
        )


def run(options: argparse.Namespace, console: Console | None = None) -> int:
    """Print the table, as Markdown if asked.

    Args:
        options: ``markdown``, ``mfu`` and ``model`` of the command line.
        console: where tables go; the standard output if not given.

    Raises:
        VipLlavaError: a model is not one of :data:`MODELS`, or the configuration is not there.
    """
    from rich.console import Console as MakeConsole

    from vipllava.config.schema import did_you_mean
    from vipllava.types import ConfigError

    for model in options.model or ():
        if model not in MODELS:
            raise ConfigError(
                f"--model {model}: not one of {', '.join(MODELS)}{did_you_mean(model, MODELS)}; of "
                "another model `python train.py ... preflight=true` makes a forecast"
            )
    console = console or MakeConsole()
    rows = machine_rows(options.model or MODELS, mfu=options.mfu)
    if options.markdown:
        console.print(markdown(rows, options.mfu), highlight=False, markup=False, soft_wrap=True)
        return 0
    from rich import box
    from rich.table import Table

    for model in dict.fromkeys(row.model for row in rows):
        title = f"{model}, hours at an MFU of {options.mfu:.0%}"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0))
        for header in _HEADERS:
            table.add_column(header, justify="left" if header in _HEADERS[:3] else "right")
        for row in rows:
            if row.model == model:
                table.add_row(*row.cells())
        console.print(table)
    return 0


def machine_rows(models: Sequence[str] = MODELS, *, mfu: float) -> list[MachineRow]:
    """Forecast every workload of some models on every trainer whose memory is known.

    Args:
        models: of ``conf/model``, made of published parts.
        mfu: share of the devices' peak.
    """
    from vipllava.config.composing import compose_job
    from vipllava.forecast.flops import WORKLOADS
    from vipllava.forecast.published import published_architecture

    machines = {stage: list(_machines(stage)) for stage in _STAGES}
    rows: list[MachineRow] = []
    for name in models:
        model = compose_job([f"model={name}", "trainer=8xa100"]).model
        architecture = published_architecture(
            model.spec.vision_tower, model.spec.language_model, tuple(model.spec.feature_layers)
        )
        patches = architecture.tower.num_patches
        corpora = {stage: _corpus(name, stage, patches) for stage in _STAGES}
        for workload in WORKLOADS:
            stage = "pretrain" if workload == "projector" else "finetune"
            for machine, cfg in machines[stage]:
                limit = (model.get("max_micro_batch_sizes") or {}).get(workload)
                rows.append(
                    _row(name, architecture, workload, machine, cfg, corpora[stage], mfu, limit)
                )
    return rows


def markdown(rows: Sequence[MachineRow], mfu: float) -> str:
    """Return ``docs/machines.md``."""
    longest = {stage: _corpus(MODELS[0], stage, 0).longest for stage in _STAGES}
    lines = [
        "# Which machine do I need",
        "",
        "Forecasts, made by `vipllava machines --markdown`. For a job of your own, with its data, "
        "add `preflight=true` to its command: `python train.py stage=pretrain model=13b "
        "trainer=8xa100 preflight=true`. Neither needs the machine, any weights or a network: the "
        "sizes of these models ship with the package.",
        "",
        "Each line is a stage on a machine of `conf/trainer` (`trainer=NAME`): `projector` is "
        "`stage=pretrain`, the others are `stage=finetune` with `tuning=full`, `lora` or `qlora`. "
        "`strategy` is the least sharded one that fits the trainer's micro-batch, or else the one "
        "that fits the largest; it offloads only where nothing else fits. To fit is to leave a "
        "twentieth free. `largest` is the largest "
        "micro-batch that fits it and divides the recipe's global batch, with every decoder block "
        "recomputed in the backward pass (gradient checkpointing); `recomputed` is how many have "
        "to be at `micro-batch`, with a tenth of the memory left free: what "
        "`stage.gradient_checkpointing=auto` does.",
        "",
        "`GiB` is a device's memory at a step's peak, of what it has, with rows of "
        f"{longest['pretrain']} tokens (projector) or {longest['finetune']} (the others), the "
        "longest there are: weights, gradients, optimizer, activations, working copies, and an "
        "allowance for CUDA, NCCL and fragmentation, with every block recomputed. `host GiB` "
        "is the memory of one node beside its devices: its processes and their loaders, what is "
        "offloaded, a checkpoint on its way to the disk or the export. Where nothing fits, the "
        "least that was tried is shown.",
        "",
        f"Hours are useful work over the devices' peak at an MFU of {mfu:.0%} (`--mfu`; "
        "`machine.mfu` in a job): what good code reaches on large devices. Half of it is common "
        "where weights travel between devices without NVLink or live on the host, so take the "
        "hours of `zero3` on such machines, and of `zero3_offload` everywhere, as a lower bound. "
        "The data are those of the recipe: 558,000 captions of about 601 tokens, 1,185,000 "
        "instructions of about 774, of whose text half carries loss.",
        "",
        "Useful work, here and in `train/mfu`, is what the linear layers that are passed multiply: "
        "those of the decoder blocks at every token, the head at supervised positions only, the "
        "projector at every patch, the tower as far as it is read; forward, for gradients of "
        "inputs, and for gradients of weights where they train; and attention under the causal "
        "mask. The embedding table is looked up and is no work. Recomputation and padding never "
        "count.",
    ]
    for model in dict.fromkeys(row.model for row in rows):
        lines += ["", f"## {model}", "", _line(_HEADERS), _line(["---"] * len(_HEADERS))]
        lines += [_line(row.cells()) for row in rows if row.model == model]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _machines(stage: str) -> Iterator[tuple[str, DictConfig]]:
    """Yield every trainer whose memory is known, composed for a stage."""
    from vipllava.config.composing import CONFIG_DIR, compose_job

    for path in sorted((CONFIG_DIR / "trainer").glob("*.yaml")):
        if path.stem == "1gpu":
            for device, memory in _SINGLE:
                overrides = [
                    f"machine.device={device}",
                    f"machine.memory_gb={memory}",
                    # Not what this machine would choose.
                    "trainer.precision=bf16-mixed",
                ]
                cfg = compose_job(["trainer=1gpu", "model=7b", f"stage={stage}", *overrides])
                yield f"1gpu ({device})", cfg
        elif path.stem not in ("auto", "cpu"):
            cfg = compose_job([f"trainer={path.stem}", "model=7b", f"stage={stage}"])
            if cfg.machine.memory_gb is not None:
                yield path.stem, cfg


def _corpus(model: str, stage: str, image_tokens: int) -> Corpus:
    from vipllava.config.composing import CONFIG_DIR, compose_job
    from vipllava.training.preflight_data import assumed_corpus

    manifests = f"paths.manifests={CONFIG_DIR.parent / 'data_manifests'}"
    job = compose_job([f"model={model}", "trainer=8xa100", f"stage={stage}", manifests])
    return assumed_corpus(job, image_tokens)


def _row(
    model: str,
    architecture: Architecture,
    workload: Workload,
    machine: str,
    cfg: Any,
    corpus: Corpus,
    mfu: float,
    limit: int | None,
) -> MachineRow:
    from vipllava.config.batch import largest_micro_batch as largest_dividing
    from vipllava.forecast import job as forecasts
    from vipllava.forecast.host_memory import host_memory
    from vipllava.forecast.memory import Setup, device_memory
    from vipllava.models.adapters import AdapterSettings
    from vipllava.models.quantization import QuantizationSettings
    from vipllava.training.optim import uses_fused_adamw

    devices = int(cfg.trainer.devices) * int(cfg.trainer.num_nodes)
    global_rows = int(cfg.stage.global_batch_size)
    wanted = int(cfg.machine.micro_batch_sizes[workload])
    wanted = largest_dividing(min(wanted, limit or wanted), global_rows, devices, 1) or 1
    capability = cfg.machine.capability
    num_blocks = architecture.language_model.num_blocks
    setup = Setup(
        trainable=tuple(cfg.stage.trainable),
        workload=workload,
        strategy="single" if devices == 1 else "zero2",
        precision=cfg.trainer.precision,
        num_devices=devices,
        micro_batch_size=wanted,
        row_tokens=corpus.longest,
        row_supervised=corpus.supervised_share * corpus.longest,
        # As if flash attention were installed wherever it runs: no matter who makes the table.
        attention="sdpa" if capability is not None and capability < 8 else "flash_attention_2",
        adapter_rank=AdapterSettings().r,
        bits=QuantizationSettings().bits if workload == "qlora" else None,
        fused_optimizer=uses_fused_adamw("cuda", cfg.trainer.precision),
    )
    capacity = forecasts.device_capacity(float(cfg.machine.memory_gb))
    choice = forecasts.choose_strategy(architecture, setup, capacity, global_rows)
    plan = forecasts.RunPlan(1, global_rows, mfu=mfu, device=cfg.machine.device)
    on_host: dict[str, Any] = {
        "num_nodes": int(cfg.trainer.num_nodes),
        "num_workers": int(cfg.data.num_workers),
    }
    hours = forecasts.forecast(architecture, setup, corpus, plan).hours
    if choice is None:
        least = replace(
            setup, strategy=forecasts.possible_strategies(setup)[-1], micro_batch_size=1
        )
        memory = device_memory(architecture, least)
        return MachineRow(
            model=model,
            workload=workload,
            machine=machine,
            strategy=None,
            micro_batch_size=1,
            largest=None,
            recomputed=None,
            num_blocks=num_blocks,
            memory=memory.total,
            capacity=capacity,
            host=host_memory(architecture, least, **on_host).total,
            hours=None,
        )
    size = min(wanted, choice.micro_batch_size)
    chosen = replace(setup, strategy=choice.strategy, micro_batch_size=size)
    return MachineRow(
        model=model,
        workload=workload,
        machine=machine,
        strategy=choice.strategy,
        micro_batch_size=size,
        largest=choice.micro_batch_size,
        recomputed=forecasts.fewest_recomputed(architecture, chosen, capacity),
        num_blocks=num_blocks,
        memory=choice.memory.total,
        capacity=capacity,
        host=host_memory(architecture, chosen, **on_host).total,
        hours=hours,
    )
