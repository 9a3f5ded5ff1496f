"""Which keys a configuration has and which values they take.

Hydra refuses unknown keys on the command line, but merges whatever a YAML file holds: a misspelt
key in an experiment file would silently do nothing. This table catches those, and values that no
library would question before hours of training.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from vipllava.config.attention import KERNELS, TORCH_VARLEN
from vipllava.types import ConfigError, first_line

CHAT_TEMPLATES = ("plain", "llava_v1", "llama_3", "phi_3", "llava_v0", "chatml")
IMAGE_ASPECTS = ("square", "pad", "resize")
PARTS = ("vision_tower", "projector", "language_model")
AUTO = "auto"
# No bf16-true: without float32 copies updates at a rate of 2e-5 would be rounded away.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
ATTENTIONS = ("sdpa", "eager", "flex_attention", *(kernel.name for kernel in KERNELS))
_ATTENTIONS_OF_ANSWERS = tuple(name for name in ATTENTIONS if name != TORCH_VARLEN)
"""Generating works with padding and a cache, which PyTorch's kernel for packed rows has not."""
_WHILE_RESOLVING = " raised while resolving interpolation: "


@dataclass(frozen=True, slots=True)
class Rule:
    """What one value has to be.

    Attributes:
        expected: the rule in words, for the message.
        types: accepted Python types; true and false never pass as numbers.
        low: least number, or least length of a list.
        above: number that the value has to exceed.
        high: greatest number.
        below: number that the value has to stay under.
        choices: the allowed values.
        nullable: whether null is allowed.
        optional: whether the key may be absent.
        length: exact length of a list.
        each: rule of a list's items.
        words: the allowed texts, where numbers are allowed, too.
    """

    expected: str
    types: tuple[type, ...] = ()
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    nullable: bool = False
    optional: bool = False
    length: int | None = None
    each: Rule | None = None
    words: tuple[str, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Return whether ``value`` follows the rule."""
        if value is None:
            return self.nullable
        if self.choices:
            # true equals 1 and 1.0 in Python; here they differ.
            return any(value == c and type(value) is type(c) for c in self.choices)
        if self.types and not isinstance(value, self.types):
            return False
        if isinstance(value, bool) and bool not in self.types:
            return False
        if isinstance(value, str):
            return value in self.words if self.words else bool(value)
        if isinstance(value, (int, float)):
            # Not-a-number fails every comparison, so ask for what is right, not for what is wrong.
            return (
                (self.low is None or value >= self.low)
                and (self.above is None or value > self.above)
                and (self.high is None or value <= self.high)
                and (self.below is None or value < self.below)
                and abs(value) != float("inf")
                and value == value
            )
        if isinstance(value, (list, tuple)):
            long_enough = len(value) >= (self.low or 0)
            right_length = long_enough and self.length in (None, len(value))
            return right_length and (self.each is None or all(map(self.each.accepts, value)))
        return True


def _text(**options: Any) -> Rule:
    return Rule("a text", (str,), **options)


def _flag(**options: Any) -> Rule:
    return Rule("true or false", (bool,), **options)


def _whole(low: int, **options: Any) -> Rule:
    return Rule(f"a whole number of at least {low}", (int,), low=low, **options)


def _positive(**options: Any) -> Rule:
    return Rule("a number above 0", (int, float), above=0, **options)


def _one_of(*choices: Any, **options: Any) -> Rule:
    spelled = ", ".join(str(c).lower() if isinstance(c, bool) else str(c) for c in choices)
    return Rule(f"one of {spelled}", choices=choices, **options)


def _list(each: Rule, length: int | None = None, **options: Any) -> Rule:
    count = "" if length is None else f"{length} "
    return Rule(
        f"a list of {count}items, each {each.expected}",
        (list,),
        length=length,
        each=each,
        **options,
    )


_OPEN = Rule("anything")
"""A section whose keys are checked elsewhere: constructor arguments, users' own names."""
_OPEN_OPTIONAL = Rule("anything", optional=True, nullable=True)

TRAIN: Mapping[str, Rule] = {
    "name": _text(),
    "run_dir": _text(),
    "resume": _text(),
    "resume_anyway": _flag(),
    "seed": _whole(0),
    "objective": _text(),
    "inspect": Rule("true, false or how many samples", (bool, int), low=0),
    "preflight": _flag(),
    "replay": _text(nullable=True),
    "guard": _OPEN,
    "guard.on_nonfinite": _one_of("stop", "skip"),
    "guard.on_spike": _one_of("stop", "skip", "ignore"),
    "guard.spike_factor": Rule("a number above 1", (int, float), above=1),
    "guard.window": _whole(20),
    "guard.max_skipped": _whole(0),
    "guard.spike_floor": Rule("a number of at least 0", (int, float), low=0),
    "lint": _OPEN,
    "paths.runs": _text(),
    "paths.data_root": _text(),
    "paths.manifests": _text(),
    "paths.cache": _text(),
    "stage.name": _text(),
    "stage.checkpoint": _text(nullable=True),
    "stage.trainable": Rule(
        f"a list of at least one of {', '.join(PARTS)}", (list,), low=1, each=_one_of(*PARTS)
    ),
    "stage.chat_template": _one_of(*CHAT_TEMPLATES),
    "stage.image_aspect": _one_of(*IMAGE_ASPECTS),
    "stage.learning_rate": _positive(),
    "stage.projector_learning_rate": _positive(nullable=True),
    "stage.vision_tower_learning_rate": _positive(nullable=True),
    "stage.global_batch_size": _whole(1),
    "stage.epochs": _whole(1),
    "stage.max_length": _whole(1),
    "stage.mean_length": _whole(1),
    "stage.longest_length": _whole(1),
    "stage.supervised_share": Rule("a number above 0 and up to 1", (int, float), above=0, high=1),
    "stage.pack_length": _whole(1),
    "stage.schedule": _one_of("cosine", "constant"),
    "stage.warmup_ratio": Rule("a number from 0 to below 1", (int, float), low=0, below=1),
    "stage.weight_decay": Rule("a number of at least 0", (int, float), low=0),
    "stage.betas": _list(Rule("a number from 0 to below 1", (int, float), low=0, below=1), 2),
    "stage.eps": _positive(),
    "stage.gradient_clip": _positive(nullable=True),
    "stage.gradient_checkpointing": Rule(
        "auto, true, false or how many decoder blocks", (bool, int, str), low=0, words=(AUTO,)
    ),
    "stage.checkpoint_steps": _whole(1),
    "machine.name": _text(),
    "machine.workload": _one_of("projector", "full", "lora", "qlora"),
    "machine.micro_batch_size": _whole(1),
    "machine.weights_dtype": _one_of("float32", "bfloat16", "float16"),
    "machine.device": _text(nullable=True),
    "machine.mfu": Rule("a number above 0 and up to 1", (int, float), above=0, high=1),
    "machine.memory_gb": _positive(nullable=True),
    "machine.capability": _positive(nullable=True),
    "machine.tf32": _flag(),
    "machine.compile": _flag(),
    "machine.attn_implementation": _one_of(*ATTENTIONS),
    "machine.num_workers": _whole(0),
    "machine.micro_batch_sizes": _OPEN,
    "machine.strategies": _OPEN,
    "model.name": _text(),
    "model.chat_template": _one_of(*CHAT_TEMPLATES),
    "model.final_checkpoint": _text(),
    "model.manifests": _OPEN,
    "model.micro_batch_size": _whole(1, optional=True),
    "model.strategy": _one_of("ddp", "zero2", "zero3", "zero3_offload", optional=True),
    "model.max_micro_batch_sizes": _OPEN_OPTIONAL,
    "model.min_strategies": _OPEN_OPTIONAL,
    "model.stage_overrides": _OPEN_OPTIONAL,
    "model.spec": _OPEN,
    "tuning.name": _one_of("full", "lora", "qlora"),
    "tuning.adapter": _OPEN_OPTIONAL,
    "tuning.quantization": _OPEN_OPTIONAL,
    "tuning.stage_overrides": _OPEN_OPTIONAL,
    "trainer": _OPEN,
    "trainer.accelerator": _one_of("auto", "cpu", "cuda", "mps"),
    "trainer.devices": _whole(1),
    "trainer.num_nodes": _whole(1),
    "trainer.precision": _one_of(*PRECISIONS),
    "trainer.accumulate_grad_batches": _whole(1),
    "strategy.name": _one_of("single", "ddp", "fsdp2", "zero2", "zero3", "zero3_offload"),
    "strategy.lightning": _OPEN,
    "strategy.candidates": _OPEN_OPTIONAL,
    "visual_prompts.ranges": _OPEN,
    "visual_prompts.policies": _OPEN,
    "validation.manifest": _text(nullable=True),
    "validation.every_n_steps": _whole(1),
    "validation.max_samples": _whole(1, nullable=True),
    "validation.patience": _whole(1, nullable=True),
    "data": _OPEN,
    "data.manifest": _text(nullable=True),
    "data.mix": _OPEN_OPTIONAL,
    "data.batching": _one_of("shuffled", "length_grouped", "packed"),
    "data.micro_batch_size": _whole(1),
    "data.global_batch_size": _whole(1),
    "data.window_samples": _whole(1),
    "data.pack_length": _whole(1, optional=True),
    "data.max_images_per_pack": _whole(1, optional=True),
    "data.on_fault": _one_of("error", "quarantine"),
    "data.max_fault_rate": Rule("a number from 0 to 1", (int, float), low=0, high=1),
    "data.cache_gb": _positive(),
    "data.storage_patience_minutes": Rule(
        "minutes above 0, at most 25 (other ranks wait for half an hour)",
        (int, float),
        above=0,
        high=25,
    ),
    "data.num_workers": _whole(0),
    "module": _OPEN,
    "callbacks": _OPEN,
    "logger": _OPEN,
    "profiler.trace": _OPEN_OPTIONAL,
}
"""Keys of ``conf/train.yaml``. A key without entries below it is not looked into."""

EVALUATE: Mapping[str, Rule] = {
    "name": _text(),
    "run_dir": _text(),
    "seed": _whole(0),
    "paths.runs": _text(),
    "paths.data_root": _text(),
    "paths.manifests": _text(),
    "paths.cache": _text(),
    "checkpoint": _text(),
    "base": _text(nullable=True),
    "vision_tower": _text(nullable=True),
    "chat_template": _one_of(*CHAT_TEMPLATES, nullable=True),
    "bits": _one_of(4, 8, nullable=True),
    "device": _text(),
    "dtype": _one_of("auto", "float32", "bfloat16", "float16"),
    "attn_implementation": _one_of(*_ATTENTIONS_OF_ANSWERS),
    "batch_size": _whole(1),
    "max_new_tokens": _whole(1),
    "limit": _whole(1, nullable=True),
    "bench": _OPEN,
    "bench.name": _text(),
    "bench.manifest": _text(),
    "bench.max_new_tokens": _whole(1),
    "visual_prompts.ranges": _OPEN,
    "visual_prompts.policies": _OPEN,
}
"""Keys of ``conf/evaluate.yaml``."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean X?)`` for the nearest of ``known``, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def check_schema(cfg: DictConfig, rules: Mapping[str, Rule]) -> list[str]:
    """Return every unknown or missing key, unreadable interpolation and impossible value."""
    problems = _unknown_keys(cfg, rules)
    for path, rule in rules.items():
        if path in _opened(rules):
            continue
        section, _, key = path.rpartition(".")
        parent = OmegaConf.select(cfg, section) if section else cfg
        if not isinstance(parent, DictConfig) or key not in parent:
            if not rule.optional:
                problems.append(f"{path} is missing; expected {rule.expected}")
            continue
        try:
            value = read(cfg, path)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if not rule.accepts(value):
            problems.append(f"{path}={spell(value)}: expected {rule.expected}")
    return problems


def read(cfg: DictConfig, path: str) -> Any:
    """Return the resolved value at ``path`` as plain Python.

    Raises:
        ConfigError: the value is missing, or what it is computed from does not work out.
    """
    section, _, key = path.rpartition(".")
    try:
        parent = OmegaConf.select(cfg, section) if section else cfg
        if not isinstance(parent, DictConfig) or key not in parent:
            raise ConfigError(f"{path} is missing")
        if OmegaConf.is_missing(parent, key):
            raise ConfigError(f"{path} is not set; pass {path}=VALUE")
        value = parent[key]
        if isinstance(value, (DictConfig, ListConfig)):
            return OmegaConf.to_container(value, resolve=True)
        return value
    except InterpolationToMissingValueError:
        raise ConfigError(f"{path} is not set; pass {path}=VALUE") from None
    except OmegaConfBaseException as error:
        # A resolver's own complaint names keys and values already.
        kind, _, message = first_line(error).partition(_WHILE_RESOLVING)
        raise ConfigError(
            message if kind == "ConfigError" else f"{path}: {first_line(error)}"
        ) from None


def spell(value: Any) -> str:
    """Write a value as YAML would: ``null``, ``true``, texts bare."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _opened(rules: Mapping[str, Rule]) -> set[str]:
    return {path for path, rule in rules.items() if rule is _OPEN and _has_children(path, rules)}


def _has_children(path: str, rules: Mapping[str, Rule]) -> bool:
    return any(other.startswith(f"{path}.") for other in rules)


def _unknown_keys(cfg: DictConfig, rules: Mapping[str, Rule]) -> list[str]:
    problems: list[str] = []
    sections: dict[str, list[str]] = {"": sorted({path.split(".")[0] for path in rules})}
    for path in rules:
        section, _, key = path.rpartition(".")
        if section and section not in rules:
            sections.setdefault(section, []).append(key)
    for section, known in sections.items():
        node = OmegaConf.select(cfg, section) if section else cfg
        if not isinstance(node, DictConfig):
            problems.append(f"{section} is missing or no section; it has {_listed(known)}")
            continue
        for key in node:
            if key not in known:
                where = f"{section}.{key}" if section else str(key)
                problems.append(
                    f"{where}: no such key{did_you_mean(str(key), known)}; "
                    f"{section or 'the configuration'} has {_listed(known)}"
                )
    return problems


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
