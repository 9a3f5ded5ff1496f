"""One benchmark from its composed configuration: what ``evaluate.py`` calls.

The only place of evaluation that knows configuration objects; it knows no benchmark by name.
"""

from __future__ import annotations

import importlib
import logging
import math
import shlex
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vipllava.config.places import CONFIG_DIR
from vipllava.config.resolvers import checkpoint_name
from vipllava.config.schema import read
from vipllava.evaluation.answerers import (
    EndpointAnswerer,
    EngineAnswerer,
    EnginePool,
    EngineSettings,
    make_answerer,
)
from vipllava.evaluation.asking import Protocol, ask_items
from vipllava.evaluation.bench import (
    ALL_MARKS,
    Answerer,
    Bench,
    BenchData,
    BenchTable,
    Marks,
    Prediction,
)
from vipllava.evaluation.benches import get_bench
from vipllava.evaluation.encodings import Coordinates, check_encoding
from vipllava.evaluation.joining import join, joined_settings
from vipllava.evaluation.journal import METRICS, Journal
from vipllava.evaluation.perturbation import Perturbation
from vipllava.files.atomic import write_json, write_whole
from vipllava.files.locks import hold_folder
from vipllava.types import ConfigError, RecordError, VipLlavaError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vipllava.evaluation.correctness import Grader
    from vipllava.inference.endpoint import Endpoint

logger = logging.getLogger(__name__)

_COMMON: Final = ("name", "module", "manifest", "max_new_tokens", "marks")
"""Keys of ``bench`` that every benchmark has; the others are its options."""
_Answerers = EngineAnswerer | EnginePool | EndpointAnswerer
_MODEL: Final = ("attn_implementation", "vision_tower", "base", "chat_template", "bits")

_SOURCES: Final = ("checkpoint", "base", "vision_tower")  # of weights, where they are given


def bench_problems(cfg: DictConfig) -> list[str]:
    """Return why the job's benchmark or its options cannot be used; imports nothing heavy."""
    problems: list[str] = []
    checks = (
        _open_bench, find_marks, _check_perturbation, _check_encoding, _check_answerer, _find_judge,
    )  # fmt: skip
    for check in checks:
        try:
            check(cfg)
        except VipLlavaError as error:
            problems.append(str(error))
        except TypeError:  # a value of another kind, which the checks of the configuration name
            continue
    return list(dict.fromkeys(problems))


def _check_encoding(cfg: DictConfig) -> None:
    _coordinates(cfg)
    try:
        marks = find_marks(cfg)
    except ConfigError:  # said already
        return
    behind = EndpointAnswerer if cfg.answerer == "endpoint" else EngineAnswerer
    check_encoding(read(cfg, "encoding"), marks, several_images=behind.several_images)


def _check_answerer(cfg: DictConfig) -> None:
    if cfg.answerer == "endpoint":
        _open_endpoint(cfg, "endpoint")
    elif given := [n for n in ("base_url", "model") if cfg.endpoint[n] is not None]:
        raise ConfigError(
            f"endpoint.{given[0]}={cfg.endpoint[given[0]]}: the engine answers; "
            "pass answerer=endpoint, too"
        )


def _open_endpoint(cfg: DictConfig, section: str) -> Endpoint:
    """Make the endpoint of a section; nothing is sent yet.

    Raises:
        ConfigError: its settings cannot work, or its key is not set.
    """
    from vipllava.inference.endpoint import Endpoint, EndpointSettings

    given = read(cfg, section)
    names = [each.name for each in fields(EndpointSettings) if each.name in given]
    try:
        return Endpoint(EndpointSettings(**{name: given[name] for name in names}))
    except ConfigError as error:
        raise ConfigError(f"{section}: {error}") from None


def _find_judge(cfg: DictConfig) -> Grader | None:
    """Return the judge of the job's scores, or None if they are not a judge's.

    Raises:
        ConfigError: its settings cannot work, its key is not set, or there has to be one.
        VipLlavaError: its prompt or cache cannot be read.
    """
    given = read(cfg, "judge")
    bench, options = _open_bench(cfg)
    if not bench.is_judged(options, bool(given["base_url"] or given["model"])):
        return None
    from vipllava.evaluation.correctness import Grader, JudgePrompt, read_prompt
    from vipllava.evaluation.judge import Judge

    prompt = read_prompt(Path(given["prompt"])) if given["prompt"] else JudgePrompt()
    cache = Path(given["cache"]) if given["cache"] else None
    sizes = {name: given[name] for name in ("runs", "max_asks", "max_tokens")}
    return Grader(Judge(_open_endpoint(cfg, "judge"), cache, **sizes), prompt)


def has_data(cfg: DictConfig) -> bool:
    """Return whether something of the data of a job's benchmark is here, or can be made here."""
    from vipllava.shards.manifest import load_manifest
    from vipllava.shards.tars import match_patterns

    manifest = load_manifest(cfg.bench.manifest, cfg.paths.manifests)
    if manifest.made_by is not None:
        return True
    root = Path(cfg.paths.data_root)
    if manifest.folder is not None:
        return (root / manifest.folder).is_dir()
    return any(found for _, _, found in match_patterns(manifest.patterns, root))


def run_evaluation(*jobs: DictConfig) -> dict[str, dict[str, Any]]:
    """Run benchmarks one after another with one model; print a table for each.

    Args:
        jobs: a configuration per benchmark; they differ in ``bench`` and what follows from it.

    Returns:
        Per benchmark what its ``metrics.json`` holds.

    Raises:
        VipLlavaError: checkpoint or data cannot be used, or another evaluation writes there; the
            message says what to do.
    """
    opened: dict[str, _Answerers] = {}
    results: dict[str, dict[str, Any]] = {}
    for cfg in jobs:
        run_dir = Path(cfg.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        with hold_folder(run_dir, another="name=NEW_NAME"):
            results[cfg.bench.name] = _evaluate(cfg, run_dir, opened)
    return results


def _evaluate(cfg: DictConfig, run_dir: Path, opened: dict[str, _Answerers]) -> dict[str, Any]:
    from vipllava.evaluation.page import page_content
    from vipllava.report.evaluation_page import write_evaluation_page

    bench, options = _open_bench(cfg)
    began, judge = time.monotonic(), _find_judge(cfg)
    items, protocol = iter(()), None
    data = replace(_bench_data(cfg, options), judge=judge)
    if data.manifest.made_by is not None:
        bench = replace(bench, published=())  # those are of other items than the sample's
    settings = _settings(cfg, data)
    if bench.joins:
        folders = {name: run_dir.parent / name for name in bench.joins}
        settings = joined_settings(folders, settings)
        scored = [each for marks in find_marks(cfg) for each in join(folders, marks)]
    else:
        items, protocol = bench.items(data), _protocol(cfg, bench, data)
        scored = _ask(cfg, bench, data, protocol, Journal(run_dir, settings), opened)
    kept = [each for each in scored if each.marks == "kept"]
    model = str(cfg.endpoint.model or checkpoint_name(str(cfg.checkpoint)))
    for name, text in bench.files(kept, model).items():
        write_whole(run_dir / name, text)
    if judge is not None:
        settings |= {"judge": judge.described(scored)}
        bench = replace(bench, metric=f"graded by {judge.judge.endpoint.settings.model}")
    metrics = {
        "bench": bench.name,
        "metric": bench.metric,
        "settings": settings,
        **bench.summarise(scored, bench.chance),
        "published": [asdict(each) for each in bench.published],
    }
    write_json(run_dir / METRICS, metrics, indent=1)
    table = bench.table(bench, metrics)
    _print(table)
    content = page_content(metrics, table, scored, items, protocol, _command())
    write_evaluation_page(run_dir / "report.html", content)
    logger.info(
        "%s of %s: %.0f s; written to %s",
        bench.name, cfg.endpoint.model or cfg.checkpoint, time.monotonic() - began, run_dir,
    )  # fmt: skip
    if all(each.score is None for each in scored):
        raise VipLlavaError(
            f"none of {len(scored)} answers has a score, the first because: {scored[0].failure}. "
            "The answers are kept: start the same command again when that is mended"
        )
    return metrics


def _ask(
    cfg: DictConfig,
    bench: Bench,
    data: BenchData,
    protocol: Protocol,
    journal: Journal,
    opened: dict[str, _Answerers],
) -> list[Prediction]:
    """Return all predictions with their scores; they are in the journal, too."""

    def answerer() -> Answerer:
        if (key := repr(_answered_by(cfg))) not in opened:
            opened.clear()  # two models at once may not fit
            opened[key] = _open_answerer(cfg)
        return replace(opened[key], max_new_tokens=cfg.max_new_tokens)

    scored: list[Prediction] = []
    for marks, asked in ask_items(bench.items(data), protocol, answerer, journal).items():
        answered = [each.unscored() for each in asked if each.has_answer]
        if asked and not answered:
            raise RecordError(f"none of {len(asked)} items has an answer: {asked[0].failure}")
        by_key = {each.key: each for each in bench.score(answered, data)}
        found = [_with_score_or_reason(by_key.get(each.key, each)) for each in asked]
        journal.finish(marks, found)
        if not found:
            logger.warning("marks=%s: the marks of no item can go anywhere else", marks)
        scored += found
    if not scored:
        why = f"the data set `{cfg.bench.manifest}` is empty"
        if data.marks == ("moved",):
            why = "the marks of no item can go anywhere else; see `others` in docs/evaluation.md"
        raise RecordError(f"no questions: {why}")
    return scored


def _with_score_or_reason(prediction: Prediction) -> Prediction:
    """Return what a benchmark's scorer made of an answer; no score at all is a failure, too."""
    if prediction.score is None:
        return prediction if prediction.failure else prediction.failed("it was given no score")
    if all(map(math.isfinite, (prediction.score, *prediction.more.values()))):
        return prediction
    return prediction.failed("its score is no finite number")


def _protocol(cfg: DictConfig, bench: Bench, data: BenchData) -> Protocol:
    return Protocol(
        data.policies, data.seed, data.marks, cfg.encoding, _coordinates(cfg), bench.resize,
        _perturbation(cfg),
    )  # fmt: skip


def _command() -> str:
    """Return the command line of this run, or nothing if a program composed it."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return ""
    hydra = HydraConfig.get()
    folders = [str(each.path) for each in hydra.runtime.config_sources if each.schema == "file"]
    own = [f"--config-dir={folder}" for folder in folders if Path(folder) != CONFIG_DIR]
    return shlex.join(["vipllava", "evaluate", *own, *hydra.overrides.task])


def _open_answerer(cfg: DictConfig) -> _Answerers:
    if cfg.answerer == "endpoint":
        return EndpointAnswerer(_open_endpoint(cfg, "endpoint"))
    from vipllava.models.hub_models import draw_bars_on_terminals_only

    draw_bars_on_terminals_only()
    options = {name: cfg[name] for name in _MODEL}
    engine = EngineSettings(str(cfg.checkpoint), cfg.device, cfg.dtype, options)
    return make_answerer(engine, cfg.num_processes, cfg.max_new_tokens, cfg.batch_size)


def _answered_by(cfg: DictConfig) -> dict[str, Any]:
    """Return what the answers depend on of who gives them."""
    if cfg.answerer == "endpoint":
        asked = _open_endpoint(cfg, "endpoint").settings
        return {"answerer": "endpoint", "endpoint": asked.recorded()}
    from vipllava.checkpoints.folders import content_digest

    names = ("answerer", "checkpoint", *_MODEL, "dtype", "device")
    sources = [name for name in _SOURCES if read(cfg, name) is not None]
    return {name: read(cfg, name) for name in names} | {
        f"{name}_digest": content_digest(Path(str(read(cfg, name))).expanduser())
        for name in sources
    }


def _settings(cfg: DictConfig, data: BenchData) -> dict[str, Any]:
    """Return what the answers depend on, markings aside: those have a file each."""
    bench = {key: value for key, value in read(cfg, "bench").items() if key != "marks"}
    return {
        "bench": bench,
        **_answered_by(cfg),
        **{name: read(cfg, name) for name in ("seed", "limit", "max_new_tokens")},
        "data": data.fingerprint,
        "manifest": data.protocol,
        "encoding": cfg.encoding,
        "coordinates": read(cfg, "coordinates") if cfg.encoding == "coordinates" else None,
        "visual_prompts": read(cfg, "visual_prompts"),
        "perturb": read(cfg, "perturb"),
    }


def _coordinates(cfg: DictConfig) -> Coordinates:
    given = read(cfg, "coordinates")
    return Coordinates(*(given.get(each.name) for each in fields(Coordinates)))


def _perturbation(cfg: DictConfig) -> Perturbation:
    given = read(cfg, "perturb")
    return Perturbation(**{each.name: given.get(each.name) for each in fields(Perturbation)})


def _check_perturbation(cfg: DictConfig) -> None:
    try:
        Perturbation(colour=read(cfg, "perturb.colour"))
    except ConfigError as error:
        raise ConfigError(f"perturb.colour: {error}") from None
    try:
        perturb = _perturbation(cfg)
    except (ConfigError, AttributeError):  # said by the checks of the configuration
        return
    perturb.check(read(cfg, "encoding"))


def find_marks(cfg: DictConfig) -> tuple[Marks, ...]:
    """Return what becomes of the marks, each once.

    Raises:
        ConfigError: there is no such way; lists the known ones.
    """
    given = read(cfg, "marks")
    listed = given if isinstance(given, list) else [given]
    known = ", ".join(ALL_MARKS)
    if not listed or (wrong := [each for each in listed if each not in ALL_MARKS]):
        shown = ",".join(map(str, wrong if listed else []))
        raise ConfigError(f"marks={shown}: expected one or several of {known}")
    return tuple(dict.fromkeys(listed))


def _open_bench(cfg: DictConfig) -> tuple[Bench, Any]:
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
    return BenchData(
        manifest, Path(cfg.paths.data_root), policies, cfg.seed, cfg.limit, options, find_marks(cfg)
    )


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
    console = Console()
    console.print(shown)
    for note in table.notes:
        console.print(note, markup=False, highlight=False)
