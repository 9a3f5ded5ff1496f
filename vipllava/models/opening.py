"""Open Hugging Face folders and ids, strictly, with errors that say what to do.

transformers replaces missing weights by random ones and warns; here that is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from vipllava.models.hub_models import local_folder
from vipllava.types import CheckpointError

_SHOWN_KEYS = 20


def load_config(source: str, role: str) -> PreTrainedConfig:
    """Read the config of a folder or id.

    Raises:
        CheckpointError: nothing is there, or its ``config.json`` cannot be read.
    """
    folder = local_folder(source, role, weights=False)
    if folder.is_file():
        raise CheckpointError(f"{role}={source!r} is a file: name the folder that holds it")
    if not (folder / "config.json").is_file():
        names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{role}={source!r} is a folder without config.json (it holds {names}): name the "
            "folder that save_pretrained or a training stage's export wrote"
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(source, role, error) from error


def load_strictly(
    cls: Any, source: str, role: str, *, ignore_unexpected: bool = False, **kwargs: Any
) -> Any:
    """Make a network of ``config`` and ``state_dict`` and insist that they fit each other.

    Args:
        cls: class of transformers.
        source: where the tensors come from, for messages.
        role: the setting that names the source, for messages.
        ignore_unexpected: weights that the network does not use (the text half of a CLIP
            checkpoint) are left aside.
        kwargs: of ``from_pretrained``.

    Raises:
        CheckpointError: weights are missing, left over or misshapen; the message lists them.
    """
    try:
        with _quiet_report():
            # Misshapen weights are to be reported with the others, not to end the loading.
            model, report = cls.from_pretrained(
                None, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _unreadable(source, role, error) from error
    _raise_if_broken(source, role, report, unexpected=not ignore_unexpected)
    return model


def feature_layers_of(config: Any) -> tuple[int, ...]:
    """Return the feature layers of a VipLlava config, whatever its release calls the field."""
    name = "vision_feature_layer"
    value = getattr(config, name, None)
    if value is None:
        value = getattr(config, name + "s")
    return (value,) if isinstance(value, int) else tuple(value)


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
    return CheckpointError(
        f"{role}={source!r} cannot be loaded ({reason}): the folder is damaged or of another kind: "
        "write or download it again"
    )
