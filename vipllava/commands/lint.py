"""``vipllava lint``: the faults of a data set, as the job that trains on it would meet them."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vipllava.commands.job import (
    compose_data_job,
    flag,
    split_arguments,
    whole,
)
from vipllava.config.argument_names import naming_keys
from vipllava.files.atomic import write_whole
from vipllava.training.job import build_datamodule, forget_missing_checkpoint

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from vipllava.ingest.lint import LintReport

logger = logging.getLogger(__name__)

EXIT_FINDINGS: Final = 1


def _show(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def run(arguments: Sequence[str]) -> int:
    """Lint ``data=... [n=...] [strict=true] [json=...] [num_workers=...] [epoch=...]``.

    Returns:
        1 if ``strict`` and anything was found, else 0.

    Raises:
        VipLlavaError: the job does not compose, or there are no data at all.
    """
    own = {
        "data": str,
        "n": whole(1),
        "strict": flag,
        "json": Path,
        "num_workers": whole(0),
        "epoch": whole(0),
    }
    given, overrides = split_arguments(arguments, own)
    cfg = compose_data_job(given.get("data"), overrides)
    forget_missing_checkpoint(cfg)

    from omegaconf import OmegaConf
    from rich.console import Console
    from rich.progress import Progress

    from vipllava.ingest.lint import LintLimits, lint_shards, print_report

    values: Any = OmegaConf.to_container(cfg.lint, resolve=True)
    limits = LintLimits.from_mapping(values)
    with naming_keys(cfg):
        datamodule = build_datamodule(cfg)
    reports: list[LintReport] = []
    for manifest in datamodule.manifests:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(f"lint {manifest.name}", total=None)
            report = lint_shards(
                manifest,
                datamodule.data_root,
                datamodule.sample_encoder,
                limits,
                int(cfg.seed),
                num_samples=given.get("n"),
                num_workers=given.get("num_workers", 0),
                epoch=given.get("epoch", 0),
                on_progress=partial(_show, progress, task),
            )
        print_report(report, Console())
        reports.append(report)
    if "json" in given:
        path: Path = given["json"]
        found = [report.to_json() for report in reports]
        text = json.dumps(found if len(found) > 1 else found[0], indent=1, ensure_ascii=False)
        write_whole(path, f"{text}\n")
        logger.info("written to %s", path)
    found_any = any(report.findings for report in reports)
    return EXIT_FINDINGS if given.get("strict", False) and found_any else 0
