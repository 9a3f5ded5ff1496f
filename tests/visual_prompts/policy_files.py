"""The policies of ``conf/visual_prompts``, composed as a job composes them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from vipllava.config.composing import compose_job
from vipllava.visual_prompts.policies import VisualPromptPolicy, build_policies

FILES = ("published", "evaluation", "tiny")


@functools.cache
def load_policies(name: str = "published") -> Mapping[str, VisualPromptPolicy]:
    """Return the policies that ``visual_prompts=NAME`` gives a job."""
    cfg = compose_job([f"visual_prompts={name}"], config_name="evaluate")
    marks: Any = OmegaConf.to_container(cfg.visual_prompts, resolve=True)
    return build_policies(marks["policies"], marks["ranges"])
