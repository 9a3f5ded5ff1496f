from __future__ import annotations

from importlib.util import find_spec

from vipllava.config.hardware import CudaDevice, Hardware, installed_packages


def test_descriptions():
    assert Hardware().describe() == "0 CUDA devices"
    assert Hardware(mps=True).describe() == "0 CUDA devices (Apple MPS is there)"
    one = Hardware((CudaDevice("H200", 139.8, (9, 0)),))
    assert one.describe() == "1 CUDA device (H200 140 GiB)"


def test_installed_packages():
    assert ("peft" in installed_packages()) == (find_spec("peft") is not None)
