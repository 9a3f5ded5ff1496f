"""Checkpoints are whole or not there; tests/training/test_resume.py kills real processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests import preloaded
from tests.training.toy_training import LIGHTNING_WARNINGS, Loader, make_samples
from vipllava.training import checkpointing, ending
from vipllava.training.checkpointing import AtomicCheckpointIO, CheckpointCallback
from vipllava.training.ending import RunEnd, StopRequest
from vipllava.types import CheckpointError, Interrupted

pytestmark = LIGHTNING_WARNINGS


def _names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that is full after half of a file."""

    def write(value, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", write)


def test_a_file_has_its_name_when_it_is_whole(tmp_path):
    plugin = AtomicCheckpointIO()
    weight = torch.ones(3)
    plugin.save_checkpoint({"weight": weight}, tmp_path / "000001.ckpt")
    weight += 1  # training goes on while the file is written
    plugin.teardown()
    assert _names(tmp_path) == ["000001.ckpt"]
    assert torch.load(tmp_path / "000001.ckpt")["weight"].tolist() == [1, 1, 1]


def test_a_full_disk_keeps_the_one_before(tmp_path, full_disk):
    (tmp_path / "000001.ckpt").write_bytes(b"whole")
    plugin = AtomicCheckpointIO()

    def save_and_wait() -> None:
        plugin.save_checkpoint({}, tmp_path / "000002.ckpt")
        plugin.wait()

    with pytest.raises(CheckpointError, match=r"000002\.ckpt could not be written .*No space"):
        save_and_wait()
    plugin.teardown()
    assert _names(tmp_path) == ["000001.ckpt"]


def _fit(make_module, make_trainer, callback, *more, **changes):
    trainer = make_trainer(
        enable_checkpointing=True,
        callbacks=[callback, RunEnd(), *more],
        plugins=[AtomicCheckpointIO()],
        **changes,
    )
    trainer.fit(make_module(), Loader(make_samples(12), 2, 2))
    return trainer


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [6]), (2, [4, 6])])
def test_the_last_ones_stay(make_module, make_trainer, tmp_path, keep_last, kept):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".000009.ckpt.unfinished").write_bytes(b"half of an earlier one")
    seen: list[list[str]] = []

    class Watching(CheckpointCallback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            trainer.strategy.checkpoint_io.wait()
            seen.append(_names(folder))

    torch.save({}, folder / "best.ckpt")
    _fit(make_module, make_trainer, Watching(folder, every_n_steps=2, keep_last=keep_last))
    assert _names(folder) == [*(f"{step:06d}.ckpt" for step in kept), "best.ckpt"]
    assert torch.load(folder / "000006.ckpt", weights_only=True)["global_step"] == 6
    assert max(len(names) for names in seen) <= keep_last + 1


def test_an_older_one_stays_until_the_new_one_is_whole(tmp_path, full_disk):
    (tmp_path / "000001.ckpt").write_bytes(b"whole")
    plugin = AtomicCheckpointIO()
    plugin.on_written = CheckpointCallback(tmp_path, keep_last=1)._remove_older
    plugin.save_checkpoint({}, tmp_path / "000002.ckpt")
    with pytest.raises(CheckpointError):
        plugin.teardown()
    assert _names(tmp_path) == ["000001.ckpt"]


@pytest.mark.parametrize("content", [b"", b"no pickle at all"])
def test_reading_a_damaged_file_is_a_readable_error(tmp_path, content):
    (tmp_path / "000001.ckpt").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"000001\.ckpt (is empty|cannot be read).* move it away"
    ):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "000001.ckpt", weights_only=True)


@pytest.mark.parametrize(("changes", "last"), [({}, 6), ({"max_steps": 5}, 5)])
def test_the_last_step_is_a_checkpoint(make_module, make_trainer, tmp_path, changes, last):
    callback = CheckpointCallback(tmp_path / "c", every_n_steps=4)
    _fit(make_module, make_trainer, callback, **changes)
    assert _names(tmp_path / "c") == ["000004.ckpt", f"{last:06d}.ckpt"]


def test_by_the_clock(make_module, make_trainer, tmp_path, monkeypatch):
    now = iter(range(10_000))
    monkeypatch.setattr(checkpointing.time, "monotonic", lambda: 30.0 * next(now))
    callback = CheckpointCallback(
        tmp_path / "c", every_n_steps=None, every_n_minutes=1, keep_last=9
    )
    _fit(make_module, make_trainer, callback)
    steps = [int(name[:6]) for name in _names(tmp_path / "c")]
    assert 1 <= len(steps) < 6


@pytest.mark.parametrize(
    ("number", "name", "code"),
    [
        (signal.SIGTERM, "SIGTERM", 75),
        (signal.SIGUSR1, "SIGUSR1", 75),
        (signal.SIGHUP, "SIGHUP", 75),
        (signal.SIGINT, "Ctrl-C", 130),
    ],
)
def test_asked_to_stop_a_run_saves_first(make_module, make_trainer, tmp_path, number, name, code):
    before = signal.getsignal(number)

    class Asking(CheckpointCallback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=rf"stopped at step 4 by {name};.*same") as stopped:
        _fit(make_module, make_trainer, Asking(tmp_path / "c", every_n_steps=100))
    assert stopped.value.exit_code == code
    assert _names(tmp_path / "c") == ["000004.ckpt"]
    assert signal.getsignal(number) == before


def test_asked_to_stop_while_it_exports_a_run_ends_as_it_would(make_module, make_trainer, tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    class Asking(CheckpointCallback):
        def on_train_end(self, trainer, pl_module):
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = _fit(make_module, make_trainer, Asking(tmp_path / "c", every_n_steps=100))
    assert trainer.global_step == 6
    assert signal.getsignal(signal.SIGTERM) == before


def test_without_our_entry_point_a_second_ctrl_c_is_pythons_own(monkeypatch):
    request = StopRequest()
    request.listen()
    try:
        signal.raise_signal(signal.SIGINT)
        assert (request.name, request.exit_code) == ("Ctrl-C", 130)
        monkeypatch.setattr(ending, "SAME_CTRL_C_S", -1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        request.stop_listening()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_of_the_disk_ends_the_run_readably(make_module, make_trainer, tmp_path, full_disk):
    with pytest.raises(CheckpointError, match="free some space"):
        _fit(make_module, make_trainer, CheckpointCallback(tmp_path / "c", every_n_steps=1))
    assert _names(tmp_path / "c") == []


@pytest.mark.parametrize(("steps", "alike"), [([4, 4], True), ([4, 2], False)])
def test_processes_go_on_from_one_step(tmp_path, steps, alike):
    processes = [preloaded.call(_compare_steps, rank, tmp_path, steps[rank]) for rank in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    found = [(tmp_path / f"answer-{rank}").read_text() for rank in range(2)]
    if alike:
        assert found == ["", ""]
    else:
        assert found[0] == found[1]
        assert "go on from different steps, 2 to 4: its folder has to be on a file" in found[0]


def _compare_steps(rank: int, folder: Path, step: int) -> None:
    group = f"file://{folder}/group"
    torch.distributed.init_process_group("gloo", init_method=group, rank=rank, world_size=2)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(world_size=2, global_step=step, strategy=strategy)
    answer = ""
    try:
        checkpointing._check_same_step(trainer)
    except CheckpointError as error:
        answer = str(error)
    (folder / f"answer-{rank}").write_text(answer)
    torch.distributed.destroy_process_group()


def test_a_file_with_code_is_not_gone_on_from(make_module, make_trainer, tmp_path):
    path, marker = tmp_path / "000002.ckpt", tmp_path / "code_was_run"
    torch.save({"state_dict": {}, "more": _Code(marker)}, path)
    trainer = make_trainer(plugins=[AtomicCheckpointIO()])
    loader = Loader(make_samples(12), 2, 2)
    for name, message in ((path, "code, which is not run"), (tmp_path, "of a sharded strategy")):
        # Whatever is asked of Lightning's reader.
        with pytest.raises(CheckpointError, match=message):
            trainer.fit(make_module(), loader, ckpt_path=name, weights_only=False)
    assert not marker.exists()


class _Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_sharded_checkpoint_takes_the_place_of_one_of_its_name(tmp_path):
    """The best one has a name of its own."""

    def save(path, weights_only) -> None:
        path.mkdir()
        (path / "part").write_text(text)

    trainer: Any = SimpleNamespace(
        is_global_zero=True,
        strategy=SimpleNamespace(barrier=lambda name: None),
        save_checkpoint=save,
    )
    for text in ("first", "second", "third"):
        checkpointing._save_sharded(trainer, tmp_path / "best.ckpt")
        assert (tmp_path / "best.ckpt" / "part").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]


def test_before_its_first_step_a_run_has_nothing_to_save(make_module, make_trainer, tmp_path):
    """A signal ends it as it ends any program; Lightning would go on, or wait for other ranks."""
    before = signal.getsignal(signal.SIGTERM)
    found: list[Any] = []

    class Looking(Callback):
        """Behind ours: what Lightning has registered is in force."""

        def on_train_start(self, trainer, pl_module) -> None:
            found.append(signal.getsignal(signal.SIGTERM))

    callback = CheckpointCallback(tmp_path / "checkpoints")
    callback._stop.listen = lambda: None
    _fit(make_module, make_trainer, callback, Looking())
    assert found == [before]


@pytest.mark.parametrize("state", [{"state_dict": {}}, {"weight": torch.ones(2)}])
def test_a_file_of_something_else_is_not_gone_on_from(tmp_path, state):
    torch.save(state, tmp_path / "000005.ckpt")
    with pytest.raises(CheckpointError, match="holds no state of a run"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "000005.ckpt")
