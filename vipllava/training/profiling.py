"""``profiler=torch``: a trace of a few optimizer steps, for Perfetto or Chrome.

Lightning's own names only modules that exist before the network is built, cuts accumulated steps,
writes on every process, and leaves its hooks on every module to the end.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch.profilers import Profiler
from torch import nn
from torch.autograd.profiler import record_function
from torch.profiler import profile, schedule

from vipllava.files.atomic import write_whole
from vipllava.types import ConfigError

logger = logging.getLogger(__name__)

_MICRO_BATCH: Final = "run_training_batch"
"""Lightning's name of a micro-batch: forward, backward, and in a step's last the optimizer."""


@dataclass(eq=False)
class StepTrace(Profiler):
    """Traces some optimizer steps once, on the first process, and leaves the rest of the run alone.

    ``DIRPATH/step-000011.json.gz`` is the trace, named by its first optimizer step, with modules,
    hooks and steps by name; ``step-000011.txt`` is a table of what took longest.
    """

    dirpath: str | Path  # folder of the trace
    skip_steps: int = 10  # optimizer steps before, of this start of the run
    warmup_steps: int = 1  # steps with the tracer on whose records are thrown away; at least one
    active_steps: int = 3  # steps that are recorded
    memory: bool = False  # record what is allocated and freed
    shapes: bool = False  # record the operators' input shapes
    stacks: bool = False  # record the Python stack of each operator; slow

    # Of the class, too: the base class ends what was never begun.
    _profile: profile | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__init__(dirpath=self.dirpath)
        least = {"skip_steps": 0, "warmup_steps": 1, "active_steps": 1}
        problems = [
            f"profiler.trace.{name}={value} must be at least {number}"
            for name, number in least.items()
            if (value := getattr(self, name)) < number
        ]
        if problems:
            raise ConfigError("the profiler's settings are impossible: " + "; ".join(problems))
        self.folder = Path(self.dirpath)
        self._steps_begun = 0
        self._last_step: int | None = None
        self._name = ""
        self._finished = False
        self._running: dict[str, list[record_function]] = defaultdict(list)
        self._hooks: list[Any] = []

    def start(self, action_name: str) -> None:
        """Name what begins; a micro-batch may begin an optimizer step."""
        if self._finished:
            return
        if action_name == _MICRO_BATCH:
            self._begin_micro_batch()
        if self._profile is not None:
            _enter(self._running[action_name], action_name)

    def stop(self, action_name: str) -> None:
        """Say that it has ended."""
        _leave(self._running[action_name])

    def teardown(self, stage: str | None) -> None:
        """Write what a run that ends within the traced steps has."""
        self._end()
        super().teardown(stage)

    def _begin_micro_batch(self) -> None:
        module: Any = getattr(self, "_lightning_module", None)  # Lightning puts it there
        trainer = module.trainer
        self._finished = not trainer.is_global_zero
        if self._finished or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        done, self._steps_begun = self._steps_begun, self._steps_begun + 1
        if done == self.skip_steps:
            self._name = f"step-{trainer.global_step + self.warmup_steps:06d}"
            steps = {"warmup": self.warmup_steps, "active": self.active_steps}
            self._profile = profile(
                schedule=schedule(wait=0, repeat=1, **steps),
                on_trace_ready=self._write,
                profile_memory=self.memory,
                record_shapes=self.shapes,
                with_stack=self.stacks,
            )
            self._hooks = _name_modules(trainer.lightning_module)
            self._profile.__enter__()
        elif self._profile is not None:
            self._profile.step()
            if done == self.skip_steps + self.warmup_steps + self.active_steps:
                self._end()

    def _end(self) -> None:
        if self._profile is None:
            return
        for running in self._running.values():
            while running:
                _leave(running)
        for hook in self._hooks:
            hook.remove()
        ended, self._profile, self._finished = self._profile, None, True
        ended.__exit__(None, None, None)

    def _write(self, traced: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self._name}.json.gz"
        traced.export_chrome_trace(str(path))
        by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = traced.key_averages().table(sort_by=by, row_limit=40)
        write_whole(self.folder / f"{self._name}.txt", table)
        logger.info("profiler=torch: wrote %s; open it at https://ui.perfetto.dev", path)


def _name_modules(module: nn.Module) -> list[Any]:
    """Let every module's forward pass be recorded by its name; return what takes that back."""
    hooks: list[Any] = []
    for name, child in module.named_modules():
        if not name:
            continue
        running: list[record_function] = []
        begin: Any = partial(_enter, running, f"{name} ({type(child).__name__})")
        hooks.append(child.register_forward_pre_hook(begin))
        # Also when it does not return: recomputing a block stops as soon as it has what it needs.
        hooks.append(child.register_forward_hook(partial(_leave, running), always_call=True))
    return hooks


def _enter(running: list[record_function], name: str, *_: Any) -> None:
    running.append(record_function(name))
    running[-1].__enter__()


def _leave(running: list[record_function], *_: Any) -> None:
    if running:
        running.pop().__exit__(None, None, None)
