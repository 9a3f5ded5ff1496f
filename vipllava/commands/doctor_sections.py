"""What ``vipllava doctor`` says about the facts: rows by section, with a remedy where needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from vipllava.commands.doctor_facts import (
    Devices,
    Disk,
    Facts,
    Network,
    Packages,
    Surroundings,
)
from vipllava.config.attention import FALLBACK, attention_candidates, choose_attention
from vipllava.config.hardware import SHM_REMEDY, CudaDevice, Hardware
from vipllava.config.launch_checks import unset_command
from vipllava.config.machine_faults import HOME_REMEDY, UTF8_REMEDY

Status = Literal["ok", "warning", "problem"]

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
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "WANDB_MODE",
    "TORCH_EXTENSIONS_DIR",
    "DS_ACCELERATOR",
)
_STALE: Final = 3600.0
"""Seconds after which a build's lock is taken for a left-over."""


@dataclass(frozen=True, slots=True)
class Row:
    """One fact.

    Attributes:
        name: what it is.
        value: what was found.
        status: whether that is as it should be.
        remedy: what to do where it is not.
    """

    name: str
    value: str
    status: Status = "ok"
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """Facts that belong together."""

    title: str
    rows: tuple[Row, ...]


def sections(facts: Facts) -> tuple[Section, ...]:
    """Return all sections, in the order in which they are printed."""
    return (
        versions(facts.packages),
        devices(facts.devices, facts.packages),
        attention(facts.devices.hardware),
        network(facts.network, len(facts.devices.hardware.cuda)),
        disk(facts.disk),
        surroundings(facts.surroundings, facts.devices.hardware),
        extras(facts.packages),
    )


def versions(packages: Packages) -> Section:
    """Versions; what cannot be imported or is not what we need is a problem."""
    rows = [
        Row("python", packages.python),
        Row("platform", packages.platform),
        Row("vipllava", packages.code),
    ]
    for name, version in packages.versions.items():
        build = f"CUDA {packages.torch_cuda}" if packages.torch_cuda else "CPU build"
        shown = f"{version} ({build})" if name == "torch" else version
        if name in packages.import_errors:
            rows.append(
                Row(
                    name,
                    f"{shown}: cannot be imported: {packages.import_errors[name]}",
                    "problem",
                    f"pip install --force-reinstall {name}, in a virtual environment of its own",
                )
            )
        else:
            rows.append(Row(name, shown))
    for requirement, version in packages.unfit.items():
        there = "not installed" if version is None else f"{version} is installed"
        rows.append(Row(requirement, there, "problem", f'pip install "{requirement}"'))
    return Section("Versions", tuple(rows))


def devices(found: Devices, packages: Packages) -> Section:
    """Devices, their free memory, and whether torch and the driver fit each other."""
    machine = found.hardware
    rows = [
        _device_row(n, device, free)
        for n, (device, free) in enumerate(zip(machine.cuda, found.free_gib, strict=True))
    ]
    if not machine.cuda:
        rows.append(_without_cuda(found, packages))
    if machine.mps:
        rows.append(Row("mps", "Apple's Metal backend"))
    bf16 = "bf16 in hardware" if machine.cpu_bf16 else "no bf16 in hardware"
    rows.append(Row("cpu", f"{machine.num_cpus} cores, {bf16}"))
    return Section("Devices", tuple(rows))


def _device_row(number: int, device: CudaDevice, free: float) -> Row:
    kind = "bf16" if device.capability >= _BF16 else "fp16, no bf16"
    value = (
        f"{device.name}, {free:.1f} of {device.memory_gib:.1f} GiB free, compute capability "
        f"{device.capability[0]}.{device.capability[1]}, {kind}"
    )
    if device.memory_gib - free <= max(_TAKEN * device.memory_gib, _TAKEN_GIB):
        return Row(f"cuda:{number}", value)
    remedy = "other processes hold its memory: `nvidia-smi` names them"
    return Row(f"cuda:{number}", value, "warning", remedy)


def _without_cuda(found: Devices, packages: Packages) -> Row:
    if not found.driver:
        return Row("cuda", "none")
    if packages.torch_cuda is None:
        return Row(
            "cuda",
            "an NVIDIA driver is installed, and torch is a CPU build",
            "problem",
            "install torch's CUDA build: see pytorch.org, Get Started",
        )
    return Row(
        "cuda",
        f"an NVIDIA driver is installed, and torch for CUDA {packages.torch_cuda} sees no device",
        "problem",
        "look at CUDA_VISIBLE_DEVICES and `nvidia-smi`: the driver may be too old for this CUDA, "
        "or the container was started without --gpus all",
    )


def attention(machine: Hardware) -> Section:
    """What a job in 16 bits would use on these devices, and why not the others."""
    capability = machine.least_capability
    rows = attention_candidates(machine.installed, capability, None)
    chosen = choose_attention(rows)

    def mark(name: str, text: str) -> str:
        return "chosen" if name == chosen else text

    shown = [Row(row.name, mark(row.name, row.why_not or "usable")) for row in rows]
    slow = chosen == FALLBACK and capability is not None and capability >= _BF16
    shown.append(
        Row(
            FALLBACK,
            mark(FALLBACK, "usable"),
            "warning" if slow else "ok",
            _install_extra("flash") if slow else "",
        )
    )
    return Section("Attention", tuple(shown))


def network(found: Network, num_cuda: int) -> Section:
    """What processes talk with, and whether they can."""
    needed = num_cuda > 1
    rows = [Row("backends", ", ".join(found.backends) or "none")]
    if needed and "nccl" not in found.backends:
        remedy = "install torch's CUDA build for Linux; on Windows train in WSL"
        rows = [Row("backends", f"{rows[0].value}, no nccl", "problem", remedy)]
    if found.nccl:
        rows.append(Row("nccl", found.nccl))
    probe = found.probe
    if probe is None:
        rows.append(Row("all-reduce", "not tried"))
    elif not probe.error:
        text = f"two processes, {probe.backend}: {probe.seconds:.1f} s"
        rows.append(Row("all-reduce", text))
    else:
        rows.append(
            Row(
                "all-reduce",
                f"two processes, {probe.backend}: {probe.error}",
                "problem" if needed else "warning",
                "run again with NCCL_DEBUG=INFO; name the interface with NCCL_SOCKET_IFNAME; "
                "NCCL_P2P_DISABLE=1 tells whether the links between devices are at fault"
                if probe.backend == "nccl"
                else "name the interface with GLOO_SOCKET_IFNAME; does the host's name resolve?",
            )
        )
    for name, value in found.variables.items():
        if name == "MASTER_ADDR" and found.misplaced_master:
            remedy = "no address of this machine: a job on this node alone wants it unset"
            rows.append(Row(name, value, "warning", remedy))
        else:
            rows.append(Row(name, value))
    for name, value in found.left_over.items():
        remedy = (
            "no launcher has set it, and a job refuses to start with it: unset it in the image, "
            f"the notebook or the shell, or `{unset_command([name], 'python train.py ...')}`"
        )
        rows.append(Row(name, value or "empty", "problem", remedy))
    return Section("Processes", tuple(rows))


def disk(found: Disk) -> Section:
    """Room in the folders that runs use, and in shared memory."""
    rows: list[Row] = []
    for place in found.places:
        value = f"{place.path}: {place.free / _GIB:.1f} GiB free"
        tight = _TIGHT_TEMPORARY if place.name == "temporary" else _TIGHT
        if not place.writable:
            remedy = "change its owner, or name another folder (paths.*, HF_HOME, HOME, TMPDIR)"
            status: Status = "warning" if place.name in _ONLY_READ else "problem"
            rows.append(Row(place.name, f"{value}, cannot be written to", status, remedy))
        elif place.free < tight:
            status = "problem" if place.free < _FULL else "warning"
            remedy = (
                "free some, or name another folder (paths.*, HF_HOME, TMPDIR); `preflight=true` "
                "says what a job writes"
            )
            rows.append(Row(place.name, value, status, remedy))
        else:
            rows.append(Row(place.name, value))
    if found.shm is not None:
        value = f"{found.shm / _GIB:.2f} GiB"
        small = found.shm < _SMALL_SHM
        remedy = f"{SHM_REMEDY}: loader processes hand batches over in it"
        rows.append(Row("/dev/shm", value, "warning", remedy) if small else Row("/dev/shm", value))
    return Section("Disk", tuple(rows))


def surroundings(found: Surroundings, machine: Hardware) -> Section:
    """Variables that change a run, whether W&B has a key, builds that were left half done."""
    shown = {name: "not set" for name in _ALWAYS_SHOWN} | dict(found.variables)
    rows = [Row(name, value) for name, value in shown.items()]
    if machine.cuda and found.variables.get("DS_ACCELERATOR") == "cpu":
        rows = [row for row in rows if row.name != "DS_ACCELERATOR"]
        rows.append(
            Row(
                "DS_ACCELERATOR",
                "cpu, and there are CUDA devices",
                "problem",
                "unset DS_ACCELERATOR: DeepSpeed would not use them",
            )
        )
    if found.home is None:
        rows.append(Row("home", "none", "problem", HOME_REMEDY))
    elif not found.home_writable:
        value = f"{found.home}: cannot be written to"
        rows.append(Row("home", value, "warning", f"{HOME_REMEDY}: libraries keep caches in it"))
    else:
        rows.append(Row("home", found.home))
    value = f"terminal {found.terminal}, file names {found.file_names}"
    narrow = not all(_is_utf8(name) for name in (found.terminal, found.file_names))
    remedy = f"{UTF8_REMEDY}: other letters are shown as escapes and are refused in file names"
    rows.append(Row("encoding", value, "warning", remedy) if narrow else Row("encoding", value))
    rows.append(Row("W&B key", "there" if found.wandb_key else "none"))
    for lock, age in found.locks.items():
        value = f"{lock}, {age / 3600:.1f} hours old"
        if age < _STALE:
            rows.append(Row("build lock", value))
            continue
        remedy = "every later run would wait for it; if nothing is being built: delete it"
        rows.append(Row("build lock", value, "warning", remedy))
    return Section("Environment", tuple(rows))


def _is_utf8(name: str) -> bool:
    return name.lower().replace("_", "-") in ("utf-8", "utf8")


def extras(packages: Packages) -> Section:
    """Which extras are installed, and what brings the others."""
    return Section(
        "Extras",
        tuple(
            Row(name, f"lacks {', '.join(missing)}", remedy=_install_extra(name))
            if missing
            else Row(name, "installed")
            for name, missing in packages.extras.items()
        ),
    )


def _install_extra(name: str) -> str:
    return f"pip install -e '.[{name}]'"
