"""Weights in 4 or 8 bits with bitsandbytes: the language model's blocks, nothing else."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Final

from vipllava.models.tensor_files import FLOATS
from vipllava.types import ConfigError

KEPT_WHOLE: Final = (
    "vision_tower",
    "multi_modal_projector",
    "lm_head",
    # Some releases of transformers match from the start of the whole name.
    "model.vision_tower",
    "model.multi_modal_projector",
)
"""Modules that keep their precision; bitsandbytes would take every linear layer otherwise."""

_TYPES: Final = ("nf4", "fp4")


@dataclass(frozen=True, slots=True)
class QuantizationSettings:
    """How the language model's weights are held.

    Attributes:
        bits: 4 or 8.
        type: of 4 bits: ``nf4`` or ``fp4``.
        double_quantization: of 4 bits: the scales are quantised, too.
        compute_dtype: of 4 bits: what products are computed in.
    """

    bits: int = 4
    type: str = "nf4"
    double_quantization: bool = True
    compute_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError that lists all problems."""
        problems: list[str] = []
        if self.bits not in (4, 8):
            problems.append(f"bits={self.bits} must be 4 or 8")
        if self.type not in _TYPES:
            problems.append(f"type={self.type!r} must be one of {', '.join(_TYPES)}")
        if self.compute_dtype not in FLOATS:
            known = ", ".join(FLOATS)
            problems.append(f"compute_dtype={self.compute_dtype!r} must be one of {known}")
        if problems:
            raise ConfigError("the quantisation is impossible: " + "; ".join(problems))


def quantization_config(settings: QuantizationSettings | None) -> Any:
    """Return transformers' config of bitsandbytes, or None for whole weights.

    Raises:
        ConfigError: bitsandbytes or accelerate is not installed.
    """
    if settings is None:
        return None
    missing = [
        name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ConfigError(
            f"weights in {settings.bits} bits need {' and '.join(missing)}, which is not "
            'installed: pip install "vipllava-lightning[quant]"'
        )
    from transformers import BitsAndBytesConfig

    kept = list(KEPT_WHOLE)
    if settings.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.type,
        bnb_4bit_use_double_quant=settings.double_quantization,
        bnb_4bit_compute_dtype=FLOATS[settings.compute_dtype],
        llm_int8_skip_modules=kept,
    )
