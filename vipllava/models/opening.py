"""Open Hugging Face folders and ids, strictly, with errors that say what to do.

transformers replaces missing weights by random ones and warns; here that is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, VipLlavaForConditionalGeneration
from transformers.utils import logging as transformers_logging

from vipllava.types import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SHOWN_KEYS = 20


def check_source(source: str, role: str) -> None:
    """Raise unless ``source`` is a folder with a ``config.json`` or could be a Hugging Face id.

    Args:
        source: folder or id.
        role: the setting that names it, for the message.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            names = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
            raise CheckpointError(
                f"{role}={source!r} is a folder without config.json (it holds {names}): name the "
                "folder that save_pretrained or a training stage's export wrote"
            )
    elif path.exists():
        raise CheckpointError(f"{role}={source!r} is a file: name the folder that holds it")
    elif not _HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"{role}={source!r} does not exist: give an existing folder or a Hugging Face id "
            "such as openai/clip-vit-large-patch14-336"
        )


def load_config(source: str, role: str) -> PreTrainedConfig:
    """Read the config of a folder or id.

    Raises:
        CheckpointError: nothing is there, or its ``config.json`` cannot be read.
    """
    check_source(source, role)
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(source, role, error) from error


def load_network(cls: Any, source: str, role: str, **kwargs: Any) -> Any:
    """Call ``cls.from_pretrained`` and insist that no weight is missing or misshapen.

    Weights that the network does not use (the text half of a CLIP checkpoint) are ignored.

    Raises:
        CheckpointError: the source is missing or unreadable, of a kind that ``cls`` does not
            load, or lacks weights; the message lists them.
    """
    check_source(source, role)
    model, report = _from_pretrained(cls, source, role, **kwargs)
    _raise_if_broken(source, role, report, unexpected=False)
    return model


def open_vipllava(
    source: str | Path, *, dtype: torch.dtype, attn_implementation: str = "sdpa"
) -> VipLlavaForConditionalGeneration:
    """Open a VipLlava in the Hugging Face format, strict both ways.

    Raises:
        CheckpointError: no VipLlava is there, or keys are missing, left over or misshapen; the
            message lists them.
    """
    source, role = str(source), "checkpoint"
    config = load_config(source, role)
    if config.model_type != "vipllava":
        raise CheckpointError(
            f"checkpoint {source} holds a {config.model_type!r} model, not a VipLlava: name the "
            "export folder of a training stage, or convert the model first"
        )
    model, report = _from_pretrained(
        VipLlavaForConditionalGeneration,
        source,
        role,
        dtype=dtype,
        attn_implementation=attn_implementation,
    )
    _raise_if_broken(source, role, report, unexpected=True)
    return model


def feature_layers_of(config: Any) -> tuple[int, ...]:
    """Return the feature layers of a VipLlava config, whatever its release calls the field."""
    name = "vision_feature_layer"
    value = getattr(config, name, None)
    if value is None:
        value = getattr(config, name + "s")
    return (value,) if isinstance(value, int) else tuple(value)


def _from_pretrained(cls: Any, source: str, role: str, **kwargs: Any) -> tuple[Any, Any]:
    try:
        with _quiet_report():
            # Misshapen weights are to be reported with the others, not to end the loading.
            return cls.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _unreadable(source, role, error) from error


@contextmanager
def _quiet_report() -> Iterator[None]:
    """Silence the table of ignored weights: what matters of it is checked here."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _raise_if_broken(source: str, role: str, report: Any, *, unexpected: bool) -> None:
    problems = {"missing": sorted(report["missing_keys"])}
    if unexpected:
        problems["unexpected"] = sorted(report["unexpected_keys"])
    problems["misshapen"] = [
        f"{key} {tuple(found)} (model {tuple(expected)})"
        for key, found, expected in sorted(report["mismatched_keys"])
    ]
    lines = [
        f"{kind} ({len(keys)}): {', '.join(keys[:_SHOWN_KEYS])}"
        + (" ..." if len(keys) > _SHOWN_KEYS else "")
        for kind, keys in problems.items()
        if keys
    ]
    if lines:
        raise CheckpointError(
            f"the weights of {role}={source!r} do not fit its config.json: "
            + "; ".join(lines)
            + ". The folder is incomplete or mixes two models: write or download it again"
        )


def _unreadable(source: str, role: str, error: Exception) -> CheckpointError:
    reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
    if Path(source).expanduser().is_dir():
        remedy = "the folder is damaged or of another kind: write or download it again"
    else:
        remedy = (
            "it is no folder here, and the Hugging Face Hub did not give it: check the spelling "
            "and the network, log in with `hf auth login` if the model is gated, or name a folder"
        )
    return CheckpointError(f"{role}={source!r} cannot be loaded ({reason}): {remedy}")
