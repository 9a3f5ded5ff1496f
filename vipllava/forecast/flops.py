"""Useful work of training, by one convention, and the share of a device's peak that it makes.

Counted are the products that are really made with weights, and attention. With L weights in the
linear layers of all decoder blocks, H in the head, A in the adapters, T tokens of a sample with the
placeholders of its image, and S of them supervised, a step's useful floating-point operations in
the language model are

========== ======================== =============================================================
projector  4 L T + 4 H S            forward 2, gradients of the inputs 2; frozen weights get none
lora       4 L T + 4 H S + 6 A T    the adapters get all three; of qlora, too
full       6 L T + 6 H S            forward 2, gradients of the inputs 2, of the weights 2
========== ======================== =============================================================

and for every workload: attention among the T tokens under the causal mask, in all three passes; the
projector on every patch; the tower's forward pass up to the deepest layer that is read. What is
done twice (gradient checkpointing), padding and what a causal mask hides never count, nor do norms,
activations and the optimizer. A multiplication and an addition are two operations.
"""

from __future__ import annotations

import re
from typing import Final, Literal

from vipllava.forecast.architecture import Architecture, VisionTower
from vipllava.types import ConfigError

Workload = Literal["projector", "full", "lora", "qlora"]
WORKLOADS: Final[tuple[Workload, ...]] = ("projector", "full", "lora", "qlora")

DEVICE_PEAKS: Final[dict[str, float]] = {
    "GB200": 2500e12, "B200": 2250e12, "H200": 989e12, "GH200": 989e12, "H100 PCIe": 756e12,
    "H100 NVL": 835e12, "H100": 989e12, "H20": 148e12, "H800": 989e12, "A100": 312e12,
    "A800": 312e12, "A40": 149.7e12, "A30": 165e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12,
    "L40": 181e12, "L4": 121e12, "RTX 6000 Ada": 364.25e12, "RTX A6000": 154.8e12,
    "A6000": 154.8e12, "RTX A5000": 111.1e12, "RTX 5090": 209.5e12, "RTX 4090": 165.2e12,
    "RTX 3090 Ti": 80e12, "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip
"""Dense peak in FLOP/s by a piece of the device's name: bf16 with float32 sums, as the makers'
data sheets say without sparsity; of V100 and T4, which have no bf16, fp16."""


def useful_flops(
    architecture: Architecture,
    workload: Workload,
    *,
    num_samples: float,
    num_tokens: float,
    num_supervised: float,
    num_images: float | None = None,
    squared_tokens: float | None = None,
    adapter_rank: int = 128,
    tower_trains: bool = False,
) -> float:
    """Return the useful floating-point operations of one pass over some samples.

    Args:
        architecture: the network's sizes.
        workload: what trains of the language model.
        num_samples: how many samples.
        num_tokens: of all of them, padding left out.
        num_supervised: positions of all of them that carry loss.
        num_images: images of all of them; one each if not given.
        squared_tokens: sum of the squares of the samples' lengths, which attention goes by; as if
            all were equally long if not given.
        adapter_rank: of LoRA.
        tower_trains: the tower gets gradients, too.

    Raises:
        ConfigError: the workload is unknown.
    """
    if workload not in WORKLOADS:
        raise ConfigError(f"workload={workload!r} is not one of {', '.join(WORKLOADS)}")
    model = architecture.language_model
    per_token = 6.0 if workload == "full" else 4.0
    flops = per_token * model.linear_parameters * num_tokens
    flops += per_token * model.head_parameters * num_supervised
    if workload in ("lora", "qlora"):
        flops += 6.0 * model.adapter_parameters(adapter_rank) * num_tokens
    if squared_tokens is None:
        squared_tokens = num_tokens**2 / num_samples if num_samples else 0.0
    # Scores and their product with the values, 2 operations each, over half the square; three
    # passes, also through frozen weights.
    attention_width = model.num_heads * model.head_dim
    flops += 3 * 2 * model.num_blocks * attention_width * squared_tokens
    # The projector's norm trains: of what goes into its first layer a gradient is asked for, too.
    projector = sum(inputs * outputs for inputs, outputs in architecture.projector_linears)
    image = 6.0 * projector * architecture.tower.num_patches
    image += tower_flops(architecture.tower, trains=tower_trains)
    return flops + image * (num_samples if num_images is None else num_images)


def tower_flops(tower: VisionTower, *, trains: bool = False) -> float:
    """Return the operations of the tower over one image, as far as it is read.

    One that ``trains`` has a backward pass, too.
    """
    length = tower.num_positions
    block = 2 * tower.block_linear_parameters * length + 4 * tower.width * length**2
    patches = 2 * tower.patch_parameters * tower.num_patches
    # Of the pixels no gradient is asked for.
    return (2 if trains else 1) * patches + (3 if trains else 1) * tower.deepest_block * block


def device_peak(device_name: str) -> float | None:
    """Return the peak in FLOP/s of a device, named as its driver does; None if it is unknown."""
    words = re.sub(r"[^a-z0-9]+", " ", device_name.lower()).strip()
    # The longest name first: `H100 PCIe` is no `H100`, an `A100` no `A10`.
    names = sorted(DEVICE_PEAKS, key=len, reverse=True)
    return next((DEVICE_PEAKS[n] for n in names if f" {n.lower()} " in f" {words} "), None)
