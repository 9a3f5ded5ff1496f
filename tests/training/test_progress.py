"""A run says how far it is, in optimizer steps, on a terminal and without one."""

from __future__ import annotations

import io
import re

from rich.console import Console

from tests.training.toy_training import LIGHTNING_WARNINGS, Loader, make_samples
from vipllava.training.progress import StepProgress

pytestmark = LIGHTNING_WARNINGS


def test_without_a_terminal_a_line_tells_of_steps(make_module, make_trainer, caplog):
    progress = StepProgress(8.0, Console(file=io.StringIO()))
    # Twelve micro-batches are six steps.
    trainer = make_trainer(callbacks=[progress], accumulate_grad_batches=2)
    progress.clock = lambda: 4.0 * trainer.global_step
    with caplog.at_level("INFO", logger="vipllava.training.progress"):
        trainer.fit(make_module(), Loader(make_samples(24), 2, 2))
    lines = [m.split(", ") for name, _, m in caplog.record_tuples if name == progress.__module__]
    assert [line[0] for line in lines] == ["step 2 of 6", "step 4 of 6", "step 6 of 6"]
    assert all(line[1].startswith("loss ") for line in lines)
    assert [line[2:] for line in lines] == [
        ["4 s/step", "0:00:16 left"],
        ["4 s/step", "0:00:08 left"],
        ["4 s/step", "0:00:00 left"],
    ]


def test_a_bar_counts_steps_and_fits_eighty_columns(make_module, make_trainer, caplog):
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=80, color_system=None)
    with caplog.at_level("INFO", logger="vipllava.training.progress"):
        trainer = make_trainer(callbacks=[StepProgress(0, console)], accumulate_grad_batches=2)
        trainer.fit(make_module(), Loader(make_samples(24), 2, 2))
    last = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", text.getvalue()).splitlines()[-1]
    assert re.fullmatch(r".* 6/6 loss [\d.]+, [\d.e+]+ (steps/s|s/step), 0:00:00 left ?", last)
    assert len(last) <= 80
    assert StepProgress.__module__ not in caplog.text
