"""A step with an impossible loss stops the run, or changes nothing, and names its samples."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.training.toy_training import (
    LIGHTNING_WARNINGS,
    Loader,
    make_samples,
    overflow_backwards,
)
from vipllava.training import lit_module
from vipllava.training.guard import LossGuard, StepRecord
from vipllava.types import CheckpointError, ConfigError, VipLlavaError

pytestmark = LIGHTNING_WARNINGS
RECORD = StepRecord(
    reason="the loss is nan",
    step=7,
    loss=math.nan,
    place={"epoch": 0, "step": 7, "samples": 28, "window": 0, "row": 0},
    data={"seed": 1},
    world_size=2,
    accumulate=1,
    keys=[[["a/1", "a/2"]], [["b/1"]]],
    losses=[[0.5], [math.inf]],
)


def steady(guard: LossGuard, count: int = 20, loss: float = 2.0) -> LossGuard:
    for _ in range(count):
        assert guard.judge(loss) is None
    return guard


def test_a_loss_that_is_no_number():
    for loss in (math.nan, math.inf, -math.inf):
        verdict = LossGuard().judge(loss)
        assert verdict is not None
        assert (verdict.action, verdict.reason) == ("stop", f"the loss is {loss}")
    verdict = LossGuard(on_nonfinite="skip").judge_gradient(math.inf)
    assert verdict is not None
    assert (verdict.action, verdict.reason) == ("skip", "the gradient's norm is inf")
    assert LossGuard().judge_gradient(1e9) is None


def test_a_loss_far_above_the_last_ones():
    guard = steady(LossGuard(spike_factor=3.0))
    assert guard.judge(5.9) is None
    verdict = guard.judge(6.1)
    assert verdict is not None
    assert verdict.reason == (
        "the loss is 6.1, more than 3 times the 2 that is the median of the last 21 steps"
    )
    # What was refused is no part of the median.
    assert steady(guard, 5).judge(6.1) is not None
    assert steady(LossGuard(on_spike="ignore")).judge(1000.0) is None


def test_the_first_steps_have_to_be_worse_than_chance_too():
    assert steady(LossGuard(spike_factor=3.0), 19).judge(10.3) is None
    assert steady(LossGuard(spike_factor=3.0), 20).judge(10.3) is not None
    verdict = steady(LossGuard(spike_factor=3.0), 1).judge(10.4)
    assert verdict is not None
    assert verdict.reason == (
        "the loss is 10.4, more than 3 times the 2 that is the median of the last 1 steps"
    )


def test_far_above_chance_is_a_spike_whatever_came_before():
    guard = LossGuard()
    guard.chance_loss = math.log(259)
    verdict = guard.judge(56.0)  # in the first step
    assert verdict is not None
    assert verdict.reason == (
        "the loss is 56, more than 10 times the 5.557 of a model that guesses"
    )
    creeping = LossGuard(window=20)
    creeping.chance_loss = math.log(259)
    losses = [4.0 * 1.02**step for step in range(200)]
    assert [creeping.judge(loss) is None for loss in losses].index(False) == 133  # at 55.7


def test_where_all_losses_are_near_zero_a_hard_batch_is_no_spike():
    assert steady(LossGuard(), 100, 0.01).judge(0.11) is None
    assert steady(LossGuard(), 100, 0.01).judge(1.0) is None
    assert steady(LossGuard(), 100, 0.01).judge(1.1) is not None
    assert steady(LossGuard(spike_floor=0.0), 100, 0.01).judge(0.11) is not None


def test_the_window_forgets():
    guard = steady(LossGuard(window=20), 20, 2.0)
    steady(guard, 20, 0.1)
    assert guard.judge(2.0) is not None


def test_so_many_steps_may_be_left_out():
    guard = LossGuard(on_nonfinite="skip", max_skipped=2)
    verdicts = [guard.judge(math.nan) for _ in range(3)]
    assert [v and v.action for v in verdicts] == ["skip", "skip", "stop"]
    assert verdicts[2] is not None
    assert "2 steps were left out already (max_skipped)" in verdicts[2].reason


def test_a_resumed_run_decides_alike():
    guard = steady(LossGuard(on_spike="skip"))
    guard.judge(100.0)
    other = LossGuard(on_spike="skip")
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.num_skipped == 1
    assert other.judge(100.0) == guard.judge(100.0) != LossGuard().judge(100.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"on_spike": "warn"}, "on_spike=warn is not one of stop, skip, ignore"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite=ignore is not one of stop, skip"),
        ({"spike_factor": 1.0}, "spike_factor=1.0 must be above 1"),
        ({"window": 5}, "window=5 at least 20"),
        ({"spike_floor": -1.0}, "spike_floor=-1.0 must be a number of at least 0"),
    ],
)
def test_impossible_values(values, message):
    with pytest.raises(ConfigError, match=message):
        LossGuard(**values)


def test_a_record_is_read_as_it_was_written(tmp_path):
    path = RECORD.write(tmp_path / "guard")
    read = StepRecord.read(path)
    assert path.name == "step-000007.json"
    assert (read.loss, read.losses) == ("nan", [[0.5], ["inf"]])
    assert (read.keys, read.place, read.world_size) == (RECORD.keys, RECORD.place, 2)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))  # JSON, no NaN


def test_a_file_that_is_no_record(tmp_path):
    for text in (None, "{", '{"step": 1}'):
        path = tmp_path / "x.json"
        if text is not None:
            path.write_text(text)
        with pytest.raises(CheckpointError, match=r"no record of a refused step .*RUN/guard"):
            StepRecord.read(path)


class Poisoned:
    """The loss of every micro-batch with a certain sample is multiplied."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, key: str, factor: float) -> None:
        whole = lit_module.supervised_loss_sum

        def loss(model, batch, observers=()):
            total, count = whole(model, batch, observers)
            return total * (factor if key in batch.keys else 1.0), count

        monkeypatch.setattr(lit_module, "supervised_loss_sum", loss)


@pytest.mark.parametrize("factor", [math.nan, 1e4])
def test_a_step_that_is_left_out_changes_no_weight(
    make_module, make_trainer, monkeypatch, factor, caplog
):
    Poisoned(monkeypatch, "set/45", factor)
    guard = LossGuard(on_nonfinite="skip", on_spike="skip", window=20)
    module = make_module(guard=guard, warmup_ratio=0.0, schedule="constant")
    weights: list[torch.Tensor] = []
    monkeypatch.setattr(
        type(module),
        "on_train_batch_start",
        lambda self, batch, index: weights.append(
            torch.cat([p.detach().flatten().clone() for p in self.network.parameters()])
        ),
    )
    # 30 steps of two micro-batches of one sample: the 23rd has sample 45.
    trainer = make_trainer(accumulate_grad_batches=2, gradient_clip_val=1.0)
    trainer.fit(module, Loader(make_samples(60), 1, 2))

    steps = weights[::2]
    unchanged = [n for n in range(29) if torch.equal(steps[n], steps[n + 1])]
    assert unchanged == [22]
    assert (trainer.global_step, guard.num_skipped) == (30, 1)
    assert "at step 22; its samples: set/44, set/45. It is left out" in caplog.text


def test_a_run_that_stops_leaves_the_weights_as_they_were(make_module, make_trainer, monkeypatch):
    Poisoned(monkeypatch, "set/3", math.inf)
    recipe = {"warmup_ratio": 0.0, "schedule": "constant"}
    module = make_module(**recipe)
    with pytest.raises(VipLlavaError, match=r"the loss is inf at step 1; .*set/2, set/3"):
        make_trainer(accumulate_grad_batches=2).fit(module, Loader(make_samples(6), 1, 2))
    one = make_module(**recipe)
    make_trainer("one", accumulate_grad_batches=2, max_steps=1).fit(
        one, Loader(make_samples(6), 1, 2)
    )
    for found, expected in zip(module.network.parameters(), one.network.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_a_gradient_that_is_no_number(make_module, make_trainer):
    module = make_module()
    module.configure_model()
    overflow_backwards(module, at_step=1)
    with pytest.raises(
        VipLlavaError, match="the gradient's norm is nan at step 1; its samples: set/2, set/3"
    ):
        make_trainer(gradient_clip_val=1.0).fit(module, Loader(make_samples(4), 2, 1))


def test_a_run_that_diverges_at_once_is_stopped(make_module, make_trainer):
    module = make_module(learning_rate=50.0, warmup_ratio=0.0)
    with pytest.raises(VipLlavaError, match=r"the loss is .* at step [1-9]; its samples"):
        make_trainer().fit(module, Loader(make_samples(40), 2, 1))


def test_the_guard_goes_into_checkpoints(make_module, make_trainer, tmp_path: Path):
    module = make_module()
    trainer = make_trainer()
    trainer.fit(module, Loader(make_samples(6), 2, 1))
    trainer.save_checkpoint(tmp_path / "c.ckpt")

    other = make_module()
    make_trainer("again", max_epochs=2).fit(
        other, Loader(make_samples(6), 2, 1), ckpt_path=tmp_path / "c.ckpt", weights_only=True
    )
    assert len(other.guard.state_dict()["losses"]) == 6
    assert other.guard.state_dict()["losses"][:3] == module.guard.state_dict()["losses"]
