"""The objects of a job, made from its composed configuration; whoever needs one makes it here.

Of training only this, ``run`` and ``preflight`` know configuration objects.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from vipllava.checkpoints.loading import load_tokenizer
from vipllava.conversation import ConversationEncoder
from vipllava.conversation.encode import TooLong
from vipllava.forecast.architecture import Architecture, architecture_of
from vipllava.models.building import ModelSpec, network_config, read_tower_config, token_id
from vipllava.models.hub_models import load_config
from vipllava.models.towers import num_patches, preprocessing_of
from vipllava.stream.datamodule import VisualPromptDataModule
from vipllava.stream.image_transform import ImageTransform


def partial(node: DictConfig) -> Any:
    """Return a node's constructor, its arguments bound; ``instantiate`` would copy more objects."""
    return instantiate(node, _convert_="all", _partial_=True)


def model_spec(cfg: DictConfig) -> ModelSpec:
    """Return what a job's network is made of."""
    return partial(cfg.module.model)()


def build_datamodule(
    cfg: DictConfig, tokenizer: Any = None, spec: ModelSpec | None = None
) -> VisualPromptDataModule:
    """Build a job's data module, for its model's tokenizer and spec unless they are given."""
    spec = spec or model_spec(cfg)
    tower = read_tower_config(spec)
    tokenizer = tokenizer or load_tokenizer(spec)
    stage = cfg.stage
    encoder = conversation_encoder(
        spec, tokenizer, stage.chat_template, stage.max_length, stage.too_long
    )
    transform = ImageTransform(spec.image_size, stage.image_aspect, preprocessing_of(tower))
    datamodule = partial(cfg.data)(conversation_encoder=encoder, image_transform=transform)
    if any(manifest.made_by == "sample_world" for manifest in datamodule.manifests):
        # The only data that can be made here; all others must be there already.
        from vipllava.sample_world.build import ensure_sample_world

        ensure_sample_world(cfg.data.data_root)
    return datamodule


def conversation_encoder(
    spec: ModelSpec, tokenizer: Any, chat_template: str, max_length: int, too_long: TooLong
) -> ConversationEncoder:
    """Return what makes ids for a model; reads the tower's config, no weights."""
    return ConversationEncoder(
        tokenizer,
        chat_template,
        image_token_id=token_id(tokenizer, spec.image_token),
        image_seq_length=num_patches(read_tower_config(spec)),
        max_length=max_length,
        too_long=too_long,
    )


def job_architecture(spec: ModelSpec, tokenizer: Any) -> Architecture:
    """Return the sizes of the network that a spec describes; reads config files only."""
    config = network_config(
        read_tower_config(spec),
        load_config(spec.language_model, "language_model"),
        feature_layers=spec.feature_layers,
        num_tokens=len(tokenizer),
        image_token_id=token_id(tokenizer, spec.image_token),
    )
    return architecture_of(config)


def forget_missing_checkpoint(cfg: DictConfig) -> Path | None:
    """Let a job whose earlier stage has not run yet take config and tokenizer from the parts.

    Returns the export that is not there and was taken out of the configuration, if there was one.
    """
    folder = cfg.stage.checkpoint
    if folder is None or not Path(folder).is_relative_to(cfg.paths.runs) or Path(folder).exists():
        return None
    cfg.stage.checkpoint = None
    return Path(folder)
