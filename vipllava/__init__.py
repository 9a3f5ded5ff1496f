"""ViP-LLaVA on Lightning: multimodal LLMs that understand visual prompts.

``import vipllava as vl`` imports nothing heavy: each name below is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vipllava.api import Dataset, open_dataset, open_stream, sample_encoder
    from vipllava.checkpoints.convert import convert
    from vipllava.evaluation.bench import Bench
    from vipllava.evaluation.benches import register_bench
    from vipllava.inference.engine import Engine
    from vipllava.inference.model import connect, load
    from vipllava.models.building import ModelSpec
    from vipllava.records import RecordKind, register_kind
    from vipllava.types import Region, Request, Turn, VipLlavaError
    from vipllava.visual_prompts.drawing import draw
    from vipllava.visual_prompts.marks import (
        Arrow,
        Ellipse,
        Mask,
        MaskContour,
        Point,
        Rectangle,
        Scribble,
        Triangle,
    )
    from vipllava.visual_prompts.policies import POLICIES, VisualPromptPolicy

__version__ = "0.1.0"

__all__ = [
    "POLICIES", "Arrow", "Bench", "Dataset", "Ellipse", "Engine", "Mask", "MaskContour",
    "ModelSpec", "Point", "RecordKind", "Rectangle", "Region", "Request", "Scribble", "Triangle",
    "Turn", "VipLlavaError", "VisualPromptPolicy", "connect", "convert", "draw", "load",
    "open_dataset", "open_stream", "register_bench", "register_kind", "sample_encoder",
]  # fmt: skip

_NAMES_BY_MODULE = {
    "api": "Dataset open_dataset open_stream sample_encoder",
    "checkpoints.convert": "convert",
    "evaluation.bench": "Bench",
    "evaluation.benches": "register_bench",
    "inference.engine": "Engine",
    "inference.model": "connect load",
    "models.building": "ModelSpec",
    "records": "RecordKind register_kind",
    "types": "Region Request Turn VipLlavaError",
    "visual_prompts.drawing": "draw",
    "visual_prompts.marks": "Arrow Ellipse Mask MaskContour Point Rectangle Scribble Triangle",
    "visual_prompts.policies": "POLICIES VisualPromptPolicy",
}
_HOMES = {name: home for home, names in _NAMES_BY_MODULE.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `vipllava` has no attribute `{name}`")
    value = getattr(importlib.import_module(f"vipllava.{_HOMES[name]}"), name)
    globals()[name] = value  # the next access is a plain one
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
