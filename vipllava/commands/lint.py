"""``vipllava lint``: the faults of a data set, as the job that trains on it would meet them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vipllava.commands.job import compose_data_job
from vipllava.commands.options import ConfigFolder, JobData, Json, Overrides
from vipllava.commands.output import print_json, progress_bars
from vipllava.config.argument_names import naming_keys

if TYPE_CHECKING:
    from vipllava.ingest.lint.findings import LintReport


def lint(
    overrides: Overrides = None,
    data: JobData = None,
    num_samples: Annotated[
        int | None,
        typer.Option(min=1, help="How many samples, evenly spread.", show_default="all"),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit code 1 for warnings, too.")
    ] = False,
    as_json: Json = False,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes; 0: none but this one.")] = 0,
    epoch: Annotated[int, typer.Option(min=0, help="Whose marks to draw.")] = 0,
    config_dir: ConfigFolder = None,
) -> int:
    """Find faults in a data set before training does.

    Exit code 1 for errors. lint.LIMIT=VALUE changes what is flagged: vipllava lint --data
    user_data --strict lint.min_mark_pixels=6
    """
    cfg = compose_data_job(data, overrides or (), config_dir)

    from omegaconf import OmegaConf
    from rich.console import Console

    from vipllava.ingest.lint.findings import LintLimits, print_report
    from vipllava.ingest.lint.run import lint_shards
    from vipllava.training.job import build_datamodule, forget_missing_checkpoint

    forget_missing_checkpoint(cfg)
    values: Any = OmegaConf.to_container(cfg.lint, resolve=True)
    with naming_keys(cfg):
        limits = LintLimits.from_mapping(values)
        datamodule = build_datamodule(cfg)
    reports: list[LintReport] = []
    with progress_bars() as bars:
        for manifest in datamodule.manifests:
            report = lint_shards(
                manifest,
                datamodule.data_root,
                datamodule.sample_encoder,
                limits,
                int(cfg.seed),
                num_samples=num_samples,
                num_workers=num_workers,
                epoch=epoch,
                on_progress=lambda done, total, name=manifest.name: bars(
                    f"lint {name}", "samples", done, total
                ),
            )
            if not as_json:
                print_report(report, Console())
            reports.append(report)
    if as_json:
        found = [report.to_json() for report in reports]
        print_json(found if len(found) > 1 else found[0])
    found = [report.num_of("error") + strict * len(report.findings) for report in reports]
    return int(any(found))
