"""The LightningModule: one network, the parts that train, the loss of a global batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from transformers import PreTrainedTokenizerFast, VipLlavaForConditionalGeneration

from vipllava.checkpoints.loading import build_model
from vipllava.keyed_random import generator_for
from vipllava.models.adapters import AdapterSettings, add_adapters
from vipllava.models.blocks import compile_blocks, recompute_blocks, train_recomputed
from vipllava.models.building import ModelSpec
from vipllava.models.freezing import check_parts, hold_frozen, modules_of, set_trainable
from vipllava.models.placing import Placement
from vipllava.models.quantization import QuantizationSettings, quantization_config
from vipllava.models.supervised_loss import Observer, supervised_loss_sum
from vipllava.training import optim, sharding
from vipllava.training.guard import LossGuard, Refusal, refuse_step
from vipllava.training.optim import OptimizerSettings
from vipllava.training.restart import rescale_progress
from vipllava.types import Batch, ConfigError, VipLlavaError

logger = logging.getLogger(__name__)

HALF_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""What is computed in, by the trainer's precision, where weights are held in more."""


@dataclass(slots=True)
class _Step:
    """What is known of the optimizer step under way."""

    number: int = 0  # optimizer steps before it
    # Of this process's micro-batches so far: summed loss, supervised tokens, keys and loss of each.
    loss: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    num_tokens: int = 0
    micro_batches: list[tuple[tuple[str, ...], torch.Tensor]] = field(default_factory=list)
    sums: tuple[float, float] | None = None  # loss and supervised tokens, of all processes
    is_skipped: bool = False  # the guard has it left out
    gradient_norm: torch.Tensor = field(default_factory=lambda: torch.zeros(()))  # unclipped
    values: dict[str, float] = field(default_factory=dict)  # what else is logged


class VipLlavaLitModule(lightning.LightningModule):
    """Trains the projector, and other parts if named, on batches of marked images.

    The network is made in ``configure_model``, on every process by itself and under the
    strategy's own contexts; before that ``model`` is None. Parts that do not train stay in eval
    mode, and are held in the dtype that is computed in. Parameters that train keep
    ``ModelSpec.dtype``: in float32 with ``bf16-mixed`` they and Adam's state are master copies,
    without which updates at a rate of 2e-7 would be rounded away.

    What is logged is in :data:`vipllava.training.metrics.METRICS`. Callbacks that want more than
    the loss put an observer of the predictions into ``observers``.

    Args:
        model: what to build.
        trainable: the parts that train, of :data:`vipllava.models.freezing.PARTS`.
        optimizer: rates, decay and schedule.
        gradient_checkpointing: recompute all of the language model's blocks in the backward pass,
            none, or the first so many.
        seed: of the projector's first weights, adapters and dropout.
        tokenizer: that of the data; loaded from the spec's source if not given.
        adapter: LoRA on the language model, whose own weights then stay as they are.
        quantization: hold those weights in fewer bits; only with an adapter.
        compile_blocks: have ``torch.compile`` make each block faster; for rows of one length.
        guard: decides about steps whose loss is not finite or far too high.
    """

    def __init__(
        self,
        model: ModelSpec,
        trainable: Sequence[str],
        optimizer: OptimizerSettings,
        gradient_checkpointing: bool | int = False,
        seed: int = 42,
        tokenizer: PreTrainedTokenizerFast | None = None,
        adapter: AdapterSettings | None = None,
        quantization: QuantizationSettings | None = None,
        compile_blocks: bool = False,
        guard: LossGuard | None = None,
    ) -> None:
        super().__init__()
        if quantization is not None and adapter is None:
            raise ConfigError(
                f"weights held in {quantization.bits} bits cannot train: give them adapter=SETTINGS"
            )
        self.spec = model
        self.trainable = check_parts(trainable)
        self.settings = optimizer
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_blocks = compile_blocks
        self.guard = guard or LossGuard()
        self.seed = seed
        self.adapter = adapter
        self.quantization = quantization
        self.model: VipLlavaForConditionalGeneration | None = None
        self.observers: list[Observer] = []
        self._tokenizer = tokenizer
        self._step = _Step()
        self._last_global_step = 0
        self._progress: float | None = None

    @property
    def network(self) -> VipLlavaForConditionalGeneration:
        """The network; raises VipLlavaError before ``configure_model`` has run."""
        if self.model is None:
            raise VipLlavaError(
                "the network is not built yet: Lightning builds it when fit starts; call "
                "configure_model() to have it earlier"
            )
        return self.model

    def configure_model(self) -> None:
        """Build the network once; Lightning calls this at the start of every loop."""
        if self.model is not None:
            return
        strategy = self._strategy
        # Lightning's default device here is the strategy's; the values of what is drawn on the CPU
        # would depend on it.
        with torch.device("cpu"), sharding.zero3_paused(strategy):
            if isinstance(strategy, ModelParallelStrategy):
                mesh: Any = strategy.device_mesh
                self.model = sharding.build_fsdp2(
                    self._build,
                    self._prepare,
                    mesh["data_parallel"],
                    device=strategy.root_device,
                    precision=str(self.trainer.precision),
                )
            else:
                placement = sharding.placement_for(strategy)
                self.model = self._build(placement)
                self._prepare(self.model)
                if isinstance(placement, sharding.HandedOut):
                    placement.take_apart(self.model.parameters())  # adapters
                    self.to(placement.device)  # DeepSpeed leaves to us what is in parts
        self.train(self.training)

    def _build(self, placement: Placement | None = None) -> VipLlavaForConditionalGeneration:
        return build_model(
            self.spec,
            self._tokenizer,
            seed=self.seed,
            quantization_config=quantization_config(self.quantization),
            placement=placement,
            prepare=None if placement is None else self._choose_dtypes,
        )

    def _choose_dtypes(self, hollow: VipLlavaForConditionalGeneration) -> None:
        """Decide what each weight is held in, so that none is read in more than that."""
        set_trainable(hollow, self.trainable)
        if self.adapter is not None:
            for module in modules_of(hollow)["language_model"]:
                module.requires_grad_(False)
        half = self._half
        if half is not None and self._under_deepspeed:
            for parameter in hollow.parameters():
                parameter.data = parameter.data.to(half)
        elif half is not None:
            hold_frozen(hollow, half)

    @property
    def _strategy(self) -> Any:
        return self.trainer.strategy if self._trainer is not None else None

    @property
    def _half(self) -> torch.dtype | None:
        return HALF_DTYPES.get(str(self.trainer.precision)) if self._trainer is not None else None

    @property
    def _under_deepspeed(self) -> bool:
        return isinstance(self._strategy, DeepSpeedStrategy)

    def _prepare(self, model: VipLlavaForConditionalGeneration) -> None:
        half = self._half
        if self.adapter is not None:
            # DeepSpeed holds everything in half precision by itself.
            dtype = half if half is not None and self._under_deepspeed else self.spec.torch_dtype
            add_adapters(model, self.adapter, seed=self.seed, dtype=dtype)
        set_trainable(model, self.trainable)
        if half is not None and not self._under_deepspeed:
            hold_frozen(model, half)
        if self.gradient_checkpointing:
            every = self.gradient_checkpointing is True
            recompute_blocks(model, None if every else self.gradient_checkpointing)
        if self.compile_blocks:
            compile_blocks(model)

    def train(self, mode: bool = True) -> VipLlavaLitModule:
        """Switch the parts that train; the others stay in eval mode."""
        super().train(mode)
        if self.model is None:
            return self
        for part, modules in modules_of(self.model).items():
            for module in () if part in self.trainable else modules:
                module.eval()
        if self.gradient_checkpointing and mode:
            train_recomputed(self.model)
        return self

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Return the loss whose gradients add up to that of the global batch's mean.

        Raises VipLlavaError, with the samples, if the guard stops or no token is supervised.
        """
        if batch.num_supervised_global < 1:
            raise VipLlavaError(
                f"the global batch with samples {list(batch.keys)} has no supervised token "
                f"(num_supervised_global={batch.num_supervised_global}): its answers are empty or "
                "cut off; raise max_length or look at these records"
            )
        self._progress = batch.progress
        self._key_random_state(batch_idx)
        loss_sum, num_supervised = self._loss_sum(batch, self.observers)
        loss = loss_sum / batch.num_supervised_global
        step = self._step
        step.loss = step.loss + loss.detach()  # a 0 on the CPU first, which waits for no device
        step.num_tokens += num_supervised
        step.micro_batches.append((batch.counted_keys, loss.detach()))
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            step.number, step.sums = self.trainer.global_step, self._sum_over_ranks()
            self._act_on(self.guard.judge(step.sums[0]))
            if step.is_skipped and self._under_deepspeed:
                # It leaves a step out only if it finds an overflow in the gradients.
                loss = loss * float("nan")
        return loss * optim.backward_scale(
            self.trainer.world_size,
            self.trainer.accumulate_grad_batches,
            is_deepspeed=self._under_deepspeed,
        )

    def _loss_sum(
        self, batch: Batch, observers: Sequence[Observer] = ()
    ) -> tuple[torch.Tensor, int]:
        method = getattr(self.network, sharding.LOSS_METHOD, None)
        return (method or partial(supervised_loss_sum, self.network))(batch, observers)

    def on_validation_epoch_start(self) -> None:
        """Begin the sums of a pass over the held-out samples."""
        self._held_out = torch.zeros(2, dtype=torch.float64)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up the loss of a held-out batch; a repeated one has no labels and adds nothing."""
        loss_sum, num_supervised = self._loss_sum(batch)
        self._held_out += torch.tensor([float(loss_sum), num_supervised], dtype=torch.float64)

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all supervised tokens of the held-out samples, on all ranks."""
        sums = self._held_out.to(self.device, torch.float32)
        loss_sum, num_supervised = self._strategy.reduce(sums, reduce_op="sum").tolist()
        value = loss_sum / max(1.0, num_supervised)
        self.log("val/loss", value, prog_bar=True, logger=False, batch_size=1)
        for log in self.trainer.loggers:
            log.log_metrics({"val/loss": value}, step=max(0, self.trainer.global_step - 1))

    def _act_on(self, refusal: Refusal | None) -> None:
        """Stop, or have the step left out, if the guard says so; all ranks hear the same."""
        if refusal is None:
            return
        step = self._step
        known = (step.number, (step.sums or self._sum_over_ranks())[0], step.micro_batches)
        message = refuse_step(self.trainer, self.guard, refusal, *known)
        if refusal.action == "stop":
            raise VipLlavaError(message)
        step.is_skipped = True
        logger.warning("%s", message)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the gradient norm, which clipping changes, and the rate, which the step changes."""
        step = self._step
        step.values |= optim.learning_rates(optimizer.param_groups)
        if not self._under_deepspeed:
            if not step.is_skipped:
                step.gradient_norm = optim.gradient_norm(_parameters(optimizer))
                self._judge_gradient(float(step.gradient_norm))
            if step.is_skipped:
                self.network.zero_grad()
        elif step.is_skipped:
            # In float32 it looks for an overflow only if told to.
            self._strategy.deepspeed_engine.optimizer.check_grad_overflow = True

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm that is known already; DeepSpeed clips by itself.

        Lightning would compute it again, and refuse a fused optimizer in any mixed precision.
        """
        if not gradient_clip_val or self._step.is_skipped or self._under_deepspeed:
            return
        weights, norm = _parameters(optimizer), self._step.gradient_norm
        if gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
            nn.utils.clip_grad_value_(weights, gradient_clip_val)
        else:
            nn.utils.clip_grads_with_norm_(weights, gradient_clip_val, norm)

    def _judge_gradient(self, norm: float) -> None:
        self._step.values["train/grad_norm"] = norm
        if self.trainer.precision != "16-mixed":  # whose scaling overflows now and then
            self._act_on(self.guard.judge_gradient(norm))

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log what belongs to the optimizer step, if this micro-batch completed one."""
        self.log_step()

    def log_step(self) -> None:
        """Log the step that has just ended, if one has; every process has to call this."""
        # To the loggers at once: Lightning goes there after all callbacks, and a kill behind a
        # checkpoint would lose the row.
        if self.trainer.global_step == self._last_global_step:
            return
        self._last_global_step = self.trainer.global_step
        loss, num_tokens = self._step.sums or self._sum_over_ranks()
        if self._under_deepspeed and not self._step.is_skipped:
            norm = self._strategy.deepspeed_engine.get_global_grad_norm()
            if norm is not None:
                self._judge_gradient(float(norm))
        values = {"train/loss": loss, "train/supervised_tokens": num_tokens, **self._step.values}
        for name, value in values.items():
            on_bar = name in ("train/loss", "train/lr")
            self.log(name, value, prog_bar=on_bar, logger=False, batch_size=1)
        for log in self.trainer.loggers:
            # Numbered as Lightning does: by the steps before this one.
            row = {**values, "epoch": self.current_epoch}
            log.log_metrics(row, step=self.trainer.global_step - 1)
        self._step = _Step()

    def _sum_over_ranks(self) -> tuple[float, float]:
        mine = self._step.loss  # divided by the global count already: the ranks' values add up
        sums = torch.stack([mine.float(), mine.new_tensor(self._step.num_tokens)])
        loss, num_tokens = self._strategy.reduce(sums, reduce_op="sum").tolist()
        return loss, num_tokens

    def on_train_start(self) -> None:
        """Forget sums of an earlier fit; a resumed run starts at its own step."""
        sharding.check_rotary_precision(self.network)
        config: Any = self.network.config
        self.guard.chance_loss = math.log(config.text_config.vocab_size)
        self._step = _Step()
        self._last_global_step = self.trainer.global_step

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make AdamW and its schedule over the steps that the trainer is going to do."""
        groups = optim.parameter_groups(modules_of(self.network), self.settings)
        device: torch.device = self._strategy.root_device
        fused = optim.uses_fused_adamw(device.type, str(self.trainer.precision))
        adamw = optim.build_optimizer(groups, self.settings, fused=fused)
        num_steps = int(self.trainer.estimated_stepping_batches)

        def steps_done(step: int) -> float:
            if self._progress is None:
                return step
            # Packing: the number of steps is a bound, the share of the samples is known.
            num_epochs = self.trainer.max_epochs or 1
            return num_steps * (self.current_epoch + self._progress) / num_epochs

        schedule = optim.build_schedule(adamw, self.settings, num_steps, steps_done)
        return {"optimizer": adamw, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _key_random_state(self, batch_idx: int) -> None:
        """Make dropout a function of seed, step and rank: a resumed run draws the same masks."""
        trainer = self.trainer
        micro_batch = batch_idx % trainer.accumulate_grad_batches
        key = (self.seed, trainer.global_step, micro_batch, trainer.global_rank, "dropout")
        torch.manual_seed(int(generator_for(*key).integers(1 << 63)))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave frozen weights out: they are read from their source again, and are most of a 7B."""
        checkpoint["accumulate_grad_batches"] = self.trainer.accumulate_grad_batches
        checkpoint["loss_guard"] = self.guard.state_dict()
        checkpoint["stream_progress"] = self._progress
        state, kept = checkpoint.get("state_dict", {}), self._trainable_keys()
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k in kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the frozen weights of the built network where the checkpoint left them out.

        Lightning counts progress in micro-batches: it is put into this run's unit.
        """
        if (known := checkpoint.get("loss_guard")) is not None:
            self.guard.load_state_dict(known)
        self._progress = checkpoint.get("stream_progress")
        if (saved := checkpoint.get("accumulate_grad_batches")) is not None:
            rescale_progress(checkpoint, saved, self.trainer.accumulate_grad_batches)
        present, state = self.state_dict(), checkpoint.setdefault("state_dict", {})
        for key in set(present) - self._trainable_keys():
            state.setdefault(key, present[key])

    def _trainable_keys(self) -> set[str]:
        """Return the names of what trains; the networks have no other state worth keeping."""
        every = self.named_parameters(remove_duplicate=False)
        return {name for name, parameter in every if parameter.requires_grad}


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
