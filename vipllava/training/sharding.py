"""Networks that no process holds whole, under FSDP2 and ZeRO-3: how they are made and gathered.

The first process reads the checkpoint, the others make empty networks, and each weight is handed
out as it is read, so that a node never holds a copy per process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any, Final, TypeGuard

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.fsdp import MixedPrecisionPolicy as Policy
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import VipLlavaForConditionalGeneration
from transformers.modeling_layers import GradientCheckpointingLayer

from vipllava.checkpoints.plain_pickles import load_plain, plain_values_only
from vipllava.checkpoints.training_state import check_whole
from vipllava.models.adapters import BLOCKS, AdapterSettings, add_adapters
from vipllava.models.building import empty_network
from vipllava.models.placing import OnDevice, Placement
from vipllava.models.supervised_loss import supervised_loss_sum
from vipllava.training.first_alone import first_alone
from vipllava.types import CheckpointError, VipLlavaError, first_line

LOSS_METHOD: Final = "supervised_loss_sum"
"""Under FSDP2 the loss is called as a method of the network, which gathers what it needs then."""


class Fsdp2Strategy(ModelParallelStrategy):
    """Lightning's strategy, for checkpoints that hold what trains and no frozen weights."""

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a folder of all processes into weights and optimizers; return the rest.

        Nothing in it can run code, whatever ``weights_only`` says.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        check_whole(path)
        if not (path / ".metadata").is_file():
            raise CheckpointError(
                f"{path} is no checkpoint that FSDP2 wrote: go on with the strategy that wrote it, "
                "or make a model of it with `vipllava convert` and start from that"
            )
        module: Any = self.model
        trained = states.StateDictOptions(ignore_frozen_params=True, cpu_offload=True)
        weights = {"state_dict": states.get_model_state_dict(module, options=trained)}
        options = states.StateDictOptions(cpu_offload=True)
        try:
            with plain_values_only():
                load(weights, checkpoint_id=path)
                module.load_state_dict(weights["state_dict"], strict=False)
                for number, optimizer in enumerate(self.optimizers):
                    name = f"optimizer_{number}"
                    state = {name: states.get_optimizer_state_dict(module, optimizer)}
                    load(state, checkpoint_id=path)
                    states.set_optimizer_state_dict(
                        module, optimizer, optim_state_dict=state[name], options=options
                    )
        except CheckpointException as error:
            reason, _ = next(iter(error.failures.values()))
            raise CheckpointError(
                f"{path} cannot be continued ({first_line(reason)}): a file of it is damaged, "
                "is of other weights, or holds code, which is not run"
            ) from error
        return load_plain(path / "meta.pt")  # what Lightning keeps of a run, beside the shards


def is_zero3(strategy: Strategy | None) -> TypeGuard[DeepSpeedStrategy]:
    """Whether weights are sharded by DeepSpeed."""
    config: Any = strategy.config if isinstance(strategy, DeepSpeedStrategy) else None
    return (config or {}).get("zero_optimization", {}).get("stage") == 3


@contextmanager
def zero3_paused(strategy: Strategy | None) -> Iterator[None]:
    """Make modules as usual inside of Lightning's ``zero.Init`` around ``configure_model``.

    It takes each module apart as soon as it is made: first values would have to be whole in every
    process, and adapters would not have theirs. :class:`HandedOut` takes apart what is complete.
    """
    if not is_zero3(strategy):
        yield
        return
    from deepspeed.runtime.zero import partition_parameters

    partition_parameters.shutdown_init_context()
    try:
        yield
    finally:
        partition_parameters.restore_init_context()


class HandedOut:
    """ZeRO-3: the first process reads each weight, and every process keeps its part of it."""

    def __init__(self, strategy: DeepSpeedStrategy) -> None:
        self.device = strategy.root_device
        self.reads = strategy.global_rank == 0
        self._strategy = strategy
        self._parted: Any = None

    def put(self, hollow: nn.Parameter, read: Callable[[], torch.Tensor]) -> nn.Parameter:
        """Read on the first process, hand out, keep a part; every process has to call this."""
        if self.reads:
            value = read().to(self.device).to(hollow.dtype).contiguous()
        else:
            value = torch.empty(hollow.shape, dtype=hollow.dtype, device=self.device)
        parameter = nn.Parameter(value, requires_grad=hollow.requires_grad)
        self.take_apart([parameter])
        return parameter

    def take_apart(self, parameters: Iterable[nn.Parameter]) -> None:
        """Leave a part of each of the first process's values on every one; in the same order."""
        import deepspeed

        whole = [parameter for parameter in parameters if not hasattr(parameter, "ds_id")]
        if whole and self._parted is None:
            deepspeed.zero.Init(
                module=nn.ParameterList(whole),
                config_dict_or_path=self._strategy.config,
                remote_device=self._strategy.remote_device,
            )
            self._parted = whole[0]
        elif whole:
            self._parted.convert_to_zero_parameters(param_list=whole)


def placement_for(strategy: Strategy | None) -> Placement:
    """Return where this process's weights go as they are read: its device, unless sharded.

    Without a strategy it is the CPU; FSDP2 has :func:`build_fsdp2`.
    """
    if is_zero3(strategy):
        return HandedOut(strategy)
    return OnDevice(torch.device("cpu") if strategy is None else strategy.root_device)


def build_fsdp2(
    build: Callable[[], VipLlavaForConditionalGeneration],
    prepare: Callable[[VipLlavaForConditionalGeneration], None],
    mesh: Any,
    *,
    device: torch.device,
    precision: str,
) -> VipLlavaForConditionalGeneration:
    """Build a network whose weights are spread over processes, and shard its blocks and the rest.

    ``build`` makes the whole network, on the first process only; ``prepare`` adds adapters and
    freezes, on every one. The mesh has one dimension. In a ``precision`` of ``bf16-mixed`` sharded
    fp32 weights are gathered as bf16.
    """
    built: list[Any] = []
    first_alone(mesh.get_local_rank() == 0, "reading the model", lambda: built.append(build()))
    whole = built[0] if built else None
    # Its dtype, before `prepare` holds what is frozen in another.
    config, dtype, generation_config = _from_first(
        None if whole is None else (whole.config, whole.dtype, whole.generation_config)
    )
    if whole is not None:
        prepare(whole)
    model: Any = empty_network(config, dtype)
    model.generation_config = generation_config
    prepare(model)
    _shard(model, mesh, precision)
    model.to_empty(device=device)
    # Buffers that no file holds follow from the config; `to_empty` left them undefined.
    computed = {name for name, _ in model.named_buffers()} - set(model.state_dict())
    state, own = {}, {}
    if whole is not None:
        state, own = dict(whole.state_dict()), {n: whole.get_buffer(n).cpu() for n in computed}
    buffers = _from_first(own)
    options = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    states.set_model_state_dict(model, state, options=options)
    for name, value in buffers.items():
        model.get_buffer(name).copy_(value)
    model.tie_weights()
    setattr(model, LOSS_METHOD, MethodType(supervised_loss_sum, model))
    register_fsdp_forward_method(model, LOSS_METHOD)
    return model


def whole_network(
    model: VipLlavaForConditionalGeneration,
    strategy: Strategy,
    adapter: AdapterSettings | None,
) -> VipLlavaForConditionalGeneration | None:
    """Return a trained network with whole weights on the first process's CPU, None on the others.

    Every process has to call this.
    """
    is_first = getattr(strategy, "global_rank", 0) == 0
    if not (isinstance(strategy, ModelParallelStrategy) or is_zero3(strategy)):
        return model if is_first else None
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        with _gathered(parameter) as value:
            if is_first:
                state[name] = value.to("cpu", copy=True)
    if not is_first:
        return None
    whole: Any = empty_network(model.config, model.dtype)
    if adapter is not None:
        add_adapters(whole, adapter)
    whole.load_state_dict(state, strict=False, assign=True)
    whole.tie_weights()
    whole.generation_config = model.generation_config
    assert not (missing := [name for name, p in whole.named_parameters() if p.is_meta]), missing
    return whole


@contextmanager
def _gathered(parameter: nn.Parameter) -> Iterator[torch.Tensor]:
    """Have the whole weight; on the first process only it is certain to be there."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.detach()
    else:
        value: Any = parameter.detach()
        yield value.full_tensor() if hasattr(value, "full_tensor") else value


def _from_first(value: Any) -> Any:
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def _shard(model: VipLlavaForConditionalGeneration, mesh: Any, precision: str) -> None:
    half = Policy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half if precision == "bf16-mixed" else Policy()
    # Not the tower or the language model as such: `fully_shard` gives a module another class, and
    # transformers finds by class which hidden states a model hands out.
    tower = model.model.vision_tower.modules()
    tower_blocks = [module for module in tower if isinstance(module, GradientCheckpointingLayer)]
    for part in [*tower_blocks, *model.get_submodule(BLOCKS).children(), model]:
        fully_shard(part, mesh=mesh, mp_policy=policy)


def check_rotary_precision(model: nn.Module) -> None:
    """Raise VipLlavaError if a strategy has rounded the frequencies of the rotary embedding.

    DeepSpeed before 0.19.2 casts buffers to half precision, too: in bfloat16 a token at position
    2,000 is turned by 2.4 radians too far or too little, and nothing fails.
    """
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dtype != torch.float32:
            raise VipLlavaError(
                f"{name} is {buffer.dtype}, not float32: the strategy has rounded the rotary "
                "embedding's frequencies. With DeepSpeed: pip install 'deepspeed>=0.19.2'"
            )
