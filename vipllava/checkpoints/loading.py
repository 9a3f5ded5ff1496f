"""From whatever a user has to a network: folders and ids of every format, and parts.

::

    source --kind_of--> format --its reader--> Source (config, lazy tensors, tokenizer)
                                                  --network()--> VipLlava
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    VipLlavaForConditionalGeneration,
)

from vipllava.checkpoints.export_meta import META_NAME, ExportMeta, check_meta, load_meta
from vipllava.checkpoints.llava_format import is_llava, read_llava, read_projector
from vipllava.checkpoints.names import TEXT_TO_HF, hf_to_hf, rename, tower_to_hf
from vipllava.checkpoints.parts import INDEX as PARTS_INDEX
from vipllava.checkpoints.source import KINDS, Kind, Source, infer_chat_template
from vipllava.models.building import (
    ModelSpec,
    add_tokens,
    added_tokens,
    generation_config_for,
    grow_vocabulary,
    initial_projector,
    load_tower_config,
    network_config,
    projector_shapes,
    read_tokenizer,
    read_tower_config,
    token_id,
)
from vipllava.models.hub_models import local_folder, read_json
from vipllava.models.opening import feature_layers_of, load_config
from vipllava.models.tensor_files import LazyTensor, open_tensors, shape_of
from vipllava.models.towers import tower_of
from vipllava.types import CheckpointError

DEFAULT_TOWER = "openai/clip-vit-large-patch14-336"
"""The tower of every published checkpoint; the original format does not hold its config."""
_WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_PROJECTOR_NAMES = ("mm_projector.safetensors", "mm_projector.bin")


def kind_of(path: Path, source: str) -> Kind:
    """Tell the format of a folder or file by what is in it.

    Args:
        path: the folder or file.
        source: as the user named it, for the message.

    Raises:
        CheckpointError: it is none that can become a VipLlava; the message says what it is.
    """
    if path.is_file():
        if path.suffix == ".ckpt":
            return "training_state"
        if path.suffix in (".bin", ".safetensors", ".pt"):
            return "projector"
        raise CheckpointError(
            f"{source} is a {path.suffix or 'nameless'} file: name a model folder, a projector "
            "(mm_projector.bin) or a training checkpoint (.ckpt)"
        )
    if (path / "adapter_config.json").is_file():
        return "llava_lora" if any(path.glob("non_lora_trainables.*")) else "lora"
    if (path / ".metadata").is_file() or (path / "latest").is_file() or _is_deepspeed(path):
        return "training_state"
    has_projector = any((path / name).is_file() for name in _PROJECTOR_NAMES)
    if not (path / "config.json").is_file():
        if has_projector:
            return "projector"
        names = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{source} is a folder without config.json (it holds {names}): name the folder that "
            "save_pretrained, a training stage's export or the original code wrote"
        )
    if is_llava(path):
        has_weights = any(next(path.glob(pattern), None) for pattern in _WEIGHT_PATTERNS)
        return "projector" if has_projector and not has_weights else "llava"
    model_type = read_json(path / "config.json").get("model_type")
    if model_type == "vipllava":
        return "hf"
    raise CheckpointError(
        f"{source} holds a {model_type!r} model, not a VipLlava: name the export folder of a "
        "training stage or a published VipLlava; a language model alone starts a run with "
        "stage=pretrain model.spec.language_model=..."
    )


def open_source(
    source: str,
    *,
    vision_tower: str | None = None,
    base: str | None = None,
    chat_template: str | None = None,
    feature_layers: tuple[int, ...] | None = None,
) -> Source:
    """Open a checkpoint of any format; no weights are read yet.

    Args:
        source: folder, file or Hugging Face id.
        vision_tower: folder or id of the tower, where the source lacks it; CLIP's ViT-L/14-336,
            which every published checkpoint has, if not given.
        base: folder or id of what the source is put on: for a projector or an original LoRA the
            language model, for an adapter folder or a training checkpoint the VipLlava that
            training began with.
        chat_template: the template it was trained with, where the source does not say.
        feature_layers: tower layers that the projector reads, where the source does not say; those
            of :class:`vipllava.models.towers.Tower` if not given.

    Raises:
        CheckpointError: nothing is there, it is of no known format, or something that it does not
            carry was not given.
    """
    path = local_folder(source, "checkpoint")
    kind = kind_of(path, source)
    tower = vision_tower or DEFAULT_TOWER
    under: dict[str, Any] = {
        "vision_tower": vision_tower,
        "chat_template": chat_template,
        "feature_layers": feature_layers,
    }
    if kind == "hf":
        return _open_hf(source, path, tower if vision_tower else "", chat_template)
    if kind == "lora":
        return _open_adapter(source, path, base, **under)
    if kind == "training_state":
        return _open_training_state(source, path, base, **under)
    language_model = source if kind == "llava" else base or _named_base(path)
    if language_model is None:
        raise _needs_base(source, kind, "the language model", "lmsys/vicuna-7b-v1.5")
    tower_config = load_tower_config(tower)
    spec = ModelSpec(
        vision_tower=tower,
        language_model=language_model,
        feature_layers=feature_layers or tower_of(tower_config).feature_layers,
        chat_template=chat_template or "",
        image_size=tower_config.image_size,
    )
    if kind == "llava":
        return _open_llava(path, spec, tower_config)
    return put_on_parts(spec, source, path, kind)


def put_on_parts(spec: ModelSpec, source: str, path: Path, kind: Kind, *, seed: int = 0) -> Source:
    """Open a projector, or an adapter folder with one, between the parts that a spec names."""
    parts = open_parts(spec, seed=seed)
    tensors = dict(parts.tensors)
    projector = read_projector(path)
    for name, shape in projector_shapes(parts.config).items():
        if name not in projector:
            raise CheckpointError(f"the projector {source} has no {name}")
        if tuple(shape_of(projector[name])) != shape:
            raise CheckpointError(
                f"the projector {source} has {name} of shape "
                f"{tuple(shape_of(projector[name]))}, but tower {spec.vision_tower} with layers "
                f"{list(spec.feature_layers)} and language model {spec.language_model} want "
                f"{shape}: it was trained for others"
            )
    tensors.update(projector)
    adapter = path if kind == "llava_lora" else None
    return replace(parts, kind=kind, path=source, tensors=tensors, adapter=adapter)


def open_parts(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerFast | None = None, *, seed: int = 0
) -> Source:
    """Put a tower and a language model together, with a new projector.

    Raises:
        CheckpointError: a source is missing or of the wrong kind, or its names are unknown.
        ConfigError: feature layers or image size that the tower does not have.
    """
    tower_config = read_tower_config(spec)
    text_config: Any = load_config(spec.language_model, "language_model")
    causal: Any = AutoModelForCausalLM
    if type(text_config) not in causal._model_mapping:
        raise CheckpointError(
            f"language_model={spec.language_model!r} cannot be loaded as one: it is a "
            f"{text_config.model_type!r} model; name a causal language model"
        )
    if tokenizer is None:
        tokenizer = read_tokenizer(spec.language_model, "language_model")
        add_tokens(tokenizer, spec.image_token, spec.pad_token)
    tower_files = local_folder(spec.vision_tower, "vision_tower")
    text_files = local_folder(spec.language_model, "language_model")
    tensors: dict[str, LazyTensor] = {
        **tower_to_hf(open_tensors(tower_files, "vision_tower"), spec.vision_tower),
        **rename(open_tensors(text_files, "language_model"), TEXT_TO_HF, spec.language_model),
    }
    parts = _assembled("parts", spec, tower_config, text_config, tokenizer, tensors, text_files)
    parts.tensors.update(initial_projector(parts.config, seed))
    return parts


def _assembled(
    kind: Kind,
    spec: ModelSpec,
    tower_config: Any,
    text_config: Any,
    tokenizer: PreTrainedTokenizerFast,
    tensors: dict[str, LazyTensor],
    text_files: Path,
) -> Source:
    """Make one VipLlava of a tower and a language model whose weights are opened."""
    special_ids = ("pad_token_id", "bos_token_id", "eos_token_id")
    config: Any = network_config(
        tower_config,
        text_config,
        feature_layers=spec.feature_layers,
        num_tokens=len(tokenizer),
        image_token_id=token_id(tokenizer, spec.image_token),
        special_ids={name: getattr(tokenizer, name) for name in special_ids},
    )
    grow_vocabulary(tensors, config.text_config.vocab_size)
    source = spec.language_model
    meta = ExportMeta(
        stage="parts" if kind == "parts" else "released",
        chat_template=spec.chat_template or infer_chat_template(tokenizer, source),
        image_aspect="pad",
        image_size=spec.image_size,
        image_seq_length=config.image_seq_length,
        feature_layers=spec.feature_layers,
        vision_tower=spec.vision_tower,
        language_model=source,
        image_token=spec.image_token,
    )
    generation = generation_config_for(str(text_files), tokenizer)
    return Source(kind, source, config, tensors, tokenizer, meta, generation)


def open_spec(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerFast | None = None, *, seed: int = 0
) -> Source:
    """Open what a training job starts from.

    Args:
        spec: the parts, and the checkpoint if there is one.
        tokenizer: what :func:`load_tokenizer` returned for the same spec; loaded if not given.
        seed: decides a new projector's weights.

    Raises:
        CheckpointError: see :func:`open_source`; or the checkpoint is of another architecture than
            the spec's parts.
        ConfigError: feature layers or image size that the tower does not have.
    """
    if spec.checkpoint is None:
        return open_parts(spec, tokenizer, seed=seed)
    path = local_folder(spec.checkpoint, "checkpoint")
    kind = kind_of(path, spec.checkpoint)
    if kind in ("projector", "llava_lora"):
        return put_on_parts(spec, spec.checkpoint, path, kind, seed=seed)
    opened = open_source(
        spec.checkpoint,
        vision_tower=spec.vision_tower,
        chat_template=spec.chat_template,
        feature_layers=spec.feature_layers,
    )
    _check_same_architecture(opened, spec)
    return opened


def build_model(
    spec: ModelSpec,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    seed: int = 0,
    **options: Any,
) -> VipLlavaForConditionalGeneration:
    """Make the network that a spec describes, see :func:`open_spec`.

    Nothing here draws from torch's global generator: two calls with one seed give equal weights
    whatever was drawn before.

    Args:
        spec: the parts, and the checkpoint if there is one.
        tokenizer: what :func:`load_tokenizer` returned for the same spec; loaded if not given.
        seed: decides the projector's first weights. Not used where a checkpoint has one.
        options: ``quantization_config``, ``placement`` and ``prepare`` of :meth:`Source.network`.

    Raises:
        CheckpointError: see :func:`open_spec`; or weights are missing, left over or misshapen.
    """
    return open_spec(spec, tokenizer, seed=seed).network(
        dtype=spec.torch_dtype, attn_implementation=spec.attn_implementation, **options
    )


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerFast:
    """Load the tokenizer (no weights), with the image and the padding token present.

    It comes from ``spec.checkpoint`` where that has one, else from the language model.

    Raises:
        CheckpointError: there is no tokenizer at the source.
    """
    source, role = spec.language_model, "language_model"
    if spec.checkpoint is not None:
        folder = local_folder(spec.checkpoint, "checkpoint", weights=False)
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            source, role = str(folder), "checkpoint"
    return add_tokens(read_tokenizer(source, role), spec.image_token, spec.pad_token)


def _open_hf(source: str, path: Path, tower: str, chat_template: str | None) -> Source:
    config: Any = load_config(str(path), "checkpoint")
    tokenizer = add_tokens(read_tokenizer(str(path), "checkpoint"))
    if (path / META_NAME).is_file():
        meta = load_meta(path)
        check_meta(meta, config)
        if chat_template:
            meta = replace(meta, chat_template=chat_template)
    else:
        meta = ExportMeta(
            stage="released",
            chat_template=chat_template or infer_chat_template(tokenizer, source),
            image_aspect="pad",
            image_size=config.vision_config.image_size,
            image_seq_length=config.image_seq_length,
            feature_layers=feature_layers_of(config),
            vision_tower=tower or DEFAULT_TOWER,
            language_model=source,
        )
    if added_tokens(tokenizer).get(meta.image_token) != config.image_token_id:
        raise CheckpointError(
            f"{source} mixes two models: its tokenizer has no token {meta.image_token!r} with id "
            f"{config.image_token_id}; write or download it again"
        )
    if len(tokenizer) > config.text_config.vocab_size:
        raise CheckpointError(
            f"{source} mixes two models: its tokenizer has {len(tokenizer)} tokens, its vocabulary "
            f"{config.text_config.vocab_size} rows; write or download it again"
        )
    tensors = hf_to_hf(open_tensors(path, "checkpoint"), source)
    generation = generation_config_for(str(path), tokenizer)
    return Source("hf", source, config, tensors, tokenizer, meta, generation)


def _open_llava(path: Path, spec: ModelSpec, tower_config: Any) -> Source:
    tokenizer = add_tokens(read_tokenizer(str(path), "checkpoint"))
    opened = read_llava(path, vision_tower=local_folder(spec.vision_tower, "vision_tower"))
    return _assembled(
        "llava", spec, tower_config, opened.text_config, tokenizer, opened.tensors, path
    )


def _open_adapter(source: str, path: Path, base: str | None, **options: Any) -> Source:
    """Open the base under an adapter folder of ours; its own metadata win."""
    base = base or _named_base(path)
    if base is None:
        raise _needs_base(source, "lora", "the VipLlava", "runs/7b-pretrain/export")
    under = open_source(base, **options)
    if under.adapter is not None:
        raise CheckpointError(
            f"base={base!r} of the adapter {source} is an adapter itself: merge it first with "
            f"`vipllava convert {base} FOLDER --format lora-merged`"
        )
    meta = load_meta(path) if (path / META_NAME).is_file() else under.meta
    return replace(under, kind="lora", path=source, meta=meta, adapter=path)


def _open_training_state(source: str, path: Path, base: str | None, **options: Any) -> Source:
    """Put a training checkpoint's weights over those that training began with."""
    from vipllava.checkpoints.training_state import read_training_state

    if base is None:
        raise _needs_base(source, "training_state", "what the run started from", "FOLDER_OR_ID")
    under = open_source(base, **options)
    return replace(
        under,
        kind="training_state",
        path=source,
        tensors={**under.tensors, **read_training_state(path)},
    )


def _needs_base(source: str, kind: Kind, what: str, example: str) -> CheckpointError:
    return CheckpointError(
        f"{source} is {KINDS[kind]}, which needs {what} under it: pass base={example}"
    )


def _named_base(path: Path) -> str | None:
    """Return the base that an adapter folder names, if it names one."""
    config = path / "adapter_config.json" if path.is_dir() else None
    if config is None or not config.is_file():
        return None
    base = read_json(config).get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def _is_deepspeed(path: Path) -> bool:
    return (path / PARTS_INDEX).is_file() or any(path.glob("**/*model_states.pt"))


def _check_same_architecture(opened: Source, spec: ModelSpec) -> None:
    """Raise unless the opened checkpoint is of the architecture that the spec's sources give."""
    tower_config: Any = load_tower_config(spec.vision_tower)
    text_config: Any = load_config(spec.language_model, "language_model")
    config: Any = opened.config
    vision, text = config.vision_config, config.text_config
    pairs: list[tuple[str, object, object]] = [
        ("feature layers", feature_layers_of(config), spec.feature_layers),
        ("vision tower type", vision.model_type, tower_config.model_type),
        ("image size", vision.image_size, spec.image_size),
        ("image token id", config.image_token_id, token_id(opened.tokenizer, spec.image_token)),
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
    num_tokens = len(opened.tokenizer)
    if num_tokens > text.vocab_size or text.vocab_size < text_config.vocab_size:
        different.append(
            f"vocabulary of {text.vocab_size} rows (tokenizer {num_tokens} tokens, language "
            f"model {text_config.vocab_size} rows)"
        )
    if different:
        name = spec.name or f"{spec.vision_tower} with {spec.language_model}"
        raise CheckpointError(
            f"checkpoint {spec.checkpoint} is of another model than {name}: "
            + "; ".join(different)
            + ". Choose the model that the checkpoint was trained as, or another checkpoint"
        )
