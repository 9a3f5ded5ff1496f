"""A training job of one process on the toy data, to be killed; writes the loss of every step."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vipllava.models.building import ModelSpec

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.training.resume_job", "vipllava.training.lit_module"])


@dataclass(frozen=True)
class Job:
    """One start of the job; it goes on from the newest checkpoint in ``folder``.

    Attributes:
        folder: of its checkpoints and losses.
        data_root: holds the shards and ``manifests``.
        spec: the network.
        kill_at: global step at whose beginning it kills itself; None lets it end.
        data: further arguments of the data module.
        module: further arguments of the LightningModule.
    """

    folder: Path
    data_root: Path
    spec: ModelSpec
    kill_at: int | None = None
    data: dict[str, Any] = field(default_factory=dict)
    module: dict[str, Any] = field(default_factory=dict)


def start(job: Job) -> int:
    """Run a job to its end and return its exit code (-9: killed)."""
    process = CONTEXT.Process(target=_run, args=(job,))
    process.start()
    process.join(180)
    assert process.exitcode is not None, "the job hangs"
    return process.exitcode


def losses(folder: Path) -> dict[int, str]:
    """Return the loss of every step to the last bit; a step done twice was the same both times."""
    found: dict[int, str] = {}
    for line in (folder / "losses.txt").read_text().splitlines():
        step, loss = line.split()
        assert found.setdefault(int(step), loss) == loss, f"step {step}"
    return found


def _run(job: Job) -> None:
    # As in a real run; workers of a fork server outlive a trainer that is killed.
    multiprocessing.set_start_method("fork", force=True)
    import warnings

    import lightning
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint

    from vipllava.checkpoints.loading import load_tokenizer
    from vipllava.conversation import ConversationEncoder
    from vipllava.data.datamodule import VisualPromptDataModule
    from vipllava.data.image_transform import ImageTransform
    from vipllava.models.building import image_seq_length, token_id
    from vipllava.training.lit_module import VipLlavaLitModule
    from vipllava.visual_prompts.policies import VisualPromptPolicy

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(job.spec)
    encoder = ConversationEncoder(
        tokenizer,
        "llava_v1",
        image_token_id=token_id(tokenizer, job.spec.image_token),
        image_seq_length=image_seq_length(job.spec),
        max_length=512,
    )
    data = VisualPromptDataModule(
        "toy",
        job.data_root / "manifests",
        job.data_root,
        {"regions": VisualPromptPolicy()},
        encoder,
        ImageTransform(job.spec.image_size, "pad"),
        **{"micro_batch_size": 2, "global_batch_size": 4, "num_workers": 1, **job.data},
    )

    class Noting(VipLlavaLitModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == job.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            before = self._last_global_step
            super().on_train_batch_end(outputs, batch, batch_idx)
            if self._last_global_step != before:
                loss = float(self.trainer.callback_metrics["train/loss"])
                with (job.folder / "losses.txt").open("a") as file:
                    file.write(f"{self._last_global_step} {loss.hex()}\n")

    module = Noting(
        job.spec,
        ["projector", "language_model"],
        1e-2,
        seed=3,
        tokenizer=tokenizer,
        **job.module,
    )
    checkpoints = job.folder / "checkpoints"
    newest = sorted(checkpoints.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    save = ModelCheckpoint(checkpoints, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        accumulate_grad_batches=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[save],
        default_root_dir=job.folder,
    )
    resume = newest[-1] if newest else None
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=False)
