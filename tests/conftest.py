"""Tiny random networks and a byte tokenizer, made once per session for all rooms."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass(frozen=True)
class TinySources:
    """Folders as a user would have them, and what is in them.

    The tower: 28 pixels, patches of 14, so 4 patches; width 32, 3 blocks. The language models:
    width 32, 2 blocks. The tokenizer: one id per byte and ``<unk>`` 0, ``<s>`` 1, ``</s>`` 2, so
    259 ids; ``<image>`` becomes 259 and ``<pad>`` 260, in 320 rows. ``rows_of_64`` is as wide as
    bitsandbytes needs for 4 bits on a CPU.
    """

    vision_tower: str
    clip: str
    language_model: str
    tied_language_model: str
    phi3: str
    mistral: str
    qwen2: str
    rows_of_64: str


@pytest.fixture(scope="session")
def tiny_sources(tmp_path_factory: pytest.TempPathFactory) -> TinySources:
    """Random CLIP towers and language models, saved as transformers saves them."""
    import torch
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPTextConfig,
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Phi3Config,
        Phi3ForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("tiny_sources")
    tokenizer = byte_tokenizer()
    tower = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    text = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "initializer_range": 0.2,
    }
    clip_text = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    # num_key_value_heads=2: grouped-query attention, as in Llama-3.
    models = {
        "vision_tower": lambda: CLIPVisionModel(tower),
        "clip": lambda: CLIPModel(
            CLIPConfig(text_config=clip_text.to_dict(), vision_config=tower.to_dict())
        ),
        "language_model": lambda: LlamaForCausalLM(LlamaConfig(**text, num_key_value_heads=2)),
        "tied_language_model": lambda: LlamaForCausalLM(
            LlamaConfig(**text, num_key_value_heads=2, tie_word_embeddings=True)
        ),
        "phi3": lambda: Phi3ForCausalLM(Phi3Config(**text)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**text, num_key_value_heads=2)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**text, num_key_value_heads=2)),
        "rows_of_64": lambda: LlamaForCausalLM(
            LlamaConfig(**text | {"hidden_size": 64, "intermediate_size": 128})
        ),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, make in models.items():
            make().save_pretrained(root / name)
            if name not in ("vision_tower", "clip"):
                tokenizer.save_pretrained(root / name)
    return TinySources(**{name: str(root / name) for name in models})


def byte_tokenizer():
    """A tokenizer of 259 ids that adds BOS: specials first, then one id per byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *letters])}
    backend = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in specials])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
