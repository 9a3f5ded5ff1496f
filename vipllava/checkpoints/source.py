"""A checkpoint that is opened and not yet read: the one thing that every format becomes.

Config, tokenizer and metadata are small and here; weights stay in their files until a network is
made of them, so that they are never in memory twice.
"""

from __future__ import annotations

from collections.abc import Callable
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
        placement: Placement | None = None,
        prepare: Callable[[VipLlavaForConditionalGeneration], None] | None = None,
        merge_adapter: bool = True,
    ) -> VipLlavaForConditionalGeneration:
        """Make the network, its adapter with it.

        Args:
            dtype: of the parameters.
            attn_implementation: attention of tower and language model.
            quantization_config: transformers' own, for weights held in fewer bits.
            placement: where to put the weights; the CPU if not given.
            prepare: decides, before weights are read, what each is held in and what trains.
            merge_adapter: add an adapter to the weights; else it stays beside them. Weights that
                are placed and not in few bits have it added in any case.

        Raises:
            CheckpointError: weights are missing, left over or misshapen; the message lists them.
        """
        tensors, adapter = self.tensors, self.adapter
        if adapter is not None and placement is not None and quantization_config is None:
            # Added on the host, in `dtype`, by the processes that read: rounded only after that.
            tensors, adapter = self._merged(dtype) if placement.reads else tensors, None
        model = materialise(
            self.config,
            tensors,
            source=self.path,
            stored_name=lambda name: map_name(name, HF_TO_HF),
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantization_config=quantization_config,
            placement=placement,
            prepare=prepare,
        )
        if adapter is not None:
            from vipllava.checkpoints.adapter_format import load_adapter
            from vipllava.models.adapters import merge_adapters

            load_adapter(model, adapter)
            if merge_adapter:
                merge_adapters(model)
        model.generation_config = self.generation_config
        return model

    def _merged(self, dtype: torch.dtype) -> dict[str, LazyTensor]:
        """Return the weights with the adapter added to them, in memory."""
        state = hf_to_hf(self.network(dtype=dtype).state_dict(), self.path)
        return {name: tensor for name, tensor in state.items() if name in self.tensors}


def infer_chat_template(tokenizer: PreTrainedTokenizerFast, source: str) -> str:
    """Return the template whose role tokens a tokenizer has; Vicuna's if it is a Llama's.

    For checkpoints that do not say what they were trained with. The vocabulary decides, never a
    name.

    Raises:
        CheckpointError: no template is known for such a vocabulary.
    """
    added = set(added_tokens(tokenizer))
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
