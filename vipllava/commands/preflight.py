"""``train.py preflight=true``: a job looked over, as tables; an error if it cannot run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from vipllava.commands.output import make_console, rows_table
from vipllava.training.callbacks import render_parameter_table
from vipllava.training.preflight import PreflightReport, examine
from vipllava.types import VipLlavaError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.table import Table


def preflight(cfg: DictConfig, console: Console | None = None) -> PreflightReport:
    """Look a job over, print tables, notes and problems, and complain if it cannot run.

    Args:
        cfg: what Hydra composed from ``conf/train.yaml``, its plan checked.
        console: where tables go; the standard output if not given.

    Returns:
        What was printed, if nothing stands in the way.

    Raises:
        VipLlavaError: config or tokenizer of a model whose sizes do not ship cannot be had; or,
            when all has been printed, something would stop the job: each problem with its remedy.
    """
    report = examine(cfg)
    console = console or make_console()
    console.print(Text(f"preflight: {report.title}", style="bold"))
    console.print(_data_table(report))
    console.print(render_parameter_table(report.forecast.parameters))
    for title, facts in _facts(report).items():
        console.print(
            rows_table(title, ("", "value"), facts.items(), right=["value"], show_header=False)
        )
    for note in report.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    if report.problems:
        listed = "\n".join(f"  - {problem}" for problem in report.problems)
        count = len(report.problems)
        raise VipLlavaError(f"preflight found {count} problem{'s' if count > 1 else ''}:\n{listed}")
    what = "nothing" if report.num_proved else "nothing that was looked at"
    console.print(Text(f"{what} stands in the way", style="green"))
    return report


def _data_table(report: PreflightReport) -> Table:
    rows: list[tuple[str, ...]] = []
    for part in report.corpus.datasets:
        seen = report.forecast.times_seen.get(part.name)
        known = part.num_samples > 0
        rows.append(
            (
                part.name,
                f"{part.num_samples:,}" if known else "not known",
                f"{part.num_per_epoch:,}" if known else "",
                "" if seen is None else f"{seen:g}",
            )
        )
    numbers = ("samples", "an epoch takes", "times seen")
    caption = (
        f"labels proved: {report.num_proved} samples; linted: {report.num_linted}; mean length "
        f"{report.corpus.mean_tokens:.0f} tokens, longest {report.corpus.longest}"
    )
    return rows_table("Data", ("data set", *numbers), rows, right=numbers, caption=caption)


def _facts(report: PreflightReport) -> dict[str, dict[str, str]]:
    """Return what is known of the job's work, memory and disk, by the title of its table."""
    expected, plan, setup = report.forecast, report.plan, report.setup
    memory, host, steps = expected.memory, expected.host, expected.num_steps
    num_blocks = report.num_blocks
    hours = None if expected.hours is None else f"{expected.hours:.1f} (MFU {plan.mfu:.0%})"
    work = {
        "optimizer steps": "not known" if steps is None else f"{steps:,}",
        "samples a step": f"{expected.samples_per_step:,.0f}",
        "tokens a step": f"{expected.tokens_per_step:,.0f}",
        "useful TFLOP a step": f"{expected.flops_per_step / 1e12:,.4g}",
        "device": plan.device or "not known",
        "hours": hours or "not known",
    }
    of_device = {
        "weights": _gib(memory.weights),
        "gradients": _gib(memory.gradients),
        "optimizer": _gib(memory.optimizer),
        "activations": _gib(memory.activations),
        "working copies": _gib(memory.working),
        "overhead": _gib(memory.overhead),
        "all": _gib(memory.total),
        "the device has": _gib(report.capacity),
        "decoder blocks recomputed": f"{setup.num_recomputed(num_blocks)} of {num_blocks}",
        "all, if none is recomputed": _gib(report.none_recomputed),
        "all, if every one is": _gib(report.all_recomputed),
    }
    if report.capacity is not None:
        choice = report.choice
        of_device[f"largest micro-batch with {setup.strategy}"] = str(report.largest or "none")
        of_device["strategy of choice"] = (
            "none fits"
            if choice is None
            else f"{choice.strategy} (micro-batch up to {choice.micro_batch_size})"
        )
    of_node = {
        "processes and their loaders": _gib(host.processes),
        "copies of weights at the start": _gib(host.copies),
        "what stays while it trains": _gib(host.trained),
        "a checkpoint or the export": _gib(host.saving),
        "all": _gib(host.total),
        "the machine has": _gib(report.host_capacity),
        "mapped weight files, shared": _gib(host.files),
    }
    disk = {
        "a checkpoint": _gb(expected.checkpoint_bytes),
        "the export": _gb(expected.export_bytes),
        "needed at once": _gb(expected.disk_bytes),
        "free": _gb(report.free_disk),
    }
    rows = f"{setup.micro_batch_size} rows of {setup.row_tokens} tokens"
    nodes, per_node = plan.num_nodes, setup.num_devices // plan.num_nodes
    return {
        "Work": work,
        f"Memory of a device: {setup.strategy}, {setup.precision}, {rows}": of_device,
        f"Memory of a node: {nodes} x {per_node} processes": of_node,
        "Disk": disk,
    }


def _gib(size: float | None) -> str:
    """Write bytes of memory, e.g. ``71.3 GiB`` or ``4.2 MiB``."""
    if size is None:
        return "not known"
    return f"{size / 2**30:.1f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"


def _gb(size: float) -> str:
    """Write bytes on a disk, e.g. ``26.9 GB`` or ``4.2 MB``."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
