"""What a VipLlava is made of: its config and token ids, its new weights, and the network itself.

Wherever weights come from (:mod:`vipllava.checkpoints.loading` knows the formats), they arrive here
as one dict of tensors that are read when they are needed. Importing this takes seconds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AddedToken,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.vipllava.modeling_vipllava import VipLlavaMultiModalProjector
from transformers.utils import logging as transformers_logging

from vipllava.models.attention import attention_settings
from vipllava.models.hub_models import load_config, local_folder, read_json, what_instead
from vipllava.models.modeling_vipllava_patches import VipLlavaPatchesForConditionalGeneration
from vipllava.models.placing import OnDevice, Placement, fill, hollow_network, one_to_one
from vipllava.models.tensor_files import (
    FLOATS,
    ComputedTensor,
    LazyTensor,
    dtype_of,
    list_misfits,
    read_tensor,
    shape_of,
)
from vipllava.models.towers import CLIP, num_patches, read_preprocessing, tower_of
from vipllava.types import CheckpointError, ConfigError, first_line

VOCABULARY_MULTIPLE = 64
"""Embedding rows are padded to a multiple of this, as in the Hugging Face format of VipLlava."""

PROJECTOR = "multi_modal_projector"
EMBEDDINGS = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
_IN_MEMORY = {
    "vision_tower.vision_model.": "model.vision_tower.",
    f"{PROJECTOR}.": f"model.{PROJECTOR}.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}


@dataclass(frozen=True)
class ModelSpec:
    """What a VipLlava is made of. Plain values only, so that it can be printed and compared.

    Attributes:
        vision_tower: Hugging Face id or folder of a tower, or of a model that has one, of a kind
            that :mod:`vipllava.models.towers` knows.
        language_model: Hugging Face id or folder of a causal language model with its tokenizer.
        feature_layers: the tower's hidden states that the projector reads, in this order; 0 is
            the embedding output, k the output of block k, negatives count from the end.
        chat_template: name of the template the language model answers in.
        image_size: side of the square image, pixels.
        checkpoint: a VipLlava of the same architecture to open instead of the two sources, in any
            format of :func:`vipllava.checkpoints.loading.open_source`; a projector alone is put
            between them.
        dtype: of the parameters. Training wants ``float32`` (master weights); the trainer's
            precision decides what is computed in.
        attn_implementation: as transformers names it, or ``torch_varlen``, see
            :mod:`vipllava.models.attention`.
        image_token: the placeholder's token, added to the tokenizer if it is not there.
        pad_token: the padding token, likewise.
        name: the variant's name, for messages only.
    """

    vision_tower: str
    language_model: str
    feature_layers: tuple[int, ...]
    chat_template: str
    image_size: int
    checkpoint: str | None = None
    dtype: str = "float32"
    attn_implementation: str = "sdpa"
    image_token: str = "<image>"
    pad_token: str = "<pad>"
    name: str = ""

    def __post_init__(self) -> None:
        """Normalise what configuration files write as lists or paths, and check the values."""
        object.__setattr__(self, "feature_layers", tuple(int(k) for k in self.feature_layers))
        for name in ("vision_tower", "language_model", "checkpoint"):
            if (source := getattr(self, name)) is not None:
                object.__setattr__(self, name, str(source))
        if not self.feature_layers:
            raise ConfigError("feature_layers is empty: name a hidden state of the tower")
        if self.dtype not in FLOATS:
            raise ConfigError(f"dtype={self.dtype!r} is not one of {', '.join(FLOATS)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The parameters' dtype as torch names it."""
        return FLOATS[self.dtype]


def read_tokenizer(source: str, role: str) -> PreTrainedTokenizerFast:
    """Read a tokenizer as it is stored at a folder or id, which the setting ``role`` names."""
    folder = local_folder(source, role, weights=False)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        if instead := what_instead(folder / name):
            raise CheckpointError(instead)
    config = folder / "config.json"
    # Of a config that transformers does not know (the original format's) it would warn.
    known = not config.is_file() or read_json(config).get("model_type") in CONFIG_MAPPING
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, config=None if known else PreTrainedConfig()
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"no tokenizer could be read from {role}={source!r} ({first_line(error)}): the folder "
            "needs tokenizer.json (or tokenizer.model) and tokenizer_config.json"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(
            f"the tokenizer of {role}={source!r} is a {type(tokenizer).__name__}, not backed by "
            "the tokenizers library: save it with a tokenizer.json first"
        )
    return tokenizer


def add_tokens(
    tokenizer: PreTrainedTokenizerFast, image_token: str = "<image>", pad_token: str = "<pad>"
) -> PreTrainedTokenizerFast:
    """Make sure that both tokens exist, in place, and return the tokenizer.

    New ones take the first free ids, the image token first (Vicuna: 32000 and 32001).
    """
    for token in (image_token, pad_token):
        if token not in added_tokens(tokenizer):
            tokenizer.add_tokens(
                [AddedToken(token, special=True, normalized=False)], special_tokens=True
            )
    tokenizer.pad_token = pad_token
    return tokenizer


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Return the id of one added token; a CheckpointError where the tokenizer does not have it."""
    found = added_tokens(tokenizer).get(token)
    if found is None:
        raise CheckpointError(
            f"the tokenizer has no token {token!r}: load it with load_tokenizer, which adds it"
        )
    return found


def added_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the ids of a tokenizer's added tokens; transformers' annotations lack the method."""
    return tokenizer.get_added_vocab()


def image_seq_length(spec: ModelSpec) -> int:
    """Return the number of placeholders of one image."""
    return num_patches(read_tower_config(spec))


def read_tower_config(spec: ModelSpec) -> Any:
    """Read the config of a spec's tower, and check it, see :func:`check_tower_config`."""
    config = load_tower_config(spec.vision_tower)
    check_tower_config(config, spec)
    return config


def check_tower_config(config: Any, spec: ModelSpec) -> None:
    """Raise ConfigError where a spec's image size or feature layers are not those of its tower."""
    if config.image_size != spec.image_size:
        raise ConfigError(
            f"image_size={spec.image_size} is not that of vision_tower={spec.vision_tower!r}, "
            f"which has positions for {config.image_size} pixels: set image_size="
            f"{config.image_size} or choose another tower"
        )
    num_blocks = config.num_hidden_layers
    wrong = [k for k in spec.feature_layers if not -(num_blocks + 1) <= k <= num_blocks]
    if wrong:
        raise ConfigError(
            f"feature_layers {wrong} do not exist: vision_tower={spec.vision_tower!r} has "
            f"{num_blocks} blocks, hidden states 0 to {num_blocks} or {-num_blocks - 1} to -1"
        )


def load_tower_config(source: str) -> Any:
    """Read a vision tower's config and preprocessing; of a whole model those of its vision half."""
    config: Any = load_config(source, "vision_tower")
    config = getattr(config, "vision_config", config)
    try:
        tower_of(config)
    except CheckpointError as error:
        raise error.at(f"vision_tower={source!r}") from None
    read_preprocessing(local_folder(source, "vision_tower", weights=False), config)
    return config


def network_config(
    tower_config: Any,
    text_config: Any,
    *,
    feature_layers: Sequence[int],
    num_tokens: int,
    image_token_id: int,
    special_ids: Mapping[str, int | None] | None = None,
) -> VipLlavaConfig:
    """Make the config of a VipLlava from those of its parts, which stay as they are.

    For ``num_tokens`` ids, image and padding token included, the language model's vocabulary grows
    to a multiple of :data:`VOCABULARY_MULTIPLE`; it never shrinks. The special ids are the
    tokenizer's ``pad_token_id``, ``bos_token_id`` and ``eos_token_id``.
    """
    tower_config, text_config = copy.deepcopy(tower_config), copy.deepcopy(text_config)
    rows = max(num_tokens, text_config.vocab_size)
    text_config.vocab_size = math.ceil(rows / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    for part in (tower_config, text_config):
        part._name_or_path = ""  # else an export would carry this machine's folders
    make_config: Any = VipLlavaConfig  # its signature leaves out what every config takes
    # The name from transformers 5.23 on, where the plural is an alias that will go; before it.
    singular, plural = "vision_feature_layer", "vision_feature_layers"
    layers_name = singular if hasattr(make_config, singular) else plural
    return make_config(
        vision_config=tower_config,
        text_config=text_config,
        image_token_index=image_token_id,
        image_seq_length=num_patches(tower_config),
        tie_word_embeddings=bool(getattr(text_config, "tie_word_embeddings", False)),
        **{layers_name: list(feature_layers)},
        **(special_ids or {}),
    )


def network_class(config: Any) -> type[VipLlavaForConditionalGeneration]:
    """Return the network's class: transformers' own, which drops one token, where that fits."""
    if tower_of(config.vision_config).num_prefix_tokens == 1:
        return VipLlavaForConditionalGeneration
    return VipLlavaPatchesForConditionalGeneration


def empty_network(config: VipLlavaConfig, dtype: torch.dtype) -> VipLlavaForConditionalGeneration:
    """Make the network on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        model: Any = network_class(config)(copy.deepcopy(config))
    return model.to(dtype).eval()


def materialise(
    config: VipLlavaConfig,
    tensors: Mapping[str, LazyTensor],
    *,
    source: str,
    stored_name: Callable[[str], str | None],
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    quantization_config: Any = None,
    placement: Placement | None = None,
    prepare: Callable[[VipLlavaForConditionalGeneration], None] | None = None,
) -> VipLlavaForConditionalGeneration:
    """Make the network and read its weights into it, strict both ways.

    Args:
        config: of the network; it is copied.
        tensors: by the names of the Hugging Face format.
        source: where they come from, for messages.
        stored_name: gives the name in that format of a weight by its name in the network.
        dtype: of the parameters.
        attn_implementation: see :class:`ModelSpec`.
        quantization_config: transformers' own, for weights held in fewer bits.
        placement: where the weights go; the CPU if not given.
        prepare: decides, before a weight is read, what each is held in and what trains; not for
            weights held in fewer bits.

    Raises:
        CheckpointError: keys are missing, left over or misshapen; the message lists them.
    """
    whole_config: Any = config
    attention = attention_settings(attn_implementation)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}

    def load_by_transformers() -> VipLlavaForConditionalGeneration:
        # Of published names transformers knows those with CLIP's tower.
        known = whole_config.vision_config.model_type == CLIP.model_type
        state = {
            name if known else name_in_memory(name): (
                read_tensor(lazy) if isinstance(lazy, ComputedTensor) else lazy
            )
            for name, lazy in tensors.items()
        }
        cls = network_class(config)
        return load_strictly(cls, source, config=config, state_dict=state, **options)

    # Initial values are drawn even for weights that are then read, from a generator of their own;
    # and a caller's default device (Lightning sets its own) is not where the reading goes on.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
            if placement is not None:
                options["device_map"] = {"": placement.device}
            model = load_by_transformers()
        else:
            model = hollow_network(network_class(config), config, **options)
            read = one_to_one(model, tensors, stored_name)
            if read is None:
                # It does not fit, which is reported here, or fits in a way that transformers knows.
                model = load_by_transformers()
                read = model.get_parameter
            if prepare is not None:
                prepare(model)
            fill(model, read, placement or OnDevice(torch.device("cpu")))
    model.config._name_or_path = ""
    return model.eval()


def load_strictly(cls: Any, source: str, **options: Any) -> Any:
    """Make a network by ``cls.from_pretrained``; an error where weights and config do not fit."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its table of what does not fit is raised below
    try:
        # Misshapen weights are to be reported with the others, not to end the loading.
        model, report = cls.from_pretrained(
            None, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint={source!r} cannot be loaded ({first_line(error)}): the folder is damaged "
            "or of another kind: write or download it again"
        ) from error
    finally:
        transformers_logging.set_verbosity(before)
    misshapen = [
        f"{key} {tuple(found)} (model {tuple(expected)})"
        for key, found, expected in sorted(report["mismatched_keys"])
    ]
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    misfits = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if problems := list_misfits(misfits):
        raise CheckpointError(
            f"the weights of checkpoint={source!r} do not fit its config.json: {problems}. "
            "The folder is incomplete or mixes two models: write or download it again"
        )
    return model


def name_in_memory(name: str) -> str:
    """Return the name in the network of a weight of the Hugging Face format."""
    for stored, own in _IN_MEMORY.items():
        if name.startswith(stored):
            return own + name.removeprefix(stored)
    return name


def generation_config_for(source: str, tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Return the token ids of a folder's generation config, or else the tokenizer's, and no more.

    Vicuna's holds sampling values without ``do_sample``, which transformers refuses to save.
    """
    old = GenerationConfig()
    with suppress(OSError, ValueError):  # not every model has one
        old = GenerationConfig.from_pretrained(source)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id if old.bos_token_id is None else old.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if old.eos_token_id is None else old.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def initial_projector(config: VipLlavaConfig, seed: int) -> dict[str, torch.Tensor]:
    """Return a projector with PyTorch's default initial values, by its published names.

    They are drawn on the CPU in float32, and depend on neither device nor dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes, tensors = projector_shapes(config), dict[str, torch.Tensor]()
    for name, shape in shapes.items():
        tensor = tensors[name] = torch.zeros(shape, dtype=torch.float32, device="cpu")
        if "layernorm" not in name:
            # nn.Linear.reset_parameters, with a generator of its own.
            _, num_inputs = shapes[name.replace("bias", "weight")]
            bound = 1.0 / math.sqrt(num_inputs)
            tensor.uniform_(-bound, bound, generator=generator)
        elif name.endswith("weight"):
            tensor.fill_(1.0)
    return tensors


def projector_shapes(config: VipLlavaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every projector weight, in the order in which they are drawn."""
    with torch.device("meta"):
        projector = VipLlavaMultiModalProjector(config)
    return {f"{PROJECTOR}.{name}": tuple(p.shape) for name, p in projector.named_parameters()}


def grow_vocabulary(tensors: dict[str, LazyTensor], num_rows: int) -> None:
    """Make both embeddings at least ``num_rows`` high, in place.

    New rows are the mean of the old ones: the head then gives added tokens a middling logit.
    """
    for name in (EMBEDDINGS, HEAD):
        lazy = tensors.get(name)  # a tied head is not stored
        if lazy is None or shape_of(lazy)[0] >= num_rows:
            continue
        shape = (num_rows, *shape_of(lazy)[1:])
        tensors[name] = ComputedTensor(shape, dtype_of(lazy), partial(_grown, lazy, num_rows))


def _grown(lazy: LazyTensor, num_rows: int) -> torch.Tensor:
    old = read_tensor(lazy)
    grown = torch.empty((num_rows, old.shape[1]), dtype=old.dtype, device="cpu")
    grown[: len(old)] = old
    grown[len(old) :] = mean_row(old).to(old.dtype)
    return grown


def mean_row(weight: torch.Tensor, rows_at_once: int = 4096) -> torch.Tensor:
    """Return the mean over the rows in float32, without a float32 copy of all of them."""
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in weight.split(rows_at_once):
        total += rows.double().sum(dim=0)
    return (total / len(weight)).float()
