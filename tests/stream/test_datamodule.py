"""The data module under a real Trainer: what it consumes, and how a run resumes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.toy_data import SIDE, make_manifest, said, toy_samples
from vipllava.conversation.encode import ConversationEncoder
from vipllava.models.towers import CLIP
from vipllava.shards.tars import ShardError, write_shards
from vipllava.stream import datamodule
from vipllava.stream.datamodule import VisualPromptDataModule
from vipllava.stream.image_transform import ImageTransform
from vipllava.types import Batch, CheckpointError, ConfigError, RecordError, VipLlavaError
from vipllava.visual_prompts.policies import VisualPromptPolicy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # lightning on torch 2.13
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

Policies = dict[str, VisualPromptPolicy]


class Recorder(lightning.LightningModule):
    """One weight; remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[tuple[tuple[str, ...], int]] = []
        self.steps: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        assert isinstance(batch, Batch)
        self.seen.append((batch.counted_keys, batch.num_supervised_global))
        return (self.weight * batch.num_supervised).sum() / batch.num_supervised_global

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps.append(self.trainer.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_module(
    root: Path, encoder: ConversationEncoder, policies: Policies, **changes: Any
) -> VisualPromptDataModule:
    manifests = root / "manifests"
    if not manifests.exists():
        manifests.mkdir()
        (manifests / "toy.yaml").write_text(
            "schema_version: 2\nname: toy\nstage: finetune\nlicence: none\nshards: toy/*.tar\n"
        )
    values: dict[str, Any] = {
        "manifest": "toy",
        "manifests_dir": manifests,
        "data_root": root,
        "policies": policies,
        "conversation_encoder": encoder,
        "image_transform": ImageTransform(SIDE, "pad", CLIP.preprocessing),
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "num_workers": 0,
    }
    return VisualPromptDataModule(**{**values, **changes})


def make_trainer(root: Path, **options: Any) -> lightning.Trainer:
    return lightning.Trainer(
        **{
            "default_root_dir": root,
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "accumulate_grad_batches": 2,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "callbacks": [
                ModelCheckpoint(
                    dirpath=root / "checkpoints",
                    filename="{step}",
                    every_n_train_steps=1,
                    save_top_k=-1,
                )
            ],
            **options,
        }
    )


@pytest.fixture
def fitted(
    tmp_path: Path, encoder: ConversationEncoder, policies: Policies
) -> tuple[Path, Recorder]:
    """Two epochs of ten samples: three optimizer steps each, the last over two samples."""
    write_shards(toy_samples(10), tmp_path / "toy")
    model = Recorder()
    make_trainer(tmp_path).fit(model, datamodule=make_module(tmp_path, encoder, policies))
    return tmp_path, model


def test_epochs_steps_and_denominators(fitted: tuple[Path, Recorder]) -> None:
    _, model = fitted
    assert len(model.seen) == 12
    assert model.steps == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    for epoch in (model.seen[:6], model.seen[6:]):
        keys = [key for batch, _ in epoch for key in batch]
        assert sorted(keys) == [f"toy/s{n:03d}" for n in range(10)]
        assert [len(batch) for batch, _ in epoch] == [2, 2, 2, 2, 1, 1]
        assert all(epoch[n][1] == epoch[n + 1][1] > 0 for n in (0, 2, 4))
    assert model.seen[:6] != model.seen[6:]


def test_batches_are_copied_while_the_device_computes(
    tmp_path: Path,
    encoder: ConversationEncoder,
    policies: Policies,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copies: list[bool] = []
    move = Batch.to

    def note(batch: Batch, device: Any, non_blocking: bool = False) -> Batch:
        copies.append(non_blocking)
        return move(batch, device, non_blocking)

    monkeypatch.setattr(Batch, "to", note)
    write_shards(toy_samples(4), tmp_path / "toy")
    make_trainer(tmp_path, max_epochs=1).fit(
        Recorder(), datamodule=make_module(tmp_path, encoder, policies)
    )
    assert copies == [True] * 2


@pytest.mark.parametrize("step", range(1, 6))
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_goes_on_where_the_checkpoint_was(
    fitted: tuple[Path, Recorder],
    encoder: ConversationEncoder,
    policies: Policies,
    step: int,
    workers: int,
) -> None:
    root, whole = fitted
    model = Recorder()
    module = make_module(root, encoder, policies, num_workers=workers)
    checkpoint = root / "checkpoints" / f"step={step}.ckpt"
    make_trainer(root).fit(model, datamodule=module, ckpt_path=checkpoint, weights_only=False)
    assert model.seen == whole.seen[2 * step :]


def test_a_checkpoint_of_other_data_is_refused(
    fitted: tuple[Path, Recorder], encoder: ConversationEncoder, policies: Policies
) -> None:
    root, _ = fitted
    module = make_module(root, encoder, policies, seed=1)
    trainer = make_trainer(root)
    checkpoint = root / "checkpoints" / "step=1.ckpt"
    with pytest.raises(CheckpointError, match="seed: saved 42, now 1"):
        trainer.fit(Recorder(), datamodule=module, ckpt_path=checkpoint, weights_only=False)


def test_the_trainer_has_to_accumulate_what_the_global_batch_needs(
    tmp_path: Path, encoder: ConversationEncoder, policies: Policies
) -> None:
    write_shards(toy_samples(8), tmp_path / "toy")
    trainer = make_trainer(tmp_path, accumulate_grad_batches=1)
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches is 1; .* on 1 ranks needs 2"):
        trainer.fit(Recorder(), datamodule=make_module(tmp_path, encoder, policies))


@pytest.mark.slow
def test_two_real_ranks_see_what_one_sees(fitted: tuple[Path, Recorder]) -> None:
    root, one = fitted
    script = [sys.executable, "-m", "tests.stream.two_ranks", str(root)]
    done = subprocess.run(
        script, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((root / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == 6  # three steps of two micro-batches
    denominators = [[total for _, total in seen] for seen in ranks]
    assert denominators[0] == denominators[1] == [total for _, total in one.seen[:6]]
    keys = [key for seen in ranks for batch, _ in seen for key in batch]
    assert sorted(keys) == sorted(key for batch, _ in one.seen[:6] for key in batch)
    assert sum(not batch for seen in ranks for batch, _ in seen) == 2  # repeats alone


def test_labels_are_proved_before_training(
    tmp_path: Path,
    encoder: ConversationEncoder,
    policies: Policies,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_shards(toy_samples(8), tmp_path / "toy")
    proved: list[str] = []

    def prove(encoder: object, turns: object, encoded: object, key: str) -> None:
        proved.append(key)
        if len(proved) == 3:
            raise VipLlavaError("not the answer")

    monkeypatch.setattr(datamodule, "prove_labels", prove)
    with pytest.raises(VipLlavaError, match="not the answer"):
        make_module(tmp_path, encoder, policies).setup("fit")
    assert len(set(proved)) == 3


def test_missing_and_broken_data_stop_the_set_up(
    tmp_path: Path, encoder: ConversationEncoder, policies: Policies
) -> None:
    with pytest.raises(ShardError, match=r"toy/\*\.tar does not exist"):
        make_module(tmp_path, encoder, policies).setup("fit")
    bad = {"id": "refcocog-1", "bboxes": [[1, 1, 9, 9]], "conversations": said("Hi", "yes")}
    key, _, image, extension = toy_samples(1)[0]
    write_shards([(key, bad, image, extension)], tmp_path / "toy")
    with pytest.raises(RecordError, match=r"000000\.tar: toy/s000: field `segmentations` is miss"):
        make_module(tmp_path, encoder, policies).setup("fit")


def test_no_trainer(tmp_path: Path, encoder: ConversationEncoder, policies: Policies) -> None:
    assert make_manifest().name == "toy"
    with pytest.raises(ConfigError, match="has no trainer"):
        make_module(tmp_path, encoder, policies).train_dataloader()
