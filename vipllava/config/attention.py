"""Which attention implementation a job gets, and why not another.

The first in the order of :data:`KERNELS` that is installed and that devices and precision support;
without one, PyTorch's own ``sdpa``. Nothing heavy is imported.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

TORCH_VARLEN: Final = "torch_varlen"
"""PyTorch's own flash kernel for rows of several samples (:mod:`vipllava.models.attention`)."""

FALLBACK: Final = "sdpa"
_FULL_PRECISION: Final = ("32-true", "float32")
_NO_CUDA: Final = "needs CUDA devices"
_NONE: Final = (999, 0)


@dataclass(frozen=True, slots=True)
class Kernel:
    """An implementation that not every machine can run; all of these compute in 16 bits only."""

    name: str  # as a configuration and transformers name it; our own for :data:`TORCH_VARLEN`
    package: str  # what has to be in :attr:`~vipllava.config.hardware.Hardware.installed`
    label: str  # the same for a reader
    install: str  # how it comes
    least: tuple[int, int]  # the least compute capability
    below: tuple[int, int] = _NONE  # the first capability that is too new for it
    by_name_only: bool = False  # never chosen by itself


KERNELS: Final = (
    Kernel("flash_attention_4", "flash_attn_4", "flash-attn-4", "pip install --pre flash-attn-4",
           least=(9, 0), by_name_only=True),  # an alpha, so far
    Kernel("flash_attention_3", "flash_attn_3", "flash-attn-3",
           "build it from the folder `hopper` of Dao-AILab/flash-attention",
           least=(9, 0), below=(10, 0)),  # with instructions that only Hopper has
    Kernel("flash_attention_2", "flash_attn", "flash_attn",
           'pip install "vipllava-lightning[flash]"', least=(8, 0)),
    Kernel(TORCH_VARLEN, TORCH_VARLEN, "a torch with flash kernels",
           "install a CUDA build of torch 2.11 or newer", least=(8, 0)),
)  # fmt: skip
"""The best first."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What stands against one implementation, on one machine."""

    kernel: Kernel
    missing: str | None  # that its package is not installed
    unsupported: str | None  # why devices or precision cannot use it

    @property
    def name(self) -> str:
        """The implementation's name."""
        return self.kernel.name

    @property
    def why_not(self) -> str:
        """Why it is not chosen by itself; empty if nothing stands against it."""
        alpha = "an alpha, used only where it is asked for by name"
        found = "; ".join(filter(None, (self.missing, self.unsupported)))
        return found or (alpha if self.kernel.by_name_only else "")


def attention_candidates(
    installed: Collection[str], capability: tuple[int, int] | None, precision: str | None
) -> tuple[Candidate, ...]:
    """Say of every kernel what stands against it.

    Args:
        installed: packages, see :attr:`~vipllava.config.hardware.Hardware.installed`.
        capability: the least compute capability of the CUDA devices; None without any.
        precision: the trainer's precision or the weights' dtype; None where it does not matter.

    Returns:
        In the order of :data:`KERNELS`.
    """
    found: list[Candidate] = []
    for kernel in KERNELS:
        missing = f"needs {kernel.label}, which is not installed"
        if capability is None:
            unsupported = _NO_CUDA
        elif not kernel.least <= capability < kernel.below:
            (major, minor), more = kernel.least, kernel.below == _NONE
            unsupported = (
                f"devices of compute capability {capability[0]}.{capability[1]} cannot run it, it "
                f"needs {major}.{minor}{' or more' if more else ''}"
            )
        elif precision in _FULL_PRECISION:
            unsupported = f"computes in bf16 or fp16 only, not in {precision}"
        else:
            unsupported = None
        found.append(
            Candidate(kernel, None if kernel.package in installed else missing, unsupported)
        )
    return tuple(found)


def choose_attention(candidates: Sequence[Candidate]) -> str:
    """Return the first implementation that nothing stands against, else :data:`FALLBACK`."""
    return next((c.name for c in candidates if not c.why_not), FALLBACK)


def explain_attention(used: str, candidates: Sequence[Candidate]) -> str:
    """Say in one line what is used, and why no better one: ``sdpa (flash_attention_2: ...)``."""
    best = choose_attention(candidates)
    if used != best:
        return f"{used}, as configured (by itself it would be {best})"
    if all(candidate.unsupported == _NO_CUDA for candidate in candidates):
        return f"{used} (all others need CUDA devices)"
    before = itertools.takewhile(lambda candidate: candidate.name != used, candidates)
    better = [f"{c.name}: {c.why_not}" for c in before if not c.kernel.by_name_only]
    return f"{used} ({' | '.join(better)})" if better else used


def keeps_no_mask(name: str) -> bool:
    """Return whether an implementation tells samples of a row apart by bounds, without a mask."""
    return any(name == kernel.name for kernel in KERNELS)
