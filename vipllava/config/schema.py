"""Which keys a configuration has and which values they take.

Hydra refuses unknown keys on the command line, but merges whatever a YAML file holds: a misspelt
key there would silently do nothing. OmegaConf's structured configs stop at the first mistake, have
no bounds and no choices, and turn "3" into 3.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, get_args

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from vipllava.config.argument_names import with_keys
from vipllava.config.attention import KERNELS, TORCH_VARLEN
from vipllava.config.hardware import Hardware
from vipllava.types import ConfigError, Shape, first_line

PARTS: Final = ("vision_tower", "projector", "language_model")
AUTO: Final = "auto"
SHARDING_STRATEGIES: Final = ("zero2", "zero3", "zero3_offload")
STRATEGIES: Final = ("single", "ddp", "fsdp2", *SHARDING_STRATEGIES)
_WHILE_RESOLVING: Final = " raised while resolving interpolation: "


@dataclass(frozen=True, slots=True)
class Rule:
    """What one value has to be."""

    expected: str  # the rule in words, for the message
    accepts: Callable[[Any], bool]  # whether a value, as plain Python, follows it
    optional: bool = False  # whether the key may be absent


@dataclass(frozen=True, slots=True)
class Section:
    """What the keys of one section have to be; those of a key that is a section itself, too."""

    keys: Mapping[str, Rule | Section]
    is_open: bool = False  # whether it has more, checked elsewhere: constructor arguments


def _whole(low: int, high: float = math.inf) -> Rule:
    bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
    # `type`: true is an int for `isinstance`.
    return Rule(f"a whole number {bounds}", lambda v: type(v) is int and low <= v <= high)


def _number(bounds: str, fits: Callable[[float], bool]) -> Rule:
    return Rule(
        f"a number {bounds}",
        lambda v: type(v) in (int, float) and math.isfinite(v) and fits(v),
    )


def _one_of(*choices: Any) -> Rule:
    spelled = ", ".join(spell(choice) for choice in choices)
    # true equals 1 and 1.0 in Python; here they differ.
    return Rule(f"one of {spelled}", lambda v: any(v == c and type(v) is type(c) for c in choices))


def _null_or(rule: Rule) -> Rule:
    return replace(rule, accepts=lambda v: v is None or rule.accepts(v))


def _optional(rule: Rule) -> Rule:
    return replace(rule, optional=True)


def _section(rules: Mapping[Rule, str], *, is_open: bool = False, **sections: Section) -> Section:
    """Return a section from the keys of each rule, separated by spaces."""
    keys: dict[str, Rule | Section] = {k: r for r, names in rules.items() for k in names.split()}
    return Section(keys | sections, is_open)


def spell(value: Any) -> str:
    """Write a value as YAML would: ``null``, ``true``, texts bare."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


_ANY = Rule("anything", lambda v: v is not None)
"""Of a value that is checked elsewhere: constructor arguments, users' own names."""
_ANY_OR_NONE = _optional(_null_or(_ANY))
_TEXT = Rule("a text", lambda v: isinstance(v, str) and v != "")
_TEXT_OR_NULL = _null_or(_TEXT)
_FLAG = Rule("true or false", lambda v: isinstance(v, bool))
_COUNT = _whole(1)
_COUNT_OR_NULL = _null_or(_COUNT)
_INDEX = _whole(0)
_POSITIVE = _number("above 0", lambda v: v > 0)
_POSITIVE_OR_NULL = _null_or(_POSITIVE)
_NOT_NEGATIVE = _number("of at least 0", lambda v: v >= 0)
_SHARE = _number("above 0 and up to 1", lambda v: 0 < v <= 1)
_FROM_0_TO_1 = _number("from 0 to 1", lambda v: 0 <= v <= 1)
_BELOW_ONE = _number("from 0 to below 1", lambda v: 0 <= v < 1)
_BETAS = Rule(
    f"a list of 2 items, each {_BELOW_ONE.expected}",
    lambda v: isinstance(v, list) and len(v) == 2 and all(map(_BELOW_ONE.accepts, v)),
)
_PARTS = Rule(
    f"a list of at least one of {', '.join(PARTS)}",
    lambda v: isinstance(v, list) and v != [] and all(part in PARTS for part in v),
)
_HOW_MANY_SAMPLES = Rule(
    "true, false or how many samples", lambda v: _FLAG.accepts(v) or _INDEX.accepts(v)
)
_HOW_MANY_BLOCKS = Rule(
    "auto, true, false or how many decoder blocks",
    lambda v: v == AUTO or _FLAG.accepts(v) or _INDEX.accepts(v),
)
_PATIENCE = Rule(
    "minutes above 0, at most 25 (other ranks wait for half an hour)",
    lambda v: _POSITIVE.accepts(v) and v <= 25,
)
_CHAT_TEMPLATE = _one_of("plain", "llava_v1", "llama_3", "phi_3", "llava_v0", "chatml")
# No bf16-true: without float32 copies updates at a rate of 2e-5 would be rounded away.
_PRECISION = _one_of("32-true", "bf16-mixed", "16-mixed")
_DTYPES = ("float32", "bfloat16", "float16")
_ATTENTIONS = ("sdpa", "eager", "flex_attention", *(kernel.name for kernel in KERNELS))
# Generating works with padding and a cache, which PyTorch's kernel for packed rows has not.
_ATTENTIONS_OF_ANSWERS = tuple(name for name in _ATTENTIONS if name != TORCH_VARLEN)
_PATHS = _section({_TEXT: "runs data_root manifests cache"})
_VISUAL_PROMPTS = _section({_ANY: "ranges policies"})

TRAIN: Final = _section({
    _TEXT: "name run_dir resume objective",
    _TEXT_OR_NULL: "replay",
    _INDEX: "seed",
    _FLAG: "resume_anyway preflight",
    _HOW_MANY_SAMPLES: "inspect",
    _ANY: "lint module callbacks logger",
}, paths=_PATHS, visual_prompts=_VISUAL_PROMPTS,
    guard=_section({
        _one_of("stop", "skip"): "on_nonfinite",
        _one_of("stop", "skip", "ignore"): "on_spike",
        _number("above 1", lambda v: v > 1): "spike_factor",
        _NOT_NEGATIVE: "spike_floor",
        _whole(20): "window",
        _INDEX: "max_skipped",
    }, is_open=True),
    stage=_section({
        _TEXT: "name",
        _TEXT_OR_NULL: "checkpoint",
        _PARTS: "trainable",
        _CHAT_TEMPLATE: "chat_template",
        _one_of("square", "pad", "resize"): "image_aspect",
        _one_of("cut", "drop_turns", "error"): "too_long",
        _POSITIVE: "learning_rate eps",
        _POSITIVE_OR_NULL: "projector_learning_rate vision_tower_learning_rate gradient_clip",
        _COUNT: "global_batch_size epochs max_length mean_length longest_length pack_length "
        "checkpoint_steps",
        _SHARE: "supervised_share",
        _one_of("cosine", "constant"): "schedule",
        _BELOW_ONE: "warmup_ratio",
        _NOT_NEGATIVE: "weight_decay",
        _BETAS: "betas",
        _HOW_MANY_BLOCKS: "gradient_checkpointing",
    }),
    machine=_section({
        _TEXT: "name",
        _TEXT_OR_NULL: "device",
        _one_of("projector", "full", "lora", "qlora"): "workload",
        _COUNT: "micro_batch_size",
        _INDEX: "num_workers",
        _one_of(*_DTYPES): "weights_dtype",
        _SHARE: "mfu",
        _POSITIVE_OR_NULL: "memory_gb capability",
        _FLAG: "tf32 compile",
        _one_of(*_ATTENTIONS): "attn_implementation",
        _ANY: "micro_batch_sizes strategies",
    }),
    model=_section({
        _TEXT: "name final_checkpoint",
        _CHAT_TEMPLATE: "chat_template",
        _ANY: "manifests spec",
        _optional(_COUNT): "micro_batch_size",
        _optional(_one_of("ddp", *SHARDING_STRATEGIES)): "strategy",
        _ANY_OR_NONE: "max_micro_batch_sizes min_strategies stage_overrides",
    }),
    tuning=_section({
        _one_of("full", "lora", "qlora"): "name",
        _ANY_OR_NONE: "adapter quantization stage_overrides",
    }),
    trainer=_section({
        _one_of(AUTO, "cpu", "cuda", "mps"): "accelerator",
        _COUNT: "devices num_nodes accumulate_grad_batches",
        _PRECISION: "precision",
    }, is_open=True),
    strategy=_section({
        _one_of(*STRATEGIES): "name", _ANY: "lightning", _ANY_OR_NONE: "candidates",
    }),
    validation=_section({
        _TEXT_OR_NULL: "manifest",
        _COUNT: "every_n_steps",
        _COUNT_OR_NULL: "max_samples patience",
    }),
    data=_section({
        _TEXT_OR_NULL: "manifest",
        _ANY_OR_NONE: "mix",
        _one_of("shuffled", "length_grouped", "packed"): "batching",
        _COUNT: "micro_batch_size global_batch_size window_samples",
        _optional(_COUNT): "pack_length max_images_per_pack",
        _one_of("error", "quarantine"): "on_fault",
        _FROM_0_TO_1: "max_fault_rate",
        _POSITIVE: "cache_gb",
        _PATIENCE: "storage_patience_minutes",
        _INDEX: "num_workers",
    }, is_open=True),
    profiler=_section({_ANY_OR_NONE: "trace"}),
)  # fmt: skip
"""Keys of ``conf/train.yaml``."""

_ENDPOINT: Final[dict[Rule, str]] = {
    _TEXT_OR_NULL: "base_url model api_key_env revision",
    _null_or(_NOT_NEGATIVE): "temperature",
    _null_or(_SHARE): "top_p",
    _null_or(_INDEX): "seed",
    _one_of("max_tokens", "max_completion_tokens"): "limit_name",
    Rule("a section of fields", lambda v: isinstance(v, dict)): "extra_body",
    _INDEX: "max_retries",
    _POSITIVE: "timeout_s total_s",
}
"""Keys of ``conf/endpoint``, but for ``concurrency``."""

EVALUATE: Final = _section({
    _TEXT: "name run_dir checkpoint device",
    _one_of("engine", "endpoint"): "answerer",
    _TEXT_OR_NULL: "base vision_tower",
    _null_or(_CHAT_TEMPLATE): "chat_template",
    _INDEX: "seed",
    _COUNT: "batch_size max_new_tokens",
    _COUNT_OR_NULL: "limit num_processes",
    _ANY: "marks",
    _one_of("overlay", "coordinates", "set_of_mark", "crop"): "encoding",
    _null_or(_one_of(4, 8)): "bits",
    _one_of(AUTO, *_DTYPES): "dtype",
    _one_of(*_ATTENTIONS_OF_ANSWERS): "attn_implementation",
}, paths=_PATHS, visual_prompts=_VISUAL_PROMPTS,
    coordinates=_section({
        _one_of("pixels", "unit", "thousand"): "scale",
        _one_of("box", "point"): "form",
        _TEXT_OR_NULL: "words",
    }),
    perturb=_section({
        _null_or(_one_of(*get_args(Shape))): "shape",
        _TEXT_OR_NULL: "colour",
        _COUNT_OR_NULL: "width",
        _null_or(_whole(1, 255)): "alpha",
        _null_or(_FROM_0_TO_1): "jitter",
        _null_or(_whole(1, 100)): "jpeg_quality",
    }),
    bench=_section({_TEXT: "name manifest", _COUNT: "max_new_tokens"}, is_open=True),
    endpoint=_section({**_ENDPOINT, _COUNT: "concurrency", _FLAG: "check_images"}),
    judge=_section({
        **_ENDPOINT,
        _null_or(_TEXT): "prompt cache",
        _COUNT: "concurrency runs max_asks max_tokens",
    }),
)  # fmt: skip
"""Keys of ``conf/evaluate.yaml``."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the nearest of ``known``, or None; transposed letters are nearer than other ones."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return max(near, key=lambda found: sorted(found) == sorted(name), default=None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean X?)`` for the nearest of ``known``, or nothing."""
    found = nearest(name, known)
    return f" (did you mean {found}?)" if found else ""


def check_schema(cfg: DictConfig, section: Section, path: str = "") -> list[str]:
    """Return every unknown or missing key, unreadable interpolation and impossible value.

    ``section`` is what the job ``cfg`` has to be, or the section at ``path`` in it.
    """
    known = ", ".join(section.keys)
    node = OmegaConf.select(cfg, path) if path else cfg
    if not isinstance(node, DictConfig):
        return [f"{path} is missing or no section; it has {known}"]
    prefix = f"{path}." if path else ""
    problems: list[str] = []
    for key in () if section.is_open else [key for key in node if key not in section.keys]:
        hint, child = did_you_mean(str(key), section.keys), node.get(key)
        if not path and isinstance(child, DictConfig) and set(child) <= set(section.keys):
            # A file of a group sets keys below the group's name, where it does not say otherwise.
            hint = f" (a file of the group `{key}` begins with the line: # @package _global_)"
        has = f"{path or 'the configuration'} has {known}"
        problems.append(f"{prefix}{key}: no such key{hint}; {has}")
    for key, rule in section.keys.items():
        where = f"{prefix}{key}"
        if isinstance(rule, Section):
            problems += check_schema(cfg, rule, where)
        elif key in node:
            try:
                if not rule.accepts(value := read(cfg, where)):
                    problems.append(f"{where}={spell(value)}: {_expected(rule, where, value)}")
            except ConfigError as error:
                problems.append(str(error))
        elif not rule.optional:
            problems.append(f"{where} is missing; expected {rule.expected}")
    return problems


def _expected(rule: Rule, where: str, value: Any) -> str:
    """Say what a value has to be; a text may look like a number, and YAML takes it for one."""
    if isinstance(value, (bool, int, float)) and rule.accepts(text := spell(value)):
        return f"expected {rule.expected}, in quotes: '{where}=\"{text}\"'"
    return f"expected {rule.expected}"


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
        value = parent[key]
        if isinstance(value, (DictConfig, ListConfig)):
            return OmegaConf.to_container(value, resolve=True)
        return value
    except InterpolationToMissingValueError:
        raise ConfigError(f"{path} is not set; pass {path}=VALUE") from None
    except OmegaConfBaseException as error:
        kind, _, message = first_line(error).partition(_WHILE_RESOLVING)
        raise ConfigError(
            with_keys(message, cfg) if kind == "ConfigError" else f"{path}: {first_line(error)}"
        ) from None


class JobValues:
    """A composed job, for checks that go on where some of its values cannot be read.

    :func:`check_schema` has reported those already.
    """

    def __init__(self, cfg: DictConfig, machine: Hardware) -> None:
        self.cfg = cfg
        self.machine = machine
        self.is_evaluation = "bench" in cfg

    def get(self, path: str, kind: type | tuple[type, ...] = object) -> Any:
        """Return the value at ``path`` if it can be read and is of ``kind``, else None."""
        try:
            value = read(self.cfg, path)
        except (ConfigError, KeyError, TypeError, AttributeError):
            return None
        return value if isinstance(value, kind) else None

    def number(self, path: str) -> int | None:
        """Return the whole number of at least 1 at ``path``, else None."""
        value = self.get(path)
        return value if _COUNT.accepts(value) else None
