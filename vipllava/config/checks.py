"""Everything that cannot run, found before anything is loaded and said all at once."""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from omegaconf import DictConfig

from vipllava.config import hardware
from vipllava.config.attention import attention_candidates
from vipllava.config.batch import accumulation_steps
from vipllava.config.hardware import Hardware
from vipllava.config.job_values import JobValues
from vipllava.config.launch_checks import check_launch, check_single_process
from vipllava.config.machine_faults import HOME_REMEDY, find_home
from vipllava.config.schema import (
    EVALUATE,
    TRAIN,
    check_schema,
    did_you_mean,
    spell,
)
from vipllava.processes import is_first_process
from vipllava.types import ConfigError

_WANDB_WITHOUT_KEY = ("offline", "disabled", "dryrun")
_BF16_CAPABILITY = (8, 0)


def check_config(
    cfg: DictConfig, machine: Hardware | None = None, more: Sequence[str] = ()
) -> None:
    """Check a composed training or evaluation job.

    Args:
        cfg: what Hydra composed from ``conf/train.yaml`` or ``conf/evaluate.yaml``.
        machine: the hardware to check against; this machine if not given.
        more: problems that were found elsewhere, to be said with the others.

    Raises:
        ConfigError: listing every problem, each naming the key, its value and the remedy.
    """
    if problems := [*find_problems(cfg, machine), *more]:
        raise ConfigError(format_problems(problems))


def check_data_config(cfg: DictConfig) -> None:
    """Check what looking at a job's data needs; where it would train does not matter.

    Raises:
        ConfigError: listing every unknown key and impossible value, and an unknown manifest.
    """
    problems = [_explain(p, cfg) for p in check_schema(cfg, TRAIN)]
    problems += _manifest(JobValues(cfg, hardware.detect()))
    if problems:
        raise ConfigError(format_problems(list(dict.fromkeys(problems))))


def check_plan_config(cfg: DictConfig) -> None:
    """Check what a forecast of a job needs; what this machine has or lacks does not matter.

    Raises:
        ConfigError: listing every unknown key and impossible value, an unknown manifest, a global
            batch that does not divide, and settings that contradict each other.
    """
    problems = [_explain(p, cfg) for p in check_schema(cfg, TRAIN)]
    job = JobValues(cfg, Hardware(installed=frozenset(hardware.OPTIONAL_PACKAGES)))
    for check in (_manifest, _global_batch, _tuning, _compile):
        problems += check(job)
    if problems:
        raise ConfigError(format_problems(list(dict.fromkeys(problems))))


def find_problems(cfg: DictConfig, machine: Hardware | None = None) -> list[str]:
    """Return every problem of a composed job, without repetitions, in the order of the checks."""
    evaluating = "bench" in cfg
    rules = EVALUATE if evaluating else TRAIN
    checks = _EVALUATE_CHECKS if evaluating else _TRAIN_CHECKS
    problems = [_explain(p, cfg) for p in check_schema(cfg, rules)]
    job = JobValues(cfg, machine or hardware.detect())
    for check in checks:
        problems += check(job)
    return list(dict.fromkeys(problems))


def format_problems(problems: list[str]) -> str:
    """Write a list of problems as the message of one error."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    listed = "\n".join(f"  - {problem}" for problem in problems)
    return f"this configuration cannot run: {count}\n{listed}"


def _explain(problem: str, cfg: DictConfig) -> str:
    """Say more about the one value that a user has to bring."""
    if problem.startswith("data.manifest is not set") or "model.manifests." in problem:
        stage = cfg.stage.get("name")
        names = _known_manifests(str(cfg.paths.manifests))
        return (
            f"data.manifest is not set: stage={stage} trains on data of your own; pass "
            f"data.manifest=NAME ({', '.join(names) or 'no manifests here'}) or the path of a "
            "manifest file"
        )
    return problem


def _known_manifests(folder: str) -> list[str]:
    return sorted(path.stem for path in Path(folder).expanduser().glob("*.yaml"))


def _manifest(job: JobValues) -> list[str]:
    key = "bench.manifest" if "bench" in job.cfg else "data.manifest"
    named = {key: job.get(key, str)}
    if mix := job.get("data.mix", dict):
        named = {f"data.mix.{name}": str(name) for name in mix}
    problems: list[str] = []
    for where, name in named.items():
        problems += _manifest_problems(where, name, job.get("paths.manifests", str))
    return problems


def _manifest_problems(key: str, name: str | None, folder: str | None) -> list[str]:
    if name is None or folder is None:
        return []
    if name.endswith((".yaml", ".yml")):
        return [] if Path(name).is_file() else [f"{key}={name}: there is no such file"]
    known = _known_manifests(folder)
    if name in known:
        return []
    if not known:
        return [
            f"paths.manifests={folder} holds no manifests; start from the project's folder or pass "
            "paths.manifests=FOLDER"
        ]
    return [f"{key}={name}: unknown{did_you_mean(name, known)}; known: {', '.join(known)}"]


def _checkpoint(job: JobValues) -> list[str]:
    """The folder a stage starts from, or that is evaluated, where it is one of our runs."""
    key = "checkpoint" if "bench" in job.cfg else "stage.checkpoint"
    folder, runs = job.get(key, str), job.get("paths.runs", str)
    if folder is None or runs is None or not Path(folder).is_relative_to(runs):
        return []  # hub ids and folders elsewhere: the loader says what is wrong with them
    if Path(folder).is_dir():
        return []
    if key == "checkpoint":
        return [f"checkpoint={folder}: no such folder; train first or pass checkpoint=FOLDER"]
    return [
        f"stage={job.get('stage.name')} starts from {folder}, which is not there; run the stage "
        "before it or pass stage.checkpoint=FOLDER"
    ]


def _global_batch(job: JobValues) -> list[str]:
    size, micro = job.number("data.global_batch_size"), job.number("data.micro_batch_size")
    devices, nodes = job.number("trainer.devices"), job.number("trainer.num_nodes")
    if size is None or micro is None or devices is None or nodes is None:
        return []
    try:
        accumulation_steps(size, micro, devices, nodes)
    except ConfigError as error:
        return [str(error)]
    steps = job.number("trainer.accumulate_grad_batches")
    if steps is not None and micro * steps * devices * nodes != size:
        return [
            f"machine.micro_batch_size={micro} x trainer.accumulate_grad_batches={steps} x "
            f"trainer.devices={devices} x trainer.num_nodes={nodes} = "
            f"{micro * steps * devices * nodes}, not stage.global_batch_size={size}; leave "
            "trainer.accumulate_grad_batches out, it is computed"
        ]
    return []


def _devices(job: JobValues) -> list[str]:
    accelerator, wanted = job.get("trainer.accelerator"), job.number("trainer.devices")
    if wanted is None:
        return []
    machine = job.machine
    trainer = job.get("machine.name")
    if accelerator == "mps":
        if not machine.mps:
            return ["trainer.accelerator=mps: this machine has no Apple MPS; use trainer=auto"]
        return [] if wanted == 1 else [f"trainer.devices={wanted}: Apple MPS is one device"]
    if accelerator == "auto" and not machine.cuda:
        return []
    if accelerator not in ("cuda", "auto"):
        return []
    memory = job.get("machine.memory_gb", (int, float))
    needs = f"{wanted} CUDA device{'s' if wanted > 1 else ''}"
    needs += f" with {memory} GB" if memory else ""
    enough = [d for d in machine.cuda if d.memory_gib >= 0.95 * (memory or 0)]
    if len(enough) >= wanted:
        return []
    return [
        f"trainer={trainer} wants {needs}; this machine has {machine.describe()}; use "
        "trainer=auto, or another of conf/trainer"
    ]


def _precision(job: JobValues) -> list[str]:
    precision, accelerator = job.get("trainer.precision", str), job.get("trainer.accelerator")
    if precision is None:
        return []
    problems: list[str] = []
    on_cuda = accelerator == "cuda" or (accelerator == "auto" and bool(job.machine.cuda))
    if precision.startswith("16") and not on_cuda:
        problems.append(
            f"trainer.precision={precision} needs CUDA devices; use 32-true or bf16-mixed"
        )
    if precision.startswith("16") and job.get("strategy.name") == "fsdp2":
        problems.append(
            f"strategy=fsdp2 does not work with trainer.precision={precision}: FSDP2 has no loss "
            "scaling; use bf16-mixed, 32-true, or strategy=zero3"
        )
    capability = _capability(job)
    if not on_cuda or capability is None or capability >= _BF16_CAPABILITY:
        return problems
    no_bf16 = f"devices of compute capability {capability[0]}.{capability[1]} have no bf16"
    if precision.startswith("bf16"):
        problems.append(f"trainer.precision={precision}: {no_bf16}; use trainer.precision=16-mixed")
    if job.get("tuning.quantization.compute_dtype") == "bfloat16":
        problems.append(
            f"tuning.quantization.compute_dtype=bfloat16: {no_bf16}; leave it out, it follows "
            "trainer.precision"
        )
    return problems


def _capability(job: JobValues) -> tuple[int, int] | None:
    """The least compute capability among the trainer's stated one and the devices here."""
    found = [device.capability for device in job.machine.cuda]
    stated = job.get("machine.capability", (int, float))
    if stated is not None:
        found.append(hardware.capability_of(stated))
    return min(found, default=None)


def _strategy(job: JobValues) -> list[str]:
    strategy = job.get("strategy.name", str)
    if strategy is None or not strategy.startswith("zero"):
        return []
    problems: list[str] = []
    accelerator = job.get("trainer.accelerator", str)
    if accelerator in ("cpu", "mps"):
        problems.append(
            f"strategy={strategy} needs CUDA devices; trainer.accelerator={accelerator}; use "
            "strategy=auto, ddp or fsdp2"
        )
    elif accelerator == "auto" and not job.machine.cuda:  # `cuda` without any is said already
        problems.append(
            f"strategy={strategy} needs CUDA devices; this machine has {job.machine.describe()}; "
            "use strategy=auto, ddp or fsdp2"
        )
    if "deepspeed" not in job.machine.installed:
        problems.append(_needs_extra(f"strategy={strategy}", "deepspeed", "deepspeed"))
    if job.get("trainer.precision") == "32-true" and job.machine.cuda:
        problems.append(
            f"strategy={strategy} wants half precision with fp32 master weights; "
            "trainer.precision=32-true is not that; use bf16-mixed or 16-mixed"
        )
    return problems


def _attention(job: JobValues) -> list[str]:
    if "bench" in job.cfg:
        return _attention_at("attn_implementation", job)
    # A model may have an implementation of its own in place of the machine's.
    own = "model.spec.attn_implementation"
    problems = _attention_at("machine.attn_implementation", job)
    if job.get(own) != job.get("machine.attn_implementation"):
        problems += _attention_at(own, job)
    return problems


def _attention_at(key: str, job: JobValues) -> list[str]:
    wanted = job.get(key, str)
    on_cuda = job.get("trainer.accelerator") not in ("cpu", "mps")
    candidates = attention_candidates(
        job.machine.installed,
        _capability(job) if on_cuda else None,
        job.get("dtype" if "bench" in job.cfg else "trainer.precision", str),
    )
    problems: list[str] = []
    for candidate in candidates:
        if candidate.name != wanted:
            continue
        if candidate.missing:
            kernel = candidate.kernel
            problems.append(
                f"{key}={wanted} needs {kernel.label}, which is not installed: {kernel.install}, "
                "or use sdpa"
            )
        if candidate.unsupported:
            problems.append(f"{key}={wanted}: {candidate.unsupported}; use sdpa")
    return problems


def _tuning(job: JobValues) -> list[str]:
    tuning = job.get("tuning.name", str)
    if tuning not in ("lora", "qlora"):
        return []
    problems: list[str] = []
    if "peft" not in job.machine.installed:
        problems.append(_needs_extra(f"tuning={tuning}", "lora", "peft"))
    if tuning == "qlora" and "bitsandbytes" not in job.machine.installed:
        problems.append(_needs_extra("tuning=qlora", "quant", "bitsandbytes"))
    if "language_model" not in (job.get("stage.trainable", list) or ["language_model"]):
        problems.append(
            f"tuning={tuning} adapts the language model, which stage={job.get('stage.name')} "
            "leaves frozen; use tuning=full"
        )
    if "vision_tower" in (job.get("stage.trainable", list) or []):
        problems.append(
            f"stage.trainable names vision_tower, and tuning={tuning} trains adapters and the "
            "projector only; use tuning=full, or leave the tower out"
        )
    strategy = job.get("strategy.name", str) or ""
    if tuning == "qlora" and (strategy.startswith("zero3") or strategy == "fsdp2"):
        problems.append(
            f"tuning=qlora does not work with strategy={strategy}: weights in 4 bits cannot be "
            "sharded here; use strategy=ddp or auto, or tuning=lora"
        )
    return problems


def _compile(job: JobValues) -> list[str]:
    if not job.get("machine.compile", bool):
        return []
    problems: list[str] = []
    batching, strategy = job.get("data.batching", str), job.get("strategy.name", str) or ""
    if batching != "packed":
        problems.append(
            f"machine.compile=true with data.batching={batching}: every other length of the rows "
            "would be compiled anew; pass data=packed, whose rows have one length"
        )
    if strategy.startswith("zero3"):
        problems.append(
            f"machine.compile=true does not work with strategy={strategy}, which gathers weights "
            "inside of what would be compiled; use strategy=zero2, fsdp2 or ddp"
        )
    if job.get("tuning.name", str) == "qlora":
        problems.append(
            "machine.compile=true does not work with tuning=qlora, whose weights in few bits "
            "torch.compile cannot follow; use tuning=lora"
        )
    return problems


def _loggers(job: JobValues) -> list[str]:
    loggers = job.get("logger", dict) or {}
    return [
        _needs_extra(f"logger={name}", name, name)
        for name in ("tensorboard", "wandb")
        if loggers.get(name) and name not in job.machine.installed
    ]


def _wandb_key(job: JobValues) -> list[str]:
    """W&B asks for a key when a run starts, which is late, and a batch job cannot answer."""
    mode = os.environ.get("WANDB_MODE", "").lower()
    if not job.get("logger.wandb", dict) or "wandb" not in job.machine.installed:
        return []
    if job.get("logger.wandb.offline") is True or mode in _WANDB_WITHOUT_KEY:
        return []
    if not is_first_process():
        return []  # which alone logs
    if has_wandb_key():
        return []
    return [
        f"logger=wandb has no key for {_wandb_host()}: run `wandb login`, set WANDB_API_KEY, or "
        "set WANDB_MODE=offline and upload later with `wandb sync`"
    ]


def has_wandb_key() -> bool:
    """Return whether W&B would find a key, in the environment or in the user's netrc file."""
    names = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    return any(os.environ.get(name) for name in names) or _in_netrc(_wandb_host())


def _wandb_host() -> str:
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return urlsplit(url).hostname or url


def _in_netrc(host: str) -> bool:
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]
    for file in files:
        try:
            if netrc.netrc(file.expanduser()).authenticators(host) is not None:
                return True
        except (OSError, RuntimeError, netrc.NetrcParseError):  # RuntimeError: there is no home
            continue
    return False


def _home(job: JobValues) -> list[str]:
    """Without one, libraries keep what they fetch in a folder that is called ``~``."""
    if find_home() is not None:
        return []
    return [f"this user has no home folder, neither by HOME nor by the system: {HOME_REMEDY}"]


def _callbacks(job: JobValues) -> list[str]:
    keys = ("throughput.every_n_steps", "samples.every_n_steps", "samples.num_samples")
    problems: list[str] = []
    for key in (f"callbacks.{key}" for key in keys):
        value = job.get(key)
        if value is not None and job.number(key) is None:
            problems.append(f"{key}={spell(value)}: expected a whole number of at least 1")
    return problems


def _device(job: JobValues) -> list[str]:
    device = job.get("device", str)
    if device is None:
        return []
    kind, _, index = device.partition(":")
    there = {
        "auto": not index,
        "cpu": not index,
        "mps": not index and job.machine.mps,
        "cuda": (index or "0").isdecimal() and int(index or 0) < len(job.machine.cuda),
    }
    if kind not in there:
        return [f"device={device}: expected auto, cpu, cuda, cuda:N or mps"]
    if there[kind]:
        return []
    return [f"device={device}: this machine has {job.machine.describe()}; use device=auto"]


def _needs_extra(what: str, extra: str, package: str) -> str:
    return f"{what} needs {package}, which is not installed: pip install -e '.[{extra}]'"


_Check = Callable[[JobValues], list[str]]
_TRAIN_CHECKS: tuple[_Check, ...] = (
    _manifest,
    _checkpoint,
    _global_batch,
    _devices,
    check_launch,
    _precision,
    _strategy,
    _attention,
    _tuning,
    _compile,
    _loggers,
    _wandb_key,
    _callbacks,
    _home,
)
_EVALUATE_CHECKS: tuple[_Check, ...] = (
    _manifest,
    _checkpoint,
    check_single_process,
    _device,
    _attention,
    _home,
)
