"""``vipllava doctor``: what a machine has, what is wrong with it, and what to do about it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from vipllava.commands.options import Json
from vipllava.commands.output import facts_table, print_json
from vipllava.config.attention import FALLBACK, attention_candidates, choose_attention
from vipllava.config.hardware import SHM_REMEDY, Hardware
from vipllava.config.launch_checks import unset_command
from vipllava.config.machine_faults import HOME_REMEDY, UTF8_REMEDY

if TYPE_CHECKING:
    from rich.console import Console

    from vipllava.commands import doctor_facts as looked
    from vipllava.commands.network_probe import Probe

Status = Literal["ok", "warning", "problem"]

_STYLES: Final = {"problem": "bold red", "warning": "yellow", "ok": ""}
"""From the worst."""
_PIPED_WIDTH: Final = 160
_GIB: Final = 2**30
_BF16: Final = (8, 0)
_TAKEN, _TAKEN_GIB = 0.1, 1.0
"""What may be taken of a device's memory, as a share or in GiB: our own context is part of it."""
_FULL, _TIGHT = 1 * _GIB, 20 * _GIB
"""Free bytes: below the first nothing can be saved, below the second no real model's checkpoint."""
_TIGHT_TEMPORARY: Final = 2 * _GIB
_SMALL_SHM: Final = 1 * _GIB
"""Loader processes hand their batches over in it; Docker gives 64 MB unless told otherwise."""
_ONLY_READ: Final = ("data", "hub cache")
"""Folders that may be filled already, and belong to somebody else."""
_ALWAYS_SHOWN: Final = (
    "HF_HOME", "HF_HUB_OFFLINE", "WANDB_MODE", "TORCH_EXTENSIONS_DIR", "DS_ACCELERATOR",
)  # fmt: skip
_STALE: Final = 3600.0
"""Seconds after which a build's lock is taken for a left-over."""


@dataclass(frozen=True, slots=True)
class Row:
    """One fact."""

    name: str  # what it is
    value: str  # what was found
    status: Status = "ok"  # whether that is as it should be
    remedy: str = ""  # what to do where it is not


def doctor(
    as_json: Json = False,
    no_network: Annotated[
        bool, typer.Option("--no-network", help="Do not let two processes talk to each other.")
    ] = False,
) -> int:
    """Say what this machine has and lacks.

    Versions, devices, kernels, network, disk, extras: for a new machine, and for a bug report.
    Exit code 1 if something is wrong.
    """
    from rich.console import Console

    from vipllava.commands.doctor_facts import look

    found = sections(look(network=not no_network))
    statuses = {row.status for rows in found.values() for row in rows}
    worst = next((status for status in _STYLES if status in statuses), "ok")
    if as_json:
        plain = {title: [asdict(row) for row in rows] for title, rows in found.items()}
        print_json({"status": worst, "sections": plain})
    else:
        _print_sections(found, Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH))
    return int(worst == "problem")


def sections(facts: looked.Facts) -> dict[str, list[Row]]:
    """Return the rows of every section by its title, in the order in which they are printed."""
    machine = facts.devices.hardware
    return {
        "Versions": versions(facts.packages),
        "Devices": devices(facts.devices, facts.packages),
        "Attention": attention(machine),
        "Processes": network(facts.network, len(machine.cuda)),
        "Disk": disk(facts.places, facts.shm),
        "Environment": surroundings(facts.surroundings, machine),
        "Extras": extras(facts.packages),
    }


def _print_sections(found: Mapping[str, Sequence[Row]], console: Console) -> None:
    """Print a table for each section, then what is bad with its remedies."""
    from rich.text import Text

    bad: dict[str, list[Text]] = {"problem": [], "warning": []}
    for title, rows in found.items():
        table = facts_table([], title, indent=2)
        table.add_column(overflow="fold")
        for row in rows:
            style = _STYLES[row.status]
            # What is bad has its remedy below.
            last = row.remedy if row.status == "ok" else row.status
            table.add_row(*map(Text, (row.name, row.value)), Text(last, style))
            if row.status != "ok":
                text = f"{row.status}: {title}, {row.name}: {row.value}"
                bad[row.status] += [Text(text, style), Text(f"  -> {row.remedy}")]
        console.print(table)
        console.print()
    for line in [*bad["problem"], *bad["warning"]] or [Text("nothing is wrong", "green")]:
        console.print(line)


def versions(packages: looked.Packages) -> list[Row]:
    """Versions; what cannot be imported or is not what we need is a problem."""
    rows = [
        Row("python", packages.python),
        Row("platform", packages.platform),
        Row("vipllava", packages.code),
    ]
    for name, version in packages.versions.items():
        build = f"CUDA {packages.torch_cuda}" if packages.torch_cuda else "CPU build"
        shown = f"{version} ({build})" if name == "torch" else version
        remedy = f"pip install --force-reinstall {name}, in a virtual environment of its own"
        if error := packages.import_errors.get(name):
            rows.append(Row(name, f"{shown}: cannot be imported: {error}", "problem", remedy))
        else:
            rows.append(Row(name, shown))
    for requirement, version in packages.unfit.items():
        there = "not installed" if version is None else f"{version} is installed"
        rows.append(Row(requirement, there, "problem", f'pip install "{requirement}"'))
    return rows


def devices(found: looked.Devices, packages: looked.Packages) -> list[Row]:
    """Devices, their free memory, and whether torch and the driver fit each other."""
    machine = found.hardware
    rows: list[Row] = []
    for number, (device, free) in enumerate(zip(machine.cuda, found.free_gib, strict=True)):
        major, minor = device.capability
        value = (
            f"{device.name}, {free:.1f} of {device.memory_gib:.1f} GiB free, compute capability "
            f"{major}.{minor}, {'bf16' if device.capability >= _BF16 else 'fp16, no bf16'}"
        )
        taken = device.memory_gib - free > max(_TAKEN * device.memory_gib, _TAKEN_GIB)
        remedy = "other processes hold its memory: `nvidia-smi` names them"
        rows.append(_judged(f"cuda:{number}", value, "warning" if taken else "ok", remedy))
    if not machine.cuda:
        rows.append(_without_cuda(found.driver, packages.torch_cuda))
    if machine.mps:
        rows.append(Row("mps", "Apple's Metal backend"))
    bf16 = "bf16 in hardware" if machine.cpu_bf16 else "no bf16 in hardware"
    return [*rows, Row("cpu", f"{machine.num_cpus} cores, {bf16}")]


def _without_cuda(driver: bool, torch_cuda: str | None) -> Row:
    if not driver:
        return Row("cuda", "none")
    there = "an NVIDIA driver is installed, and torch"
    if torch_cuda is None:
        remedy = "install torch's CUDA build: see pytorch.org, Get Started"
        return Row("cuda", f"{there} is a CPU build", "problem", remedy)
    remedy = (
        "look at CUDA_VISIBLE_DEVICES and `nvidia-smi`: the driver may be too old for this CUDA, "
        "or the container was started without --gpus all"
    )
    return Row("cuda", f"{there} for CUDA {torch_cuda} sees no device", "problem", remedy)


def attention(machine: Hardware) -> list[Row]:
    """What a job in 16 bits would use on these devices, and why not the others."""
    capability = machine.least_capability
    kernels = attention_candidates(machine.installed, capability, None)
    chosen = choose_attention(kernels)
    said = {kernel.name: kernel.why_not or "usable" for kernel in kernels} | {FALLBACK: "usable"}
    said[chosen] = "chosen"
    rows = [Row(name, text) for name, text in said.items() if name != FALLBACK]
    slow = chosen == FALLBACK and capability is not None and capability >= _BF16
    status: Status = "warning" if slow else "ok"
    return [*rows, _judged(FALLBACK, said[FALLBACK], status, _install_extra("flash"))]


def network(found: looked.Network, num_cuda: int) -> list[Row]:
    """What processes talk with, and whether they can."""
    needed = num_cuda > 1
    backends = ", ".join(found.backends) or "none"
    rows = [Row("backends", backends)]
    if needed and "nccl" not in found.backends:
        remedy = "install torch's CUDA build for Linux; on Windows train in WSL"
        rows = [Row("backends", f"{backends}, no nccl", "problem", remedy)]
    if found.nccl:
        rows.append(Row("nccl", found.nccl))
    rows.append(_all_reduce(found.probe, needed))
    for name, value in found.variables.items():
        misplaced = name == "MASTER_ADDR" and found.misplaced_master
        remedy = "no address of this machine: a job on this node alone wants it unset"
        rows.append(_judged(name, value, "warning" if misplaced else "ok", remedy))
    for name, value in found.left_over.items():
        remedy = (
            "no launcher has set it, and a job refuses to start with it: unset it in the image, "
            f"the notebook or the shell, or `{unset_command([name], 'python train.py ...')}`"
        )
        rows.append(Row(name, value or "empty", "problem", remedy))
    return rows


def _all_reduce(probe: Probe | None, needed: bool) -> Row:
    if probe is None:
        return Row("all-reduce", "not tried")
    text = f"two processes, {probe.backend}: "
    if not probe.error:
        return Row("all-reduce", f"{text}{probe.seconds:.1f} s")
    remedy = (
        "run again with NCCL_DEBUG=INFO; name the interface with NCCL_SOCKET_IFNAME; "
        "NCCL_P2P_DISABLE=1 tells whether the links between devices are at fault"
        if probe.backend == "nccl"
        else "name the interface with GLOO_SOCKET_IFNAME; does the host's name resolve?"
    )
    return Row("all-reduce", text + probe.error, "problem" if needed else "warning", remedy)


def disk(places: Sequence[looked.Place], shm: int | None) -> list[Row]:
    """Room in the folders that runs use, and in shared memory."""
    rows = [_place_row(place) for place in places]
    if shm is not None:
        status: Status = "warning" if shm < _SMALL_SHM else "ok"
        remedy = f"{SHM_REMEDY}: loader processes hand batches over in it"
        rows.append(_judged("/dev/shm", f"{shm / _GIB:.2f} GiB", status, remedy))
    return rows


def _place_row(place: looked.Place) -> Row:
    value = f"{place.path}: {place.free / _GIB:.1f} GiB free"
    tight = _TIGHT_TEMPORARY if place.name == "temporary" else _TIGHT
    if not place.writable:
        remedy = "change its owner, or name another folder (paths.*, HF_HOME, HOME, TMPDIR)"
        status: Status = "warning" if place.name in _ONLY_READ else "problem"
        return Row(place.name, f"{value}, cannot be written to", status, remedy)
    remedy = (
        "free some, or name another folder (paths.*, HF_HOME, TMPDIR); `preflight=true` says what "
        "a job writes"
    )
    status = "ok" if place.free >= tight else "warning" if place.free >= _FULL else "problem"
    return _judged(place.name, value, status, remedy)


def surroundings(found: looked.Surroundings, machine: Hardware) -> list[Row]:
    """Variables that change a run, whether W&B has a key, builds that were left half done."""
    shown = dict.fromkeys(_ALWAYS_SHOWN, "not set") | dict(found.variables)
    accelerator: list[Row] = []
    if machine.cuda and shown["DS_ACCELERATOR"] == "cpu":
        value = f"{shown.pop('DS_ACCELERATOR')}, and there are CUDA devices"
        remedy = "unset DS_ACCELERATOR: DeepSpeed would not use them"
        accelerator = [Row("DS_ACCELERATOR", value, "problem", remedy)]
    rows = [*(Row(name, value) for name, value in shown.items()), *accelerator]
    if found.home is None:
        rows.append(Row("home", "none", "problem", HOME_REMEDY))
    elif not found.home_writable:
        value = f"{found.home}: cannot be written to"
        rows.append(Row("home", value, "warning", f"{HOME_REMEDY}: libraries keep caches in it"))
    else:
        rows.append(Row("home", found.home))
    value = f"terminal {found.terminal}, file names {found.file_names}"
    names = {found.terminal.lower(), found.file_names.lower()}
    status: Status = "ok" if names <= {"utf-8", "utf8", "utf_8"} else "warning"
    remedy = f"{UTF8_REMEDY}: other letters are shown as escapes and are refused in file names"
    rows.append(_judged("encoding", value, status, remedy))
    rows.append(Row("W&B key", "there" if found.wandb_key else "none"))
    for lock, age in found.locks.items():
        remedy = "every later run would wait for it; if nothing is being built: delete it"
        value = f"{lock}, {age / 3600:.1f} hours old"
        rows.append(_judged("build lock", value, "ok" if age < _STALE else "warning", remedy))
    return rows


def extras(packages: looked.Packages) -> list[Row]:
    """Which extras are installed, and what brings the others."""
    return [
        Row(name, f"lacks {', '.join(missing)}", remedy=_install_extra(name))
        if missing
        else Row(name, "installed")
        for name, missing in packages.extras.items()
    ]


def _judged(name: str, value: str, status: Status, remedy: str) -> Row:
    """Return a fact, with its remedy only where one is needed."""
    return Row(name, value, status, "" if status == "ok" else remedy)


def _install_extra(name: str) -> str:
    return f'pip install "vipllava-lightning[{name}]"'
