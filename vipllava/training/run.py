"""One stage from its composed configuration: what ``train.py`` calls, after its checks."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.accelerators import CPUAccelerator
from omegaconf import DictConfig, OmegaConf

from vipllava.checkpoints.export_meta import ExportMeta, code_version
from vipllava.checkpoints.loading import load_tokenizer, open_spec
from vipllava.config.attention import FALLBACK, TORCH_VARLEN
from vipllava.config.hardware import free_shm
from vipllava.models import attention
from vipllava.models.building import ModelSpec, image_seq_length
from vipllava.models.hub_models import draw_bars_on_terminals_only
from vipllava.processes import compute_on_cpu, end_with_parent, is_first_process, naming_parent
from vipllava.shards.manifest import Manifest
from vipllava.training import restart
from vipllava.training.callbacks import ExportCallback, StartLog
from vipllava.training.checkpointing import AtomicCheckpointIO
from vipllava.training.csv_log import FILE_NAME, cut_csv
from vipllava.training.ending import EarlyStop, RunEnd, hold_signals_of_starting
from vipllava.training.job import build_datamodule, partial
from vipllava.training.preflight import look_ahead, shared_memory_warning
from vipllava.training.restart import CSV, EXPORT_FOLDER, Goal, Restart
from vipllava.types import Interrupted, VipLlavaError, first_line

logger = logging.getLogger(__name__)

_LIMITS = ("limit_train_batches", "overfit_batches", "fast_dev_run", "max_time")
"""Arguments of the trainer that end a run before its epochs, or cut these short."""
_PATIENCE_S = 180.0
"""How long a job that its launcher has started again waits for the start before it to let go."""


def run_training(cfg: DictConfig) -> Path:
    """Train one stage from its checked configuration; return the folder of the exported model."""
    run_dir = Path(cfg.run_dir)
    with contextlib.ExitStack() as stack:
        if is_first_process():
            patience_s = _PATIENCE_S if restart.started_again() else 0.0
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(restart.hold_run(run_dir, patience_s=patience_s))
            except OSError as error:
                raise restart.unwritable(run_dir, error) from error
        return _train(cfg)


def _train(cfg: DictConfig) -> Path:
    # Loader processes are forked from a process that has used the tokenizer, which else warns.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    end_with_parent()
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        # Lightning prints beside the root logger, which has both terminal and file; and what it
        # tells of devices, steps and its makers' products is no news of this run.
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).setLevel(logging.WARNING)
    draw_bars_on_terminals_only()
    lightning.seed_everything(int(cfg.seed), workers=True, verbose=False)
    if cfg.machine.tf32:
        torch.set_float32_matmul_precision("high")
    export_dir = Path(cfg.run_dir) / EXPORT_FOLDER
    job: Any = OmegaConf.to_container(cfg, resolve=True)
    start = _begin(cfg, job)
    if start.finished:
        return export_dir

    make_module = partial(cfg.module)
    spec = _with_proven_attention(cfg, make_module.keywords["model"])
    tokenizer = load_tokenizer(spec)
    datamodule = build_datamodule(cfg, tokenizer, spec)
    outlook = look_ahead(cfg, tokenizer, datamodule, spec)
    if is_first_process():
        for line in outlook.lines:
            logger.info(line)
        if warning := shared_memory_warning(cfg, spec.image_size, free_shm()):
            logger.warning(warning)
    # A download may take longer than processes wait for each other once they have a group.
    open_spec(spec, tokenizer)
    blocks = outlook.setup.recomputed_blocks
    module = make_module(
        seed=int(cfg.seed),
        model=spec,
        tokenizer=tokenizer,
        gradient_checkpointing=True if blocks is None else blocks,
    )
    callbacks: list[Any] = [StartLog(cfg.run_dir, job), RunEnd()]
    chosen = (node for node in (cfg.get("callbacks") or {}).values() if node)  # null: none
    callbacks += [instantiate(node, _convert_="all") for node in chosen]
    if cfg.validation.manifest is not None and cfg.validation.patience is not None:
        callbacks.append(EarlyStop(int(cfg.validation.patience)))
    meta = _export_meta(cfg, spec, datamodule.manifests)
    base = spec.checkpoint or spec.language_model
    callbacks.append(ExportCallback(export_dir, tokenizer, meta, base=base))
    trainer = partial(cfg.trainer)(
        logger=_loggers(cfg, start), callbacks=callbacks, plugins=_plugins(cfg)
    )
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.world_size == 1:
        compute_on_cpu()

    logger.info("training stage %s of %s into %s", cfg.stage.name, cfg.model.name, cfg.run_dir)
    with warnings.catch_warnings():
        # Frozen parts stay in eval mode on purpose.
        warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training")
        # The module clips where DeepSpeed does not.
        warnings.filterwarnings("ignore", message="Since DeepSpeed handles gradient clipping")
        # Lightning 2.6 with torch 2.13; nothing a user can do.
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
        ckpt_path = None if start.checkpoint is None else str(start.checkpoint)
        try:
            hold_signals_of_starting(trainer.strategy.launcher)
            with naming_parent():  # Lightning starts the other processes of this node
                trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
        except torch.OutOfMemoryError as error:
            raise VipLlavaError(_out_of_memory(cfg, error)) from error
        except Interrupted:
            _leave_processes()
            if trainer.is_global_zero:
                raise
            return export_dir  # one process tells; a launcher takes an error of another for a crash
        except Exception as error:
            # W&B starts inside of `fit`, before any weight is loaded.
            if not type(error).__module__.startswith("wandb."):
                raise
            raise VipLlavaError(
                f"W&B cannot be reached or refuses this run ({first_line(error)}): see to network, "
                "key, entity and project, or set WANDB_MODE=offline and upload later with "
                "`wandb sync`"
            ) from error
    _leave_processes()
    if trainer.interrupted or (trainer.is_global_zero and not export_dir.is_dir()):
        what = "training ended before its last step and exported nothing to"
        raise VipLlavaError(f"{what} {export_dir}: start it again")
    if trainer.is_global_zero:
        restart.mark_finished(Path(cfg.run_dir), _goal(cfg))
    return export_dir


def _goal(cfg: DictConfig) -> Goal:
    """Return what is asked for: a run that has ended has done this, and no more."""
    bounds: Any = OmegaConf.to_container(cfg.trainer, resolve=True)
    limits = {name: bounds[name] for name in _LIMITS if bounds.get(name) not in (None, False)}
    whole = limits.get("limit_train_batches")
    if isinstance(whole, float) and whole == 1.0:  # all of them; 1 would be one
        del limits["limit_train_batches"]
    if cfg.validation.manifest is not None and cfg.validation.patience is not None:
        limits["patience"] = int(cfg.validation.patience)
    return Goal(int(cfg.trainer.max_epochs), int(cfg.trainer.max_steps), limits)


def _leave_processes() -> None:
    """Leave the group of processes where all have come to the same end, not after an error.

    The threads of gloo would now and then abort a process whose work is done.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _with_proven_attention(cfg: DictConfig, spec: ModelSpec) -> ModelSpec:
    """Try PyTorch's own kernel on this device: a wrong one would train without any error."""
    if spec.attn_implementation != TORCH_VARLEN or not torch.cuda.is_available():
        return spec
    # Each process on its own device: a context on another one's costs that one half a gigabyte.
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    problem = attention.find_kernel_problem(attention.load_kernel(), device)
    if problem is None:
        return spec
    message = f"{TORCH_VARLEN} does not work on {torch.cuda.get_device_name(device)} ({problem})"
    nodes = (cfg.machine, cfg.model.spec)
    if not all(OmegaConf.is_interpolation(node, "attn_implementation") for node in nodes):
        raise VipLlavaError(f"{message}: pass machine.attn_implementation={FALLBACK}")
    logger.warning("%s: %s is used instead", message, FALLBACK)
    return replace(spec, attn_implementation=FALLBACK)


def _out_of_memory(cfg: DictConfig, error: BaseException) -> str:
    every = cfg.stage.gradient_checkpointing is True
    recompute = "" if every else "stage.gradient_checkpointing=true (recompute every block), "
    return (
        f"the device's memory ran out ({first_line(error)}): pass {recompute}"
        f"machine.micro_batch_size=N with an N below {cfg.data.micro_batch_size}, or another "
        "strategy; the same command with preflight=true says what fits"
    )


def _begin(cfg: DictConfig, job: dict[str, Any]) -> Restart:
    """Decide where the run begins; the first process also brings its folder into that state."""
    run_dir, every = Path(cfg.run_dir), int(cfg.trainer.log_every_n_steps or 1)
    asked: Any = {"goal": _goal(cfg), "resume": str(cfg.resume)}
    if not is_first_process():
        return restart.find_restart(run_dir, **asked)
    start = restart.prepare_run(run_dir, job, anyway=bool(cfg.resume_anyway), **asked)
    if start.finished:
        logger.info(
            f"{run_dir} has ended already, and its export is there: for more pass stage.epochs=N "
            "or trainer.max_steps=N, to begin anew resume=never, for a run of its own name=NEW_NAME"
        )
        return start
    log = run_dir / CSV / FILE_NAME
    num_rows = cut_csv(log, start.num_steps)
    if start.checkpoint is not None:
        logger.info("going on from %s, after %s steps", start.checkpoint, start.num_steps)
        if OmegaConf.select(cfg, "logger.csv") and num_rows * every < start.num_steps - every:
            logger.warning(
                f"{log} has {num_rows} rows of the {start.num_steps} steps that are done: it was "
                "cut or moved, and its curve has a gap"
            )
    return start


def _loggers(cfg: DictConfig, start: Restart) -> list[Any]:
    """Instantiate the loggers by name; null switches one off. Each goes on where the run does."""
    nodes = {name: node for name, node in (cfg.get("logger") or {}).items() if node}
    # TensorBoard hides what an earlier start wrote about steps that are now done again.
    more: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": start.num_steps}}
    chosen = "WANDB_RUN_ID" in os.environ or OmegaConf.select(cfg, "logger.wandb.id") is not None
    if "wandb" in nodes:
        # Pictures of tables wait there for `wandb sync`: with the run, not in the home folder.
        os.environ.setdefault("WANDB_DATA_DIR", str(Path(cfg.run_dir, "wandb").absolute()))
    if "wandb" in nodes and not chosen and is_first_process():
        more["wandb"] = {"id": restart.wandb_id(Path(cfg.run_dir))}
    return [instantiate(n, _convert_="all", **more.get(name, {})) for name, n in nodes.items()]


def _plugins(cfg: DictConfig) -> list[Any]:
    plugins: list[Any] = [AtomicCheckpointIO()] if cfg.strategy.name in ("single", "ddp") else []
    # torchrun inside a Slurm job has its own ranks, which Lightning prefers, too.
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # Its own way of saving and queueing again knows nothing of run folders.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return plugins


def _export_meta(cfg: DictConfig, spec: ModelSpec, manifests: Sequence[Manifest]) -> ExportMeta:
    policies: Any = OmegaConf.to_container(cfg.visual_prompts, resolve=True)
    return ExportMeta(
        stage=cfg.stage.name,
        chat_template=cfg.stage.chat_template,
        image_aspect=cfg.stage.image_aspect,
        image_size=spec.image_size,
        image_seq_length=image_seq_length(spec),
        feature_layers=spec.feature_layers,
        vision_tower=spec.vision_tower,
        language_model=spec.language_model,
        image_token=spec.image_token,
        data=tuple(f"{manifest.name}: {manifest.licence.strip()}" for manifest in manifests),
        visual_prompts=policies,
        code=code_version(),
    )
