"""OmegaConf resolvers of ``conf/``: values that follow from others, ``${vip.NAME:ARGUMENTS}``.

Pure functions of the configuration, except the few that look at this machine because
``trainer=auto`` or ``trainer=1gpu`` says so; only those import torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vipllava.config import hardware, places
from vipllava.config.attention import FALLBACK, attention_candidates, choose_attention
from vipllava.config.batch import accumulation_steps, largest_micro_batch
from vipllava.config.schema import SHARDING_STRATEGIES
from vipllava.types import ConfigError

_LONGEST_FOLDER = 200
"""Bytes; file systems end at 255, and files beside the folder may add to its name."""
_CHOSEN = ("single", "ddp", *SHARDING_STRATEGIES)
"""What ``strategy=auto`` chooses from, by how much of the model's state it takes off a device."""


def register_resolvers() -> None:
    """Make the ``vip.*`` resolvers known to OmegaConf; calling it again changes nothing."""
    for function in _RESOLVERS:
        OmegaConf.register_new_resolver(f"vip.{function.__name__}", function, replace=True)


def recipe(key: str, default: Any, *, _root_: DictConfig) -> Any:
    """``${vip.recipe:KEY,PUBLISHED}``: the stage's value of ``key``.

    The tuning's ``stage_overrides`` come first, then the model's, each for this stage or for
    ``all``; then the published value. ``stage.KEY=...`` on the command line beats all of them.
    """
    for group in ("tuning", "model"):
        for stage in (OmegaConf.select(_root_, "stage.name"), "all"):
            overrides = OmegaConf.select(_root_, f"{group}.stage_overrides.{stage}")
            if overrides is not None and key in overrides:
                return overrides[key]
    return default


def workload(trainable: Sequence[str], tuning: str) -> str:
    """``projector`` when only that trains, else the tuning: what decides memory per device."""
    return tuning if "language_model" in trainable else "projector"


def micro_batch_size(*, _root_: DictConfig) -> int:
    """Samples per device and forward pass.

    The machine's table by workload, replaced by ``model.micro_batch_size`` where a model fits
    everywhere, capped by ``model.max_micro_batch_sizes``; then the largest number up to that
    which divides the global batch, so the recipe's global batch holds on any number of devices.
    """
    work = OmegaConf.select(_root_, "machine.workload")
    limit = OmegaConf.select(_root_, "model.micro_batch_size")
    if limit is None:
        limit = _of_workload("machine.micro_batch_sizes", work, _root_)
    cap = OmegaConf.select(_root_, f"model.max_micro_batch_sizes.{work}")
    limit = int(limit if cap is None else min(limit, cap))
    devices, nodes = int(_root_.trainer.devices), int(_root_.trainer.num_nodes)
    size = int(_root_.stage.global_batch_size)
    return largest_micro_batch(limit, size, devices, nodes) or limit


def packs_per_micro_batch(*, _root_: DictConfig) -> int:
    """Packs that hold about as many samples as the machine's micro-batch, at least one."""
    tokens = int(_root_.machine.micro_batch_size) * int(_root_.stage.mean_length)
    return max(1, tokens // int(_root_.data.pack_length))


def packs_per_batch(*, _root_: DictConfig) -> int:
    """Packs that hold about as many samples as the global batch; all devices get equally many."""
    tokens = int(_root_.stage.global_batch_size) * int(_root_.stage.mean_length)
    devices = int(_root_.trainer.devices) * int(_root_.trainer.num_nodes)
    at_once = int(_root_.data.micro_batch_size) * devices
    return at_once * max(1, round(tokens / int(_root_.data.pack_length) / at_once))


def strategy(*, _root_: DictConfig) -> str:
    """The strategy that ``strategy=auto`` stands for: by machine, workload and model.

    One process needs none. Otherwise ``model.strategy`` (a model small enough to be replicated), or
    the machine's table, raised to ``model.min_strategies`` where the model's state is larger.
    """
    if int(_root_.trainer.devices) * int(_root_.trainer.num_nodes) == 1:
        return "single"
    own = OmegaConf.select(_root_, "model.strategy")
    if own is not None:
        return str(own)
    work = OmegaConf.select(_root_, "machine.workload")
    chosen = _of_workload("machine.strategies", work, _root_)
    names = (chosen, OmegaConf.select(_root_, f"model.min_strategies.{work}", default=chosen))
    if unknown := set(names) - set(_CHOSEN):
        raise ConfigError(f"unknown strategy `{unknown.pop()}`; allowed: {', '.join(_CHOSEN)}")
    return max(names, key=_CHOSEN.index)


def _of_workload(table: str, work: str, root: DictConfig) -> Any:
    value = OmegaConf.select(root, f"{table}.{work}")
    if value is None:
        raise ConfigError(f"{table} has no entry for `{work}`")
    return value


def devices(global_batch_size: int) -> int:
    """``trainer=auto``: the most CUDA devices that divide the global batch; 1 without CUDA."""
    present = len(hardware.detect().cuda)
    return next((n for n in range(present, 1, -1) if global_batch_size % n == 0), 1)


def precision() -> str:
    """The best mixed precision of the first CUDA device, or of a CPU that has bf16 units."""
    machine = hardware.detect()
    if machine.cuda:  # bf16 units came with capability 8.0 (A100); older ones have fp16 only
        return "bf16-mixed" if machine.cuda[0].capability >= (8, 0) else "16-mixed"
    # Twice as fast where the CPU has the units, many times slower where it emulates them.
    return "bf16-mixed" if machine.cpu_bf16 and not machine.mps else "32-true"


def num_workers(limit: int) -> int:
    """Loader processes: half of the cores, at most ``limit``; the other half trains."""
    return min(limit, hardware.detect().num_cpus // 2)


def attention(*, _root_: DictConfig) -> str:
    """The best attention that is installed and that the trainer's devices and precision support."""
    if str(_root_.trainer.accelerator) not in ("cuda", "auto"):
        return FALLBACK
    stated = OmegaConf.select(_root_, "machine.capability")
    if stated is not None:  # else those devices count that are here
        have = hardware.installed_packages(), hardware.capability_of(stated)
    else:
        have = hardware.detect().installed, hardware.detect().least_capability
    return choose_attention(attention_candidates(*have, str(_root_.trainer.precision)))


def weights_dtype(strategy_name: str, precision_name: str) -> str:
    """Dtype the weights are loaded in.

    DeepSpeed keeps fp32 master copies of half-precision weights itself; everywhere else the loaded
    weights are the master copies and stay in fp32 (pure bf16 loses updates at 2e-7).
    """
    return compute_dtype(precision_name) if strategy_name.startswith("zero") else "float32"


def compute_dtype(precision_name: str) -> str:
    """Dtype of matrix products: of weights in 4 bits, which autocast does not see, too."""
    return {"bf16-mixed": "bfloat16", "16-mixed": "float16"}.get(precision_name, "float32")


def zero_if_null(value: float | None) -> float:
    """DeepSpeed spells "no clipping" 0, Lightning spells it null."""
    return float(value or 0)


def one_if_set(value: Any) -> float:
    """All of something where a value is set, none of it where it is null."""
    return 0.0 if value is None else 1.0


def product(*factors: int) -> int:
    """Product of whole numbers, e.g. the processes of all nodes."""
    return math.prod(factors)


def run_dir(runs: str, name: str) -> str:
    """Hydra's output folder of this job where Hydra runs it (a sweep's job has its own).

    Raises ConfigError for a name that leads out of ``runs``: Hydra makes this folder before any
    other check.
    """
    path = PurePath(str(name))  # a name of digits is a number so far; the checks say so
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ConfigError(
            f"name={name}: leads out of paths.runs; name a folder in it, or set paths.runs=FOLDER"
        )
    from hydra.core.hydra_config import HydraConfig

    runtime = HydraConfig.get().runtime if HydraConfig.initialized() else None
    # Missing while Hydra works out this very folder.
    if runtime is None or OmegaConf.is_missing(runtime, "output_dir"):
        return f"{runs}/{name}"
    return str(runtime.output_dir)


def folder_name(text: str) -> str:
    """``text`` as the name of one folder: no slashes, and of a length that file systems bear."""
    name = text.replace("/", "-").replace(" ", "")
    if len(name.encode()) <= _LONGEST_FOLDER:
        return name
    return f"{name[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def last_part(path: str) -> str:
    """The last folder of a path."""
    return Path(path).name


def checkpoint_name(source: str) -> str:
    """What to call a checkpoint: by its run where it lies in the folder of one."""
    path = Path(source).expanduser().absolute()
    if path.name == "export":
        return path.parent.name
    if path.parent.name == "checkpoints":
        return f"{path.parents[1].name}-{path.stem}"
    within = path.name in ("adapter", "projector")
    return f"{path.parent.name}-{path.name}" if within else path.name


def answerer_name(answerer: str, checkpoint: str, model: str | None) -> str:
    """What to call who answers: the checkpoint, or the model behind an endpoint."""
    return checkpoint_name(model or "endpoint" if answerer == "endpoint" else checkpoint)


def package_path(relative: str) -> str:
    """Absolute path of a file that ships inside the package."""
    return str(Path(__file__).resolve().parents[1] / relative)


def manifests_dir() -> str:
    """See :func:`vipllava.config.places.manifests_dir`."""
    return str(places.manifests_dir())


_RESOLVERS: tuple[Callable[..., Any], ...] = (
    accumulation_steps, answerer_name, attention, compute_dtype, devices, folder_name, last_part,
    manifests_dir, micro_batch_size, num_workers, one_if_set, package_path, packs_per_batch,
    packs_per_micro_batch, precision, product, recipe, run_dir, strategy, weights_dtype, workload,
    zero_if_null,
)  # fmt: skip
