"""Everything that cannot run, found before anything is loaded and said all at once."""

from __future__ import annotations

import inspect
import netrc
import os
import pydoc
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from omegaconf import DictConfig, ListConfig, OmegaConf

from vipllava.config import hardware
from vipllava.config.argument_names import with_keys
from vipllava.config.attention import attention_candidates
from vipllava.config.batch import accumulation_steps
from vipllava.config.hardware import Hardware
from vipllava.config.launch_checks import check_launch, check_single_process
from vipllava.config.machine_faults import HOME_REMEDY, find_home
from vipllava.config.schema import (
    EVALUATE,
    TRAIN,
    JobValues,
    Section,
    check_schema,
    did_you_mean,
    spell,
)
from vipllava.processes import is_first_process
from vipllava.types import ConfigError, first_line

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_WANDB_KEY: Final = re.compile(r"[\w-]+(\.[\w-]+){2}|([^-]*-)?[\w-]{40,}")  # a token, or a key
_TARGET_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")


def check_config(
    cfg: DictConfig, machine: Hardware | None = None, more: Sequence[str] = ()
) -> None:
    """Check a composed training or evaluation job.

    Args:
        machine: the hardware to check against; this machine if not given.
        more: problems that were found elsewhere, to be said with the others.

    Raises:
        ConfigError: listing every problem, each naming the key, its value and the remedy.
    """
    _refuse([*find_problems(cfg, machine), *more])


def check_data_config(cfg: DictConfig, more: Sequence[str] = ()) -> None:
    """Raise ConfigError where looking at a job's data fails; where it trains does not matter."""
    _refuse([*_find(JobValues(cfg, Hardware()), TRAIN, (_manifest, _data_root)), *more])


def check_plan_config(cfg: DictConfig, more: Sequence[str] = ()) -> None:
    """Raise ConfigError where a forecast fails; what this machine has or lacks does not matter."""
    job = JobValues(cfg, Hardware(installed=frozenset(hardware.OPTIONAL_PACKAGES)))
    _refuse([*_find(job, TRAIN, (_manifest, _global_batch, _tuning, _compile)), *more])


def check_targets(cfg: DictConfig) -> None:
    """Check every constructor call of a job: does ``_target_`` exist, does it take the arguments?

    Importing the classes costs seconds (transformers, lightning): after the cheap checks.

    Raises:
        ConfigError: listing every problem, each naming its key.
    """
    _refuse(find_target_problems(cfg))


def find_target_problems(cfg: DictConfig) -> list[str]:
    """Return what is wrong with the constructor calls of a job, each naming its key."""
    problems: list[str] = []
    for path, node in targets(cfg):
        name = str(node["_target_"])
        try:
            target: Any = pydoc.locate(name)
        except pydoc.ErrorDuringImport as error:
            if isinstance(error.value, (KeyboardInterrupt, SystemExit)):
                raise error.value from None  # Ctrl-C: pydoc catches that, too
            problems.append(f"{path}._target_={name} cannot be imported: {first_line(error)}")
            continue
        if target is None:
            problems.append(f"{path}._target_={name}: there is no such class or function")
            continue
        parameters = inspect.signature(target).parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            continue
        problems += [
            f"{path}.{key}: {name} takes no such argument{did_you_mean(str(key), parameters)}"
            for key in node
            if key not in parameters and key not in _TARGET_KEYS
        ]
    return problems


def targets(cfg: DictConfig, prefix: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Yield the path and node of everything with a ``_target_``, in order of appearance.

    Interpolations are not followed: what they point to is met at its own place.
    """
    if "_target_" in cfg:
        yield prefix, cfg
    for key in map(str, cfg):
        if OmegaConf.is_missing(cfg, key) or OmegaConf.is_interpolation(cfg, key):
            continue
        path = f"{prefix}.{key}" if prefix else key
        child: Any = cfg[key]
        items = enumerate(child) if isinstance(child, ListConfig) else ()
        for where, node in [(path, child), *((f"{path}.{index}", item) for index, item in items)]:
            if isinstance(node, DictConfig) and node:
                yield from targets(node, where)


def find_problems(cfg: DictConfig, machine: Hardware | None = None) -> list[str]:
    """Return every problem of a composed job, without repetitions, in the order of the checks."""
    job = JobValues(cfg, machine or hardware.detect())
    schema = (EVALUATE, _EVALUATE_CHECKS) if job.is_evaluation else (TRAIN, _TRAIN_CHECKS)
    return _find(job, *schema)


def _find(job: JobValues, schema: Section, checks: Sequence[_Check]) -> list[str]:
    problems = [_explain(problem, job.cfg) for problem in check_schema(job.cfg, schema)]
    return list(dict.fromkeys([*problems, *chain.from_iterable(check(job) for check in checks)]))


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError(format_problems(problems))


def format_problems(problems: list[str]) -> str:
    """Write a list of problems as the message of one error."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    listed = "\n".join(f"  - {problem}" for problem in problems)
    return f"this configuration cannot run: {count}\n{listed}"


def _explain(problem: str, cfg: DictConfig) -> str:
    """Say more about the one value that a user has to bring."""
    if not problem.startswith("data.manifest is not set") and "model.manifests." not in problem:
        return problem
    names = ", ".join(_known_manifests(str(cfg.paths.manifests)))
    return (
        f"data.manifest is not set: stage={cfg.stage.get('name')} trains on data of your own; pass "
        f"data.manifest=NAME ({names or 'no manifests here'}) or the path of a manifest file"
    )


def _known_manifests(folder: str) -> list[str]:
    return sorted(path.stem for path in Path(folder).expanduser().glob("*.yaml"))


def _manifest(job: JobValues) -> Iterator[str]:
    folder = job.get("paths.manifests", str)
    key = "bench.manifest" if job.is_evaluation else "data.manifest"
    named = {key: job.get(key, str)}
    if mix := job.get("data.mix", dict):
        named = {f"data.mix.{name}": str(name) for name in mix}
    for where, name in named.items():
        if name is None or folder is None:
            continue
        known = _known_manifests(folder)
        if name.endswith((".yaml", ".yml")):
            if not Path(name).is_file():
                yield f"{where}={name}: there is no such file"
        elif name.endswith((".json", ".jsonl", ".tar")):
            yield (
                f"{where}={name} is no manifest: copy data_manifests/user_data.yaml, name in it "
                "where records, images and shards lie, and pass its name (docs/your_data.md)"
            )
        elif not known:
            yield (
                f"paths.manifests={folder} holds no manifests; start from the project's folder or "
                "pass paths.manifests=FOLDER"
            )
        elif name not in known:
            yield f"{where}={name}: unknown{did_you_mean(name, known)}; known: {', '.join(known)}"


def _checkpoint(job: JobValues) -> Iterator[str]:
    """The folder or file a stage starts from, or that is evaluated; the hub is not asked yet."""
    if job.get("answerer") == "endpoint":
        return
    key = "checkpoint" if job.is_evaluation else "stage.checkpoint"
    source, runs = job.get(key, str), job.get("paths.runs", str)
    if source is None or runs is None or Path(source).expanduser().exists():
        return
    if Path(source).is_relative_to(runs):
        if job.is_evaluation:
            yield f"{key}={source}: no such file or folder; train first or pass {key}=FOLDER"
        else:
            yield (
                f"stage={job.get('stage.name')} starts from {source}, which is not there; run the "
                "stage before it or pass stage.checkpoint=FOLDER"
            )
    elif _is_path(source):
        yield f"{key}={source}: no such file or folder in {Path.cwd()}"


def _is_path(source: str) -> bool:
    """Return whether a name is not a hub's: an id has one slash, and not a folder's name before."""
    ends = source.endswith((".ckpt", ".bin", ".safetensors"))
    owner = source.partition("/")[0] if "/" in source else None
    return ends or not _HUB_ID.fullmatch(source) or (owner is not None and Path(owner).is_dir())


def _data_root(job: JobValues) -> Iterator[str]:
    """A folder that is named has to be there: sample data are made in it, else in `data`."""
    root = job.get("paths.data_root", str)
    if root is None or root == "data" or "://" in root or Path(root).expanduser().is_dir():
        return
    yield f"paths.data_root={root}: no such folder; make it, or name the one that has the data"


def _global_batch(job: JobValues) -> Iterator[str]:
    size, micro = job.number("data.global_batch_size"), job.number("data.micro_batch_size")
    devices, nodes = job.number("trainer.devices"), job.number("trainer.num_nodes")
    if size is None or micro is None or devices is None or nodes is None:
        return
    try:
        accumulation_steps(size, micro, devices, nodes)
    except ConfigError as error:
        yield with_keys(str(error), job.cfg)
        return
    steps = job.number("trainer.accumulate_grad_batches")
    if steps is not None and micro * steps * devices * nodes != size:
        yield (
            f"machine.micro_batch_size={micro} x trainer.accumulate_grad_batches={steps} x "
            f"trainer.devices={devices} x trainer.num_nodes={nodes} = "
            f"{micro * steps * devices * nodes}, not stage.global_batch_size={size}; leave "
            "trainer.accumulate_grad_batches out, it is computed"
        )


def _devices(job: JobValues) -> Iterator[str]:
    accelerator, wanted = job.get("trainer.accelerator"), job.number("trainer.devices")
    machine = job.machine
    if wanted is None:
        return
    if accelerator == "mps" and not machine.mps:
        yield "trainer.accelerator=mps: this machine has no Apple MPS; use trainer=auto"
    elif accelerator == "mps" and wanted > 1:
        yield f"trainer.devices={wanted}: Apple MPS is one device"
    if not (accelerator == "cuda" or (accelerator == "auto" and machine.cuda)):
        return
    memory = job.get("machine.memory_gb", (int, float))
    if sum(d.memory_gib >= 0.95 * (memory or 0) for d in machine.cuda) < wanted:
        needs = f"{wanted} CUDA device{'s' if wanted > 1 else ''}"
        needs += f" with {memory} GB" if memory else ""
        yield (
            f"trainer={job.get('machine.name')} wants {needs}; this machine has "
            f"{machine.describe()}; use trainer=auto, or another of conf/trainer"
        )


def _precision(job: JobValues) -> Iterator[str]:
    precision, accelerator = job.get("trainer.precision", str), job.get("trainer.accelerator")
    if precision is None:
        return
    on_cuda = accelerator == "cuda" or (accelerator == "auto" and bool(job.machine.cuda))
    if precision.startswith("16") and not on_cuda:
        yield f"trainer.precision={precision} needs CUDA devices; use 32-true or bf16-mixed"
    if precision.startswith("16") and job.get("strategy.name") == "fsdp2":
        yield (
            f"strategy=fsdp2 does not work with trainer.precision={precision}: FSDP2 has no loss "
            "scaling; use bf16-mixed, 32-true, or strategy=zero3"
        )
    capability = _capability(job)
    if not on_cuda or capability is None or capability >= (8, 0):
        return
    no_bf16 = f"devices of compute capability {capability[0]}.{capability[1]} have no bf16"
    if precision.startswith("bf16"):
        yield f"trainer.precision={precision}: {no_bf16}; use trainer.precision=16-mixed"
    if job.get("tuning.quantization.compute_dtype") == "bfloat16":
        yield (
            f"tuning.quantization.compute_dtype=bfloat16: {no_bf16}; leave it out, it follows "
            "trainer.precision"
        )


def _capability(job: JobValues) -> tuple[int, int] | None:
    """The least compute capability among the trainer's stated one and the devices here."""
    stated = job.get("machine.capability", (int, float))
    stated = None if stated is None else hardware.capability_of(stated)
    return min(filter(None, (stated, job.machine.least_capability)), default=None)


def _strategy(job: JobValues) -> Iterator[str]:
    strategy = job.get("strategy.name", str) or ""
    if not strategy.startswith("zero"):
        return
    accelerator = job.get("trainer.accelerator", str)
    # `cuda` without any is said already.
    if accelerator in ("cpu", "mps") or (accelerator == "auto" and not job.machine.cuda):
        here = f"this machine has {job.machine.describe()}"
        why = here if accelerator == "auto" else f"trainer.accelerator={accelerator}"
        yield f"strategy={strategy} needs CUDA devices; {why}; use strategy=auto, ddp or fsdp2"
    yield from _extra(job, f"strategy={strategy}", "deepspeed", "deepspeed")
    if job.get("trainer.precision") == "32-true" and job.machine.cuda:
        yield (
            f"strategy={strategy} wants half precision with fp32 master weights; "
            "trainer.precision=32-true is not that; use bf16-mixed or 16-mixed"
        )


def _attention(job: JobValues) -> Iterator[str]:
    # A model may have an implementation of its own in place of the machine's.
    keys = ["model.spec.attn_implementation", "machine.attn_implementation", "attn_implementation"]
    wanted = {job.get(key, str): key for key in keys}
    precision = job.get("dtype" if job.is_evaluation else "trainer.precision", str)
    on_cuda = job.get("trainer.accelerator") not in ("cpu", "mps")
    capability = _capability(job) if on_cuda else None
    for candidate in attention_candidates(job.machine.installed, capability, precision):
        if candidate.name not in wanted:
            continue
        what, kernel = f"{wanted[candidate.name]}={candidate.name}", candidate.kernel
        if candidate.missing:
            yield f"{what} {candidate.missing}: {kernel.install}, or use sdpa"
        if candidate.unsupported:
            yield f"{what}: {candidate.unsupported}; use sdpa"


def _tuning(job: JobValues) -> Iterator[str]:
    tuning, strategy = job.get("tuning.name", str), job.get("strategy.name", str) or ""
    if tuning not in ("lora", "qlora"):
        return
    yield from _extra(job, f"tuning={tuning}", "lora", "peft")
    if tuning == "qlora":
        yield from _extra(job, "tuning=qlora", "quant", "bitsandbytes")
    trainable = job.get("stage.trainable", list) or ["language_model"]
    if "language_model" not in trainable:
        yield (
            f"tuning={tuning} adapts the language model, which stage={job.get('stage.name')} "
            "leaves frozen; use tuning=full"
        )
    if "vision_tower" in trainable:
        yield (
            f"stage.trainable names vision_tower, and tuning={tuning} trains adapters and the "
            "projector only; use tuning=full, or leave the tower out"
        )
    if tuning == "qlora" and (strategy.startswith("zero3") or strategy == "fsdp2"):
        yield (
            f"tuning=qlora does not work with strategy={strategy}: weights in 4 bits cannot be "
            "sharded here; use strategy=ddp or auto, or tuning=lora"
        )


def _compile(job: JobValues) -> Iterator[str]:
    if not job.get("machine.compile", bool):
        return
    batching, strategy = job.get("data.batching", str), job.get("strategy.name", str) or ""
    if batching != "packed":
        yield (
            f"machine.compile=true with data.batching={batching}: every other length of the rows "
            "would be compiled anew; pass data=packed, whose rows have one length"
        )
    if strategy.startswith("zero3"):
        yield (
            f"machine.compile=true does not work with strategy={strategy}, which gathers weights "
            "inside of what would be compiled; use strategy=zero2, fsdp2 or ddp"
        )
    if job.get("tuning.name", str) == "qlora":
        yield (
            "machine.compile=true does not work with tuning=qlora, whose weights in few bits "
            "torch.compile cannot follow; use tuning=lora"
        )


def _loggers(job: JobValues) -> Iterator[str]:
    loggers = job.get("logger", dict) or {}
    for name in ("tensorboard", "wandb"):
        if loggers.get(name):
            yield from _extra(job, f"logger={name}", name, name)
    if not (job.get("logger.wandb", dict) and "wandb" in job.machine.installed):
        return
    if job.get("logger.wandb.log_model") not in (None, False):
        yield (
            "logger.wandb.log_model: checkpoints are not uploaded during a run; do it afterwards "
            "with `wandb artifact put --type model RUN_DIR/export`"
        )
    # W&B asks for a key when a run starts, which is late, and a batch job cannot answer.
    mode = job.get("logger.wandb.mode", str) or os.environ.get("WANDB_MODE", "")
    offline = mode.lower() in ("offline", "disabled", "dryrun")
    if offline or job.get("logger.wandb.offline") is True or not is_first_process():
        return  # the first process alone logs
    otherwise = "or set WANDB_MODE=offline and upload later with `wandb sync`"
    key = os.environ.get("WANDB_API_KEY")
    if not has_wandb_key():
        yield (
            f"logger=wandb has no key for {_wandb_hosts()[0]}: run `wandb login`, set "
            f"WANDB_API_KEY, {otherwise}"
        )
    elif key and not _WANDB_KEY.fullmatch(key):
        yield (
            f"WANDB_API_KEY has {len(key)} characters and is no key of W&B, which has 40 or more "
            f"of A-Z, 0-9, _: copy it from https://wandb.ai/authorize, {otherwise}"
        )


def has_wandb_key() -> bool:
    """Return whether W&B would find a key, in the environment or in the user's netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named = os.environ.get("NETRC")
    for file in [named] if named else ["~/.netrc", "~/_netrc"]:
        # RuntimeError: there is no home.
        with suppress(OSError, RuntimeError, netrc.NetrcParseError):
            if any(map(netrc.netrc(Path(file).expanduser()).authenticators, _wandb_hosts())):
                return True
    return False


def _wandb_hosts() -> tuple[str, ...]:
    """Return the names under which W&B keeps the key of its server, by the client's version."""
    if (url := os.environ.get("WANDB_BASE_URL")) is None:
        return "api.wandb.ai", "api.forge.coreweave.com"
    parts = urlsplit(url)
    return parts.hostname or url, parts.netloc


def _validation(job: JobValues) -> Iterator[str]:
    interval = job.get("trainer.val_check_interval")
    if interval is not None and job.number("trainer.val_check_interval") is None:
        yield (
            f"trainer.val_check_interval={spell(interval)}: validation is counted in optimizer "
            "steps here, not in parts of an epoch: pass validation.every_n_steps=N instead"
        )


def _home(job: JobValues) -> Iterator[str]:
    if find_home() is None:  # libraries would keep what they fetch in a folder that is called ``~``
        yield f"this user has no home folder, neither by HOME nor by the system: {HOME_REMEDY}"


def _callbacks(job: JobValues) -> Iterator[str]:
    for name in ("throughput.every_n_steps", "samples.every_n_steps", "samples.num_samples"):
        key = f"callbacks.{name}"
        value = job.get(key)
        if value is not None and job.number(key) is None:
            yield f"{key}={spell(value)}: expected a whole number of at least 1"


def _device(job: JobValues) -> Iterator[str]:
    device = job.get("device", str)
    if device is None:
        return
    kind, _, index = device.partition(":")
    there = {
        "auto": not index,
        "cpu": not index,
        "mps": not index and job.machine.mps,
        "cuda": (index or "0").isdecimal() and int(index or 0) < len(job.machine.cuda),
    }
    if kind not in there:
        yield f"device={device}: expected auto, cpu, cuda, cuda:N or mps"
    elif not there[kind]:
        yield f"device={device}: this machine has {job.machine.describe()}; use device=auto"


def _extra(job: JobValues, what: str, extra: str, package: str) -> Iterator[str]:
    if package not in job.machine.installed:
        install = f'pip install "vipllava-lightning[{extra}]"'
        yield f"{what} needs {package}, which is not installed: {install}"


_Check = Callable[[JobValues], Iterable[str]]
_TRAIN_CHECKS: tuple[_Check, ...] = (
    _manifest, _data_root, _checkpoint, _global_batch, _devices, check_launch, _precision,
    _strategy, _attention, _tuning, _compile, _validation, _loggers, _callbacks, _home,
)  # fmt: skip
_EVALUATE_CHECKS: tuple[_Check, ...] = (
    _manifest, _data_root, _checkpoint, check_single_process, _device, _attention, _home,
)  # fmt: skip
