"""Whether the batches that loader processes have ready find room in shared memory."""

from __future__ import annotations

from vipllava.config.hardware import SHM, SHM_REMEDY

_CHANNELS = 3


def shared_memory_warning(
    free: int | None,
    *,
    images: int,
    image_size: int,
    num_workers: int,
    num_processes: int,
    prefetch_factor: int = 2,
) -> str | None:
    """Say that shared memory is too small for the batches in flight; None if it is not.

    Args:
        free: its free bytes; None where a system has none.
        images: of one optimizer step of one process, which is what a loader process hands over.
        image_size: side of an image, pixels; a value takes a byte.
        num_workers: loader processes of each process.
        num_processes: processes on this machine.
        prefetch_factor: shares that a loader process has ready.
    """
    in_flight = num_processes * num_workers * prefetch_factor
    need = in_flight * images * _CHANNELS * image_size**2
    if free is None or need <= free:
        return None
    return (
        f"{SHM} has {free / 1e6:.1f} MB free, and batches in flight take {need / 1e6:.1f} MB "
        f"({num_processes} processes x {num_workers} workers x {prefetch_factor} ahead x "
        f"{images} images of {image_size} x {image_size}): a loader process may die of it: "
        f"{SHM_REMEDY}"
    )
