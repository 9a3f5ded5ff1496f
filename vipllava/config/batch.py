"""Arithmetic of the global batch: micro-batch x accumulation x devices x nodes."""

from __future__ import annotations

from vipllava.types import ConfigError


def accumulation_steps(
    global_batch_size: int, micro_batch_size: int, devices: int, num_nodes: int
) -> int:
    """Return how many micro-batches each process accumulates per optimizer step.

    Args:
        global_batch_size: samples per optimizer step, over all processes.
        micro_batch_size: samples per process and forward pass.
        devices: processes per node.
        num_nodes: nodes.

    Raises:
        ConfigError: a number is not positive, or the global batch does not divide; names the
            numbers and the nearest ones that work.
    """
    numbers = {
        "global_batch_size": global_batch_size,
        "micro_batch_size": micro_batch_size,
        "devices": devices,
        "num_nodes": num_nodes,
    }
    bad = [f"{name}={value}" for name, value in numbers.items() if value < 1]
    if bad:
        raise ConfigError(f"{', '.join(bad)}: must be at least 1")
    per_forward = micro_batch_size * devices * num_nodes
    if global_batch_size % per_forward == 0:
        return global_batch_size // per_forward
    raise ConfigError(_does_not_divide(global_batch_size, micro_batch_size, devices, num_nodes))


def largest_micro_batch(
    limit: int, global_batch_size: int, devices: int, num_nodes: int
) -> int | None:
    """Return the largest micro-batch up to ``limit`` that divides the global batch, or None."""
    world_size = devices * num_nodes
    if min(limit, global_batch_size, world_size) < 1 or global_batch_size % world_size:
        return None
    per_process = global_batch_size // world_size
    return max(m for m in range(1, limit + 1) if per_process % m == 0)


def _does_not_divide(
    global_batch_size: int, micro_batch_size: int, devices: int, num_nodes: int
) -> str:
    per_forward = micro_batch_size * devices * num_nodes
    below = global_batch_size // per_forward * per_forward
    globals_ = [str(n) for n in (below, below + per_forward) if n > 0]
    product = (
        f"micro_batch_size={micro_batch_size} x devices={devices} x "
        f"num_nodes={num_nodes} = {per_forward}"
    )
    message = (
        f"global_batch_size={global_batch_size} is not a multiple of {product}; nearest "
        f"global batch sizes that are: {', '.join(globals_)}"
    )
    micros = _nearest_micro_batches(global_batch_size, micro_batch_size, devices * num_nodes)
    if micros:
        return f"{message}; or keep it with micro_batch_size={' or '.join(micros)}"
    fewer = next(
        (n for n in range(devices, 0, -1) if global_batch_size % (n * num_nodes) == 0), None
    )
    if fewer is None:
        return f"{message}; no micro-batch divides it on {num_nodes} nodes"
    return f"{message}; or keep it with devices={fewer}"


def _nearest_micro_batches(
    global_batch_size: int, micro_batch_size: int, world_size: int
) -> list[str]:
    if global_batch_size % world_size:
        return []
    per_process = global_batch_size // world_size
    fitting = [m for m in range(1, per_process + 1) if per_process % m == 0]
    below = [m for m in fitting if m < micro_batch_size][-1:]
    above = [m for m in fitting if m > micro_batch_size][:1]
    return [str(m) for m in below + above]
