"""What ``benchmarks/train.py`` trains: networks, the parts of them that train, and samples.

``tiny`` is the shipped model on the sample world, on the CPU. ``7b`` has the published sizes,
random weights made on the device itself, and random samples as long as the recipe's: captions of
601 tokens on average in stage 1, the stage-2 mix's lengths (mean 774) for LoRA and full training.
Where a device cannot hold all of its decoder blocks, there are fewer, and the name says so.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

from vipllava.checkpoints.loading import build_model, load_tokenizer
from vipllava.conversation import ConversationEncoder
from vipllava.forecast.architecture import (
    LANGUAGE_MODELS,
    TOWERS,
    architecture_of,
    published_config,
)
from vipllava.forecast.flops import Workload
from vipllava.forecast.memory import Setup, device_memory
from vipllava.models.adapters import AdapterSettings, add_adapters
from vipllava.models.building import ModelSpec, image_seq_length, token_id
from vipllava.models.freezing import set_trainable
from vipllava.models.towers import CLIP
from vipllava.sample_world import BASE, TINY_POLICIES
from vipllava.sample_world.build import ensure_sample_world
from vipllava.shards.manifest import load_manifest
from vipllava.stream.collate import EncodedSample
from vipllava.stream.image_transform import ImageTransform
from vipllava.stream.sample_encoder import SampleEncoder, SampleSource
from vipllava.types import IGNORE_INDEX, Encoded

ROOT: Final = Path(__file__).resolve().parent.parent
TRAINABLE: Final[dict[Workload, tuple[str, ...]]] = {
    "projector": ("projector",),
    "lora": ("projector", "language_model"),
    "full": ("projector", "language_model"),
}
NUM_STEPS: Final = 12  # micro-batches of padded rows

_HISTOGRAM: Final = ROOT / "tests" / "stream" / "length_histogram.json"
_CAPTION: Final = (12, 39)  # tokens of a caption: 25 on average
_FEATURE_LAYERS: Final = (-2, -5, -8, -11, 6)
_MICRO_BATCHES: Final[dict[Workload, int]] = {"projector": 16, "lora": 8, "full": 8}
_PACK_LENGTHS: Final[dict[Workload, int]] = {"projector": 4224, "lora": 4096, "full": 4096}
"""Both as ``trainer=1gpu`` and the stages have them."""
_USABLE: Final = 0.92  # of a device's memory: what a forecast may come to
_SHARES: Final = (1, 3 / 4, 1 / 2, 1 / 4, 1 / 8)  # of the decoder blocks, where not all fit


@dataclass(frozen=True)
class Case:
    """One network, what trains of it, and samples.

    Attributes:
        model: its name in the table.
        workload: what trains of the language model.
        device: where.
        make_network: builds it on the device; nothing is set to train yet.
        samples: of one pass; every way of training takes all of them.
        micro_batch_size: padded rows of a step.
        pack_length: tokens of a packed row.
        pad_token_id: of padding.
        attention: as ours is configured to compute it; the plain loop has transformers' default.
        adapter: of LoRA.
    """

    model: str
    workload: Workload
    device: torch.device
    make_network: Callable[[], VipLlavaForConditionalGeneration]
    samples: Sequence[EncodedSample]
    micro_batch_size: int
    pack_length: int
    pad_token_id: int
    attention: str = "sdpa"
    adapter: AdapterSettings = AdapterSettings()  # noqa: RUF009 - a frozen value

    @property
    def trainable(self) -> tuple[str, ...]:
        """The parts that train."""
        return TRAINABLE[self.workload]

    @property
    def image_size(self) -> int:
        """Side of the pictures, pixels."""
        return next(s.pixel_values.shape[-1] for s in self.samples if s.pixel_values is not None)

    def network(self) -> VipLlavaForConditionalGeneration:
        """Build the network: what trains in float32, the rest as it was made."""
        model: Any = self.make_network()
        if self.workload == "lora":
            add_adapters(model, self.adapter)
            model.to(self.device)
        set_trainable(model, self.trainable)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return model


def tiny_spec() -> ModelSpec:
    """Return the tiny model as ``conf/model/tiny.yaml`` builds it."""
    return ModelSpec(
        vision_tower=str(BASE / "vision_tower"),
        language_model=str(BASE / "language_model"),
        feature_layers=(-1, -2, -3, -4, 1),
        chat_template="llava_v1",
        image_size=112,
        attn_implementation="eager",
    )


def tiny_case(workload: Workload, data_root: Path) -> Case:
    """Return the shipped tiny model on the sample data, on the CPU."""
    spec = tiny_spec()
    micro_batch = 32
    return Case(
        model="tiny",
        workload=workload,
        device=torch.device("cpu"),
        make_network=lambda: build_model(spec),
        samples=_sample_world(spec, workload, micro_batch * NUM_STEPS, data_root),
        micro_batch_size=micro_batch,
        pack_length=512,
        pad_token_id=token_id(load_tokenizer(spec), spec.pad_token),
        attention=spec.attn_implementation,
    )


def random_case(workload: Workload, device: torch.device, capacity: float) -> Case | None:
    """Return a 7B, or as many of its decoder blocks as the device bears, with random weights.

    Args:
        workload: what trains.
        device: where.
        capacity: bytes of its memory.

    Returns:
        None where not even the smallest share of the blocks fits.
    """
    config = published_config(next(iter(TOWERS)), "lmsys/vicuna-7b-v1.5", _FEATURE_LAYERS)
    micro_batch = _MICRO_BATCHES[workload]
    lengths, pictured = published_lengths(workload, micro_batch * NUM_STEPS)
    all_blocks = int(LANGUAGE_MODELS["lmsys/vicuna-7b-v1.5"]["num_hidden_layers"])
    blocks = blocks_that_fit(config, workload, capacity, micro_batch, int(lengths.max()))
    if blocks == 0:
        return None
    config = with_blocks(config, blocks)
    share = 1.0 if workload == "projector" else 0.5
    return Case(
        model="7b" if blocks == all_blocks else f"7b, {blocks} of {all_blocks} blocks",
        workload=workload,
        device=device,
        make_network=lambda: random_network(config, device),
        samples=random_samples(config, lengths, pictured, supervised_share=share),
        micro_batch_size=micro_batch,
        pack_length=_PACK_LENGTHS[workload],
        pad_token_id=_image_token(config) + 1,
    )


def can_train(workload: Workload) -> bool:
    """Whether what the workload needs is installed."""
    return workload != "lora" or importlib.util.find_spec("peft") is not None


def blocks_that_fit(
    config: VipLlavaConfig, workload: Workload, capacity: float, rows: int, row_tokens: int
) -> int:
    """Return how many decoder blocks a device can train, by the forecast with recomputation.

    Args:
        config: of the whole network.
        workload: what trains.
        capacity: bytes of the device.
        rows: of a step.
        row_tokens: of the longest row; the plain loop has logits at every token.
    """
    all_blocks = int(_text_config(config).num_hidden_layers)
    setup = Setup(
        trainable=TRAINABLE[workload],
        workload=workload,
        strategy="single",
        precision="bf16-mixed",
        weights_dtype="float32" if workload == "full" else "bfloat16",
        num_devices=1,
        micro_batch_size=rows,
        row_tokens=row_tokens,
        row_supervised=row_tokens,
        adapter_rank=128 if workload == "lora" else 0,
    )
    for share in _SHARES:
        blocks = max(1, int(share * all_blocks))
        architecture = architecture_of(with_blocks(config, blocks))
        if device_memory(architecture, setup).total <= _USABLE * capacity:
            return blocks
    return 0


def with_blocks(config: VipLlavaConfig, blocks: int) -> VipLlavaConfig:
    """Return the config of the same network with so many decoder blocks."""
    changed = copy.deepcopy(config)
    _text_config(changed).num_hidden_layers = blocks
    return changed


def random_network(
    config: VipLlavaConfig, device: torch.device
) -> VipLlavaForConditionalGeneration:
    """Make a network with random weights on the device itself; bfloat16, on a CPU float32."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    make: Any = VipLlavaForConditionalGeneration._from_config
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return make(copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa")


def published_lengths(
    workload: Workload, count: int, seed: int = 0
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Return tokens of as many samples of the recipe's stage, and which of them have a picture."""
    rng = np.random.default_rng(seed)
    if workload == "projector":
        lengths = 576 + rng.integers(*_CAPTION, count)
        return lengths.astype(np.int32), np.ones(count, dtype=bool)
    stored = json.loads(_HISTOGRAM.read_text(encoding="utf-8"))
    width, counts = stored["bin_width"], np.array([stored["with_image"], stored["text_only"]])
    drawn = rng.choice(counts.size, count, p=counts.ravel() / counts.sum())
    lengths = drawn % counts.shape[1] * width + rng.integers(1, width + 1, count)
    return lengths.astype(np.int32), drawn < counts.shape[1]


def random_samples(
    config: VipLlavaConfig,
    lengths: npt.NDArray[np.int32],
    pictured: npt.NDArray[np.bool_],
    *,
    supervised_share: float,
    seed: int = 0,
) -> list[EncodedSample]:
    """Return samples of random ids and pixels.

    Args:
        config: of the network they are for.
        lengths: tokens of each, its picture's among them.
        pictured: whether it has a picture.
        supervised_share: of its text's tokens those at the end that carry loss.
        seed: decides ids and pixels.
    """
    rng = np.random.default_rng(seed)
    sizes: Any = config
    patches, side = sizes.image_seq_length, sizes.vision_config.image_size
    samples: list[EncodedSample] = []
    for number, (length, has_image) in enumerate(zip(lengths, pictured, strict=True)):
        begin = np.full(patches if has_image else 1, _image_token(config) if has_image else 1)
        text = rng.integers(3, _image_token(config), max(2, int(length) - len(begin)))
        ids = np.concatenate([begin, text]).astype(np.int64)
        labels = np.full_like(ids, IGNORE_INDEX)
        supervised = max(1, int(supervised_share * len(text)))
        labels[-supervised:] = ids[-supervised:]
        pixels = None
        if has_image:
            pixels = torch.from_numpy(rng.integers(0, 256, (3, side, side), dtype=np.uint8))
        samples.append(
            EncodedSample(f"random/{number}", Encoded(ids, labels, int(has_image)), pixels)
        )
    return samples


def _text_config(config: Any) -> Any:
    return config.text_config


def _image_token(config: Any) -> int:
    return int(config.image_token_id)


def _sample_world(
    spec: ModelSpec, workload: Workload, count: int, data_root: Path
) -> list[EncodedSample]:
    ensure_sample_world(data_root)
    stage = "pretrain" if workload == "projector" else "finetune"
    tokenizer = load_tokenizer(spec)
    encoder = ConversationEncoder(
        tokenizer,
        "plain" if stage == "pretrain" else spec.chat_template,
        image_token_id=token_id(tokenizer, spec.image_token),
        image_seq_length=image_seq_length(spec),
        max_length=512,
    )
    transform = ImageTransform(
        spec.image_size, "square" if stage == "pretrain" else "pad", CLIP.preprocessing
    )
    samples = SampleEncoder(TINY_POLICIES, encoder, transform, seed=42)
    source = SampleSource.open(
        load_manifest(f"sample_{stage}", ROOT / "data_manifests"), data_root, seed=42
    )
    return [samples.encode(source.sample(index)) for index in range(count)]
