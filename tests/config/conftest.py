"""Machines to check against, made up."""

from __future__ import annotations

import os

import pytest

from vipllava.config import hardware
from vipllava.config.hardware import OPTIONAL_PACKAGES, CudaDevice, Hardware

EVERYTHING = frozenset(OPTIONAL_PACKAGES)
MACHINES = {
    "laptop": Hardware(num_cpus=8),
    "bf16_server": Hardware(num_cpus=32, cpu_bf16=True),
    "mac": Hardware(mps=True, num_cpus=8),
    "8xa100": Hardware((CudaDevice("A100", 79.2, (8, 0)),) * 8, num_cpus=96, installed=EVERYTHING),
    "8xa100_40g": Hardware(
        (CudaDevice("A100", 39.4, (8, 0)),) * 8, num_cpus=96, installed=EVERYTHING
    ),
    "8xv100": Hardware((CudaDevice("V100", 31.7, (7, 0)),) * 8, num_cpus=80, installed=EVERYTHING),
    "2xt4": Hardware((CudaDevice("T4", 14.6, (7, 5)),) * 2, num_cpus=16),
    "6xa100": Hardware((CudaDevice("A100", 79.2, (8, 0)),) * 6, num_cpus=96, installed=EVERYTHING),
}


@pytest.fixture
def machines() -> dict[str, Hardware]:
    return MACHINES


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Hardware:
    """The machine that the tests run on: a laptop without CUDA, or the marked one."""
    machine = MACHINES[getattr(request, "param", "laptop")]
    monkeypatch.setattr(hardware, "detect", lambda: machine)
    monkeypatch.setattr(hardware, "installed_packages", lambda: machine.installed)
    ours = ("VIPLLAVA_DATA", "WANDB_RUN_GROUP", "RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK")
    launchers = ("SLURM_", "MASTER_", "NODE_", "TORCHELASTIC_", "OMPI_", "PMI_", "JSM_", "LSB_")
    for name in (*ours, *(name for name in os.environ if name.startswith(launchers))):
        monkeypatch.delenv(name, raising=False)
    return machine
