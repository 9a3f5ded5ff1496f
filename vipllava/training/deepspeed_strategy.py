"""DeepSpeed whose checkpoints another number of processes, or another stage, goes on from.

They hold, for each process, the stretches of trained weights and of Adam's state that it keeps, by
the weights' names; whoever reads takes what belongs to its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn

from vipllava.checkpoints import training_state as store
from vipllava.checkpoints.training_state import INDEX, WEIGHT, Part, Shared, check_whole
from vipllava.stream.ranks import gather_objects
from vipllava.types import CheckpointError, ConfigError

_COUNTERS: Final = ("global_steps", "global_samples", "skipped_steps")  # of DeepSpeed's engine
# Of its dynamic loss scaling, which only float16 has.
_SCALING: Final = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_STEP: Final = "step"


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Where this process keeps a part of a weight: in a flat tensor, which the optimizer knows."""

    start: int  # of the part in the weight
    length: int  # in elements
    flat: torch.Tensor  # float32, of many weights' parts
    offset: int  # of the part in it

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the part of a flat tensor, of the weights or of the optimizer's state."""
        return flat.detach().narrow(0, self.offset, self.length)


class ElasticDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's strategy for ZeRO-2 and ZeRO-3, with or without the optimizer on the host.

    Raises ConfigError if the DeepSpeed configuration asks for what its checkpoints do not know.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config: Any = self.config or {}
        zero = config.get("zero_optimization", {})
        optimizer = zero.get("offload_optimizer") or {}
        asks = {
            f"stage={zero.get('stage')}": zero.get("stage") not in (2, 3),
            "offload_optimizer.device=nvme": optimizer.get("device") == "nvme",
            "offload_optimizer.ratio": optimizer.get("ratio", 1.0) != 1.0,
            "offload_optimizer.super_offload": bool(optimizer.get("super_offload")),
            "offload_param.device=nvme": (zero.get("offload_param") or {}).get("device") == "nvme",
            "round_robin_gradients": bool(zero.get("round_robin_gradients")),
            "mics_shard_size": (zero.get("mics_shard_size") or -1) > 0,
            "zenflow": bool(zero.get("zenflow")),
        }
        problems = [f"zero_optimization.{name}" for name, asked in asks.items() if asked]
        problems += [name for name in ("optimizer", "torch_autocast") if name in config]
        if problems:
            raise ConfigError(
                f"the DeepSpeed configuration asks for {', '.join(problems)}, which checkpoints "
                "here do not know: take that out, or choose another strategy"
            )

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write a folder, every process its own file; OSError on all if one of them cannot."""
        folder = Path(self.broadcast(str(filepath)))
        stretches = self._stretches()

        def write() -> dict[str, int]:
            folder.mkdir(parents=True, exist_ok=True)
            parts = {name: self._part(stretch) for name, stretch in stretches.items()}
            sizes = store.write_part(folder, self.global_rank, parts)
            if self.is_global_zero:
                sizes |= store.write_shared(folder, self._shared(checkpoint))
            return sizes

        sizes = {name: size for files in _on_all(write) for name, size in files.items()}
        _on_all(lambda: store.write_index(folder, sizes) if self.is_global_zero else None)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a folder into weights and optimizer, of any number of processes; return the rest.

        Nothing in it can run code, whatever ``weights_only`` says.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        check_whole(path)
        if not (path / INDEX).is_file():
            raise CheckpointError(
                f"{path} is no checkpoint of a DeepSpeed strategy: go on with the strategy that "
                "wrote it, or make a model of it with `vipllava convert` and start from that"
            )
        module: Any = self.lightning_module
        if module.trainer.state.fn != TrainerFn.FITTING:
            raise CheckpointError(
                f"{path} can only be trained on: make a model of it with `vipllava convert`"
            )
        shared = store.read_shared(path)
        self._check_weights(path, shared)
        with torch.no_grad():
            self._read_parts(path, shared.engine[_STEP])
        self._set_engine(shared.engine)
        return shared.run

    def _stretches(self) -> dict[str, _Stretch]:
        zero: Any = self.deepspeed_engine.optimizer
        found = ((name, _stretch_of(weight, zero)) for name, weight in self._trained())
        return {name: stretch for name, stretch in found if stretch is not None}

    def _trained(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, Any]]:
        assert self.lightning_module is not None
        weights = self.lightning_module.named_parameters(remove_duplicate=remove_duplicate)
        return ((name, weight) for name, weight in weights if weight.requires_grad)

    def _state(self) -> dict[torch.Tensor, dict[str, Any]]:
        zero: Any = self.deepspeed_engine.optimizer
        return zero.optimizer.state

    def _part(self, stretch: _Stretch) -> Part:
        tensors = {WEIGHT: stretch.of(stretch.flat)}
        for name, value in self._state().get(stretch.flat, {}).items():
            if value.shape == stretch.flat.shape:
                tensors[name] = stretch.of(value)
        return Part(stretch.start, tensors)

    def _shared(self, checkpoint: dict[str, Any]) -> Shared:
        engine: Any = self.deepspeed_engine
        scaler = engine.optimizer.loss_scaler
        steps = {float(state[_STEP]) for state in self._state().values()}
        assert len(steps) <= 1, steps
        first: dict[int, str] = {id(weight): name for name, weight in self._trained()}
        every = self._trained(remove_duplicate=False)
        tied = {name: first[id(weight)] for name, weight in every if first[id(weight)] != name}
        in_parts = ("state_dict", "optimizer_states")
        return Shared(
            run={key: value for key, value in checkpoint.items() if key not in in_parts},
            shapes={name: _shape(weight) for name, weight in self._trained()},
            tied=tied,
            engine={
                _STEP: max(steps, default=0.0),
                "counters": {name: int(getattr(engine, name)) for name in _COUNTERS},
                "scaling": {n: getattr(scaler, n) for n in _SCALING if hasattr(scaler, n)},
            },
        )

    def _check_weights(self, path: Path, shared: Shared) -> None:
        here = {name: _shape(weight) for name, weight in self._trained()}
        if here == shared.shapes:
            return
        names = sorted(here.keys() ^ shared.shapes.keys()) or [
            f"{name} {shared.shapes[name]}, here {shape}"
            for name, shape in here.items()
            if shared.shapes[name] != shape
        ]
        shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
        raise CheckpointError(
            f"{path} has other weights that train than this run ({shown}): keep model, adapter and "
            "the parts that train, or make a model of it with `vipllava convert` and start from it"
        )

    def _read_parts(self, path: Path, step: float) -> None:
        zero: Any = self.deepspeed_engine.optimizer
        weights_sharded = hasattr(zero, "checkpoint_event_prologue")
        if weights_sharded:
            zero.checkpoint_event_prologue()
            flats = zero.fp32_partitioned_groups_flat
        else:
            flats = zero.single_partition_of_fp32_groups
        files = store.read_parts(path)
        keys = {key for parts in files for part in parts.values() for key in part.tensors}
        keys.discard(WEIGHT)
        group = zero.optimizer.param_groups[0]
        # All of them, with the few that are padding here: they count the steps, too. AdamW makes
        # the same state in its first step.
        for flat in flats if keys else ():
            beside = flat.device if group.get("fused") or group.get("capturable") else "cpu"
            state = zero.optimizer.state[flat]
            state[_STEP] = torch.tensor(step, dtype=torch.float32, device=beside)
            state.update({key: torch.zeros_like(flat) for key in keys})
        for name, stretch in self._stretches().items():
            state = self._state().get(stretch.flat, {})
            into = {key: stretch.of(state[key]) for key in keys}
            into[WEIGHT] = stretch.of(stretch.flat)
            found = (parts[name] for parts in files if name in parts)
            copied = sum(store.copy_overlap(part, stretch.start, into) for part in found)
            store.check_complete(name, copied, stretch.length)
        if weights_sharded:
            for number in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(number)
            zero.checkpoint_event_epilogue()
        else:
            zero.update_lp_params()

    def _set_engine(self, saved: dict[str, Any]) -> None:
        engine: Any = self.deepspeed_engine
        for name, value in saved["counters"].items():
            setattr(engine, name, value)
        scaler = engine.optimizer.loss_scaler
        for name, value in saved["scaling"].items() if scaler.dynamic else ():
            setattr(scaler, name, value)


def _stretch_of(weight: Any, zero: Any) -> _Stretch | None:
    if hasattr(weight, "ds_id"):  # ZeRO-3: every process has its part of each weight
        group, offset, size = zero.grad_position[zero.get_param_id(weight)]
        start = size * torch.distributed.get_rank(weight.ds_process_group)
        length = min(size, weight.ds_numel - start)
        flat = zero.fp32_partitioned_groups_flat[group]
        return _Stretch(start, length, flat, offset) if length > 0 else None
    mapping = weight._hp_mapping
    if mapping is None:
        return None
    return _Stretch(
        mapping.lp_fragment_address.start,
        mapping.lp_fragment_address.numel,
        zero.single_partition_of_fp32_groups[mapping.param_group_index],
        mapping.hp_fragment_address.start,
    )


def _shape(weight: Any) -> list[int]:
    return list(getattr(weight, "ds_shape", weight.shape))


def _on_all(action: Callable[[], Any]) -> list[Any]:
    """Do something on every process; return all results, or raise on all if one of them failed."""
    try:
        result = action()
    except OSError as error:
        result = error
    results = gather_objects(result)
    for rank, found in enumerate(results):
        if isinstance(found, OSError):
            raise OSError(f"process {rank}: {found}")
    return results
