"""One benchmark from its composed configuration: what ``evaluate.py`` calls.

The only place of evaluation that knows configuration objects; it knows no benchmark by name.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vipllava.config.schema import read
from vipllava.evaluation.bench import Bench, BenchData, BenchTable, ask_all
from vipllava.evaluation.benches import get_bench
from vipllava.files.atomic import read_text, write_json, write_whole
from vipllava.files.locks import hold_folder
from vipllava.types import ConfigError, RecordError, VipLlavaError

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)

_COMMON: Final = ("name", "module", "manifest", "max_new_tokens")
"""Keys of ``bench`` that every benchmark has; the others are its options."""


def bench_problems(cfg: DictConfig) -> list[str]:
    """Return why the job's benchmark or its options cannot be used; imports nothing heavy."""
    try:
        _open_bench(cfg)
    except VipLlavaError as error:
        return [str(error)]
    return []


def run_evaluation(cfg: DictConfig) -> dict[str, Any]:
    """Run one benchmark, write its files to ``run_dir`` and print a table.

    Returns:
        The results, as written to ``results.json``.

    Raises:
        VipLlavaError: checkpoint or data cannot be used, or another evaluation writes there; the
            message says what to do.
    """
    run_dir = Path(cfg.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with hold_folder(run_dir, another="name=NEW_NAME"):
        return _evaluate(cfg, run_dir)


def _refuse_another(path: Path, asked: Mapping[str, Any]) -> None:
    """Raise ConfigError where a folder has the results of another question than this one."""
    if (text := read_text(path)) is None:
        return
    try:
        before = json.loads(text)
        other = [f"{key}={before[key]}" for key in asked if before[key] != asked[key]]
    except (ValueError, TypeError, KeyError):
        other = ["something else"]
    if other:
        raise ConfigError(
            f"{path} has the results of {', '.join(other)}: pass name=NEW_NAME to keep both, or "
            "move it away"
        )


def _evaluate(cfg: DictConfig, run_dir: Path) -> dict[str, Any]:
    bench, options = _open_bench(cfg)
    about = {
        "benchmark": bench.name,
        "manifest": cfg.bench.manifest,
        "checkpoint": str(cfg.checkpoint),
        "seed": cfg.seed,
        "limit": cfg.limit,
    }
    _refuse_another(run_dir / "results.json", about)
    asked = bench.read(_bench_data(cfg, options))
    from vipllava.inference.engine import Engine
    from vipllava.models.hub_models import draw_bars_on_terminals_only

    draw_bars_on_terminals_only()
    names = ("attn_implementation", "vision_tower", "base", "chat_template", "bits")
    settings = {name: cfg[name] for name in names}
    engine = Engine.from_checkpoint(cfg.checkpoint, cfg.device, cfg.dtype, **settings)
    began = time.monotonic()
    answered = ask_all(asked, engine, max_new_tokens=cfg.max_new_tokens, batch_size=cfg.batch_size)
    if not answered:
        raise RecordError(f"no questions: the data set `{cfg.bench.manifest}` is empty")
    for name, text in bench.files(answered).items():
        write_whole(run_dir / name, text)
    results = about | bench.score(answered)
    write_json(run_dir / "results.json", results, indent=1)
    _print(bench.table(results))
    logger.info(
        "%s of %s: %.0f s; written to %s",
        bench.name, cfg.checkpoint, time.monotonic() - began, run_dir,
    )  # fmt: skip
    return results


def _open_bench(cfg: DictConfig) -> tuple[Bench[Any], Any]:
    """Return the job's benchmark and its options."""
    section: dict[str, Any] = read(cfg, "bench")
    if section.get("module"):
        _import(str(section["module"]))
    bench = get_bench(str(section.get("name")))
    given = {key: value for key, value in section.items() if key not in _COMMON}
    known = [option.name for option in fields(bench.options)]
    if unknown := sorted(set(given) - set(known)):
        raise ConfigError(
            f"bench has unknown keys {', '.join(unknown)}; `{bench.name}` has "
            f"{', '.join((*_COMMON, *known))}"
        )
    try:
        return bench, bench.options(**given)
    except ConfigError as error:
        raise ConfigError(f"bench.{error}") from None


def _import(module: str) -> None:
    """Import the module that registers a user's benchmark, also from the current folder."""
    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` does; last, so that it hides nothing
        sys.path.append(here)
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and one that it imports is not
        raise ConfigError(
            f"bench.module={module}: there is no such module in this folder or on PYTHONPATH"
        ) from None


def _bench_data(cfg: DictConfig, options: Any) -> BenchData:
    from omegaconf import OmegaConf

    from vipllava.shards.manifest import load_manifest
    from vipllava.visual_prompts.policies import build_policies

    manifest = load_manifest(cfg.bench.manifest, cfg.paths.manifests)
    if manifest.made_by == "sample_world":
        from vipllava.sample_world.build import ensure_sample_world

        ensure_sample_world(cfg.paths.data_root)
    marks: Any = OmegaConf.to_container(cfg.visual_prompts, resolve=True)
    policies = build_policies(marks["policies"], marks["ranges"])
    return BenchData(manifest, Path(cfg.paths.data_root), policies, cfg.seed, cfg.limit, options)


def _print(table: BenchTable) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=table.title)
    for number, column in enumerate(table.columns):
        shown.add_column(column, justify="right" if number else "left")
    for row in table.rows:
        shown.add_row(*row)
    if table.total:
        shown.add_section()
        shown.add_row(*table.total)
    Console().print(shown)
