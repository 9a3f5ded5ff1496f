"""``vipllava inspect``, ``vipllava train inspect=true``: a page of what a job's model will see."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from vipllava.commands.job import compose_data_job
from vipllava.commands.options import ConfigFolder, JobData, Overrides
from vipllava.config.argument_names import naming_keys
from vipllava.types import RecordError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vipllava.report.inspected import InspectedSample, RefusedSample
    from vipllava.stream.datamodule import VisualPromptDataModule
    from vipllava.stream.order import Item
    from vipllava.stream.sample_encoder import SampleEncoder, SampleSource
    from vipllava.stream.visual_prompt_dataset import VisualPromptDataset

logger = logging.getLogger(__name__)

DEFAULT_SAMPLES: Final = 24


def inspect(
    overrides: Overrides = None,
    data: JobData = None,
    num_samples: Annotated[int, typer.Option(min=1, help="How many samples.")] = DEFAULT_SAMPLES,
    output: Annotated[
        Path | None, typer.Option(help="The page.", show_default="inspect.html in the run's folder")
    ] = None,
    config_dir: ConfigFolder = None,
) -> None:
    """Write a page of what the model will see of a data set.

    It shows which tokens carry loss, too. For example: vipllava inspect --data sample_finetune
    model=tiny
    """
    cfg = compose_data_job(data, overrides or (), config_dir)
    given = {"--data": data, "--num-samples": num_samples, "--output": output}
    given["--config-dir"] = config_dir
    options = [word for name, value in given.items() if value for word in (name, str(value))]
    command = shlex.join(["vipllava", "inspect", *options, *(overrides or ())])
    with naming_keys(cfg):
        inspect_job(cfg, num_samples=num_samples, output=output, command=command)


def inspect_job(
    cfg: DictConfig,
    *,
    num_samples: int | None = None,
    output: Path | None = None,
    command: str = "",
) -> Path:
    """Write a page of the samples that a training job meets first.

    Args:
        cfg: what Hydra composed from ``conf/train.yaml``, its data checked.
        num_samples: how many; by default what ``inspect`` says, else 24.
        output: the page; ``inspect.html`` in the run's folder by default.
        command: how to make the page again.

    Raises:
        VipLlavaError: the data cannot be opened.
    """
    from vipllava.training.job import build_datamodule, forget_missing_checkpoint

    if num_samples is None:
        num_samples = DEFAULT_SAMPLES if isinstance(cfg.inspect, bool) else int(cfg.inspect)
    path = output or Path(cfg.run_dir) / "inspect.html"
    forget_missing_checkpoint(cfg)
    datamodule = build_datamodule(cfg)
    dataset = datamodule.open_dataset()
    items = datamodule.first_items(dataset, num_samples)
    chosen = "the first that training meets"
    write_page(path, cfg, datamodule, dataset, items, chosen=chosen, command=command)
    return path


def write_page(
    path: Path,
    cfg: DictConfig,
    datamodule: VisualPromptDataModule,
    dataset: VisualPromptDataset,
    items: Sequence[Item],
    *,
    chosen: str,
    command: str = "",
    remarks: Sequence[str] = (),
) -> None:
    """Write a page of some samples of a job whose data is open.

    Args:
        path: the page.
        cfg: what Hydra composed.
        datamodule, dataset: the job's.
        items: the samples.
        chosen: how they were chosen, in words.
        command: how to make the page again.
        remarks: on each of the samples.
    """
    from vipllava.files.atomic import write_whole
    from vipllava.report.inspect_page import JobSummary, build_inspect_page

    texts, transform = datamodule.conversation_encoder, datamodule.sample_encoder.transform
    summary = JobSummary(
        dataset=" + ".join(source.name for source in dataset.sources),
        num_samples=sum(len(source) for source in dataset.sources),
        stage=cfg.stage.name,
        model=cfg.model.name,
        chat_template=texts.template.name,
        image_aspect=transform.aspect,
        image_size=transform.size,
        image_seq_length=texts.image_seq_length,
        max_length=texts.max_length,
        seed=int(cfg.seed),
        chosen=chosen,
        command=command,
    )
    sources, encoder = dataset.sources, datamodule.sample_encoder
    shown = [look_at(sources[i.part], encoder, i.position, i.epoch_pass) for i in items]
    write_whole(path, build_inspect_page(summary, shown, remarks))
    logger.info(
        "%d of %d samples of %s: open %s", len(shown), summary.num_samples, summary.dataset, path
    )


def look_at(
    source: SampleSource, encoder: SampleEncoder, position: int, epoch: int
) -> InspectedSample | RefusedSample:
    """Return one sample as a page shows it; one that training would refuse with the reason."""
    from vipllava.records import find_kind
    from vipllava.report.inspected import RefusedSample, inspect_trace

    entry = source.shards.read(position)
    shard = Path(entry.shard).name
    try:
        trace = encoder.trace(source.parse(entry, epoch), epoch)
    except RecordError as error:
        return RefusedSample(entry.key, source.name, shard, str(error))
    kind = find_kind(entry.record, source.record_kind, has_image=False).name
    return inspect_trace(
        trace, encoder.conversation_encoder, encoder.transform, shard=shard, record_kind=kind
    )
