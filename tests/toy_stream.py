"""Fixtures: a tokenizer of characters and bytes, and a data set in tars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.toy_data import (
    IMAGE_SEQ_LENGTH,
    IMAGE_TOKEN_ID,
    SIDE,
    Stored,
    encode_picture,
    make_manifest,
)
from vipllava.conversation.encode import ConversationEncoder
from vipllava.models.towers import CLIP
from vipllava.shards.tars import write_shards
from vipllava.stream.image_transform import ImageTransform
from vipllava.stream.sample_encoder import SampleEncoder, SampleSource
from vipllava.stream.visual_prompt_dataset import VisualPromptDataset
from vipllava.visual_prompts.policies import VisualPromptPolicy


@pytest.fixture(scope="session")
def picture() -> bytes:
    """A 64 x 48 JPEG."""
    return encode_picture()


@pytest.fixture(scope="session")
def encoder() -> ConversationEncoder:
    """Every ASCII character and byte is a token; four image positions."""
    return make_encoder()


def make_encoder(max_length: int = 2048) -> ConversationEncoder:
    """Build what the fixture gives."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocab += [chr(code) for code in range(0x21, 0x7F)]
    model = BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=[], byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return ConversationEncoder(tokenizer, "llava_v1", IMAGE_TOKEN_ID, IMAGE_SEQ_LENGTH, max_length)


@pytest.fixture(scope="session")
def policies() -> dict[str, VisualPromptPolicy]:
    """The policy that the toy records name."""
    return {"regions": VisualPromptPolicy()}


Build = Callable[[Sequence[Stored]], VisualPromptDataset]


@pytest.fixture
def build_dataset(
    tmp_path: Path, encoder: ConversationEncoder, policies: dict[str, VisualPromptPolicy]
) -> Build:
    """Write samples as tars under ``tmp_path/toy`` and open them for training."""

    def build(samples: Sequence[Stored]) -> VisualPromptDataset:
        write_shards(samples, tmp_path / "toy", max_samples=8, check_images=False)
        source = SampleSource.open(make_manifest(), tmp_path, seed=7)
        samples_encoder = SampleEncoder(
            policies, encoder, ImageTransform(SIDE, "pad", CLIP.preprocessing), seed=7
        )
        return VisualPromptDataset([source], samples_encoder)

    return build
