"""Assemble the network: a CLIP tower and a causal language model become one VipLlava.

The network itself is ``transformers.VipLlavaForConditionalGeneration``. What is decided here is
where the parts come from, which token ids they agree on, and how the new weights (projector,
embedding rows) start. Sources are Hugging Face ids or folders; transformers does the loading.

Importing this module imports transformers (seconds): entry points do it late.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from vipllava.models.opening import (
    check_source,
    feature_layers_of,
    load_config,
    load_network,
    open_vipllava,
)
from vipllava.types import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

VOCABULARY_MULTIPLE = 64
"""Embedding rows are padded to a multiple of this, as in the Hugging Face format of VipLlava."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSpec:
    """What a VipLlava is made of. Plain values only, so that it can be printed and compared.

    Attributes:
        vision_tower: Hugging Face id or folder of a CLIP model.
        language_model: Hugging Face id or folder of a causal language model with its tokenizer.
        feature_layers: the tower's hidden states that the projector reads, in this order; 0 is the
            embedding output, k the output of block k, negatives count from the end.
        chat_template: name of the template the language model answers in.
        image_size: side of the square picture, pixels.
        checkpoint: folder or id of a VipLlava to open instead of assembling the two sources; it
            must be of the same architecture as the sources say.
        dtype: dtype of the parameters. Training wants ``float32`` (master weights); the
            trainer's precision decides what is computed in.
        attn_implementation: attention of tower and language model, as transformers names them.
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
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} is not one of {', '.join(_DTYPES)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The parameters' dtype as torch names it."""
        return _DTYPES[self.dtype]


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerFast:
    """Load the tokenizer (no weights), with the image and the padding token present.

    It comes from ``spec.checkpoint`` where that is set, else from the language model. Tokens that
    are already there keep their ids; new ones take the first free ids, the image token first
    (Vicuna: 32000 and 32001).

    Raises:
        CheckpointError: there is no tokenizer at the source.
    """
    role = "checkpoint" if spec.checkpoint else "language_model"
    tokenizer = read_tokenizer(spec.checkpoint or spec.language_model, role)
    return add_tokens(tokenizer, spec.image_token, spec.pad_token)


def read_tokenizer(source: str, role: str) -> PreTrainedTokenizerFast:
    """Read a tokenizer as it is stored.

    Args:
        source: folder or id.
        role: the setting that names it, for the message.

    Raises:
        CheckpointError: there is none, or it is not backed by the tokenizers library.
    """
    check_source(source, role)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no tokenizer could be read from {role}={source!r} ({_first_line(error)}): the folder "
            "needs tokenizer.json (or tokenizer.model) and tokenizer_config.json"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(
            f"the tokenizer of {role}={source!r} is a {type(tokenizer).__name__}, not backed by "
            "the tokenizers library: save it with a tokenizer.json first"
        )
    return tokenizer


def add_tokens(
    tokenizer: PreTrainedTokenizerFast, image_token: str, pad_token: str
) -> PreTrainedTokenizerFast:
    """Make sure that both tokens exist, in place, and return the tokenizer."""
    for token in (image_token, pad_token):
        if token not in _added_tokens(tokenizer):
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
    found = _added_tokens(tokenizer).get(token)
    if found is None:
        raise CheckpointError(
            f"the tokenizer has no token {token!r}: load it with load_tokenizer, which adds it"
        )
    return found


def _added_tokens(tokenizer: Any) -> dict[str, int]:
    return tokenizer.get_added_vocab()


def image_seq_length(spec: ModelSpec) -> int:
    """Return the number of placeholders of one picture: patches, the class token left out.

    Reads the tower's ``config.json`` only.

    Raises:
        CheckpointError: the source is no CLIP tower.
        ConfigError: ``image_size`` is not the tower's.
    """
    return _patches(_tower_config(spec), spec)


def build_model(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerFast | None = None, *, seed: int = 0
) -> VipLlavaForConditionalGeneration:
    """Assemble the network, or open ``spec.checkpoint``.

    Nothing here draws from torch's global generator: two calls with one seed give equal weights
    whatever was drawn before.

    Args:
        spec: the parts.
        tokenizer: what :func:`load_tokenizer` returned for the same spec; loaded if not given.
        seed: decides the projector's first weights. Not used where a checkpoint is opened.

    Raises:
        CheckpointError: a source is missing or of the wrong kind, its weights are incomplete, or
            ``spec.checkpoint`` is of another architecture than the spec.
        ConfigError: feature layers or image size that the tower does not have.
    """
    tokenizer = tokenizer or load_tokenizer(spec)
    # from_pretrained draws initial values even for weights that it then reads.
    with torch.random.fork_rng(devices=[]):
        if spec.checkpoint is not None:
            model = open_vipllava(
                spec.checkpoint,
                dtype=spec.torch_dtype,
                attn_implementation=spec.attn_implementation,
            )
            _check_same_architecture(model, spec, tokenizer)
        else:
            model = _assemble(spec, tokenizer, seed)
    return model


def _assemble(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerFast, seed: int
) -> VipLlavaForConditionalGeneration:
    sequence_length = image_seq_length(spec)
    loading: dict[str, Any] = {
        "dtype": spec.torch_dtype,
        "attn_implementation": spec.attn_implementation,
    }
    tower = load_network(CLIPVisionModel, spec.vision_tower, "vision_tower", **loading)
    _check_feature_layers(spec, tower.config.num_hidden_layers)
    language_model = load_network(
        AutoModelForCausalLM, spec.language_model, "language_model", **loading
    )
    grow_vocabulary(language_model, len(tokenizer))
    for part in (tower, language_model):
        # Else an export would carry this machine's folders; where the parts came from stands in
        # the export's own metadata.
        part.config._name_or_path = ""

    make_config: Any = VipLlavaConfig  # its signature leaves out what every config takes
    config = make_config(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=token_id(tokenizer, spec.image_token),
        image_seq_length=sequence_length,
        tie_word_embeddings=bool(getattr(language_model.config, "tie_word_embeddings", False)),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation=spec.attn_implementation,
        dtype=spec.torch_dtype,
        **{feature_layers_field(): list(spec.feature_layers)},
    )
    # On the meta device nothing is allocated: every weight comes from the loaded parts, which are
    # moved in, not copied.
    with torch.device("meta"):
        model = VipLlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    projector = model.model.multi_modal_projector
    projector.to_empty(device=model.lm_head.weight.device)
    initialise_projector(projector, seed)
    projector.to(spec.torch_dtype)
    model.generation_config = _generation_config(language_model, tokenizer)
    # from_pretrained returns modules in eval mode; the projector was made in train mode.
    return model.eval()


def _generation_config(
    language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> GenerationConfig:
    """Keep the token ids of the language model's generation config and nothing else.

    Vicuna's holds sampling values without ``do_sample``, which transformers refuses to save.
    """
    old = language_model.generation_config
    bos = getattr(old, "bos_token_id", None)
    eos = getattr(old, "eos_token_id", None)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id if bos is None else bos,
        eos_token_id=tokenizer.eos_token_id if eos is None else eos,
        pad_token_id=tokenizer.pad_token_id,
    )


def feature_layers_field() -> str:
    """Return how this release of transformers names the feature layers in the config.

    Plural up to 5.22, singular from 5.23 on (the plural then is an alias that will go).
    """
    singular = "vision_feature_layer"
    return singular if hasattr(VipLlavaConfig(), singular) else singular + "s"


def initialise_projector(projector: nn.Module, seed: int) -> None:
    """Give every layer of the projector PyTorch's default initial values, drawn from ``seed``.

    Drawn on the CPU in float32, so that the values do not depend on device or dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in projector.modules():
        if isinstance(module, nn.Linear):
            # nn.Linear.reset_parameters, with a generator of its own.
            bound = 1.0 / math.sqrt(module.in_features)
            for parameter in (module.weight, module.bias):
                values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                values.uniform_(-bound, bound, generator=generator)
                parameter.data.copy_(values)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()


def grow_vocabulary(language_model: Any, num_tokens: int) -> None:
    """Make room for ``num_tokens`` ids, in place, rows padded to a multiple of 64.

    New rows of both embeddings are the mean of the old ones: the head then gives added tokens a
    middling logit instead of a random one. Never shrinks.
    """
    old = language_model.get_input_embeddings().weight.shape[0]
    new = math.ceil(max(num_tokens, old) / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if new == old:
        return
    language_model.resize_token_embeddings(new, mean_resizing=False)
    embeddings = (language_model.get_input_embeddings(), language_model.get_output_embeddings())
    with torch.no_grad():
        for layer in embeddings:
            weight = layer.weight
            weight[old:] = weight[:old].float().mean(dim=0).to(weight.dtype)


def _check_same_architecture(
    model: VipLlavaForConditionalGeneration, spec: ModelSpec, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Raise unless the opened checkpoint is of the architecture that the spec's sources give."""
    assert spec.checkpoint is not None
    tower_config = _tower_config(spec)
    text_config: Any = load_config(spec.language_model, "language_model")
    config: Any = model.config
    vision, text = config.vision_config, config.text_config
    pairs: list[tuple[str, object, object]] = [
        ("feature layers", feature_layers_of(config), spec.feature_layers),
        ("image size", vision.image_size, spec.image_size),
        ("image token id", config.image_token_id, token_id(tokenizer, spec.image_token)),
        ("language model type", text.model_type, text_config.model_type),
    ]
    for what in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size"):
        pairs.append((f"tower {what}", getattr(vision, what), getattr(tower_config, what)))
    for what in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ):
        pairs.append(
            (f"language model {what}", getattr(text, what, None), getattr(text_config, what, None))
        )
    different = [
        f"{what} {found} (model {expected})" for what, found, expected in pairs if found != expected
    ]
    if len(tokenizer) > text.vocab_size or text.vocab_size < text_config.vocab_size:
        different.append(
            f"vocabulary of {text.vocab_size} rows (tokenizer {len(tokenizer)} tokens, language "
            f"model {text_config.vocab_size} rows)"
        )
    if different:
        name = spec.name or f"{spec.vision_tower} with {spec.language_model}"
        raise CheckpointError(
            f"checkpoint {spec.checkpoint} is of another model than {name}: "
            + "; ".join(different)
            + ". Choose the model that the checkpoint was trained as, or another checkpoint"
        )


def _check_feature_layers(spec: ModelSpec, num_blocks: int) -> None:
    wrong = [k for k in spec.feature_layers if not -(num_blocks + 1) <= k <= num_blocks]
    if wrong:
        raise ConfigError(
            f"feature_layers {wrong} do not exist: vision_tower={spec.vision_tower!r} has "
            f"{num_blocks} blocks, hidden states 0 to {num_blocks} or {-num_blocks - 1} to -1"
        )


def _tower_config(spec: ModelSpec) -> Any:
    config: Any = load_config(spec.vision_tower, "vision_tower")
    config = getattr(config, "vision_config", config)
    if config.model_type != "clip_vision_model":
        raise CheckpointError(
            f"vision_tower={spec.vision_tower!r} is a {config.model_type!r} model, not a CLIP "
            "tower: name a CLIP model, such as openai/clip-vit-large-patch14-336"
        )
    _patches(config, spec)
    return config


def _patches(tower_config: Any, spec: ModelSpec) -> int:
    if tower_config.image_size != spec.image_size:
        raise ConfigError(
            f"image_size={spec.image_size} is not that of vision_tower={spec.vision_tower!r}, "
            f"which has positions for {tower_config.image_size} pixels: set image_size="
            f"{tower_config.image_size} or choose another tower"
        )
    return (spec.image_size // tower_config.patch_size) ** 2


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
