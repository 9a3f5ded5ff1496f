"""``vipllava machines``: which machine a stage needs, for every real model and every trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vipllava.commands.output import print_table, rows_table, say
from vipllava.types import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vipllava.forecast.architecture import Architecture
    from vipllava.forecast.flops import Workload
    from vipllava.forecast.job import Corpus

MODELS: Final = ("7b", "13b", "llama3_8b", "phi3_mini")
_SINGLE: Final = (("RTX 4090", 24), ("A100", 80), ("H200", 141))
"""Devices and their GB: what ``trainer=1gpu`` is shown for: it takes whatever there is."""

_STAGES: Final = ("pretrain", "finetune")
_HEADERS: Final = (
    "trains", "machine", "strategy", "micro-batch", "largest", "recomputed", "GiB", "host GiB",
    "hours",
)  # fmt: skip
_SPARE: Final = ("recomputed", "largest", "host GiB", "micro-batch")
"""What a narrow terminal has no room for."""
_GIB: Final = 2**30


@dataclass(frozen=True, slots=True)
class MachineRow:
    """One model, workload and machine."""

    model: str  # of ``conf/model``
    workload: str  # what trains
    machine: str  # the trainer, and which device where that is open
    strategy: str | None  # the least sharded that fits; None if nothing does
    micro_batch_size: int  # that ``memory`` is of: the trainer's, or the largest if that is smaller
    largest: int | None  # micro-batch that fits; None if none does
    recomputed: int | None  # the fewest decoder blocks that have to be, for that micro-batch to fit
    num_blocks: int  # that the model has
    memory: float  # bytes of a device; where nothing fits, the least that was tried
    capacity: float  # bytes that the device has
    host: float  # bytes of a node beside its devices
    hours: float | None  # of the stage

    def cells(self) -> tuple[str, ...]:
        """Return the row as texts, one for each of the table's headers."""
        fits = self.strategy is not None
        return (
            self.workload,
            self.machine,
            self.strategy or "does not fit",
            str(self.micro_batch_size),
            str(self.largest) if self.largest else "-",
            f"{self.recomputed} of {self.num_blocks}" if self.recomputed is not None else "-",
            f"{self.memory / _GIB:.1f} of {self.capacity / _GIB:.1f}",
            f"{self.host / _GIB:.0f}" if fits else "-",
            f"{self.hours:.1f}" if fits and self.hours is not None else "-",
        )


def machines(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model", help="Of conf/model; may be repeated.", show_default="all real ones"
        ),
    ] = None,
    mfu: Annotated[float, typer.Option(help="Share of the devices' peak.")] = 0.4,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="For docs/machines.md.")] = False,
) -> None:
    """Say which machine I need: memory, strategy, hours.

    For every model, stage and trainer. The same for one job, with its data: vipllava train
    preflight=true
    """
    from rich import box

    from vipllava.config.schema import did_you_mean

    for model in models or ():
        if model not in MODELS:
            raise ConfigError(
                f"--model {model}: not one of {', '.join(MODELS)}{did_you_mean(model, MODELS)}; of "
                "another model `vipllava train ... preflight=true` makes a forecast"
            )
    rows = machine_rows(models or MODELS, mfu=mfu)
    if as_markdown:
        say(markdown(rows))
        return
    for model in dict.fromkeys(row.model for row in rows):
        title, cells = f"{model}, hours at an MFU of {mfu:.0%}", _cells(rows, model)
        look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 0), "spare": _SPARE}
        print_table(rows_table(title, _HEADERS, cells, right=_HEADERS[3:], **look))


def machine_rows(models: Sequence[str] = MODELS, *, mfu: float) -> list[MachineRow]:
    """Forecast every workload of models of ``conf/model`` on every trainer of known memory."""
    from vipllava.config.composing import compose_job
    from vipllava.forecast.architecture import published_architecture
    from vipllava.forecast.flops import WORKLOADS

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


def markdown(rows: Sequence[MachineRow]) -> str:
    """Return the tables of ``docs/machines.md``."""
    tables: list[str] = []
    for model in dict.fromkeys(row.model for row in rows):
        cells = [_HEADERS, ["---"] * len(_HEADERS), *_cells(rows, model)]
        lines = ("| " + " | ".join(line) + " |" for line in cells)
        tables.append("\n".join((f"## {model}", "", *lines)))
    return "\n\n".join(tables)


def _cells(rows: Sequence[MachineRow], model: str) -> list[tuple[str, ...]]:
    return [row.cells() for row in rows if row.model == model]


def _machines(stage: str) -> Iterator[tuple[str, DictConfig]]:
    """Yield every trainer whose memory is known, composed for a stage."""
    from vipllava.config.composing import compose_job
    from vipllava.config.places import CONFIG_DIR

    for name in sorted(path.stem for path in (CONFIG_DIR / "trainer").glob("*.yaml")):
        job = [f"trainer={name}", "model=7b", f"stage={stage}"]
        if name == "1gpu":
            for device, memory in _SINGLE:
                machine = [f"machine.device={device}", f"machine.memory_gb={memory}"]
                # Not what this machine would choose.
                precision = "trainer.precision=bf16-mixed"
                yield f"1gpu ({device})", compose_job([*job, *machine, precision])
        elif name not in ("auto", "cpu"):
            cfg = compose_job(job)
            if cfg.machine.memory_gb is not None:
                yield name, cfg


def _corpus(model: str, stage: str, image_tokens: int) -> Corpus:
    from vipllava.config.composing import compose_job
    from vipllava.config.places import MANIFESTS_DIR
    from vipllava.training.preflight import assumed_corpus

    manifests = f"paths.manifests={MANIFESTS_DIR}"
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
    from vipllava.forecast.memory import Setup
    from vipllava.models.adapters import AdapterSettings
    from vipllava.models.quantization import QuantizationSettings
    from vipllava.training.optim import uses_fused_adamw

    num_nodes = int(cfg.trainer.num_nodes)
    devices = int(cfg.trainer.devices) * num_nodes
    global_rows = int(cfg.stage.global_batch_size)
    wanted = int(cfg.machine.micro_batch_sizes[workload])
    wanted = largest_dividing(min(wanted, limit or wanted), global_rows, devices, 1) or 1
    capability = cfg.machine.capability
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
    chosen = replace(
        setup,
        strategy=choice.strategy if choice else forecasts.possible_strategies(setup)[-1],
        micro_batch_size=min(wanted, choice.micro_batch_size) if choice else 1,
    )
    plan = forecasts.RunPlan(
        1, global_rows, mfu=mfu, device=cfg.machine.device, num_nodes=num_nodes,
        num_workers=int(cfg.data.num_workers),
    )  # fmt: skip
    expected = forecasts.forecast(architecture, chosen, corpus, plan)
    return MachineRow(
        model=model,
        workload=workload,
        machine=machine,
        strategy=choice and choice.strategy,
        micro_batch_size=chosen.micro_batch_size,
        largest=choice and choice.micro_batch_size,
        recomputed=choice and forecasts.fewest_recomputed(architecture, chosen, capacity),
        num_blocks=architecture.language_model.num_blocks,
        memory=expected.memory.total,
        capacity=capacity,
        host=expected.host.total,
        hours=choice and expected.hours,
    )
