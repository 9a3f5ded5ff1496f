"""``train.py preflight=true``: a job looked over, as tables; an error if it cannot run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vipllava.training.callbacks import render_parameter_table
from vipllava.training.preflight import PreflightReport, examine
from vipllava.types import VipLlavaError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def preflight(cfg: DictConfig, console: Console | None = None) -> PreflightReport:
    """Look a job over, print what was found, and complain if it cannot run.

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
    print_preflight(report, console)
    if report.problems:
        listed = "\n".join(f"  - {problem}" for problem in report.problems)
        count = len(report.problems)
        raise VipLlavaError(f"preflight found {count} problem{'s' if count > 1 else ''}:\n{listed}")
    return report


def in_gib(size: float) -> str:
    """Write bytes of memory, e.g. ``71.3 GiB`` or ``4.2 MiB``."""
    return f"{size / 2**30:.1f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"


def in_gb(size: float) -> str:
    """Write bytes on a disk, e.g. ``26.9 GB`` or ``4.2 MB``."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def print_preflight(report: PreflightReport, console: Console | None = None) -> None:
    """Print every table, the notes and the problems.

    Args:
        report: what was found.
        console: where to print; the standard output if not given.
    """
    console = console or Console()
    console.print(Text(f"preflight: {report.title}", style="bold"))
    for table in (
        _data_table(report),
        render_parameter_table(report.forecast.parameters),
        _work_table(report),
        _memory_table(report),
        _host_table(report),
        _disk_table(report),
    ):
        console.print(table)
    for note in report.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    if not report.problems:
        what = "nothing" if report.num_proved else "nothing that was looked at"
        console.print(Text(f"{what} stands in the way", style="green"))


def _data_table(report: PreflightReport) -> Table:
    table = Table(title="Data")
    table.add_column("data set")
    for header in ("samples", "an epoch takes", "times seen"):
        table.add_column(header, justify="right")
    for part in report.corpus.datasets:
        seen = report.forecast.times_seen.get(part.name)
        known = part.num_samples > 0
        table.add_row(
            part.name,
            f"{part.num_samples:,}" if known else "not known",
            f"{part.num_per_epoch:,}" if known else "",
            "" if seen is None else f"{seen:g}",
        )
    table.caption = (
        f"labels proved: {report.num_proved} samples; linted: {report.num_linted}; mean length "
        f"{report.corpus.mean_tokens:.0f} tokens, longest {report.corpus.longest}"
    )
    return table


def _work_table(report: PreflightReport) -> Table:
    expected, plan = report.forecast, report.plan
    hours = "not known" if expected.hours is None else f"{expected.hours:.1f} (MFU {plan.mfu:.0%})"
    return _facts(
        "Work",
        {
            "optimizer steps": "not known"
            if expected.num_steps is None
            else f"{expected.num_steps:,}",
            "samples a step": f"{expected.samples_per_step:,.0f}",
            "tokens a step": f"{expected.tokens_per_step:,.0f}",
            "useful TFLOP a step": f"{expected.flops_per_step / 1e12:,.4g}",
            "device": plan.device or "not known",
            "hours": hours,
        },
    )


def _memory_table(report: PreflightReport) -> Table:
    memory, setup = report.forecast.memory, report.setup
    facts = {
        "weights": in_gib(memory.weights),
        "gradients": in_gib(memory.gradients),
        "optimizer": in_gib(memory.optimizer),
        "activations": in_gib(memory.activations),
        "working copies": in_gib(memory.working),
        "overhead": in_gib(memory.overhead),
        "all": in_gib(memory.total),
        "the device has": "not known" if report.capacity is None else in_gib(report.capacity),
    }
    facts["decoder blocks recomputed"] = (
        f"{setup.num_recomputed(report.num_blocks)} of {report.num_blocks}"
    )
    facts["all, if none is recomputed"] = in_gib(report.none_recomputed)
    facts["all, if every one is"] = in_gib(report.all_recomputed)
    if report.capacity is not None:
        largest = "none" if report.largest is None else str(report.largest)
        facts[f"largest micro-batch with {setup.strategy}"] = largest
        choice = report.choice
        facts["strategy of choice"] = (
            "none fits"
            if choice is None
            else f"{choice.strategy} (micro-batch up to {choice.micro_batch_size})"
        )
    rows = f"{setup.micro_batch_size} rows of {setup.row_tokens} tokens"
    return _facts(f"Memory of a device: {setup.strategy}, {setup.precision}, {rows}", facts)


def _host_table(report: PreflightReport) -> Table:
    host, capacity = report.forecast.host, report.host_capacity
    nodes, per_node = report.plan.num_nodes, report.setup.num_devices // report.plan.num_nodes
    return _facts(
        f"Memory of a node: {nodes} x {per_node} processes",
        {
            "processes and their loaders": in_gib(host.processes),
            "copies of weights at the start": in_gib(host.copies),
            "what stays while it trains": in_gib(host.trained),
            "a checkpoint or the export": in_gib(host.saving),
            "all": in_gib(host.total),
            "the machine has": "not known" if capacity is None else in_gib(capacity),
            "mapped weight files, shared": in_gib(host.files),
        },
    )


def _disk_table(report: PreflightReport) -> Table:
    expected = report.forecast
    return _facts(
        "Disk",
        {
            "a checkpoint": in_gb(expected.checkpoint_bytes),
            "the export": in_gb(expected.export_bytes),
            "needed at once": in_gb(expected.disk_bytes),
            "free": in_gb(report.free_disk),
        },
    )


def _facts(title: str, facts: dict[str, str]) -> Table:
    table = Table(title=title, show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in facts.items():
        table.add_row(name, value)
    return table
