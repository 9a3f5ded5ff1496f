"""What a job holds on each device and in its first node, computed from sizes alone.

The figures follow what the code does. Without sharding (``single``, ``ddp``) and with FSDP2 the
weights that train are float32 and are computed with as half-precision copies, the others are held
in half precision; DeepSpeed holds all of them so, with float32 masters beside Adam's moments.
Activations are the tensors that autograd keeps for the backward pass of a Llama-like block:

====================== ====================================== =====================================
in a block             frozen weights                         trained weights keep also
====================== ====================================== =====================================
two norms              the input, float32                     the normed input, and its product
attention              queries, keys, values, result          the input of the projections
MLP                    gate, its activation, up               the input, and their product
====================== ====================================== =====================================

Gradient checkpointing keeps the input of each block instead, and one block's tensors at a time.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from vipllava.config.attention import keeps_no_mask
from vipllava.config.schema import STRATEGIES
from vipllava.forecast.architecture import Architecture, LanguageModel
from vipllava.forecast.flops import Workload
from vipllava.models.freezing import ParameterRow
from vipllava.types import ConfigError

_BUCKET: Final = 500_000_000  # weights: reduce_bucket_size of conf/strategy/zero*.yaml
_LIVE: Final = 1_050_000_000  # stage3_max_live_parameters and the prefetch bucket
_SUB_GROUP: Final = 1_000_000_000
_CONTEXT_BYTES: Final = 1_000_000_000  # CUDA's context, cuBLAS' workspaces
_COMMUNICATOR_BYTES: Final = 600_000_000  # NCCL's buffers
_FRAGMENTED: Final = 0.05  # of what comes and goes
_NF4_BYTES: Final = {True: 0.5 + 1 / 64 + 4 / (64 * 256), False: 0.5 + 4 / 64}
"""Bytes of a weight in 4 bits with its block's scale, by whether scales are quantised, too."""
_PROCESS_BYTES: Final = 700_000_000  # Python and torch
_CUDA_BYTES: Final = 1_300_000_000  # CUDA's and NCCL's share of the host, for each process
_WORKER_BYTES: Final = 300_000_000  # of a loader process, what it does not share
_STORED_BYTES: Final = 2  # of a weight in the files of published models


@dataclass(frozen=True, slots=True)
class Setup:
    """How a stage is trained: all that its memory depends on beside the network."""

    trainable: tuple[str, ...]  # the parts that train
    workload: Workload  # what trains of the language model
    strategy: str  # one of :data:`STRATEGIES`
    precision: str  # Lightning's name, e.g. ``bf16-mixed``
    num_devices: int  # processes of all nodes
    micro_batch_size: int  # rows per device and forward pass
    row_tokens: int  # tokens of a row, padding among them; of the longest that is to fit
    row_images: float = 1.0  # images of a row
    row_supervised: float = 0.0  # positions of a row that carry loss
    recomputed_blocks: int | None = None  # in the backward pass, the first ones; None: all
    attention: str = "sdpa"  # as transformers names it
    adapter_rank: int = 0  # of LoRA, or 0
    adapter_dropout: bool = True  # whether adapters drop any of their input
    weights_dtype: str = "float32"  # loaded in, where strategy and precision leave it so
    bits: int | None = None  # of the language model's linear layers, if they are quantised
    double_quantization: bool = True  # of 4 bits
    fused_optimizer: bool = False  # AdamW without temporary copies

    def __post_init__(self) -> None:
        """Check the strategy's name; raises ConfigError."""
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"strategy={self.strategy!r} is not one of {', '.join(STRATEGIES)}")

    @property
    def is_replica(self) -> bool:
        """Whether every device holds everything."""
        return self.strategy in ("single", "ddp")

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed shards."""
        return self.strategy.startswith("zero")

    def num_recomputed(self, num_blocks: int) -> int:
        """Return how many of so many decoder blocks are recomputed."""
        wanted = num_blocks if self.recomputed_blocks is None else self.recomputed_blocks
        return min(wanted, num_blocks)

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in a matrix product."""
        return 4 if self.precision.startswith("32") else 2

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight as it is held."""
        if self.is_zero or self.precision.endswith("-true"):
            return self.compute_bytes
        return 4 if self.weights_dtype == "float32" else 2

    @property
    def frozen_bytes(self) -> int:
        """Bytes of a weight that does not train."""
        return self.compute_bytes if self.precision.endswith("-mixed") else self.weight_bytes

    @property
    def stream_bytes(self) -> int:
        """Bytes of a number between the blocks.

        Embeddings of float32 weights are float32, and autocast leaves sums alone. FSDP2 gathers
        half-precision copies, which then are the weights.
        """
        if self.strategy == "fsdp2":
            return self.compute_bytes
        return self.weight_bytes if self.trains_language_model else self.frozen_bytes

    @property
    def copy_bytes(self) -> int:
        """Bytes of the half-precision copy that autocast makes of a trained weight."""
        # Each product keeps its own for its backward pass: Lightning switches the cache off.
        casts = self.is_replica and self.weight_bytes != self.compute_bytes
        return self.compute_bytes if casts else 0

    @property
    def norm_bytes(self) -> float:
        """Bytes that a norm keeps of each number, which it takes as float32."""
        if not self.trains_language_model:
            return 4.0
        # What it multiplies its weights with, and the result where the next product reads it.
        whole = self.stream_bytes == 4
        result = 0 if whole and self.compute_bytes != 4 else self.stream_bytes
        return 4.0 + self.stream_bytes + result

    @property
    def trains_language_model(self) -> bool:
        """Whether the language model's own weights get gradients."""
        return self.workload == "full" and "language_model" in self.trainable

    @property
    def rank(self) -> int:
        """Rank of the adapters that there are."""
        return self.adapter_rank if self.workload in ("lora", "qlora") else 0


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of one device at the step's peak, and of the host per node-wide job."""

    weights: float  # as they are held, or this device's part of them
    gradients: float  # of what trains
    optimizer: float  # Adam's moments, and float32 masters where the weights are none
    activations: float  # kept for the backward pass, autocast's copies of weights among them
    working: float  # weights gathered or made whole, buckets of gradients, the optimizer's copies
    overhead: float  # an allowance for CUDA's context, NCCL and fragmentation
    host: float = 0.0  # on the host, of all devices together: what is offloaded

    @property
    def allocated(self) -> float:
        """What PyTorch's allocator has handed out at the peak."""
        return self.total - self.overhead

    @property
    def total(self) -> float:
        """All that the device has to have."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "host")


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes of the node that needs most: the job's first one."""

    processes: float  # of all processes and their loader processes, with nothing of the network
    copies: float  # of weights, while they are loaded; gone when they are where they train
    trained: float  # stays while a job trains: what is offloaded; without devices all
    saving: float  # a checkpoint written beside the training, or the export if that is larger
    files: float  # pages of mapped weight files, which the kernel may take back

    @property
    def total(self) -> float:
        """What the node has to have, while weights are loaded and later."""
        return max(self.processes + self.copies, self.processes + self.trained + self.saving)


def parameter_rows(architecture: Architecture, setup: Setup) -> tuple[ParameterRow, ...]:
    """Count the parameters of each part and those that train, adapters among them."""

    def row(part: str, count: int, trainable: int) -> ParameterRow:
        return ParameterRow(part, count, trainable * (part in setup.trainable))

    tower, model = architecture.tower, architecture.language_model
    language_model = row("language_model", model.num_parameters, model.num_parameters)
    if adapters := model.adapter_parameters(setup.rank):
        language_model = ParameterRow("language_model", model.num_parameters + adapters, adapters)
    return (
        row("vision_tower", tower.num_parameters, tower.read_parameters),
        row("projector", architecture.projector_parameters, architecture.projector_parameters),
        language_model,
    )


def weight_counts(architecture: Architecture, setup: Setup) -> tuple[int, int]:
    """Return the sums of :func:`parameter_rows`: all weights, and those that train."""
    rows = parameter_rows(architecture, setup)
    return sum(row.num_parameters for row in rows), sum(row.num_trainable for row in rows)


def device_memory(architecture: Architecture, setup: Setup) -> DeviceMemory:
    """Forecast the peak of one device."""
    count, trained = weight_counts(architecture, setup)
    shards, held = setup.num_devices, setup.weight_bytes
    weights = float(held * trained + setup.frozen_bytes * (count - trained))
    if setup.bits is not None:
        few = architecture.language_model.linear_parameters
        each = 1.0 if setup.bits == 8 else _NF4_BYTES[setup.double_quantization]
        weights += (each - setup.frozen_bytes) * few
    if setup.strategy in ("zero3", "zero3_offload", "fsdp2"):
        weights /= shards
    own = trained if setup.is_replica else trained / shards
    # DeepSpeed keeps gradients as the weights are, and masters beside Adam's moments.
    gradients, optimizer, host = own * held, own * 2 * held, 0.0
    if setup.is_zero:
        optimizer = own * 12.0
    if setup.strategy == "zero3_offload":
        # Masters, moments, float32 gradients, and the gradients as they arrive.
        host = trained * (12.0 + 4.0 + held)
        gradients, optimizer = 0.0, 0.0
    forward, backward = _activations(architecture, setup)
    passes, step = _working(architecture, setup, count, trained)
    phases = ((forward, passes), (backward, passes), (0.0, step))
    activations, working = max(phases, key=sum)
    overhead = _CONTEXT_BYTES + _FRAGMENTED * (activations + working)
    if shards > 1:
        overhead += _COMMUNICATOR_BYTES
    return DeviceMemory(weights, gradients, optimizer, activations, working, overhead, host)


def host_memory(
    architecture: Architecture,
    setup: Setup,
    *,
    num_nodes: int = 1,
    num_workers: int = 0,
    on_devices: bool = True,
) -> HostMemory:
    """Forecast what the job's first node needs beside its devices.

    Nodes share the processes equally, each of which has ``num_workers`` loader processes; where not
    ``on_devices`` it is the host that trains.
    """
    per_node = setup.num_devices / num_nodes
    count, trained = weight_counts(architecture, setup)
    weights = float(setup.weight_bytes * count)
    memory = device_memory(architecture, setup)
    held = memory.host / num_nodes
    if not on_devices:
        held += memory.allocated * per_node
    # One process writes, from a copy; of DeepSpeed's parts every process, one flat tensor after the
    # other. The export is gathered whole where no process has all of it.
    saving = 3.0 * setup.weight_bytes * trained if setup.is_replica else 0.0
    if setup.is_zero and setup.strategy != "zero3_offload":
        saving = 4.0 * trained / num_nodes
    if setup.strategy in ("fsdp2", "zero3", "zero3_offload"):
        saving = max(saving, weights)
    process = _PROCESS_BYTES + num_workers * _WORKER_BYTES + on_devices * _CUDA_BYTES
    return HostMemory(
        processes=per_node * process,
        # The first process reads all; else each weight goes from the mapped file to its device.
        copies=weights if setup.strategy == "fsdp2" else 0.0,
        trained=held,
        saving=saving,
        files=float(_STORED_BYTES * count),
    )


def machine_memory() -> float | None:
    """Return the bytes that this machine, or the container, may use; None where it does not say."""
    known: list[float] = []
    with suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
        known.append(float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # `max`: no limit
            known.append(float(Path(path).read_text(encoding="ascii")))
    return min(known, default=None)


def _working(
    architecture: Architecture, setup: Setup, count: int, trained: int
) -> tuple[float, float]:
    """Return the bytes of copies of weights during the passes, and of the optimizer's step."""
    model = architecture.language_model
    shards, compute = setup.num_devices, setup.compute_bytes
    # Without fusing, AdamW makes a tensor of roots beside all second moments of a group.
    root = 0.0 if setup.fused_optimizer else 4.0
    if setup.strategy == "zero2":
        return 2.0 * _BUCKET * compute, (4.0 + root) * trained / shards
    if setup.strategy.startswith("zero3"):
        bucket, group = float(compute * _BUCKET), min(_SUB_GROUP, trained / shards)
        step = 0.0 if setup.strategy == "zero3_offload" else (4.0 + root) * group
        return compute * min(count, _LIVE) + bucket, bucket + step
    step = root * trained * setup.weight_bytes / 4.0
    if setup.strategy == "fsdp2":
        # The rest stays gathered through a step; of the blocks one is used, the next under way,
        # and the gradients of one are summed in float32.
        rest = count - model.num_blocks * model.block_parameters
        rest -= architecture.tower.num_blocks * architecture.tower.block_parameters
        block = model.block_parameters + model.adapter_parameters(setup.rank) / model.num_blocks
        sums = 4.0 * block if setup.trains_language_model else 0.0
        return compute * (rest + 2 * block) + sums, step / shards
    # A frozen weight in few bits is made whole for each product.
    return 0.0 if setup.bits is None else float(compute * model.largest_linear), step


def _activations(architecture: Architecture, setup: Setup) -> tuple[float, float]:
    """Return the bytes at the end of the forward pass and at the backward pass's peak."""
    model = architecture.language_model
    tokens = setup.micro_batch_size * setup.row_tokens
    block = _block_bytes(model, setup, tokens)
    stream = tokens * setup.stream_bytes * model.width  # what goes from block to block
    trained = setup.trains_language_model
    # A block's backward pass: three gradients as wide as its MLP, in trained ones one of them in
    # the room of what the down projection read; that of its input.
    passing = tokens * ((2 if trained else 3) * setup.compute_bytes * model.mlp_width) + stream
    if setup.rank and setup.copy_bytes:
        passing += tokens * 4.0 * model.mlp_width  # an adapter's input in the adapter's float32
    last_norm = setup.norm_bytes * tokens * model.width
    # The embeddings with the features laid in, and the angles of all positions.
    kept = _feature_bytes(architecture, setup) + stream
    kept += tokens * 2 * model.head_dim * setup.stream_bytes
    again = model.num_blocks
    if setup.recomputed_blocks is not None:
        again = min(again, setup.recomputed_blocks)
    # The inputs of what is recomputed; of trained blocks the first one is the embeddings.
    kept += stream * max(0, again - 1 if trained else again)
    logits = setup.micro_batch_size * setup.row_supervised * model.vocabulary
    head_copy = loss = 0.0
    if trained:
        # A layer's gradient, before it is added to the others: where autocast has made a copy, in
        # the room that the copy had.
        head_copy = float(setup.copy_bytes * model.head_parameters)
        loss = logits * setup.compute_bytes + setup.stream_bytes * model.head_parameters
        passing += setup.stream_bytes * model.largest_linear
    stored = kept + (model.num_blocks - again) * block
    forward = stored + last_norm + head_copy + max(12.0 * logits, loss)
    backward = 0.0
    if again:
        # A float32 input of the first norm is that of the block, which is kept already.
        backward = kept + block + passing - (stream if setup.stream_bytes == 4 else 0.0)
    if again < model.num_blocks:
        # The last norm's own backward pass, in float32, or that of the block before it.
        norm = tokens * model.width * 20.0 + stream
        backward = max(backward, stored + last_norm + max(passing, norm))
    return forward, max(forward, backward)


def _block_bytes(model: LanguageModel, setup: Setup, tokens: float) -> float:
    """Return what one decoder block keeps for its backward pass."""
    compute, trained = setup.compute_bytes, setup.trains_language_model
    queries = model.num_heads * model.head_dim
    # A mask over padded rows makes PyTorch's own attention repeat grouped keys and values.
    flash = keeps_no_mask(setup.attention)
    keys = model.head_dim * (model.num_key_value_heads if flash else model.num_heads)
    numbers = 2 * queries + 2 * keys + 3 * model.mlp_width
    kept = 2 * setup.norm_bytes * tokens * model.width + compute * tokens * numbers
    if trained:
        kept += compute * tokens * model.mlp_width  # what the down projection reads
        if setup.stream_bytes != compute:
            # Every product casts its float32 input for itself.
            readers = sum(inputs == model.width for inputs, _ in model.block_linears)
            readers -= int(queries == model.width)  # the output projection's is half already
            kept += compute * tokens * readers * model.width
    if setup.rank:
        # Of each adapter its input and the narrow middle. Dropout makes every input one of its own
        # and keeps which numbers it dropped; a cast does the first, too.
        inputs = sum(i for i, _ in model.block_linears)
        if setup.adapter_dropout:
            kept += tokens * inputs * (compute + 1)
        elif setup.copy_bytes:
            # peft casts the input to the adapter's float32, autocast back: a copy for each.
            kept += tokens * inputs * compute
        else:
            kept += tokens * (2 * model.width + model.mlp_width) * compute
        kept += tokens * len(model.block_linears) * setup.rank * compute
    adapters = model.adapter_parameters(setup.rank) / model.num_blocks
    kept += setup.copy_bytes * (model.block_linear_parameters if trained else adapters)
    squares = setup.micro_batch_size * setup.row_tokens**2
    if setup.attention == "eager":
        kept += squares * model.num_heads * (4 if compute == 4 else 4 + compute)
    elif not flash:
        kept += squares * compute  # the mask as what is added to the scores
    return kept


def _feature_bytes(architecture: Architecture, setup: Setup) -> float:
    """Return what projector and tower keep for the backward pass."""
    tower, compute, stream = architecture.tower, setup.compute_bytes, setup.stream_bytes
    images = setup.micro_batch_size * setup.row_images
    patches = images * tower.num_patches
    read = architecture.projector_linears[0][0]
    hidden = sum(outputs for _, outputs in architecture.projector_linears)
    kept = patches * (read * stream + hidden * compute)
    if "projector" in setup.trainable:
        kept += patches * (read * compute + architecture.projector_linears[0][1] * compute)
        kept += setup.copy_bytes * sum(i * o for i, o in architecture.projector_linears)
    if "vision_tower" in setup.trainable:
        # Norms, attention and MLP of every block, as of the language model's.
        length = images * tower.num_positions
        numbers = 8 * tower.width + 3 * tower.mlp_width
        kept += tower.deepest_block * length * (numbers * compute + 2 * stream * tower.width)
        kept += setup.copy_bytes * tower.deepest_block * tower.block_linear_parameters
    return kept
