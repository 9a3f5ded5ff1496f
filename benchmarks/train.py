"""Training steps, ours beside the plain padded loop of transformers, with the same samples.

Every line of the table takes all samples of its case, one optimizer step (forward, backward, AdamW)
after the other, and the lines take turns step by step; they share network and optimizer.

========== =====================================================================================
line       what it does
========== =====================================================================================
ours       :func:`supervised_loss_sum`, as training calls it: over rows packed to one length, or
           over padded rows in shuffled order; what is frozen is in eval mode. On CUDA also with
           the attention that a run would choose there, and with its blocks compiled
plain      the network's own forward over padded rows with an attention mask and labels: logits at
           every position; with recomputation, as the released scripts have it, and without
========== =====================================================================================

Weights that train are float32, on CUDA computed with in bfloat16; frozen ones are bfloat16 there.
``tflops`` is useful work a second by :mod:`vipllava.forecast.flops`, the median over the steps; the
samples per second follow from it by the mean work of a sample, so that a step with many or long
samples counts as any other. ``spread`` are its quartiles over the median. ``ratio`` is to the plain
loop with recomputation. ``gib`` is the peak that PyTorch allocated.
"""

from __future__ import annotations

import copy
import gc
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

import numpy as np
import torch
from transformers import VipLlavaForConditionalGeneration
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks.train_cases import Case, can_train, random_case, tiny_case
from vipllava.config import hardware
from vipllava.config.attention import FALLBACK, attention_candidates, choose_attention
from vipllava.forecast.architecture import architecture_of
from vipllava.forecast.flops import Workload, device_peak
from vipllava.models.attention import attention_settings
from vipllava.models.blocks import compile_blocks
from vipllava.models.freezing import modules_of
from vipllava.models.supervised_loss import supervised_loss_sum
from vipllava.models.towers import CLIP, normalise_pixels
from vipllava.stream.collate import Collator
from vipllava.stream.pack_planner import plan_packs
from vipllava.training.metrics import BatchFlops
from vipllava.training.optim import OptimizerSettings, build_optimizer, parameter_groups
from vipllava.types import PADDING_SEGMENT, Batch

WORKLOADS: Final[tuple[Workload, ...]] = ("projector", "lora", "full")
OUT_OF_MEMORY: Final = "out of memory"
_WARM_UP: Final = 2
_LEAST_STEPS: Final = 10
_SECONDS: Final = 100.0  # of a case, after which no line gets more than the least steps
_MAX_IMAGES: Final = 16  # of a packed row


@dataclass(frozen=True, slots=True)
class Line:
    """One way of training.

    Attributes:
        loop: ``ours`` or ``plain``.
        rows: ``packed`` or ``padded``.
        checkpointing: blocks are recomputed in the backward pass.
        attention: as ``machine.attn_implementation`` names it.
        compiled: each decoder block is.
    """

    loop: str
    rows: str
    checkpointing: bool
    attention: str
    compiled: bool = False


@dataclass(slots=True)
class Measured:
    """What a line's steps took: useful FLOP/s of each; bytes at the peak; why it has none."""

    rates: list[float] = field(default_factory=list)
    memory: int = 0
    failure: str | None = None


def run(data_root: Path = Path("data")) -> dict[str, Any]:
    """Measure the tiny model on the CPU and, where there is a CUDA device, a 7B on it."""
    # Lines of many shapes take turns: whole segments would leave the memory in pieces.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    rows: list[dict[str, Any]] = []
    for workload in WORKLOADS:
        if can_train(workload):
            rows += measure(tiny_case(workload, data_root))
        else:
            rows.append(_row("tiny", workload, reference_line(), "needs the extra lora"))
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
        capacity = torch.cuda.get_device_properties(0).total_memory
        for workload in WORKLOADS:
            if not can_train(workload):
                rows.append(_row("7b", workload, reference_line(), "needs the extra lora"))
            elif case := random_case(workload, torch.device("cuda"), capacity):
                rows += measure(case)
            else:
                rows.append(_row("7b", workload, reference_line(), OUT_OF_MEMORY))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"rows": rows, "device": device, "torch": torch.__version__}


def lines_of(case: Case) -> tuple[Line, ...]:
    """Return the ways of training that a case compares."""
    ours, plain = partial(Line, "ours"), reference_line()
    lines = [
        ours("packed", False, case.attention),
        ours("packed", True, case.attention),
        ours("padded", False, case.attention),
        plain,
        Line("plain", "padded", False, plain.attention),
    ]
    if case.device.type == "cuda":
        machine = hardware.detect()
        known = attention_candidates(machine.installed, machine.least_capability, "bf16-mixed")
        fast = choose_attention(known)
        if fast != FALLBACK:
            lines.append(ours("packed", False, fast))
        lines.append(ours("packed", False, fast, compiled=True))
        flash = "flash_attention_2"
        if any(kernel.name == flash and not kernel.why_not for kernel in known):
            lines.append(Line("plain", "padded", True, flash))
    return tuple(lines)


def reference_line() -> Line:
    """Return the line that the others are compared with."""
    return Line("plain", "padded", True, "sdpa")


def measure(case: Case, warm_up: int = _WARM_UP) -> list[dict[str, Any]]:
    """Train a case in every way; return a row of the table for each."""
    model = case.network()
    settings = OptimizerSettings(learning_rate=1e-5)
    optimizer = build_optimizer(
        parameter_groups(modules_of(model), settings), settings, fused=case.device.type == "cuda"
    )
    rank = case.adapter.r if case.workload == "lora" else 0
    lines = lines_of(case)
    if any(line.compiled for line in lines):
        compile_blocks(model)
    work_of = BatchFlops(architecture_of(model.config), case.workload, adapter_rank=rank)
    steps = {rows: batches(case, rows) for rows in ("packed", "padded")}
    work = {rows: [float(work_of(batch)) for batch in steps[rows]] for rows in steps}
    measured = {line: Measured() for line in lines}
    began = time.monotonic()
    longest = max(map(len, steps.values()))
    for turn, index in enumerate([*range(min(warm_up, longest)), *range(longest)]):
        if turn >= warm_up + _LEAST_STEPS and time.monotonic() - began > _SECONDS:
            break
        for line, found in measured.items():
            if found.failure is not None or index >= len(steps[line.rows]):
                continue
            seconds = _try_step(model, optimizer, case, line, steps[line.rows][index], found)
            if seconds is not None and turn >= warm_up:
                found.rates.append(work[line.rows][index] / seconds)
    per_sample = sum(work["padded"]) / len(case.samples)
    del model, optimizer
    _collect()
    return _table(case, measured, per_sample)


def batches(case: Case, rows: str) -> list[Batch]:
    """Return the micro-batches of a case, every sample in exactly one.

    Args:
        case: has the samples.
        rows: ``packed``: rows of one length, about as many samples as a padded micro-batch has;
            ``padded``: in the order in which they come.
    """
    samples, length = case.samples, None
    if rows == "packed":
        length = case.pack_length
        lengths = np.array([sample.encoded.length for sample in samples], dtype=np.int32)
        pictured = np.array([sample.pixel_values is not None for sample in samples])
        plan = plan_packs(lengths, pictured, pack_length=length, max_images=_MAX_IMAGES)
        packs = [[samples[index] for index in pack] for pack in plan]
        order = np.random.default_rng(0).permutation(len(packs))
        count = max(1, int(case.micro_batch_size * lengths.mean() // length))
        packs = [packs[n] for n in order]
        micro_batches = [packs[n : n + count] for n in range(0, len(packs), count)]
    else:
        count = case.micro_batch_size
        single = [[sample] for sample in samples]
        micro_batches = [single[n : n + count] for n in range(0, len(single), count)]
    collator = Collator(case.pad_token_id, case.image_size, pack_length=length)
    made = [collator(rows_of_step) for rows_of_step in micro_batches]
    for batch in made:
        batch.num_supervised_global = batch.num_supervised
    return made


def our_loss(model: VipLlavaForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """Return the mean over supervised tokens, as a training step works it out."""
    return supervised_loss_sum(model, batch)[0] / batch.num_supervised_global


def plain_loss(
    model: VipLlavaForConditionalGeneration, inputs: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Return the loss as the network itself works it out."""
    return model(**inputs, use_cache=False).loss


def plain_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """Return a padded batch as transformers' own processor and collator would make it."""
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": (batch.segment_ids != PADDING_SEGMENT).long(),
        "labels": batch.labels,
    }
    if len(batch.pixel_values):
        inputs["pixel_values"] = normalise_pixels(
            batch.pixel_values, torch.float32, CLIP.preprocessing
        )
    return inputs


def _try_step(
    model: VipLlavaForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    case: Case,
    line: Line,
    batch: Batch,
    found: Measured,
) -> float | None:
    """Return the seconds of a step; None, with the reason noted, where memory is short."""
    try:
        return _step(model, optimizer, case, line, batch, found)
    except RuntimeError as error:
        message = str(error)
        if OUT_OF_MEMORY not in message and "ALLOC_FAILED" not in message:
            raise
        found.failure = OUT_OF_MEMORY
    # Behind the handler: the error holds the step's tensors.
    optimizer.zero_grad()
    optimizer.state.clear()  # it may be there in part
    _collect()
    return None


def _step(
    model: VipLlavaForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    case: Case,
    line: Line,
    batch: Batch,
    found: Measured,
) -> float:
    _set_mode(model, case, line)
    on_cuda = case.device.type == "cuda"
    host = plain_inputs(batch) if line.loop == "plain" else {}
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    with (
        torch.compiler.set_stance("default" if line.compiled else "force_eager"),
        # Lightning's precision plugin keeps no copies of weights; a plain loop does.
        torch.autocast(
            case.device.type,
            torch.bfloat16,
            enabled=on_cuda,
            cache_enabled=line.loop == "plain",
        ),
    ):
        if line.loop == "plain":
            loss = plain_loss(model, {name: t.to(case.device) for name, t in host.items()})
        else:
            loss = our_loss(model, copy.copy(batch).to(case.device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if on_cuda:
        torch.cuda.synchronize()
        found.memory = max(found.memory, torch.cuda.max_memory_allocated())
    return time.perf_counter() - began


def _set_mode(model: VipLlavaForConditionalGeneration, case: Case, line: Line) -> None:
    """Bring the network into the state in which a line trains it."""
    network: Any = model
    if network.config.text_config._attn_implementation != line.attention:
        network.set_attn_implementation(_attention(line.attention))
    model.train()
    _set_checkpointing(model, False)
    if line.loop == "plain":
        _set_checkpointing(model, line.checkpointing)
        return
    for part, modules in modules_of(model).items():
        for module in modules:
            module.train(part in case.trainable)
    language_model: Any = model.model.language_model
    _set_checkpointing(language_model, line.checkpointing)
    for module in language_model.modules() if line.checkpointing else ():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # without it nothing is recomputed


_attention = cache(attention_settings)
"""Once, for compiled blocks are made anew where a function is registered again."""


def _set_checkpointing(part: Any, wanted: bool) -> None:
    # transformers renames these from 5.18 on and warns about the old names.
    names = ("activation_checkpointing", "gradient_checkpointing")
    name = next(name for name in names if hasattr(part, f"{name}_enable"))
    if wanted:
        getattr(part, f"{name}_enable")({"use_reentrant": False})
    else:
        getattr(part, f"{name}_disable")()


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _table(
    case: Case, measured: dict[Line, Measured], flops_per_sample: float
) -> list[dict[str, Any]]:
    on_cuda = case.device.type == "cuda"
    peak = device_peak(torch.cuda.get_device_name()) if on_cuda else None
    reference = measured[reference_line()].rates
    rows: list[dict[str, Any]] = []
    for line, found in measured.items():
        row = _row(case.model, case.workload, line, found.failure or "-")
        if found.rates and found.failure is None:
            rate = median(found.rates)
            row["samples_per_s"] = rate / flops_per_sample
            row["spread"] = _spread(found.rates)
            row["tflops"] = rate / 1e12
            row["mfu"] = rate / peak if peak else "-"
            row["gib"] = found.memory / 2**30 if on_cuda else "-"
            row["ratio"] = rate / median(reference) if reference else "-"
            row["steps"] = len(found.rates)
        rows.append(row)
    return rows


def _row(model: str, workload: Workload, line: Line, speed: str) -> dict[str, Any]:
    return {
        "model": model,
        "trains": workload,
        "loop": line.loop,
        "rows": line.rows,
        "attention": line.attention,
        "checkpointing": "yes" if line.checkpointing else "no",
        "compiled": "yes" if line.compiled else "no",
        "samples_per_s": speed,
        "spread": "-",
        "tflops": "-",
        "mfu": "-",
        "gib": "-",
        "ratio": "-",
        "steps": 0,
    }


def _spread(rates: Sequence[float]) -> str:
    if len(rates) < 2:
        return "-"
    low, middle, high = quantiles(rates, n=4)
    return f"{low / middle - 1:+.0%} {high / middle - 1:+.0%}"
