"""The data of a job looked at before it starts: opened, proved, measured, linted."""

from __future__ import annotations

from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from vipllava.forecast.job import Corpus, DataSetShare
from vipllava.ingest.lint.findings import LintLimits
from vipllava.ingest.lint.run import lint_shards
from vipllava.shards.manifest import is_remote, load_manifest
from vipllava.stream.datamodule import VisualPromptDataModule
from vipllava.stream.order import SampleOrder, parse_mix, plan_parts
from vipllava.stream.visual_prompt_dataset import VisualPromptDataset


def look_at_data(cfg: DictConfig, datamodule: VisualPromptDataModule) -> tuple[Corpus, int]:
    """Open the shards, prove the first labels, and measure an epoch; return how many were proved.

    Raises:
        VipLlavaError: the data cannot be opened, or labels are not what they should be.
    """
    datamodule.setup("fit")
    dataset = datamodule.dataset
    assert dataset is not None
    image_tokens = datamodule.conversation_encoder.image_seq_length
    texts = estimated = supervised = 0
    share = 0.0
    for item, encoded in datamodule.proved:
        texts += encoded.length - encoded.num_images * image_tokens
        shards = dataset.sources[item.part].shards
        estimated += int(shards.text_tokens(np.array([item.position]))[0])
        supervised += encoded.num_supervised
        share = max(share, encoded.num_supervised / encoded.length)
    # The index estimates lengths for a real vocabulary; this tokenizer's are known for a few.
    ratio = texts / estimated if estimated else 1.0
    of_text = supervised / texts if texts else None
    corpus = measured_corpus(cfg, datamodule, dataset, ratio, share or None, of_text)
    return corpus, len(datamodule.proved)


def measured_corpus(
    cfg: DictConfig,
    datamodule: VisualPromptDataModule,
    dataset: VisualPromptDataset,
    ratio: float = 1.0,
    supervised_share: float | None = None,
    supervised_text: float | None = None,
) -> Corpus:
    """Measure an epoch by the indices of its shards.

    Args:
        cfg: the job.
        datamodule: its data.
        dataset: the same, opened.
        ratio: corrects their texts' lengths, which are estimates.
        supervised_share: of a dense sample's tokens; the stage's, if not measured.
        supervised_text: share of all texts' tokens that carries loss; assumed, if not measured.
    """
    sizes = {source.name: source.shards.shard_sizes for source in dataset.sources}
    parts = plan_parts(sizes, datamodule.mix_entries, datamodule.samples_per_epoch)
    epoch = SampleOrder(parts, datamodule.seed, window_samples=datamodule.window_samples).epoch(0)
    num_images = np.empty(len(epoch), dtype=np.int64)
    for number, source in enumerate(dataset.sources):
        chosen = epoch.part == number
        num_images[chosen] = source.shards.has_image(epoch.position[chosen])
    placeholders = num_images * datamodule.conversation_encoder.image_seq_length
    texts = ratio * (dataset.estimate_lengths(epoch) - placeholders)
    lengths = np.minimum(placeholders + texts, int(cfg.stage.max_length)).astype(np.float64)
    mean_text = float((lengths - placeholders).clip(min=0).mean())
    return Corpus(
        datasets=tuple(DataSetShare(p.name, p.num_samples, p.num_per_epoch) for p in parts),
        mean_tokens=float(lengths.mean()),
        mean_squared_tokens=float((lengths**2).mean()),
        images_per_sample=float(num_images.mean()),
        longest=int(np.ceil(lengths.max())),
        supervised_share=supervised_share or float(cfg.stage.supervised_share),
        mean_supervised=(supervised_text or _supervised_text(cfg)) * mean_text,
    )


def assumed_corpus(cfg: DictConfig, image_tokens: int) -> Corpus:
    """Return the recipe's lengths and the manifests' sizes, for data that cannot be opened."""
    mix: Any = parse_mix(cfg.data.mix) if cfg.data.mix else {cfg.data.manifest: None}
    manifests = {name: load_manifest(name, cfg.data.manifests_dir) for name in mix}
    sizes = {m.name: m.num_samples or m.approximate_samples or 0 for m in manifests.values()}
    shares = tuple(DataSetShare(name, size, size) for name, size in sizes.items())
    if cfg.data.mix and all(sizes.values()):
        entries = {manifests[name].name: entry for name, entry in mix.items()}
        parts = plan_parts({n: (s,) for n, s in sizes.items()}, entries, cfg.data.samples_per_epoch)
        shares = tuple(DataSetShare(p.name, p.num_samples, p.num_per_epoch) for p in parts)
    mean = float(cfg.stage.mean_length)
    return Corpus(
        datasets=shares,
        mean_tokens=mean,
        mean_squared_tokens=mean**2,
        images_per_sample=1.0,
        longest=min(int(cfg.stage.longest_length), int(cfg.stage.max_length)),
        supervised_share=float(cfg.stage.supervised_share),
        mean_supervised=_supervised_text(cfg) * max(0.0, mean - image_tokens),
    )


def _supervised_text(cfg: DictConfig) -> float:
    """Return the share of texts' tokens that carries loss, about: captions whole, of talks half."""
    return 1.0 if cfg.stage.chat_template == "plain" else 0.5


def lint_data(
    cfg: DictConfig, datamodule: VisualPromptDataModule, notes: list[str], problems: list[str]
) -> int:
    """Lint a few samples of each data set, add to notes and problems, and return how many."""
    values: Any = OmegaConf.to_container(cfg.lint, resolve=True)
    limits, root, count = LintLimits.from_mapping(values), datamodule.data_root, 0
    for manifest in datamodule.manifests:
        if is_remote(str(root)) or any(map(is_remote, manifest.patterns)):
            notes.append(f"{manifest.name} lies at an address and was not linted")
            continue
        found = lint_shards(
            manifest, root, datamodule.sample_encoder, limits, int(cfg.seed), num_samples=64
        )
        count += found.num_checked
        severities = {finding.code: finding.severity for finding in found.findings}
        for severity, into in (("error", problems), ("warning", notes)):
            counts = found.counts.items()
            counted = [f"{n} {code}" for code, n in counts if severities.get(code) == severity]
            if counted:
                into.append(
                    f"lint of {found.num_checked} samples of {manifest.name}: "
                    f"{', '.join(counted)}; `vipllava lint --data {manifest.name}` shows each"
                )
    return count
