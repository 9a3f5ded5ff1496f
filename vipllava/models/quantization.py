"""Weights in 4 or 8 bits with bitsandbytes: the language model's blocks, nothing else."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Final

from vipllava.models.tensor_files import FLOATS
from vipllava.types import ConfigError

# Modules that keep their precision; some releases of transformers match from the start of the name.
_KEPT_WHOLE: Final = (
    "vision_tower", "multi_modal_projector", "lm_head",
    "model.vision_tower", "model.multi_modal_projector",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class QuantizationSettings:
    """How the language model's weights are held."""

    bits: int = 4  # or 8, to which the others do not apply
    type: str = "nf4"  # or ``fp4``
    double_quantization: bool = True  # the scales are quantised, too
    compute_dtype: str = "bfloat16"  # of the products

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError that lists all problems."""
        problems: list[str] = []
        if self.bits not in (4, 8):
            problems.append(f"bits={self.bits} must be 4 or 8")
        if self.type not in ("nf4", "fp4"):
            problems.append(f"type={self.type!r} must be one of nf4, fp4")
        if (dtype := self.compute_dtype) not in FLOATS:
            problems.append(f"compute_dtype={dtype!r} must be one of {', '.join(FLOATS)}")
        if problems:
            raise ConfigError("the quantisation is impossible: " + "; ".join(problems))


def quantization_config(settings: QuantizationSettings | None) -> Any:
    """Return transformers' config of bitsandbytes, if it is installed; None for whole weights."""
    if settings is None:
        return None
    needed = ("bitsandbytes", "accelerate")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"weights in {settings.bits} bits need {' and '.join(missing)}, which is not "
            'installed: pip install "vipllava-lightning[quant]"'
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=settings.bits == 4,
        load_in_8bit=settings.bits == 8,
        bnb_4bit_quant_type=settings.type,
        bnb_4bit_use_double_quant=settings.double_quantization,
        bnb_4bit_compute_dtype=FLOATS[settings.compute_dtype],
        llm_int8_skip_modules=list(_KEPT_WHOLE),
    )
