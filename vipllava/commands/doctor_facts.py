"""What ``vipllava doctor`` looks at, as plain values that a test can make up."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vipllava import __version__
from vipllava.commands import network_probe
from vipllava.commands.network_probe import Probe
from vipllava.config import hardware
from vipllava.config.hardware import SHM, Hardware
from vipllava.config.launch_checks import left_over, misplaced_master
from vipllava.config.machine_faults import find_home
from vipllava.types import first_line

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PROJECT: Final = "vipllava-lightning"
NO_FEATURES: Final = ("all", "browser", "dev")
"""Extras that are for working on the project."""

_PYPROJECT: Final = Path(__file__).resolve().parents[2] / "pyproject.toml"
_SHOWN: Final = (
    "torch", "lightning", "transformers", "tokenizers", "hydra-core", "omegaconf", "numpy",
    "deepspeed", "peft", "bitsandbytes", "flash-attn", "flash-attn-3", "flash-attn-4", "wandb",
)  # fmt: skip
_IMPORTED: Final = ("torch", "lightning", "transformers")
_VARIABLES: Final = (
    "HF_HOME", "HF_HUB_OFFLINE", "WANDB_MODE", "TORCH_EXTENSIONS_DIR", "DS_ACCELERATOR",
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "VIPLLAVA_DATA", "VIPLLAVA_CACHE",
)  # fmt: skip
"""None of these ever holds a key."""

_Texts = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Packages:
    """What is installed."""

    python: str  # version
    platform: str  # operating system and processor
    code: str  # our version, with the commit of a checkout
    versions: _Texts  # of the packages worth showing that are installed
    # of our requirements those that are not met, with the version that is there or None
    unfit: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    import_errors: _Texts = field(default_factory=dict[str, str])  # by package, why
    torch_cuda: str | None = None  # CUDA version that torch was built with; None for a CPU build
    # by extra, the requirements that are not met
    extras: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])


@dataclass(frozen=True, slots=True)
class Devices:
    """What computes here."""

    hardware: Hardware  # devices and optional packages
    free_gib: tuple[float, ...] = ()  # free memory of each CUDA device, GiB
    driver: bool = False  # whether an NVIDIA driver is installed


@dataclass(frozen=True, slots=True)
class Network:
    """How processes talk to each other."""

    backends: tuple[str, ...]  # of torch.distributed that are built in
    nccl: str = ""  # version of NCCL; empty without
    variables: _Texts = field(default_factory=dict[str, str])  # of the environment that change it
    probe: Probe | None = None  # what came of trying; None where it was left out
    # variables of the environment that only a launcher sets, and none has
    left_over: _Texts = field(default_factory=dict[str, str])
    misplaced_master: str | None = None  # ``MASTER_ADDR`` where it is no address of this machine


@dataclass(frozen=True, slots=True)
class Place:
    """A folder that runs write to or read from."""

    name: str  # what it is for
    path: str  # the folder, which may not be there yet
    free: int  # free bytes of its disk
    writable: bool  # whether it, or the nearest folder above it that is there, can be written to


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the environment says."""

    variables: _Texts = field(default_factory=dict[str, str])  # that are set; none holds a key
    wandb_key: bool = False  # whether W&B has a key, in the environment or in a file
    # lock files of torch's extension builds, with their age in seconds
    locks: Mapping[str, float] = field(default_factory=dict[str, float])
    home: str | None = "/home/you"  # the user's home folder; None where there is none
    home_writable: bool = True  # whether it can be written to
    terminal: str = "utf-8"  # encoding of the standard output
    file_names: str = "utf-8"  # encoding of the names of files


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that the sections are made of."""

    packages: Packages
    devices: Devices
    network: Network
    places: tuple[Place, ...]
    shm: int | None  # bytes of ``/dev/shm``; None where a system has none
    surroundings: Surroundings


def look(*, network: bool = True) -> Facts:
    """Look at this machine.

    Args:
        network: try whether two processes can talk to each other; takes seconds.
    """
    packages = look_at_packages()
    driver = Path("/proc/driver/nvidia/version").exists() or bool(shutil.which("nvidia-smi"))
    if "torch" in packages.import_errors:
        devices = Devices(Hardware(), driver=driver)
        talking = Network((), left_over=left_over())
    else:
        import torch

        found = hardware.detect()
        free = tuple(torch.cuda.mem_get_info(n)[0] / 2**30 for n in range(len(found.cuda)))
        devices = Devices(found, free, driver)
        talking = _look_at_network(len(found.cuda), try_it=network)
    shm = shutil.disk_usage(SHM).total if SHM.is_dir() else None
    return Facts(packages, devices, talking, _look_at_places(), shm, look_at_surroundings())


def look_at_packages() -> Packages:
    """Read versions, check our requirements, and import what everything needs."""
    errors: dict[str, str] = {}
    for name in _IMPORTED:
        try:
            import_module(name)
        except Exception as error:  # noqa: BLE001  whatever it is, it is what is wrong here
            errors[name] = f"{type(error).__name__}: {first_line(error)}"
    code, torch_cuda = __version__, None
    if not errors:
        from vipllava.checkpoints.export_meta import code_version

        code = code_version()
    if "torch" not in errors:
        import torch

        torch_cuda = torch.version.cuda
    requirements = project_requirements()
    core = {str(r): _version(r.name) for r in requirements.pop("", ()) if not _is_met(r)}
    return Packages(
        python=platform.python_version(),
        platform=platform.platform(),
        code=code,
        versions={name: found for name in _SHOWN if (found := _version(name))},
        unfit=core,
        import_errors=errors,
        torch_cuda=torch_cuda,
        extras={
            name: _missing(name, requirements) for name in requirements if name not in NO_FEATURES
        },
    )


def project_requirements() -> dict[str, tuple[Requirement, ...]]:
    """Return what we need by extra, under an empty name what we always need.

    From ``pyproject.toml`` in a checkout, else from what is installed.
    """
    from packaging.requirements import Requirement

    if _PYPROJECT.is_file():
        project = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]
        groups = {"": project["dependencies"], **project["optional-dependencies"]}
        return {name: tuple(map(Requirement, lines)) for name, lines in groups.items()}
    try:
        metadata = importlib.metadata.metadata(PROJECT)
    except importlib.metadata.PackageNotFoundError:
        return {}  # a copy of the package alone
    found: dict[str, list[Requirement]] = {
        extra: [] for extra in ("", *metadata.get_all("Provides-Extra", []))
    }
    for requirement in map(Requirement, metadata.get_all("Requires-Dist", [])):
        marker, requirement.marker = requirement.marker, None
        wanted_by = [e for e in found if marker is not None and marker.evaluate({"extra": e})]
        found[wanted_by[0] if wanted_by else ""].append(requirement)
    return {extra: tuple(group) for extra, group in found.items()}


def _look_at_network(num_cuda: int, *, try_it: bool) -> Network:
    """Look at torch.distributed, and try it if asked to: NCCL where two CUDA devices are."""
    from torch import distributed
    from torch.cuda import nccl

    variables = {
        name: value for name, value in sorted(os.environ.items())
        if name.startswith(("NCCL_", "MASTER_", "GLOO_"))
    }  # fmt: skip
    if not distributed.is_available():
        return Network((), variables=variables, left_over=left_over())
    there = {"nccl": distributed.is_nccl_available(), "gloo": distributed.is_gloo_available()}
    backends = tuple(name for name in there if there[name])
    version = ".".join(map(str, nccl.version())) if there["nccl"] else ""
    wanted = "nccl" if num_cuda >= network_probe.PROCESSES else "gloo"
    probe = network_probe.probe_network(wanted) if try_it and wanted in backends else None
    return Network(backends, version, variables, probe, left_over(), misplaced_master())


def _look_at_places() -> tuple[Place, ...]:
    """Look at the folders that the configuration names, and at the temporary one."""
    from vipllava.config.composing import compose_job

    paths = compose_job(["trainer=cpu"]).paths
    named = os.environ.get("XDG_CACHE_HOME")
    cache = Path(named) if named else (find_home() or Path("~")) / ".cache"
    folders: dict[str, str] = {
        "runs": paths.runs,
        "data": paths.data_root,
        "shard cache": paths.cache,
        "hub cache": os.environ.get("HF_HOME") or str(cache / "huggingface"),
        "temporary": tempfile.gettempdir(),
    }
    return tuple(look_at_place(name, Path(path)) for name, path in folders.items())


def look_at_place(name: str, path: Path) -> Place:
    """Return how much room there is where ``path`` is or would be made."""
    path = Path(os.path.expanduser(path)).absolute()  # noqa: PTH111  there may be no home
    there = next(folder for folder in (path, *path.parents) if folder.is_dir())
    return Place(name, str(path), shutil.disk_usage(there).free, os.access(there, os.W_OK))


def look_at_surroundings() -> Surroundings:
    """Read variables, look for a W&B key and for locks of extension builds."""
    from vipllava.config.checks import has_wandb_key

    named, home = os.environ.get("TORCH_EXTENSIONS_DIR"), find_home()
    root = Path(named) if named else (home or Path("~")) / ".cache" / "torch_extensions"
    # ROOT/EXTENSION/lock where it is named, ROOT/py311_cu128/EXTENSION/lock where not.
    locks = sorted({*root.glob("*/lock"), *root.glob("*/*/lock")})
    return Surroundings(
        {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        has_wandb_key(),
        {str(lock): max(0.0, time.time() - lock.stat().st_mtime) for lock in locks},
        None if home is None else str(home),
        home is not None and look_at_place("home", home).writable,
        sys.stdout.encoding or "none",
        sys.getfilesystemencoding(),
    )


def _missing(extra: str, groups: Mapping[str, tuple[Requirement, ...]]) -> tuple[str, ...]:
    """Return an extra's requirements that are not met, those of extras it names included."""
    found: list[str] = []
    for requirement in groups[extra]:
        if requirement.name == PROJECT:
            for other in sorted(requirement.extras):
                found += _missing(other, groups)
        elif not _is_met(requirement):
            found.append(str(requirement))
    return tuple(found)


def _is_met(requirement: Requirement) -> bool:
    version = _version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
