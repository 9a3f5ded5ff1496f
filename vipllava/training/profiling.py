"""``profiler=torch``: a trace of a few optimizer steps, for Perfetto or Chrome.

Lightning's own ``PyTorchProfiler`` names only modules that exist before the network is built,
counts micro-batches, so that an accumulated step is cut, writes on every process, and leaves its
hooks on every module to the end of the run. Here the steps are whole, and before and behind them a
call costs a comparison or two.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch.profilers import Profiler
from torch import nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile, schedule

from vipllava.files.atomic import write_whole
from vipllava.types import ConfigError

logger = logging.getLogger(__name__)

_MICRO_BATCH: Final = "run_training_batch"
"""Lightning's name of a micro-batch: forward, backward, and in a step's last the optimizer."""
_TABLE_ROWS: Final = 40


class StepTrace(Profiler):
    """Traces some optimizer steps once, on the first process, and leaves the rest of the run alone.

    ``DIRPATH/step-000011.json.gz`` is the trace, named by its first optimizer step; modules, the
    framework's hooks and the steps are in it by name. ``step-000011.txt`` is a table of what took
    longest.

    Args:
        dirpath: folder of the trace.
        skip_steps: optimizer steps before, of this start of the run.
        warmup_steps: steps with the tracer on whose records are thrown away; at least one.
        active_steps: steps that are recorded.
        memory: record what is allocated and freed.
        shapes: record the operators' input shapes.
        stacks: record the Python stack of each operator; slow.

    Raises:
        ConfigError: a number of steps is impossible.
    """

    _profile: profile | None = None  # here, for the base class ends what was never begun, too

    def __init__(
        self,
        dirpath: str | Path,
        skip_steps: int = 10,
        warmup_steps: int = 1,
        active_steps: int = 3,
        memory: bool = False,
        shapes: bool = False,
        stacks: bool = False,
    ) -> None:
        super().__init__(dirpath=dirpath)
        given = {
            "skip_steps": skip_steps,
            "warmup_steps": warmup_steps,
            "active_steps": active_steps,
        }
        problems = [
            f"profiler.trace.{name}={given[name]} must be at least {least}"
            for name, least in {"skip_steps": 0, "warmup_steps": 1, "active_steps": 1}.items()
            if given[name] < least
        ]
        if problems:
            raise ConfigError("the profiler's settings are impossible: " + "; ".join(problems))
        self.folder = Path(dirpath)
        self.skip_steps = skip_steps
        self.warmup_steps = warmup_steps
        self.active_steps = active_steps
        self._options: dict[str, Any] = {
            "profile_memory": memory,
            "record_shapes": shapes,
            "with_stack": stacks,
        }
        self._num_steps = 0
        self._last_step: int | None = None
        self._first_traced = 0
        self._finished = False
        self._open: dict[str, record_function] = {}
        self._hooks: list[Any] = []

    def start(self, action_name: str) -> None:
        """Name what begins; a micro-batch may begin an optimizer step."""
        if self._finished:
            return
        if action_name == _MICRO_BATCH:
            self._begin_micro_batch()
        if self._profile is not None and action_name not in self._open:
            self._open[action_name] = _entered(action_name)

    def stop(self, action_name: str) -> None:
        """Say that it has ended."""
        if opened := self._open.pop(action_name, None):
            opened.__exit__(None, None, None)

    def teardown(self, stage: str | None) -> None:
        """Write what a run that ends within the traced steps has."""
        if self._profile is not None:
            self._end()
        super().teardown(stage)

    def _begin_micro_batch(self) -> None:
        module: Any = getattr(self, "_lightning_module", None)  # Lightning puts it there
        trainer = module.trainer
        if not trainer.is_global_zero:
            self._finished = True
            return
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self._num_steps += 1
        done = self._num_steps - 1
        if done == self.skip_steps:
            self._first_traced = trainer.global_step + self.warmup_steps
            self._begin(trainer.lightning_module)
        elif self._profile is not None:
            self._profile.step()
            if done == self.skip_steps + self.warmup_steps + self.active_steps:
                self._end()

    def _begin(self, module: nn.Module) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=self.warmup_steps, active=self.active_steps, repeat=1),
            on_trace_ready=self._write,
            **self._options,
        )
        self._hooks = _name_modules(module)
        self._profile.__enter__()

    def _end(self) -> None:
        assert self._profile is not None
        for name in list(self._open):
            self.stop(name)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        ended, self._profile, self._finished = self._profile, None, True
        ended.__exit__(None, None, None)

    def _write(self, traced: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{self._first_traced:06d}.json.gz"
        traced.export_chrome_trace(str(path))
        by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = traced.key_averages().table(sort_by=by, row_limit=_TABLE_ROWS)
        write_whole(path.with_name(f"step-{self._first_traced:06d}.txt"), table)
        logger.info("profiler=torch: wrote %s; open it at https://ui.perfetto.dev", path)


def _name_modules(module: nn.Module) -> list[Any]:
    """Let every module's forward pass be recorded by its name; return what takes that back."""
    hooks: list[Any] = []
    for name, child in module.named_modules():
        if not name:
            continue
        running: list[record_function] = []
        begin: Callable[..., None] = partial(_begin_forward, f"{name} ({type(child).__name__})")
        hooks.append(child.register_forward_pre_hook(partial(begin, running)))
        # Also when it does not return: recomputing a block stops as soon as it has what it needs.
        hooks.append(child.register_forward_hook(partial(_end_forward, running), always_call=True))
    return hooks


def _begin_forward(name: str, running: list[record_function], *_: Any) -> None:
    running.append(_entered(name))


def _end_forward(running: list[record_function], *_: Any) -> None:
    if running:
        running.pop().__exit__(None, None, None)


def _entered(name: str) -> record_function:
    record = record_function(name)
    record.__enter__()
    return record
