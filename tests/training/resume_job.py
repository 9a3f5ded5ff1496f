"""A training job of one process on the toy data, to be killed; writes the loss of every step."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import preloaded
from vipllava.models.building import ModelSpec
from vipllava.models.towers import CLIP


@dataclass(frozen=True)
class Job:
    """One start of the job; it goes on from the newest checkpoint in ``folder``.

    Attributes:
        folder: of its checkpoints and losses.
        data_root: holds the shards and ``manifests``.
        spec: the network.
        kill_at: global step at whose beginning it kills itself; None lets it end.
        kill_in_save_of: step in the middle of whose checkpoint's file it kills itself.
        ask_at: step during which it is asked to stop by SIGTERM.
        data: further arguments of the data module.
        module: further arguments of the LightningModule.
    """

    folder: Path
    data_root: Path
    spec: ModelSpec
    kill_at: int | None = None
    kill_in_save_of: int | None = None
    ask_at: int | None = None
    data: dict[str, Any] = field(default_factory=dict)
    module: dict[str, Any] = field(default_factory=dict)


def start(job: Job) -> int:
    """Run a job to its end and return its exit code (-9: killed)."""
    with preloaded.call(_run, job) as process:
        try:
            return process.wait(180)
        finally:
            process.kill()


def losses(folder: Path) -> dict[int, str]:
    """Return the loss of every step to the last bit; a step done twice was the same both times."""
    found: dict[int, str] = {}
    for line in (folder / "losses.txt").read_text().splitlines():
        step, loss = line.split()
        assert found.setdefault(int(step), loss) == loss, f"step {step}"
    return found


def log(folder: Path) -> str:
    """Return the run's own log."""
    return (folder / "csv" / "metrics.csv").read_text()


def _run(job: Job) -> None:
    # As in a real run; workers of a fork server outlive a trainer that is killed.
    multiprocessing.set_start_method("fork", force=True)
    import warnings

    import lightning
    import torch

    from vipllava.checkpoints.loading import load_tokenizer
    from vipllava.conversation import ConversationEncoder
    from vipllava.models.building import image_seq_length, token_id
    from vipllava.stream.datamodule import VisualPromptDataModule
    from vipllava.stream.image_transform import ImageTransform
    from vipllava.training import checkpointing
    from vipllava.training.csv_log import CsvLog, cut_csv
    from vipllava.training.lit_module import VipLlavaLitModule
    from vipllava.training.optim import OptimizerSettings
    from vipllava.training.restart import prepare_run
    from vipllava.types import Interrupted
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
        ImageTransform(job.spec.image_size, "pad", CLIP.preprocessing),
        **{"micro_batch_size": 2, "global_batch_size": 4, "num_workers": 1, **job.data},
    )

    class Noting(VipLlavaLitModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == job.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.trainer.global_step == job.ask_at:
                os.kill(os.getpid(), signal.SIGTERM)

        def log_step(self) -> None:
            before = self._last_global_step
            super().log_step()
            if self._last_global_step != before:
                loss = float(self.trainer.callback_metrics["train/loss"])
                with (job.folder / "losses.txt").open("a") as file:
                    file.write(f"{self._last_global_step} {loss.hex()}\n")

    module = Noting(
        job.spec,
        ["projector", "language_model"],
        OptimizerSettings(1e-2),
        seed=3,
        tokenizer=tokenizer,
        **job.module,
    )
    if job.kill_in_save_of is not None:
        _kill_in_save_of(job.kill_in_save_of)
    restart = prepare_run(job.folder, {"seed": 3})
    cut_csv(job.folder / "csv" / "metrics.csv", restart.num_steps)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        accumulate_grad_batches=2,
        logger=CsvLog(job.folder / "csv"),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[checkpointing.CheckpointCallback(job.folder / "checkpoints", every_n_steps=1)],
        plugins=[checkpointing.AtomicCheckpointIO()],
        default_root_dir=job.folder,
    )
    try:
        trainer.fit(module, datamodule=data, ckpt_path=restart.checkpoint, weights_only=True)
    except Interrupted as error:
        raise SystemExit(error.exit_code) from error


def _kill_in_save_of(step: int) -> None:
    """Let this process die when half of a checkpoint is in its file."""
    import io

    import torch

    save = torch.save

    def half(value: Any, file: Any) -> None:
        if value["global_step"] != step:
            save(value, file)
            return
        whole = io.BytesIO()
        save(value, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
