"""What an engine is opened with, in this process or another one; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vipllava.inference.engine import Engine
    from vipllava.inference.protocol import GenerationEngine


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine is opened with, in this process or another one."""

    checkpoint: str
    device: str = "auto"
    dtype: str = "auto"
    # further arguments of :meth:`vipllava.inference.engine.Engine.from_checkpoint`
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    def open(self) -> Engine:
        """Load the model."""
        from vipllava.inference.engine import Engine

        return Engine.from_checkpoint(self.checkpoint, self.device, self.dtype, **self.options)


@dataclass(frozen=True, slots=True)
class LocalEngineSettings:
    """Opens the engine of one device for :class:`vipllava.inference.worker_pool.WorkerPool`."""

    engine: EngineSettings  # its device gives way to the worker's
    num_threads: int | None = (
        None  # of each worker that computes on the CPU; None is torch's choice
    )
    # further arguments of :class:`vipllava.inference.local_engine.LocalEngine`
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    def __call__(self, device: str) -> GenerationEngine:
        """Load the model on a device.

        Raises:
            VipLlavaError: see :meth:`vipllava.inference.engine.Engine.from_checkpoint`.
        """
        import torch

        from vipllava.inference.local_engine import LocalEngine

        if device.startswith("cuda:"):
            torch.cuda.set_device(device)  # what names no device does not go to the first
        return LocalEngine(replace(self.engine, device=device).open(), **self.options)
