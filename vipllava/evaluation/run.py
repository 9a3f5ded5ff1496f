"""One benchmark from its composed configuration: what ``evaluate.py`` calls.

The only place of evaluation that knows configuration objects. Adding a benchmark is a file in
``benches``, one in ``conf/bench`` and a line in ``_BENCHES``.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vipllava.files.atomic import write_whole
from vipllava.types import ConfigError, VipLlavaError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vipllava.inference.engine import Engine
    from vipllava.shards.manifest import Manifest

logger = logging.getLogger(__name__)


def run_evaluation(cfg: DictConfig) -> dict[str, Any]:
    """Run one benchmark, write its files to ``run_dir`` and print a table.

    Returns:
        The results, as written to ``results.json``.

    Raises:
        VipLlavaError: checkpoint or data cannot be used; the message says what to do.
    """
    if cfg.bench.name not in _BENCHES:
        raise ConfigError(f"unknown benchmark `{cfg.bench.name}`; known: {', '.join(_BENCHES)}")
    manifest = _open_manifest(cfg)
    from vipllava.inference.engine import Engine
    from vipllava.models.hub_models import draw_bars_on_terminals_only

    draw_bars_on_terminals_only()
    engine = Engine.from_checkpoint(
        cfg.checkpoint,
        cfg.device,
        cfg.dtype,
        attn_implementation=cfg.attn_implementation,
        vision_tower=cfg.vision_tower,
        base=cfg.base,
        chat_template=cfg.chat_template,
        bits=cfg.bits,
    )
    began = time.monotonic()
    results = _BENCHES[cfg.bench.name](cfg, manifest, engine)
    logger.info(
        "%s of %s: %.0f s; written to %s",
        cfg.bench.name, cfg.checkpoint, time.monotonic() - began, cfg.run_dir,
    )  # fmt: skip
    return results


def _open_manifest(cfg: DictConfig) -> Manifest:
    from vipllava.shards.manifest import load_manifest

    manifest = load_manifest(cfg.bench.manifest, cfg.paths.manifests)
    if manifest.made_by == "sample_world":
        from vipllava.sample_world.build import ensure_sample_world

        ensure_sample_world(cfg.paths.data_root)
    return manifest


def _run_regions(cfg: DictConfig, manifest: Manifest, engine: Engine) -> dict[str, Any]:
    from omegaconf import OmegaConf

    from vipllava.evaluation.benches import regions
    from vipllava.stream.sample_encoder import iter_samples
    from vipllava.visual_prompts.policies import build_policies

    marks: Any = OmegaConf.to_container(cfg.visual_prompts, resolve=True)
    samples = iter_samples(manifest, cfg.paths.manifests, cfg.paths.data_root, cfg.seed)
    questions = regions.read_questions(
        itertools.islice(samples, cfg.limit),
        build_policies(marks["policies"], marks["ranges"]),
        cfg.seed,
    )
    predictions = regions.ask(
        questions,
        engine,
        draw_marks=_draw_marks(cfg.bench.draw_marks),
        max_new_tokens=cfg.max_new_tokens,
        batch_size=cfg.batch_size,
    )
    results = {**_origin(cfg), **regions.score(predictions)}
    regions.write_results(Path(cfg.run_dir), predictions, results)
    _print_regions(results)
    return results


def _draw_marks(value: Any) -> Any:
    """YAML reads ``true`` and ``false`` as booleans; ``both`` stays a word."""
    name = str(value).lower()
    if name not in ("true", "false", "both"):
        raise ConfigError(f"bench.draw_marks is {value!r}; use true, false or both")
    return name


def _run_vip_bench(cfg: DictConfig, manifest: Manifest, engine: Engine) -> dict[str, Any]:
    from vipllava.evaluation.benches import vip_bench
    from vipllava.evaluation.judge import OfflineMatcher

    if manifest.folder is None:
        raise ConfigError(
            f"bench.manifest={manifest.name} has no folder in the ViP-Bench layout; "
            "use one of format vip_bench"
        )
    folder = Path(cfg.paths.data_root) / manifest.folder
    if not folder.is_dir():
        raise VipLlavaError(f"{folder} is missing; put ViP-Bench there or set paths.data_root")
    items = {split: vip_bench.read_items(folder, split) for split in vip_bench.SPLITS}
    run_dir = Path(cfg.run_dir)
    results: dict[str, Any] = {**_origin(cfg), "judge": "offline matcher", "splits": {}}
    for split, all_items in items.items():
        chosen = all_items[: cfg.limit]
        answers = vip_bench.answer_items(
            chosen, engine, max_new_tokens=cfg.max_new_tokens, batch_size=cfg.batch_size
        )
        vip_bench.write_answers(run_dir / f"answers-{split}.json", answers)
        results["splits"][split] = vip_bench.score(chosen, answers, OfflineMatcher())
    write_whole(run_dir / vip_bench.RESULTS, json.dumps(results, indent=1) + "\n")
    _print_vip_bench(results)
    return results


_BENCHES: Mapping[str, Callable[[DictConfig, Manifest, Engine], dict[str, Any]]] = {
    "regions": _run_regions,
    "vip_bench": _run_vip_bench,
}


def _origin(cfg: DictConfig) -> dict[str, Any]:
    return {
        "benchmark": cfg.bench.name,
        "manifest": cfg.bench.manifest,
        "checkpoint": str(cfg.checkpoint),
        "seed": cfg.seed,
    }


def _print_regions(results: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"regions: {results['num_questions']} questions, accuracy in % (95 %)")
    for column in ("shape", "questions", "with marks", "marks not drawn"):
        table.add_column(column, justify="left" if column == "shape" else "right")
    rows = [*results["by_shape"].items(), ("all", results)]
    for name, row in rows:
        known = row["marked"] or row["unmarked"]
        table.add_row(
            name, str(known["total"]), _percent(row["marked"]), _percent(row["unmarked"]),
            end_section=name == rows[-2][0],
        )  # fmt: skip
    Console().print(table)


def _percent(accuracy: Mapping[str, float] | None) -> str:
    if accuracy is None:
        return "-"
    share, low, high = (100 * accuracy[key] for key in ("accuracy", "low", "high"))
    return f"{share:.1f} ({low:.1f}-{high:.1f})"


def _print_vip_bench(results: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    splits = results["splits"]
    table = Table(title=f"ViP-Bench, {results['judge']} (0-100; total with 95 % interval)")
    table.add_column("capability")
    for split in splits:
        table.add_column(split, justify="right")
    capabilities = dict.fromkeys(c for result in splits.values() for c in result["by_capability"])
    for capability in capabilities:
        cells = [result["by_capability"].get(capability) for result in splits.values()]
        table.add_row(
            capability, *(f"{c['score']:.1f} ({c['num_items']})" if c else "-" for c in cells)
        )
    table.add_section()
    table.add_row("total", *(_total(result) for result in splits.values()))
    Console().print(table)


def _total(result: Mapping[str, Any]) -> str:
    if result["low"] is None:
        return "-"
    text = f"{result['total']:.1f} ({result['low']:.1f}-{result['high']:.1f})"
    failed = f", {result['num_failures']} without verdict" if result["num_failures"] else ""
    return f"{text}, {result['num_items']} items{failed}"
