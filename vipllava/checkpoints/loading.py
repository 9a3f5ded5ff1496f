"""From whatever a user has to a network: folders and ids of every format, and parts.

::

    source --kind_of--> format --its reader--> Source (config, lazy tensors, tokenizer)
                                                  --network()--> VipLlava

Weights stay in their files until a network is made of them, so that they are in memory once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from vipllava.checkpoints.adapter_format import load_adapter
from vipllava.checkpoints.export_meta import META_NAME, ExportMeta, check_meta, load_meta
from vipllava.checkpoints.kinds import KINDS, Kind, has_any, kind_of
from vipllava.checkpoints.llava_format import read_llava, read_projector
from vipllava.checkpoints.names import HF_TO_HF, TEXT_TO_HF, hf_to_hf, map_name, rename, tower_to_hf
from vipllava.checkpoints.training_state import JOB_FILE, read_training_state
from vipllava.files.atomic import read_yaml
from vipllava.models.adapters import merge_adapters
from vipllava.models.building import (
    ModelSpec,
    add_tokens,
    added_tokens,
    check_tower_config,
    generation_config_for,
    grow_vocabulary,
    initial_projector,
    load_tower_config,
    materialise,
    network_config,
    projector_shapes,
    read_tokenizer,
    read_tower_config,
    token_id,
)
from vipllava.models.hub_models import load_config, local_folder, read_json
from vipllava.models.placing import Placement
from vipllava.models.tensor_files import LazyTensor, open_tensors, shape_of
from vipllava.models.towers import feature_layers_of, num_patches, tower_of
from vipllava.types import CheckpointError

DEFAULT_TOWER = "openai/clip-vit-large-patch14-336"
"""The tower of every published checkpoint; the original format does not hold its config."""
_LANGUAGE_MODEL = ("the language model", "lmsys/vicuna-7b-v1.5")
_UNDER: dict[Kind, tuple[str, str]] = {
    "projector": _LANGUAGE_MODEL,
    "llava_lora": _LANGUAGE_MODEL,
    "lora": ("the VipLlava", "runs/7b-pretrain/export"),
    "training_state": ("what the run started from", "FOLDER_OR_ID"),
}
"""What a format is put on, and an example of it."""


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
            load_adapter(model, adapter)
            if merge_adapter:
                merge_adapters(model)
        model.generation_config = self.generation_config
        return model


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
        vision_tower: folder or id of the tower, where the source lacks it; what its
            ``vipllava.json`` says if not given, else CLIP's ViT-L/14-336, which every published
            checkpoint has.
        base: folder or id of what the source is put on: for a projector or an original LoRA the
            language model, for an adapter folder or a training checkpoint the VipLlava that
            training began with.
        chat_template: the template it was trained with, where the source does not say.
        feature_layers: tower layers that the projector reads, where the source does not say; those
            of ``vipllava.json``, else of :class:`vipllava.models.towers.Tower`, if not given.

    Raises:
        CheckpointError: nothing is there, it is of no known format, or something that it does not
            carry was not given.
    """
    path = local_folder(source, "checkpoint")
    kind = kind_of(path, source)
    meta = load_meta(path) if (path / META_NAME).is_file() else None
    tower = vision_tower or (meta.vision_tower if meta else DEFAULT_TOWER)
    if kind == "hf":
        return _open_hf(source, path, tower, chat_template)
    options: dict[str, Any] = {"chat_template": chat_template, "feature_layers": feature_layers}
    if kind == "llava":
        base = source
    elif base is None:
        return _open_on_own_base(source, path, kind, vision_tower=vision_tower, **options)
    if kind in ("lora", "training_state"):
        under = open_source(base, vision_tower=vision_tower, **options)
        return _put_on_base(under, base, source, path, kind, chat_template)
    tower_config = load_tower_config(tower)
    spec = ModelSpec(
        vision_tower=tower,
        language_model=base,
        feature_layers=feature_layers or (meta or tower_of(tower_config)).feature_layers,
        chat_template=chat_template or (meta.chat_template if meta else ""),
        image_size=tower_config.image_size,
    )
    check_tower_config(tower_config, spec)
    if kind != "llava":
        return _put_on_parts(spec, source, path, kind)
    tokenizer = add_tokens(read_tokenizer(str(path), "checkpoint"))
    text_config, tensors = read_llava(path, vision_tower=local_folder(tower, "vision_tower"))
    opened = _assembled("llava", spec, tower_config, text_config, tokenizer, tensors, path)
    if meta is None:
        return opened
    changed = {"feature_layers": spec.feature_layers, "chat_template": spec.chat_template}
    meta = replace(meta, vision_tower=tower, **changed)
    check_meta(meta, opened.config)
    return replace(opened, meta=meta)


def _open_on_own_base(source: str, path: Path, kind: Kind, **options: Any) -> Source:
    """Open what says itself what it is put on: an adapter, or a checkpoint in its run's folder."""
    config, model = path / "adapter_config.json", _job_of(path).get("module", {}).get("model")
    try:
        if config.is_file() and (base := read_json(config).get("base_model_name_or_path")):
            return open_source(source, base=base, **options)
        if kind == "training_state" and model:
            known = {each.name for each in fields(ModelSpec)}
            under = open_spec(ModelSpec(**{n: v for n, v in model.items() if n in known}))
            return _put_on_base(under, under.path, source, path, kind, options["chat_template"])
    except CheckpointError as error:
        where = f"{source} on the base that it names (pass base=FOLDER_OR_ID for another one)"
        raise error.at(where) from None
    what, example = _UNDER[kind]
    raise CheckpointError(
        f"{source} is {KINDS[kind]}, which needs {what} under it: pass base={example}"
    )


def _put_on_parts(spec: ModelSpec, source: str, path: Path, kind: Kind, *, seed: int = 0) -> Source:
    """Open a projector, or an adapter folder with one, between the parts that a spec names."""
    parts = _open_parts(spec, seed=seed)
    projector = read_projector(path)
    for name, shape in projector_shapes(parts.config).items():
        if name not in projector:
            raise CheckpointError(f"the projector {source} has no {name}")
        if (found := shape_of(projector[name])) != shape:
            raise CheckpointError(
                f"the projector {source} has {name} of shape {found}, but tower "
                f"{spec.vision_tower} with layers {list(spec.feature_layers)} and language model "
                f"{spec.language_model} want {shape}: it was trained for others"
            )
    tensors = {**parts.tensors, **projector}
    adapter = path if kind == "llava_lora" else None
    return replace(parts, kind=kind, path=source, tensors=tensors, adapter=adapter)


def _open_parts(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerFast | None = None, *, seed: int = 0
) -> Source:
    """Put a tower and a language model together, with a new projector."""
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
    meta = replace(
        _meta_of(config, tokenizer, source, spec.vision_tower, spec.chat_template),
        stage="parts" if kind == "parts" else "released",
        image_token=spec.image_token,
    )
    generation = generation_config_for(str(text_files), tokenizer)
    return Source(kind, source, config, tensors, tokenizer, meta, generation)


def _meta_of(
    config: Any, tokenizer: Any, source: str, tower: str, template: str | None
) -> ExportMeta:
    """Return what a checkpoint without metadata would say about itself."""
    return ExportMeta(
        stage="released",
        chat_template=template or _infer_chat_template(tokenizer, source),
        image_aspect="pad",
        image_size=config.vision_config.image_size,
        image_seq_length=config.image_seq_length,
        feature_layers=feature_layers_of(config),
        vision_tower=tower,
        language_model=source,
    )


def _infer_chat_template(tokenizer: PreTrainedTokenizerFast, source: str) -> str:
    """Return the template whose role tokens a tokenizer has; Vicuna's if it is a Llama's.

    For checkpoints that do not say what they were trained with; a name never decides.
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
        return _open_parts(spec, tokenizer, seed=seed)
    path = local_folder(spec.checkpoint, "checkpoint")
    kind = kind_of(path, spec.checkpoint)
    if kind in ("projector", "llava_lora"):
        return _put_on_parts(spec, spec.checkpoint, path, kind, seed=seed)
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
    """Make the network that a spec describes; two calls with one seed give equal weights.

    Args:
        spec: as the next two, see :func:`open_spec`.
        tokenizer: of the spec.
        seed: of a new projector; torch's global generator is not drawn from.
        options: ``quantization_config``, ``placement`` and ``prepare`` of :meth:`Source.network`.

    Raises:
        CheckpointError: see :func:`open_spec`; or weights are missing, left over or misshapen.
    """
    return open_spec(spec, tokenizer, seed=seed).network(
        dtype=spec.torch_dtype, attn_implementation=spec.attn_implementation, **options
    )


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a spec's checkpoint, or language model, with image and padding token.

    Raises:
        CheckpointError: there is no tokenizer at the source.
    """
    source, role = spec.language_model, "language_model"
    if spec.checkpoint is not None:
        folder = local_folder(spec.checkpoint, "checkpoint", weights=False)
        if has_any(folder, "tokenizer.json", "tokenizer.model"):
            source, role = str(folder), "checkpoint"
    return add_tokens(read_tokenizer(source, role), spec.image_token, spec.pad_token)


def _open_hf(source: str, path: Path, tower: str, chat_template: str | None) -> Source:
    config: Any = load_config(str(path), "checkpoint")
    # Old configs lack it, and what newer releases write of them has the default, 576.
    config.image_seq_length = num_patches(config.vision_config)
    tokenizer = add_tokens(read_tokenizer(str(path), "checkpoint"))
    if (path / META_NAME).is_file():
        meta = load_meta(path)
        check_meta(meta, config)
        if chat_template:
            meta = replace(meta, chat_template=chat_template)
    else:
        meta = _meta_of(config, tokenizer, source, tower, chat_template)
    num_tokens, num_rows = len(tokenizer), config.text_config.vocab_size
    image_id = config.image_token_id
    if added_tokens(tokenizer).get(meta.image_token) != image_id or num_tokens > num_rows:
        raise CheckpointError(
            f"{source} mixes two models: its tokenizer has no token {meta.image_token!r} with id "
            f"{image_id}, or its {num_tokens} tokens exceed a vocabulary of {num_rows} rows; write "
            "or download it again"
        )
    tensors = hf_to_hf(open_tensors(path, "checkpoint"), source)
    generation = generation_config_for(str(path), tokenizer)
    return Source("hf", source, config, tensors, tokenizer, meta, generation)


def _put_on_base(
    under: Source, base: str, source: str, path: Path, kind: Kind, chat_template: str | None
) -> Source:
    """Put an adapter folder of ours, or what a run trained, on the opened base."""
    changed = replace(under, kind=kind, path=source)
    if kind == "training_state":
        # Trained as its own stage says, not as the one before.
        stage = _job_of(path).get("stage", {})
        said = {name: stage[name] for name in ("chat_template", "image_aspect") if name in stage}
        said |= {"stage": stage["name"]} if "name" in stage else {}
        said |= {"chat_template": chat_template} if chat_template else {}
        tensors = {**under.tensors, **read_training_state(path)}
        return replace(changed, tensors=tensors, meta=replace(under.meta, **said))
    if under.adapter is not None:
        raise CheckpointError(
            f"base={base!r} of the adapter {source} is an adapter itself: merge it first with "
            f"`vipllava convert {base} FOLDER --format lora-merged`"
        )
    meta = load_meta(path) if (path / META_NAME).is_file() else under.meta
    return replace(changed, meta=meta, adapter=path)


def _job_of(checkpoint: Path) -> dict[str, Any]:
    """Return the job of the run in whose folder a checkpoint lies; empty where there is none."""
    return read_yaml(checkpoint.absolute().parents[1] / JOB_FILE) or {}


def _check_same_architecture(opened: Source, spec: ModelSpec) -> None:
    """Raise unless the opened checkpoint is of the architecture that the spec's sources give."""
    config: Any = opened.config
    vision, text = config.vision_config, config.text_config
    text_config: Any = load_config(spec.language_model, "language_model")
    pairs: list[tuple[str, object, object]] = [
        ("feature layers", feature_layers_of(config), spec.feature_layers),
        ("image size", vision.image_size, spec.image_size),
        ("image token id", config.image_token_id, token_id(opened.tokenizer, spec.image_token)),
    ]
    heads = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
    for part, found, expected, names in (
        ("vision tower", vision, load_tower_config(spec.vision_tower), (*heads, "patch_size")),
        ("language model", text, text_config, (*heads, "intermediate_size", "num_key_value_heads")),
    ):
        for name in names:
            what = f"{part} {name.removeprefix('model_')}"
            pairs.append((what, getattr(found, name, None), getattr(expected, name, None)))
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
