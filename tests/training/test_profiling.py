"""The trace that ``profiler=torch`` leaves."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.training.toy_training import LIGHTNING_WARNINGS, Loader, make_samples
from vipllava.training.profiling import StepTrace
from vipllava.training.run import run_training
from vipllava.types import ConfigError

pytestmark = LIGHTNING_WARNINGS

BLOCK = "model.model.language_model.layers.1 (LlamaDecoderLayer)"


def events(path: Path) -> list[dict[str, Any]]:
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def spans(path: Path, name: str) -> list[tuple[float, float]]:
    """Return begin and end of everything of that name, in order."""
    found = [e for e in events(path) if e.get("ph") == "X" and e["name"] == name]
    return sorted((e["ts"], e["ts"] + e["dur"]) for e in found if e["cat"] == "user_annotation")


def test_a_run_with_the_profiler_leaves_a_trace_of_its_third_step(config, tmp_path):
    run_training(
        config(
            "stage=pretrain",
            "stage.epochs=1",
            "stage.gradient_checkpointing=true",
            "profiler=torch",
            "profiler.trace.skip_steps=1",
            "profiler.trace.active_steps=1",
            "profiler.trace.shapes=true",
        )
    )
    folder = tmp_path / "runs" / "tiny-pretrain" / "profile"
    names = {path.name for path in folder.iterdir()}
    assert names == {"step-000002.json.gz", "step-000002.txt"}
    trace = folder / "step-000002.json.gz"
    assert len(spans(trace, "ProfilerStep#1")) == 1
    # Two micro-batches. What is in a block runs forward, and once more for the backward pass.
    assert len(spans(trace, "run_training_batch")) == 2
    assert len(spans(trace, "model.model.multi_modal_projector (VipLlavaMultiModalProjector)")) == 2
    assert len(spans(trace, BLOCK)) >= 2
    assert len(spans(trace, f"{BLOCK[:-20]}.mlp (LlamaMLP)")) == 4
    assert len(spans(trace, "Optimizer.step#AdamW.step")) == 1
    assert any("Input Dims" in e.get("args", {}) for e in events(trace))
    assert "aten::mm" in (folder / "step-000002.txt").read_text()


@pytest.fixture
def trace(tmp_path) -> StepTrace:
    return StepTrace(tmp_path / "profile", skip_steps=1, warmup_steps=1, active_steps=2)


def test_whole_steps_are_traced_and_then_nothing_is(make_module, make_trainer, trace):
    module = make_module()
    trainer = make_trainer(profiler=trace, accumulate_grad_batches=2)
    trainer.fit(module, Loader(make_samples(24), 2, 2))

    assert trainer.global_step == 6
    (written,) = trace.folder.glob("*.json.gz")
    assert written.name == "step-000002.json.gz"
    steps = spans(written, "ProfilerStep#1") + spans(written, "ProfilerStep#2")
    updates = spans(written, "Optimizer.step#AdamW.step")
    assert len(spans(written, "run_training_batch")) == 4
    assert len(spans(written, BLOCK)) == 4
    assert len(updates) == 2
    for step, update in zip(steps, updates, strict=True):
        assert step[0] < update[0] < update[1] < step[1]
    left = [
        hook
        for part in module.network.modules()
        for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values())
        if isinstance(hook, partial)
    ]
    assert left == []


def test_a_run_that_ends_early_leaves_what_it_has(make_module, make_trainer, trace):
    trainer = make_trainer(profiler=trace)
    trainer.fit(make_module(), Loader(make_samples(6), 2, 1))

    (written,) = trace.folder.glob("*.json.gz")
    assert len(spans(written, "Optimizer.step#AdamW.step")) == 1


def test_only_the_first_process_writes(make_module, make_trainer, trace):
    trainer = make_trainer(
        profiler=trace, devices=2, strategy="ddp_fork", use_distributed_sampler=False
    )
    trainer.fit(make_module(), Loader(make_samples(12), 2, 1))

    (written,) = trace.folder.glob("*.json.gz")
    assert len(spans(written, "run_training_batch")) == 2


def test_impossible_steps_are_refused():
    with pytest.raises(ConfigError) as error:
        StepTrace("profile", skip_steps=-1, warmup_steps=0, active_steps=0)
    assert str(error.value) == (
        "the profiler's settings are impossible: profiler.trace.skip_steps=-1 must be at least 0; "
        "profiler.trace.warmup_steps=0 must be at least 1; "
        "profiler.trace.active_steps=0 must be at least 1"
    )
