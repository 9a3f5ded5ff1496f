"""Running an entry point: what ``@hydra.main`` does, with one readable error instead of a trace.

A user's mistake ends with exit code 2 and everything that is wrong; a defect keeps its traceback.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from vipllava.config import sweep
from vipllava.config.argument_names import naming_keys
from vipllava.config.composing import COMPOSING_ERRORS, composition_message
from vipllava.config.machine_faults import explain_fault, make_output_safe
from vipllava.config.overrides import readable_words
from vipllava.config.places import CONFIG_DIR
from vipllava.config.resolvers import register_resolvers
from vipllava.processes import begin
from vipllava.types import VipLlavaError

# On import: a process of a launcher gets the job by pickle, and composes before it calls anything.
register_resolvers()


def run_main(
    task: Callable[[DictConfig], None],
    *,
    config_name: str,
    config_dir: Path = CONFIG_DIR,
    arguments: Sequence[str] | None = None,
) -> None:
    """Compose the job that the command line describes and hand it to ``task``.

    Args:
        task: what to do with the configuration.
        config_name: the root file, without suffix.
        config_dir: absolute path of the configuration folder.
        arguments: the job's part of the command line, its last words; all but the program's name
            if not given.
    """
    begin()
    # Hydra would print its own short message and exit 1; ours, which is short, needs the exception.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    make_output_safe()
    command = sys.argv
    words = command[1:] if arguments is None else arguments
    given = readable_words(words)
    program = _program(len(command) - len(words))
    sys.argv = [command[0], *given]  # where Hydra reads it
    started = False

    def job(cfg: DictConfig) -> float | None:
        nonlocal started
        started = True
        sys.argv = command  # Lightning starts its further processes with it
        if sweep.is_sweep():
            return sweep.run_in_fresh_process(cfg, program)
        try:
            with naming_keys(cfg):
                task(cfg)
        except VipLlavaError as error:
            _note_in_log(str(error))
            _fail(str(error), error.exit_code)
        except Exception as error:
            _note_in_log("the run ended with this:", error)
            _fail_by_machine(error, cfg)
            raise
        return None

    job.__module__ = config_name  # Hydra names the log by it
    main = hydra.main(version_base="1.3", config_path=str(config_dir), config_name=config_name)(job)
    try:
        main()
    except VipLlavaError as error:  # of a sweep's job, when all of them have run
        _fail(str(error))
    except Exception as error:
        # submitit has no class of its own for all of its errors.
        if type(error).__module__.startswith("submitit."):
            _fail(f"a queued job did not end well; the others go on. {error}")
        if started:
            raise
        # OmegaConf has an OSError without a number for a file that is no mapping.
        if isinstance(error, COMPOSING_ERRORS) or getattr(error, "errno", 0) is None:
            _fail_by_machine(error)
            _fail(composition_message(given, config_dir, config_name, error))
        if isinstance(error, BrokenPipeError):  # of `--cfg job | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushed at the exit
            sys.exit(1)
        if isinstance(error, OSError):
            _fail(f"the run's folder cannot be written ({error}): make room or set paths.runs")
        if isinstance(error, RuntimeError) and "srun" in str(error):
            _fail("hydra/launcher=slurm: there is no `srun` here; start it on a cluster's node")
        raise


def _program(num_words: int) -> list[str]:
    """Return the words that start this program: those of ``sys.argv`` before the job's own."""
    spec = sys.modules["__main__"].__spec__
    start = [str(Path(sys.argv[0]).resolve())] if spec is None else ["-m", spec.name]
    return [sys.executable, *start, *sys.argv[1:num_words]]


def _note_in_log(message: str, error: Exception | None = None) -> None:
    """Write why a run ends into its log file; the terminal gets it from the end itself."""
    record = logging.LogRecord(
        __name__, logging.ERROR, __file__, 0, message, None,
        error and (type(error), error, error.__traceback__),
    )  # fmt: skip
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            with suppress(OSError):  # a full disk may be what ended it
                handler.handle(record)


def _fail_by_machine(error: Exception, cfg: DictConfig | None = None) -> None:
    """End the program with a message where the machine is at fault; return where it is not."""
    folders: list[str] = []
    if cfg is not None:
        named = [OmegaConf.select(cfg, key) for key in ("run_dir", "paths.runs", "paths.cache")]
        folders = [*map(str, filter(None, named)), os.environ.get("HF_HOME", "")]
    message = explain_fault(error, filter(None, folders))
    if message is None:
        return
    if cfg is not None and any(Path(folders[0]).glob("checkpoints/[!.]*")):
        message += "; what was saved before is whole, and the same command goes on from it"
    _fail(message)


def _fail(message: str, exit_code: int = VipLlavaError.exit_code) -> None:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(exit_code)
