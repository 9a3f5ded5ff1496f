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
    Place,
    Surroundings,
)
from vipllava.commands.network_probe import Probe
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
    """One fact."""

    name: str  # what it is
    value: str  # what was found
    status: Status = "ok"  # whether that is as it should be
    remedy: str = ""  # what to do where it is not


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
        remedy = f"pip install --force-reinstall {name}, in a virtual environment of its own"
        if error := packages.import_errors.get(name):
            rows.append(Row(name, f"{shown}: cannot be imported: {error}", "problem", remedy))
        else:
            rows.append(Row(name, shown))
    for requirement, version in packages.unfit.items():
        there = "not installed" if version is None else f"{version} is installed"
        rows.append(Row(requirement, there, "problem", f'pip install "{requirement}"'))
    return Section("Versions", tuple(rows))


def devices(found: Devices, packages: Packages) -> Section:
    """Devices, their free memory, and whether torch and the driver fit each other."""
    machine = found.hardware
    pairs = enumerate(zip(machine.cuda, found.free_gib, strict=True))
    rows = [_device_row(number, device, free) for number, (device, free) in pairs]
    if not machine.cuda:
        rows.append(_without_cuda(found.driver, packages.torch_cuda))
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
    taken = device.memory_gib - free > max(_TAKEN * device.memory_gib, _TAKEN_GIB)
    remedy = "other processes hold its memory: `nvidia-smi` names them"
    return _judged(f"cuda:{number}", value, "warning" if taken else "ok", remedy)


def _without_cuda(driver: bool, torch_cuda: str | None) -> Row:
    there = "an NVIDIA driver is installed, and torch"
    if not driver:
        return Row("cuda", "none")
    if torch_cuda is None:
        remedy = "install torch's CUDA build: see pytorch.org, Get Started"
        return Row("cuda", f"{there} is a CPU build", "problem", remedy)
    remedy = (
        "look at CUDA_VISIBLE_DEVICES and `nvidia-smi`: the driver may be too old for this CUDA, "
        "or the container was started without --gpus all"
    )
    return Row("cuda", f"{there} for CUDA {torch_cuda} sees no device", "problem", remedy)


def attention(machine: Hardware) -> Section:
    """What a job in 16 bits would use on these devices, and why not the others."""
    capability = machine.least_capability
    kernels = attention_candidates(machine.installed, capability, None)
    chosen = choose_attention(kernels)
    said = {kernel.name: kernel.why_not or "usable" for kernel in kernels} | {FALLBACK: "usable"}
    said[chosen] = "chosen"
    slow = chosen == FALLBACK and capability is not None and capability >= _BF16
    rows = [
        _judged(
            name, text, "warning" if slow and name == FALLBACK else "ok", _install_extra("flash")
        )
        for name, text in said.items()
    ]
    return Section("Attention", tuple(rows))


def network(found: Network, num_cuda: int) -> Section:
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
    return Section("Processes", tuple(rows))


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


def disk(found: Disk) -> Section:
    """Room in the folders that runs use, and in shared memory."""
    rows = [_place_row(place) for place in found.places]
    if found.shm is not None:
        status: Status = "warning" if found.shm < _SMALL_SHM else "ok"
        remedy = f"{SHM_REMEDY}: loader processes hand batches over in it"
        rows.append(_judged("/dev/shm", f"{found.shm / _GIB:.2f} GiB", status, remedy))
    return Section("Disk", tuple(rows))


def _place_row(place: Place) -> Row:
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


def surroundings(found: Surroundings, machine: Hardware) -> Section:
    """Variables that change a run, whether W&B has a key, builds that were left half done."""
    shown = {name: "not set" for name in _ALWAYS_SHOWN} | dict(found.variables)
    rows = [Row(name, value) for name, value in shown.items()]
    if machine.cuda and shown["DS_ACCELERATOR"] == "cpu":
        rows = [row for row in rows if row.name != "DS_ACCELERATOR"]
        remedy = "unset DS_ACCELERATOR: DeepSpeed would not use them"
        value = "cpu, and there are CUDA devices"
        rows.append(Row("DS_ACCELERATOR", value, "problem", remedy))
    if found.home is None:
        rows.append(Row("home", "none", "problem", HOME_REMEDY))
    elif not found.home_writable:
        value = f"{found.home}: cannot be written to"
        rows.append(Row("home", value, "warning", f"{HOME_REMEDY}: libraries keep caches in it"))
    else:
        rows.append(Row("home", found.home))
    names = {found.terminal.lower(), found.file_names.lower()}
    rows.append(
        _judged(
            "encoding",
            f"terminal {found.terminal}, file names {found.file_names}",
            "ok" if names <= {"utf-8", "utf8", "utf_8"} else "warning",
            f"{UTF8_REMEDY}: other letters are shown as escapes and are refused in file names",
        )
    )
    rows.append(Row("W&B key", "there" if found.wandb_key else "none"))
    for lock, age in found.locks.items():
        remedy = "every later run would wait for it; if nothing is being built: delete it"
        value = f"{lock}, {age / 3600:.1f} hours old"
        rows.append(_judged("build lock", value, "ok" if age < _STALE else "warning", remedy))
    return Section("Environment", tuple(rows))


def extras(packages: Packages) -> Section:
    """Which extras are installed, and what brings the others."""
    rows = [
        Row(name, f"lacks {', '.join(missing)}", remedy=_install_extra(name))
        if missing
        else Row(name, "installed")
        for name, missing in packages.extras.items()
    ]
    return Section("Extras", tuple(rows))


def _judged(name: str, value: str, status: Status, remedy: str) -> Row:
    """Return a fact, with its remedy only where one is needed."""
    return Row(name, value, status, "" if status == "ok" else remedy)


def _install_extra(name: str) -> str:
    return f'pip install "vipllava-lightning[{name}]"'
