"""A checkpoint that is opened and not yet read: the one thing that every format becomes.

Weights stay in their files until a network is made of them, so that they are in memory once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from vipllava.checkpoints.export_meta import ExportMeta
from vipllava.checkpoints.names import HF_TO_HF, hf_to_hf, map_name
from vipllava.models.building import added_tokens, materialise
from vipllava.models.placing import Placement
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
    """A VipLlava, wherever it comes from."""

    kind: Kind  # its format
    path: str  # the folder, file or id that the user named
    config: VipLlavaConfig  # of the network; the vocabulary has room for image and padding token
    # weights by the names of the Hugging Face format, read when they are needed
    tensors: dict[str, LazyTensor]
    tokenizer: PreTrainedTokenizerFast  # with image and padding token
    meta: ExportMeta  # chat template, picture geometry and origin
    generation_config: GenerationConfig  # token ids for ``generate``
    adapter: Path | None = None  # folder of an adapter that belongs on top of ``tensors``

    def network(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        placement: Placement | None = None,
        quantization_config: Any = None,
        merge_adapter: bool = True,
        **options: Any,
    ) -> VipLlavaForConditionalGeneration:
        """Make the network, its adapter with it.

        Args:
            dtype: of the parameters.
            placement: where to put the weights; the CPU if not given.
            quantization_config: transformers' own, for weights held in fewer bits.
            merge_adapter: add an adapter to the weights; else it stays beside them. Weights that
                are placed and not in few bits have it added in any case.
            options: ``attn_implementation`` and ``prepare`` of
                :func:`vipllava.models.building.materialise`.

        Raises:
            CheckpointError: weights are missing, left over or misshapen; the message lists them.
        """
        tensors, adapter = self.tensors, self.adapter
        if adapter is not None and placement is not None and quantization_config is None:
            if placement.reads:
                # Added on the host, in `dtype`, by the processes that read: rounded after that.
                merged = hf_to_hf(self.network(dtype=dtype).state_dict(), self.path)
                tensors = {name: tensor for name, tensor in merged.items() if name in tensors}
            adapter = None
        model = materialise(
            self.config,
            tensors,
            source=self.path,
            stored_name=lambda name: map_name(name, HF_TO_HF),
            dtype=dtype,
            placement=placement,
            quantization_config=quantization_config,
            **options,
        )
        if adapter is not None:
            from vipllava.checkpoints.adapter_format import load_adapter
            from vipllava.models.adapters import merge_adapters

            load_adapter(model, adapter)
            if merge_adapter:
                merge_adapters(model)
        model.generation_config = self.generation_config
        return model


def infer_chat_template(tokenizer: PreTrainedTokenizerFast, source: str) -> str:
    """Return the template whose role tokens a tokenizer has; Vicuna's if it is a Llama's.

    For checkpoints that do not say what they were trained with; a name never decides.

    Raises:
        CheckpointError: no template is known for such a vocabulary.
    """
    added = added_tokens(tokenizer).keys()
    for template, tokens in (
        ("llama_3", {"<|start_header_id|>", "<|eot_id|>"}),
        ("phi_3", {"<|user|>", "<|assistant|>", "<|end|>"}),
        ("chatml", {"<|im_start|>", "<|im_end|>"}),
    ):
        if tokens <= added:
            return template
    if tokenizer.bos_token == "<s>" and tokenizer.eos_token == "</s>":
        return "llava_v1"
    raise CheckpointError(
        f"{source} does not say which chat template it was trained with, and its tokenizer has "
        "the role tokens of none: pass chat_template=NAME"
    )
