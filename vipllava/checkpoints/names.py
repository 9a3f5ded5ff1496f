"""Weight names of every format, mapped to those of the Hugging Face format and back.

The Hugging Face format here means the files of ``llava-hf``: ``vision_tower.vision_model.X``,
``multi_modal_projector.X``, ``language_model.model.X``, ``language_model.lm_head.weight``; newer
releases of transformers write ``vision_tower.X`` and read both. Every rule is anchored at the
start of a name. A name that no rule takes is an error: nothing is dropped silently but what a list
says is no weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from vipllava.types import CheckpointError

_Value = TypeVar("_Value")
Rules = tuple[tuple[str, str], ...]
"""Pairs of an anchored pattern and what it becomes; the first that matches counts."""

_TOWER: Final = "vision_tower.vision_model."
_NO_WEIGHTS: Final = re.compile(
    # Buffers that older releases stored; they follow from the config.
    r".*\.rotary_emb\.inv_freq|.*\.embeddings\.position_ids|position_ids"
)

HF_TO_HF: Final[Rules] = (
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)", _TOWER + r"\1"),
    (r"(?:model\.)?multi_modal_projector\.(.+)", r"multi_modal_projector.\1"),
    (r"language_model\.(model\..+|lm_head\..+)", r"language_model.\1"),
    # As they are called in memory from transformers 4.52 on.
    (r"model\.language_model\.(.+)", r"language_model.model.\1"),
    (r"lm_head\.(.+)", r"language_model.lm_head.\1"),
)

LLAVA_TO_HF: Final[Rules] = (
    (r"model\.vision_tower\.vision_tower\.vision_model\.(.+)", _TOWER + r"\1"),
    (
        r"model\.mm_projector\.clip_layernorm\.(weight|bias)",
        r"multi_modal_projector.projector_layernorm.\1",
    ),
    (r"model\.mm_projector\.final_linear\.0\.(weight|bias)", r"multi_modal_projector.linear_1.\1"),
    (r"model\.mm_projector\.final_linear\.2\.(weight|bias)", r"multi_modal_projector.linear_2.\1"),
    (r"model\.((?:embed_tokens|layers\.\d+|norm)\..+)", r"language_model.model.\1"),
    (r"lm_head\.weight", r"language_model.lm_head.weight"),
)

HF_TO_LLAVA: Final[Rules] = (
    (
        r"vision_tower\.vision_model\.(.+)",
        r"model.vision_tower.vision_tower.vision_model.\1",
    ),
    (
        r"multi_modal_projector\.projector_layernorm\.(weight|bias)",
        r"model.mm_projector.clip_layernorm.\1",
    ),
    (r"multi_modal_projector\.linear_1\.(weight|bias)", r"model.mm_projector.final_linear.0.\1"),
    (r"multi_modal_projector\.linear_2\.(weight|bias)", r"model.mm_projector.final_linear.2.\1"),
    (r"language_model\.model\.(.+)", r"model.\1"),
    (r"language_model\.lm_head\.(.+)", r"lm_head.\1"),
)

TEXT_TO_HF: Final[Rules] = (
    (r"model\.(.+)", r"language_model.model.\1"),
    (r"lm_head\.(.+)", r"language_model.lm_head.\1"),
)

# transformers 5.23 saves a tower alone without the prefix.
TOWER_TO_HF: Final[Rules] = ((r"(?:vision_model\.)?(.+)", _TOWER + r"\1"),)
_OTHER_HALF: Final = re.compile(
    r"text_model\..+|(?:visual|text)_projection\..+|logit_(?:scale|bias)"
)
_PREFIXES: Final = re.compile(r"(?:base_model\.)?(?:model\.(?=model\.|lm_head\.))*")
"""What LoRA runs of the original code put in front of names, in all the ways seen."""


def rename(
    tensors: Mapping[str, _Value],
    rules: Rules,
    source: str,
    *,
    ignored: Callable[[str], object] = lambda name: None,
) -> dict[str, _Value]:
    """Rename every tensor by the first rule that takes its whole name.

    Args:
        tensors: by their names in the source.
        rules: see :data:`Rules`.
        source: where they come from, for messages.
        ignored: whether a name is known to be of no use here.

    Raises:
        CheckpointError: names that no rule takes, or two that become one; all are listed.
    """
    renamed: dict[str, _Value] = {}
    origin: dict[str, str] = {}
    unknown: list[str] = []
    twice: list[str] = []
    for name, value in tensors.items():
        if _NO_WEIGHTS.fullmatch(name) or ignored(name):
            continue
        new = map_name(name, rules)
        if new is None:
            unknown.append(name)
        elif new in renamed:
            twice.append(f"{origin[new]} and {name}")
        else:
            renamed[new], origin[new] = value, name
    if unknown or twice:
        problems = [f"{source} has {len(unknown)} unknown weights: {_some(unknown)}"] * bool(
            unknown
        )
        problems += [f"{source} has weights twice: {_some(twice)}"] * bool(twice)
        raise CheckpointError("; ".join(problems) + ". It is of another kind, or mixes two models")
    return renamed


def map_name(name: str, rules: Rules) -> str | None:
    """Return a name by the first rule that takes all of it, or None."""
    for pattern, new in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(new)
    return None


def hf_to_hf(tensors: Mapping[str, _Value], source: str) -> dict[str, _Value]:
    """Bring either key style of the Hugging Face format, or names in memory, to the first.

    Unknown names stay: the loader lists them together with what is missing or misshapen.
    """
    known = {name: value for name, value in tensors.items() if map_name(name, HF_TO_HF)}
    unknown = {name: value for name, value in tensors.items() if name not in known}
    return rename(known, HF_TO_HF, source) | unknown


def tower_to_hf(tensors: Mapping[str, _Value], source: str) -> dict[str, _Value]:
    """Rename a vision tower's weights; of a whole CLIP or SigLIP the text half is left aside."""
    return rename(tensors, TOWER_TO_HF, source, ignored=_OTHER_HALF.fullmatch)


def without_prefix(name: str) -> str:
    """Return the name in a full checkpoint of a weight beside the original's adapters.

    ``base_model.model.model.mm_projector.X`` and ``model.model.mm_projector.X`` both become
    ``model.mm_projector.X``.
    """
    return _PREFIXES.sub("", name, count=1)


def _some(names: list[str], shown: int = 20) -> str:
    return ", ".join(names[:shown]) + (" ..." if len(names) > shown else "")
