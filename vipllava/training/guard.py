"""What happens when a step's loss is not finite, or far above what it was.

Every process knows the global batch's loss before the weights change, so all decide alike: a run
stops, or leaves the step out. A file names the samples; ``train.py ... replay=FILE`` computes the
step again, each micro-batch as it was, then each sample alone.
"""

from __future__ import annotations

import csv
import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import torch

from vipllava.checkpoints.plain_pickles import load_plain
from vipllava.checkpoints.training_state import read_training_state
from vipllava.files.atomic import write_whole
from vipllava.models.supervised_loss import supervised_loss_sum
from vipllava.models.tensor_files import read_tensor
from vipllava.stream.datamodule import ReplayedMicroBatch
from vipllava.stream.loader import StepLoader
from vipllava.stream.ranks import gather_objects
from vipllava.training.restart import list_checkpoints
from vipllava.types import Batch, CheckpointError, ConfigError, first_line

if TYPE_CHECKING:
    from vipllava.training.lit_module import VipLlavaLitModule

OnNonfinite = Literal["stop", "skip"]
OnSpike = Literal["stop", "skip", "ignore"]

_LEAST: Final = 20
"""Steps that have to be known before one stands out by their median alone."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A step that was refused, and all that is needed to make its batches again."""

    reason: str  # why, in words
    step: int  # optimizer steps that were done before it
    loss: float | str  # of its global batch; as a text where JSON has no number for it
    place: Mapping[str, int]  # where it begins, a :class:`vipllava.stream.batching.Cursor`
    data: Mapping[str, Any]  # which stream that is, as in a checkpoint
    world_size: int  # processes
    accumulate: int  # micro-batches of each
    keys: Sequence[Sequence[Sequence[str]]]  # of the samples, by process and micro-batch
    losses: Sequence[Sequence[float | str]]  # shares of it, by process and micro-batch
    checkpoint: str | None = None  # the newest one when it happened, or None

    def path(self, folder: Path) -> Path:
        """Return the record's path in a folder."""
        return folder / f"step-{self.step:06d}.json"

    def write(self, folder: Path) -> Path:
        """Write the record into a folder; one of an earlier try of the step is replaced."""
        losses = [[_spell(loss) for loss in losses] for losses in self.losses]
        values = asdict(self) | {"loss": _spell(self.loss), "losses": losses}
        write_whole(path := self.path(folder), json.dumps(values, indent=1) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> StepRecord:
        """Read what :meth:`write` wrote; raises CheckpointError where it is not that."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"replay={path} is no record of a refused step ({first_line(error)}): "
                "name a file of RUN/guard"
            ) from error


@dataclass(frozen=True, slots=True)
class Refusal:
    """What is to be done about a step that may not change the weights."""

    action: Literal["stop", "skip"]  # stop the run, or leave the step out
    reason: str  # why, in words


@dataclass(eq=False)
class LossGuard:
    """Decides whether a step may change the weights.

    A loss is a spike if it is far above the median of the last ones and above ``spike_floor``; in
    the first steps it has to be worse than chance, too. Far above chance it always is one.
    """

    folder: str | Path | None = None  # where records go; None writes none
    on_nonfinite: OnNonfinite = "stop"  # the run, or ``skip`` the step, at a loss that is no number
    on_spike: OnSpike = "stop"  # the same, or ``ignore``, at a loss far above the last ones
    spike_factor: float = 10.0  # how many times their median, or chance, is far
    window: int = 100  # how many steps that median is of
    max_skipped: int = 20  # steps that may be left out in one run
    # A loss up to this is no spike: where all losses are near 0, one hard batch is many times their
    # median. At 1.0 the right token still has a probability of 37 %.
    spike_floor: float = 1.0
    # Of a model that takes all tokens for equally likely; the LightningModule sets that of its own.
    chance_loss: float = field(default=math.log(32_000), init=False)
    num_skipped: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        for name, choices in (("on_nonfinite", OnNonfinite), ("on_spike", OnSpike)):
            if (value := getattr(self, name)) not in (known := get_args(choices)):
                raise ConfigError(f"{name}={value} is not one of {', '.join(known)}")
        if self.spike_factor <= 1 or self.window < _LEAST:
            raise ConfigError(
                f"spike_factor={self.spike_factor} must be above 1, window={self.window} at least "
                f"{_LEAST}"
            )
        if not 0 <= self.spike_floor < math.inf:
            raise ConfigError(f"spike_floor={self.spike_floor} must be a number of at least 0")
        self._losses: deque[float] = deque(maxlen=self.window)

    def judge(self, loss: float) -> Refusal | None:
        """Say what is to be done about a step by its global batch's loss; None: nothing."""
        if not math.isfinite(loss):
            return self._refuse(self.on_nonfinite, f"the loss is {loss}")
        if (reference := self._far_below(loss)) is not None:
            far = f"more than {self.spike_factor:g} times the {reference}"
            if refusal := self._refuse(self.on_spike, f"the loss is {loss:.4g}, {far}"):
                return refusal
        self._losses.append(loss)
        return None

    def _far_below(self, loss: float) -> str | None:
        """Return what a spike is far above; None if the loss is not a spike."""
        known = len(self._losses)
        floor = self.spike_floor if known >= _LEAST else max(self.spike_floor, self.chance_loss)
        if known and loss > max(floor, self.spike_factor * median(self._losses)):
            return f"{median(self._losses):.4g} that is the median of the last {known} steps"
        if loss > self.spike_factor * self.chance_loss:
            return f"{self.chance_loss:.4g} of a model that guesses"
        return None

    def judge_gradient(self, norm: float) -> Refusal | None:
        """Say what is to be done about a step whose loss was right, by its gradient's norm."""
        reason = f"the gradient's norm is {norm}"
        return None if math.isfinite(norm) else self._refuse(self.on_nonfinite, reason)

    def _refuse(self, action: OnSpike, reason: str) -> Refusal | None:
        if action == "ignore":
            return None
        if action == "skip":
            self.num_skipped += 1
            if self.num_skipped > self.max_skipped:
                reason += f"; {self.max_skipped} steps were left out already (max_skipped)"
                return Refusal("stop", reason)
        return Refusal(action, reason)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to decide as this one would."""
        return {"losses": list(self._losses), "num_skipped": self.num_skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._losses.clear()
        self._losses.extend(state["losses"])
        self.num_skipped = int(state["num_skipped"])


def _spell(loss: float | str) -> float | str:
    """NaN and infinity as texts, for JSON."""
    return loss if isinstance(loss, str) or math.isfinite(loss) else str(loss)


def refuse_step(
    trainer: Any,
    guard: LossGuard,
    refusal: Refusal,
    step: int,
    loss: float,
    micro_batches: Sequence[tuple[tuple[str, ...], torch.Tensor]],
) -> str:
    """Write down a refused step and return the message about it; every process has to call this.

    ``step`` are the optimizer steps before it (DeepSpeed's norm is known when the trainer has
    counted on), ``loss`` is the global batch's; this process's micro-batches have keys and loss.
    """
    where = f"its samples: {', '.join(key for keys, _ in micro_batches for key in keys)}"
    loader = trainer.train_dataloader
    if guard.folder is not None and isinstance(loader, StepLoader):
        ranks = gather_objects([(keys, float(value)) for keys, value in micro_batches])
        if (wait := getattr(trainer.strategy.checkpoint_io, "wait", None)) is not None:
            wait()  # the newest checkpoint may still be being written
        saved_in = getattr(trainer.checkpoint_callback, "dirpath", None)
        found = [] if saved_in is None else list_checkpoints(Path(saved_in))
        record = StepRecord(
            reason=refusal.reason,
            step=step,
            loss=loss,
            place=asdict(loader.began),
            data=loader.identity(),
            world_size=trainer.world_size,
            accumulate=trainer.accumulate_grad_batches,
            keys=[[keys for keys, _ in rank] for rank in ranks],
            losses=[[value for _, value in rank] for rank in ranks],
            checkpoint=str(found[-1]) if found else None,
        )
        path = record.path(Path(guard.folder))
        if trainer.is_global_zero:
            record.write(path.parent)
        where = f"its samples are in {path}; the same command with replay={path} looks at each"
    message = f"{refusal.reason} at step {step}; {where}"
    if refusal.action == "skip":
        return f"{message}. It is left out (steps left out of this run so far: {guard.num_skipped})"
    return (
        f"{message}. The weights are as they were before it: lower the learning rate, repair these "
        "records, or pass on_nonfinite=skip or on_spike=skip (or ignore)"
    )


@dataclass(frozen=True, slots=True)
class SampleLoss:
    """What one sample of a replayed step says."""

    rank: int  # the process that had it
    micro_batch: int  # in which of its micro-batches
    key: str  # ``dataset/key``
    num_tokens: int  # of the sample, its image's among them
    num_supervised: int  # of them that carry loss
    loss: float  # mean over these, of the sample alone


@dataclass(frozen=True, slots=True)
class ReplayedStep:
    """A replayed step."""

    loss: float  # of the global batch, by its micro-batches as they were
    samples: tuple[SampleLoss, ...]  # worst first: those whose loss is no number, then by loss


def load_weights(module: VipLlavaLitModule, checkpoint: Path) -> None:
    """Put the weights of a training checkpoint, a file or a folder, into a module that is built."""
    if checkpoint.is_file():
        into, state = module, load_plain(checkpoint, mapped=True)["state_dict"]
    else:
        lazy = read_training_state(checkpoint)
        into, state = module.network, {name: read_tensor(value) for name, value in lazy.items()}
    unexpected = into.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise CheckpointError(
            f"{checkpoint} is of another model: it has {', '.join(unexpected[:5])}; pass the "
            "overrides that the run had"
        )


def replay_losses(
    module: VipLlavaLitModule,
    micro_batches: Sequence[ReplayedMicroBatch],
    *,
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> ReplayedStep:
    """Compute the losses of a step again, of all ranks' micro-batches; no gradients, dropout off.

    The module is built, has the weights to use, and is moved to the device. ``autocast`` is the
    dtype of matrix products where weights are held in more.
    """
    network: Any = module.network
    network = network.to(device).eval()

    def loss_sum(batch: Batch) -> tuple[float, int]:
        context = torch.autocast(device.type, autocast) if autocast else nullcontext()
        with torch.no_grad(), context:
            total, count = supervised_loss_sum(network, batch.to(device))
        return float(total), count

    total, count, samples = 0.0, 0, list[SampleLoss]()
    for part in micro_batches:
        summed, supervised = loss_sum(part.batch)
        total, count = total + summed, count + supervised
        for batch in part.single_samples:
            summed, supervised = loss_sum(batch)
            length, mean = batch.input_ids.numel(), summed / max(1, supervised)
            samples.append(
                SampleLoss(part.rank, part.number, batch.keys[0], length, supervised, mean)
            )
    worst_first = sorted(samples, key=lambda s: (math.isfinite(s.loss), -s.loss))
    return ReplayedStep(total / max(1, count), tuple(worst_first))


def write_losses(step: ReplayedStep, path: Path) -> None:
    """Write a row for each sample, worst first."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, [field.name for field in fields(SampleLoss)])
        rows.writeheader()
        rows.writerows(asdict(sample) for sample in step.samples)
