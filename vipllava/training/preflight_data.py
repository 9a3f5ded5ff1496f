"""The data of a job looked at before it starts: opened, proved, measured, linted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vipllava.forecast.job import Corpus
    from vipllava.stream.datamodule import VisualPromptDataModule
    from vipllava.stream.visual_prompt_dataset import VisualPromptDataset

LINTED_SAMPLES: Final = 64
"""Samples of each data set that lint looks at."""


def look_at_data(cfg: DictConfig, datamodule: VisualPromptDataModule) -> tuple[Corpus, int]:
    """Open the shards, prove the first labels, and measure an epoch.

    Returns:
        The epoch, and how many samples were proved.

    Raises:
        VipLlavaError: the data cannot be opened, or labels are not what they should be.
    """
    datamodule.setup("fit")
    dataset = datamodule.dataset
    assert dataset is not None
    texts = estimated = supervised = 0
    share, num_proved = 0.0, 0
    for item in datamodule.first_items(dataset, datamodule.num_proved):
        _, good, _ = dataset.measure(item)
        source = dataset.sources[good.part]
        _, encoded = datamodule.sample_encoder.encode_text(
            source.sample(good.position, good.epoch_pass), good.epoch_pass
        )
        texts += (
            encoded.length - encoded.num_images * datamodule.conversation_encoder.image_seq_length
        )
        estimated += _text_tokens(source, good.position)
        supervised += encoded.num_supervised
        share = max(share, encoded.num_supervised / encoded.length)
        num_proved += 1
    # The index estimates lengths for a real vocabulary; this tokenizer's are known for a few.
    ratio = texts / estimated if estimated else 1.0
    of_text = supervised / texts if texts else None
    return measured_corpus(cfg, datamodule, dataset, ratio, share or None, of_text), num_proved


def _text_tokens(source: Any, position: int) -> int:
    import numpy as np

    return int(source.shards.text_tokens(np.array([position]))[0])


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
    import numpy as np

    from vipllava.forecast.job import Corpus, DataSetShare
    from vipllava.stream.order import SampleOrder, plan_parts

    sizes = {source.name: source.shards.shard_sizes for source in dataset.sources}
    parts = plan_parts(sizes, datamodule.mix_entries, datamodule.samples_per_epoch)
    epoch = SampleOrder(parts, datamodule.seed, window_samples=datamodule.window_samples).epoch(0)
    pictured = np.empty(len(epoch), dtype=np.int64)
    for number, source in enumerate(dataset.sources):
        chosen = epoch.part == number
        pictured[chosen] = source.shards.has_image(epoch.position[chosen])
    placeholders = pictured * datamodule.conversation_encoder.image_seq_length
    texts = ratio * (dataset.estimate_lengths(epoch) - placeholders)
    lengths = np.minimum(placeholders + texts, int(cfg.stage.max_length)).astype(np.float64)
    return Corpus(
        datasets=tuple(DataSetShare(p.name, p.num_samples, p.num_per_epoch) for p in parts),
        mean_tokens=float(lengths.mean()),
        mean_squared_tokens=float((lengths**2).mean()),
        images_per_sample=float(pictured.mean()),
        longest=int(np.ceil(lengths.max())),
        supervised_share=supervised_share or float(cfg.stage.supervised_share),
        mean_supervised=(supervised_text or _supervised_text(cfg))
        * float((lengths - placeholders).clip(min=0).mean()),
    )


def assumed_corpus(cfg: DictConfig, image_tokens: int) -> Corpus:
    """Return the recipe's lengths and the manifests' sizes, for data that cannot be opened.

    Args:
        cfg: the job.
        image_tokens: placeholders of one picture.
    """
    from vipllava.forecast.job import Corpus, DataSetShare
    from vipllava.shards.manifest import load_manifest
    from vipllava.stream.order import parse_mix, plan_parts

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
    cfg: DictConfig, datamodule: VisualPromptDataModule, notes: list[str]
) -> tuple[int, list[str]]:
    """Lint a few samples of each data set.

    Args:
        cfg: the job.
        datamodule: its data.
        notes: what is worth a word is added to them.

    Returns:
        How many samples, and the errors found.
    """
    from omegaconf import OmegaConf

    from vipllava.ingest.lint import LintLimits, lint_shards
    from vipllava.shards.manifest import is_remote

    values: Any = OmegaConf.to_container(cfg.lint, resolve=True)
    limits, problems, count = LintLimits.from_mapping(values), [], 0
    for manifest in datamodule.manifests:
        if is_remote(str(datamodule.data_root)) or any(map(is_remote, manifest.patterns)):
            notes.append(f"{manifest.name} lies at an address and was not linted")
            continue
        found = lint_shards(
            manifest,
            datamodule.data_root,
            datamodule.sample_encoder,
            limits,
            int(cfg.seed),
            num_samples=LINTED_SAMPLES,
        )
        count += found.num_checked
        for severity, into in (("error", problems), ("warning", notes)):
            counted = [
                f"{number} {code}"
                for code, number in found.counts.items()
                if any(f.code == code and f.severity == severity for f in found.findings)
            ]
            if counted:
                into.append(
                    f"lint of {found.num_checked} samples of {manifest.name}: "
                    f"{', '.join(counted)}; `vipllava lint --data {manifest.name}` shows each"
                )
    return count, problems
