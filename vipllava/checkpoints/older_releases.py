"""What transformers 5 writes under new names, written under those of transformers 4, too.

Engines and trainers pin 4.57; the released code is of 4.31. Of a name that it does not know a
release takes its default without a word, or does not open the folder at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vipllava.checkpoints.folders import write_json
from vipllava.models.hub_models import read_json


def add_rope(text_config: dict[str, Any]) -> None:
    """Add the rotary embedding of a language model's config under its former names, in place."""
    rope = text_config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return  # another kind, or one for each kind of layer, which transformers 4 has not
    scaling: dict[str, Any] = {**rope}
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in scaling:
            text_config[name] = scaling.pop(name)
    if scaling.get("rope_type", "default") != "default":
        text_config["rope_scaling"] = scaling | {"type": scaling["rope_type"]}


def rename_tokenizer(folder: Path) -> None:
    """Call a folder's tokenizer, which is whole in ``tokenizer.json``, by a name that all know."""
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = extra
        del config["extra_special_tokens"]
    write_json(path, config)
