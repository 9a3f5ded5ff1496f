"""The network from a config and tensors: what a VipLlava is made of, and how its weights come in.

The network itself is ``transformers.VipLlavaForConditionalGeneration``. Wherever weights come from
(:mod:`vipllava.checkpoints.loading` knows the formats), they arrive here as one dict of tensors
that are read when they are needed, so that nothing is ever in memory twice. What is decided here
is which token ids the parts agree on and how the new weights (projector, embedding rows) start.

Importing this module imports transformers (seconds): entry points do it late.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
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

from vipllava.models.attention import attention_settings
from vipllava.models.hub_models import local_folder, read_json
from vipllava.models.modeling_vipllava_patches import VipLlavaPatchesForConditionalGeneration
from vipllava.models.opening import feature_layers_of, load_config, load_strictly
from vipllava.models.placing import OnDevice, Placement, fill, hollow_network, one_to_one
from vipllava.models.tensor_files import (
    FLOATS,
    ComputedTensor,
    LazyTensor,
    dtype_of,
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
        feature_layers: the tower's hidden states that the projector reads, in this order; 0 is the
            embedding output, k the output of block k, negatives count from the end.
        chat_template: name of the template the language model answers in.
        image_size: side of the square image, pixels.
        checkpoint: a VipLlava to open instead of assembling the two sources, in any format that
            :func:`vipllava.checkpoints.loading.open_source` knows; it must be of the same
            architecture as the sources say. A projector alone is put between them.
        dtype: dtype of the parameters. Training wants ``float32`` (master weights); the
            trainer's precision decides what is computed in.
        attn_implementation: attention of tower and language model, as transformers names them, or
            ``torch_varlen``, see :mod:`vipllava.models.attention`.
        image_token: the placeholder's token; added to the tokenizer once.
        pad_token: the padding token; added to the tokenizer once.
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
        object.__setattr__(self, "vision_tower", str(self.vision_tower))
        object.__setattr__(self, "language_model", str(self.language_model))
        if self.checkpoint is not None:
            object.__setattr__(self, "checkpoint", str(self.checkpoint))
        if not self.feature_layers:
            raise ConfigError("feature_layers is empty: name a hidden state of the tower")
        if self.dtype not in FLOATS:
            raise ConfigError(f"dtype={self.dtype!r} is not one of {', '.join(FLOATS)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The parameters' dtype as torch names it."""
        return FLOATS[self.dtype]


def read_tokenizer(source: str, role: str) -> PreTrainedTokenizerFast:
    """Read a tokenizer as it is stored.

    Args:
        source: folder or id.
        role: the setting that names it, for the message.

    Raises:
        CheckpointError: there is none, or it is not backed by the tokenizers library.
    """
    folder = local_folder(source, role, weights=False)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, config=_unknown_config(folder))
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


def _unknown_config(folder: Path) -> PreTrainedConfig | None:
    """Return an empty config where the folder's is of a kind that transformers does not know.

    Such as the original format's: the tokenizer is then read by its own files, and nobody is
    warned of what is meant to be so.
    """
    try:
        model_type = read_json(folder / "config.json").get("model_type")
    except CheckpointError:
        return None
    return None if model_type in CONFIG_MAPPING else PreTrainedConfig()


def add_tokens(
    tokenizer: PreTrainedTokenizerFast, image_token: str = "<image>", pad_token: str = "<pad>"
) -> PreTrainedTokenizerFast:
    """Make sure that both tokens exist, in place, and return the tokenizer.

    Tokens that are already there keep their ids; new ones take the first free ids, the image
    token first (Vicuna: 32000 and 32001).
    """
    for token in (image_token, pad_token):
        if token not in added_tokens(tokenizer):
            tokenizer.add_tokens(
                [AddedToken(token, special=True, normalized=False)], special_tokens=True
            )
    tokenizer.pad_token = pad_token
    return tokenizer


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Return the id of one added token.

    Raises:
        CheckpointError: the tokenizer does not have it.
    """
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
    """Return the number of placeholders of one image; see :func:`read_tower_config`."""
    return num_patches(read_tower_config(spec))


def read_tower_config(spec: ModelSpec) -> Any:
    """Read the tower's ``config.json``, and ``preprocessor_config.json`` if it is there.

    Raises:
        CheckpointError: the source is no tower that is known.
        ConfigError: ``image_size`` or the feature layers are not the tower's.
    """
    config = load_tower_config(spec.vision_tower)
    check_tower_config(config, spec)
    return config


def check_tower_config(config: Any, spec: ModelSpec) -> None:
    """Check that a tower has what a spec asks of it.

    Raises:
        ConfigError: ``image_size`` or the feature layers are not the tower's.
    """
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
    """Read the config of a vision tower; of a whole model that of its vision half.

    Raises:
        CheckpointError: the source is no tower that is known.
    """
    config: Any = load_config(source, "vision_tower")
    config = getattr(config, "vision_config", config)
    try:
        tower_of(config)
    except CheckpointError as error:
        raise error.at(f"vision_tower={source!r}") from None
    read_preprocessing(local_folder(source, "vision_tower", weights=False), config)
    return config


def padded_rows(num_rows: int, num_tokens: int) -> int:
    """Return the embedding rows for ``num_tokens`` ids; never fewer than there are."""
    return math.ceil(max(num_tokens, num_rows) / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


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

    Args:
        tower_config: of a vision tower.
        text_config: of a causal language model, with its own vocabulary.
        feature_layers: see :class:`ModelSpec`.
        num_tokens: ids of the tokenizer, image and padding token included; the vocabulary grows
            to hold them, see :func:`padded_rows`.
        image_token_id: the placeholder's id.
        special_ids: the tokenizer's ``pad_token_id``, ``bos_token_id`` and ``eos_token_id``.
    """
    tower_config, text_config = copy.deepcopy(tower_config), copy.deepcopy(text_config)
    text_config.vocab_size = padded_rows(text_config.vocab_size, num_tokens)
    for part in (tower_config, text_config):
        # Else an export would carry this machine's folders; where the parts came from stands in
        # the export's own metadata.
        part._name_or_path = ""
    make_config: Any = VipLlavaConfig  # its signature leaves out what every config takes
    return make_config(
        vision_config=tower_config,
        text_config=text_config,
        image_token_index=image_token_id,
        image_seq_length=num_patches(tower_config),
        tie_word_embeddings=bool(getattr(text_config, "tie_word_embeddings", False)),
        **{feature_layers_field(): list(feature_layers)},
        **(special_ids or {}),
    )


@lru_cache(maxsize=1)
def feature_layers_field() -> str:
    """Return how this release of transformers names the feature layers in the config.

    Plural up to 5.22, singular from 5.23 on (the plural then is an alias that will go).
    """
    singular = "vision_feature_layer"
    return singular if hasattr(VipLlavaConfig(), singular) else singular + "s"


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
    role: str = "checkpoint",
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    quantization_config: Any = None,
    placement: Placement | None = None,
    prepare: Callable[[VipLlavaForConditionalGeneration], None] | None = None,
) -> VipLlavaForConditionalGeneration:
    """Make the network and read its weights into it, strict both ways.

    Nothing here draws from torch's global generator.

    Args:
        config: of the network; it is copied.
        tensors: by the names of the Hugging Face format.
        source: where they come from, for messages.
        stored_name: gives the name in that format of a weight by its name in the network.
        role: the setting that names the source, for messages.
        dtype: of the parameters.
        attn_implementation: attention of tower and language model.
        quantization_config: transformers' own, for weights held in fewer bits.
        placement: where the weights go; the CPU if not given.
        prepare: decides on the network, before a weight is read, what each is held in and what
            trains. Not for weights held in fewer bits.

    Raises:
        CheckpointError: keys are missing, left over or misshapen; the message lists them.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attention_settings(attn_implementation),
    }
    # Initial values are drawn even for weights that are then read; and a caller's default device
    # (Lightning sets its own) is not where the reading goes on.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
            if placement is not None:
                options["device_map"] = {"": placement.device}
            model = _load_by_transformers(config, tensors, source, role, options)
        else:
            model = hollow_network(network_class(config), config, **options)
            read = one_to_one(model, tensors, stored_name)
            if read is None:
                # It does not fit, which is reported here, or fits in a way that transformers knows.
                model = _load_by_transformers(config, tensors, source, role, options)
                read = model.get_parameter
            if prepare is not None:
                prepare(model)
            fill(model, read, placement or OnDevice(torch.device("cpu")))
    model.config._name_or_path = ""
    return model.eval()


def _load_by_transformers(
    config: VipLlavaConfig,
    tensors: Mapping[str, LazyTensor],
    source: str,
    role: str,
    options: dict[str, Any],
) -> VipLlavaForConditionalGeneration:
    whole: Any = config
    if whole.vision_config.model_type != CLIP.model_type:
        # Of published names transformers knows those with CLIP's tower.
        tensors = {_name_in_memory(name): lazy for name, lazy in tensors.items()}
    state = {
        name: read_tensor(lazy) if isinstance(lazy, ComputedTensor) else lazy
        for name, lazy in tensors.items()
    }
    cls = network_class(config)
    return load_strictly(cls, source, role, config=config, state_dict=state, **options)


def _name_in_memory(name: str) -> str:
    for stored, own in _IN_MEMORY.items():
        if name.startswith(stored):
            return own + name.removeprefix(stored)
    return name


def generation_config_for(
    source: str | None, tokenizer: PreTrainedTokenizerFast
) -> GenerationConfig:
    """Return the token ids of a language model's generation config and nothing else.

    Vicuna's holds sampling values without ``do_sample``, which transformers refuses to save.

    Args:
        source: folder or id with a ``generation_config.json``; without one the tokenizer's ids.
        tokenizer: with the padding token.
    """
    old = None
    if source is not None:
        try:
            old = GenerationConfig.from_pretrained(source)
        except (OSError, ValueError):
            old = None  # not every model has one
    bos, eos = getattr(old, "bos_token_id", None), getattr(old, "eos_token_id", None)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id if bos is None else bos,
        eos_token_id=tokenizer.eos_token_id if eos is None else eos,
        pad_token_id=tokenizer.pad_token_id,
    )


def initial_projector(config: VipLlavaConfig, seed: int) -> dict[str, torch.Tensor]:
    """Return a projector with PyTorch's default initial values, drawn from ``seed``.

    Drawn on the CPU in float32, so that the values do not depend on device or dtype.

    Returns:
        By the names of the Hugging Face format.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in projector_shapes(config).items():
        layer, _, kind = name.removeprefix(f"{PROJECTOR}.").partition(".")
        if layer == "projector_layernorm":
            make = torch.ones if kind == "weight" else torch.zeros
            tensors[name] = make(shape, dtype=torch.float32, device="cpu")
            continue
        # nn.Linear.reset_parameters, with a generator of its own.
        num_inputs = projector_shapes(config)[f"{PROJECTOR}.{layer}.weight"][1]
        bound = 1.0 / math.sqrt(num_inputs)
        drawn = torch.empty(shape, dtype=torch.float32, device="cpu")
        tensors[name] = drawn.uniform_(-bound, bound, generator=generator)
    return tensors


def projector_shapes(config: VipLlavaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every projector weight, in the order in which they are drawn."""
    sizes: Any = config
    inputs = len(feature_layers_of(config)) * sizes.vision_config.hidden_size
    width = sizes.text_config.hidden_size
    return {
        f"{PROJECTOR}.projector_layernorm.weight": (inputs,),
        f"{PROJECTOR}.projector_layernorm.bias": (inputs,),
        f"{PROJECTOR}.linear_1.weight": (width, inputs),
        f"{PROJECTOR}.linear_1.bias": (width,),
        f"{PROJECTOR}.linear_2.weight": (width, width),
        f"{PROJECTOR}.linear_2.bias": (width,),
    }


def grow_vocabulary(tensors: dict[str, LazyTensor], num_rows: int) -> None:
    """Make both embeddings ``num_rows`` high, in place.

    New rows are the mean of the old ones: the head then gives added tokens a middling logit
    instead of a random one. Never shrinks.
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
    """Return the mean over the rows, float32; a float32 copy of all of them never exists."""
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in weight.split(rows_at_once):
        total += rows.double().sum(dim=0)
    return (total / len(weight)).float()
