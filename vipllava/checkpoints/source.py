"""A checkpoint that is opened and not yet read: the one thing that every format becomes.

Config, tokenizer and metadata are small and here; weights stay in their files until a network is
made of them, so that they are never in memory twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from vipllava.checkpoints.export_meta import ExportMeta
from vipllava.models.building import materialise
from vipllava.models.tensor_files import LazyTensor
from vipllava.types import CheckpointError

Kind = Literal["hf", "llava", "projector", "lora", "llava_lora", "training_state", "parts"]
KINDS: dict[Kind, str] = {
    "hf": "a VipLlava in the Hugging Face format",
    "llava": "a VipLlava in the original (LLaVA) format",
    "projector": "a projector alone, as stage 1 leaves it",
    "lora": "an adapter folder of peft with the projector in it",
    "llava_lora": "an adapter folder of the original format",
    "training_state": "a training checkpoint of Lightning, DeepSpeed or FSDP2",
    "parts": "a vision tower and a language model",
}


@dataclass(frozen=True)
class Source:
    """A VipLlava, wherever it comes from.

    Attributes:
        kind: its format.
        path: the folder, file or id that the user named.
        config: of the network; the vocabulary has room for image and padding token.
        tensors: weights by the names of the Hugging Face format, read when they are needed.
        tokenizer: with image and padding token.
        meta: chat template, picture geometry and origin.
        generation_config: token ids for ``generate``.
        adapter: folder of an adapter that belongs on top of ``tensors``.
    """

    kind: Kind
    path: str
    config: VipLlavaConfig
    tensors: dict[str, LazyTensor]
    tokenizer: PreTrainedTokenizerFast
    meta: ExportMeta
    generation_config: GenerationConfig
    adapter: Path | None = None

    def network(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        attn_implementation: str = "sdpa",
        quantization_config: Any = None,
        device_map: Any = None,
        merge_adapter: bool = True,
    ) -> VipLlavaForConditionalGeneration:
        """Make the network, its adapter with it.

        Args:
            dtype: of the parameters.
            attn_implementation: attention of tower and language model.
            quantization_config: transformers' own, for weights held in fewer bits.
            device_map: where to put the weights; the CPU if not given.
            merge_adapter: add an adapter to the weights; else it stays beside them.

        Raises:
            CheckpointError: weights are missing, left over or misshapen; the message lists them.
        """
        model = materialise(
            self.config,
            self.tensors,
            source=self.path,
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantization_config=quantization_config,
            device_map=device_map,
        )
        if self.adapter is not None:
            from vipllava.checkpoints.adapter_format import load_adapter
            from vipllava.models.adapters import merge_adapters

            load_adapter(model, self.adapter)
            if merge_adapter:
                merge_adapters(model)
        model.generation_config = self.generation_config
        return model


def infer_chat_template(tokenizer: PreTrainedTokenizerFast, source: str) -> str:
    """Return the template whose role tokens a tokenizer has; Vicuna's if it is a Llama's.

    For checkpoints that do not say what they were trained with. The vocabulary decides, never a
    name.

    Raises:
        CheckpointError: no template is known for such a vocabulary.
    """
    added = set(cast("dict[str, int]", cast("Any", tokenizer).get_added_vocab()))
    marks = {
        "llama_3": {"<|start_header_id|>", "<|eot_id|>"},
        "phi_3": {"<|user|>", "<|assistant|>", "<|end|>"},
        "chatml": {"<|im_start|>", "<|im_end|>"},
    }
    for template, tokens in marks.items():
        if tokens <= added:
            return template
    if tokenizer.bos_token == "<s>" and tokenizer.eos_token == "</s>":
        return "llava_v1"
    raise CheckpointError(
        f"{source} does not say which chat template it was trained with, and its tokenizer has "
        "the role tokens of none: pass chat_template=NAME"
    )
