"""The formats of checkpoints, told apart by what is in a folder or file; a name never decides."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vipllava.checkpoints.llava_format import NON_LORA_FILES, PROJECTOR_FILES, is_llava
from vipllava.checkpoints.training_state import INDEX
from vipllava.models.hub_models import load_config
from vipllava.types import CheckpointError

Kind = Literal["hf", "llava", "projector", "lora", "llava_lora", "training_state", "parts"]
KINDS: dict[Kind, str] = {
    "hf": "a VipLlava in the Hugging Face format",
    "llava": "a VipLlava in the original (LLaVA) format",
    "projector": "a projector alone, as stage 1 leaves it",
    "lora": "an adapter folder of peft",
    "llava_lora": "an adapter folder of the original format",
    "training_state": "a training checkpoint of Lightning, DeepSpeed or FSDP2",
    "parts": "a vision tower and a language model",
}


def kind_of(path: Path, source: str) -> Kind:
    """Tell the format of a folder or file, which the user named ``source``, by what is in it.

    Raises:
        CheckpointError: it is none that can become a VipLlava; the message says what it is.
    """
    if path.is_file():
        if path.suffix == ".ckpt":
            return "training_state"
        if path.suffix in (".bin", ".safetensors", ".pt"):
            return "projector"
        raise CheckpointError(
            f"{source} is a {path.suffix or 'nameless'} file: name a model folder, a projector "
            "(mm_projector.bin) or a training checkpoint (.ckpt)"
        )
    if (path / "adapter_config.json").is_file():
        return "llava_lora" if has_any(path, *NON_LORA_FILES) else "lora"
    if has_any(path, ".metadata", "latest", INDEX, "**/*model_states.pt"):
        return "training_state"
    has_projector = has_any(path, *PROJECTOR_FILES)
    if is_llava(path):
        has_weights = has_any(path, "model*.safetensors", "pytorch_model*.bin")
        return "projector" if has_projector and not has_weights else "llava"
    if has_projector and not has_any(path, "config.json"):
        return "projector"
    model_type = load_config(str(path), "checkpoint").model_type
    if model_type == "vipllava":
        return "hf"
    raise CheckpointError(
        f"{source} holds a {model_type!r} model, not a VipLlava: name the export folder of a "
        "training stage or a published VipLlava; a language model alone starts a run with "
        "stage=pretrain model.spec.language_model=..."
    )


def has_any(folder: Path, *patterns: str) -> bool:
    """Whether a folder has a file of one of the patterns."""
    return any(next(folder.glob(pattern), None) for pattern in patterns)
