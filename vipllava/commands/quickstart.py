"""``vipllava quickstart``: the whole recipe on the tiny model, ending with a page to look at.

It runs the commands that a user would type, one process each, and then reads the files that they
wrote; nothing here trains or scores by itself. Its folder is one that it has marked: the same
command goes on there where an earlier one stopped.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vipllava.commands.options import DataRoot
from vipllava.config.places import MANIFESTS_DIR
from vipllava.files.atomic import free_path, move, read_yaml, write_whole, write_yaml
from vipllava.files.locks import hold_folder
from vipllava.processes import run_child, shell_code
from vipllava.types import VipLlavaError

if TYPE_CHECKING:
    from vipllava.report.quickstart_page import Example

_LOG = logging.getLogger(__name__)

STAGES: Final = ("pretrain", "finetune", "gpt4v")
PROGRAM = (sys.executable, "-m", "vipllava.cli")
"""What a step's words are given to."""
MARK: Final = "quickstart.yaml"
"""File of a folder that is a quick start's own: its settings, and the seconds of finished steps."""
_NUM_EXAMPLES: Final = 12
_PACKAGES: Final = ("torch", "transformers", "lightning", "webdataset")


def plan_steps(output: Path, data_root: Path, seed: int) -> dict[str, tuple[str, ...]]:
    """Return the words after ``vipllava`` of every step, by its name, in order."""
    data = f"paths.data_root={data_root}"
    runs, checkpoint = f"paths.runs={output}", f"checkpoint={output}/tiny-gpt4v/export"
    train = ("train", "experiment=quickstart", runs, data, f"seed={seed}")
    # A tenth of the work less than at the default of 16, and the same answers.
    evaluate = ("evaluate", runs, data, f"seed={seed}", checkpoint, "batch_size=64")
    every = "marks=[kept,removed,moved,recoloured]"
    return {
        "sample_data": ("sample-data", "--data-root", str(data_root)),
        **{stage: (*train, f"stage={stage}") for stage in STAGES},
        "regions": (*evaluate, "bench=regions", "name=eval/regions", every),
        "vip_bench": (*evaluate, "bench=vip_bench", "name=eval/vip_bench", "max_new_tokens=32"),
    }


def quickstart(
    output: Annotated[Path, typer.Option(help="Folder of the runs and the report.")] = Path(
        "runs/quickstart"
    ),
    seed: Annotated[int, typer.Option(min=0)] = 42,
    again: Annotated[
        bool, typer.Option("--again", help="Begin anew; an earlier one is kept beside it.")
    ] = False,
    data_root: DataRoot = "data",
) -> None:
    """Train three stages on sample data, evaluate, report.

    The same command goes on where it was stopped.
    """
    from vipllava.sample_world.build import require_photographs

    require_photographs()  # not only after minutes, when the report needs them
    if again and (output / MARK).is_file():
        with hold_folder(output, another="--output FOLDER"):
            kept = move(output, free_path(f"{output.resolve()}-before-", 1))
        _LOG.info("the earlier quick start is kept in %s", kept)
    settings = {"seed": seed, "data_root": str(Path(data_root).absolute())}
    _mark(output, settings)
    with hold_folder(output, another="--output FOLDER"):
        seconds: dict[str, float] = (read_yaml(output / MARK) or {}).get("seconds", {})
        if "all" in seconds and (output / "report.html").is_file():
            _LOG.info(
                "this quick start has ended already: open %s; --again makes a new one",
                output / "report.html",
            )
            return
        for name, words in plan_steps(output, Path(data_root), seed).items():
            if name in seconds and _result_of(output, name).exists():
                _LOG.info("%s: done before", name)
                continue
            seconds[name] = _run_step(name, words)
            write_yaml(output / MARK, settings | {"seconds": seconds})
        seconds["all"] = sum(value for name, value in seconds.items() if name != "all")
        summary = write_report(output, Path(data_root), seconds)
        write_yaml(output / MARK, settings | {"seconds": seconds})
    _LOG.info(
        "with marks %.1f %%, without %.1f %% of %d questions; %.0f s in all; open %s",
        100 * summary["accuracy_marked"], 100 * summary["accuracy_unmarked"],
        summary["num_questions"], seconds["all"], output / "report.html",
    )  # fmt: skip


def _mark(output: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder this command's own, if it is new; complain about one that is not."""
    remedy = "pass --output with another folder"
    if output.exists() and not output.is_dir():
        raise VipLlavaError(f"--output {output} is a file: {remedy}")
    marked = read_yaml(output / MARK)
    if marked is None:
        if output.is_dir() and (found := sorted(path.name for path in output.iterdir())):
            raise VipLlavaError(
                f"--output {output} was not made by `vipllava quickstart` and holds "
                f"{', '.join(found[:3])}{', ...' if found[3:] else ''}: {remedy}, or move it away"
            )
        output.mkdir(parents=True, exist_ok=True)
        write_yaml(output / MARK, dict(settings))
        return
    for name, value in settings.items():
        if marked.get(name) != value:
            option = f"--{name.replace('_', '-')}"
            raise VipLlavaError(
                f"--output {output} holds a quick start with {option} {marked.get(name)}, not "
                f"{value}: to go on with it pass that, to begin anew --again (it is kept), or "
                f"{remedy}"
            )


def _result_of(output: Path, step: str) -> Path:
    """Return what a step leaves when it has ended."""
    if step in STAGES:
        return output / f"tiny-{step}" / "export"
    return output if step == "sample_data" else output / "eval" / step / "metrics.json"


def write_report(output: Path, data_root: Path, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Write ``report.html``, ``shapes.png`` and ``summary.json``, and return the summary."""
    from vipllava.report.charts import read_loss_curve
    from vipllava.report.quickstart_page import QuickstartPage, write_quickstart_page
    from vipllava.report.shapes_image import draw_shapes_image

    curves = {
        stage: read_loss_curve(output / f"tiny-{stage}" / "csv" / "metrics.csv") for stage in STAGES
    }
    regions = _read_json(output / "eval" / "regions" / "metrics.json")
    bench = _read_json(output / "eval" / "vip_bench" / "metrics.json")
    totals = [split["total"] for split in bench["splits"].values()]
    marked, unmarked = (regions["marks"][marks] for marks in ("kept", "removed"))
    summary: dict[str, Any] = {
        "accuracy_marked": marked["score"],
        "accuracy_unmarked": unmarked["score"],
        "interval_marked": [marked["low"], marked["high"]],
        "interval_unmarked": [unmarked["low"], unmarked["high"]],
        "num_questions": marked["num_items"],
        "faithfulness": regions["faithfulness"],
        "vip_bench_total": sum(totals) / len(totals),
        "vip_bench": {name: split["total"] for name, split in bench["splits"].items()},
        "loss_first": {stage: _mean(curve[:10]) for stage, curve in curves.items()},
        "loss_last": {stage: _mean(curve[-10:]) for stage, curve in curves.items()},
        "seconds": {part: round(value, 1) for part, value in seconds.items()},
    }
    image = draw_shapes_image()
    image.save(output / "shapes.png")
    page = QuickstartPage(
        shapes_image=image,
        loss_curves=curves,
        regions=regions,
        vip_bench=bench,
        examples=_examples(output, data_root, int(regions["settings"]["seed"])),
        seconds=seconds,
        versions={"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
    )
    write_quickstart_page(output / "report.html", page)
    write_whole(output / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _run_step(name: str, words: Sequence[str]) -> float:
    """Run one command with its output on this terminal; return its seconds."""
    _LOG.info("%s: %s", name, shlex.join(["vipllava", *words]))
    began = time.monotonic()
    code, asked_by = run_child([*PROGRAM, *words])
    if code or asked_by is not None:
        code = shell_code(code or -(asked_by or 0))
        error = VipLlavaError(
            f"the quick start stopped: step `{name}` ended with code {code}; the same command goes "
            "on with it"
        )
        error.exit_code = code
        raise error
    return time.monotonic() - began


def _examples(output: Path, data_root: Path, seed: int) -> list[Example]:
    """Return a dozen held-out questions, as many shapes as there are, with their pictures."""
    from vipllava.evaluation.asking import item_image
    from vipllava.evaluation.bench import Item
    from vipllava.evaluation.journal import predictions_path, read_predictions
    from vipllava.evaluation.marking import mark_item
    from vipllava.report.quickstart_page import Example
    from vipllava.sample_world import TINY_POLICIES
    from vipllava.shards.manifest import load_manifest
    from vipllava.stream.sample_encoder import SampleSource
    from vipllava.visual_prompts.render import render_plan

    folder = output / "eval" / "regions"
    kept, removed = (read_predictions(predictions_path(folder, m)) for m in ("kept", "removed"))
    seen, order = Counter[str](), list[tuple[int, str, int]]()
    for n, (key, row) in enumerate(kept.items()):
        shape = row.groups[-1]
        if key in removed:
            order.append((seen[shape], shape, n))
            seen[shape] += 1
    manifest = load_manifest("sample_regions", MANIFESTS_DIR)
    source = SampleSource.open(manifest, data_root, seed)
    keys, examples = list(kept), list[Example]()
    for _, shape, n in sorted(order)[:_NUM_EXAMPLES]:
        row, item = kept[keys[n]], Item(keys[n], source.sample(n))
        image = item_image(item)
        assert image is not None
        marked = mark_item(item, image.size, TINY_POLICIES, seed, "kept")
        assert marked is not None
        drawn, blank = render_plan(image, marked.plan), removed[keys[n]].answer
        examples.append(
            Example(drawn, row.question, str(row.ground_truth), row.answer, blank, shape)
        )
    return examples


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _mean(points: Sequence[tuple[int, float]]) -> float:
    return sum(loss for _, loss in points) / len(points)
