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
    if bad := [f"{name}={value}" for name, value in numbers.items() if value < 1]:
        raise ConfigError(f"{', '.join(bad)}: must be at least 1")
    world_size = devices * num_nodes
    per_forward = micro_batch_size * world_size
    steps, rest = divmod(global_batch_size, per_forward)
    if not rest:
        return steps
    nearest = ", ".join(str(n * per_forward) for n in (steps, steps + 1) if n)
    fewer = [n for n in range(devices, 0, -1) if global_batch_size % (n * num_nodes) == 0]
    if global_batch_size % world_size == 0:
        fitting = _divisors(global_batch_size // world_size)
        below = [m for m in fitting if m < micro_batch_size][-1:]
        above = [m for m in fitting if m > micro_batch_size][:1]
        remedy = f"or keep it with micro_batch_size={' or '.join(map(str, below + above))}"
    elif fewer:
        remedy = f"or keep it with devices={fewer[0]}"
    else:
        remedy = f"no micro-batch divides it on {num_nodes} nodes"
    raise ConfigError(
        f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size="
        f"{micro_batch_size} x devices={devices} x num_nodes={num_nodes} = {per_forward}; nearest "
        f"global batch sizes that are: {nearest}; {remedy}"
    )


def largest_micro_batch(
    limit: int, global_batch_size: int, devices: int, num_nodes: int
) -> int | None:
    """Return the largest micro-batch up to ``limit`` that divides the global batch, or None."""
    world_size = devices * num_nodes
    if min(limit, global_batch_size, world_size) < 1 or global_batch_size % world_size:
        return None
    return max(m for m in _divisors(global_batch_size // world_size) if m <= limit)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
