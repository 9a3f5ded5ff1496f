"""Networks that no process holds whole: how they come into being, and how they are put together.

Under FSDP2 and ZeRO-3 every process keeps a part of each weight. The first process reads the
checkpoint, the others make empty networks, and each weight is handed out as it is read, so that a
node never holds a copy per process. At the end each weight is gathered on the first process again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import nn
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

_METADATA = "meta.pt"
"""Beside the shards of a checkpoint: what Lightning keeps of a run."""

LOSS_METHOD = "supervised_loss_sum"
"""Under FSDP2 the loss is called as a method of the network, which gathers what it needs then."""


class Fsdp2Strategy(ModelParallelStrategy):
    """Lightning's strategy, for checkpoints that hold what trains and nothing else.

    Its own way asks a checkpoint for every weight of the network, and a frozen one is not there.
    """

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a folder of all processes into weights and optimizers; return the rest.

        Nothing in it can run code, whatever ``weights_only`` says.

        Raises:
            CheckpointError: it is no such folder, lacks a file, or holds code.
        """
        from torch.distributed.checkpoint import state_dict as states
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_loader import load

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
        return load_plain(path / _METADATA)


def is_fsdp2(strategy: Strategy) -> bool:
    """Whether weights are sharded by PyTorch's ``fully_shard``."""
    return isinstance(strategy, ModelParallelStrategy)


def is_zero3(strategy: Strategy) -> bool:
    """Whether weights are sharded by DeepSpeed."""
    if not isinstance(strategy, DeepSpeedStrategy):
        return False
    config: Any = strategy.config or {}
    return config.get("zero_optimization", {}).get("stage") == 3


@contextmanager
def zero3_paused(strategy: Strategy) -> Iterator[None]:
    """Make modules as usual inside of Lightning's ``zero.Init``.

    That stands around ``configure_model`` and takes each module apart as soon as it is made: first
    values would have to be whole in every process for that moment, and adapters would be taken
    apart before they have theirs. :class:`HandedOut` takes apart what is complete.
    """
    if not is_zero3(strategy):
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import (
        restore_init_context,
        shutdown_init_context,
    )

    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()


class HandedOut:
    """ZeRO-3: the first process reads each weight, and every process keeps its part of it.

    Args:
        strategy: set up, its processes in a group.
    """

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
        """Leave a part of each parameter on every process; the first process's values count.

        Args:
            parameters: in the same order on every process; those in parts already stay.
        """
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
    """Decide where this process's weights go as they are read.

    Straight to its device, also where they train: Lightning moves the module there later, which
    then has nothing to do. (FSDP2 hands out what the first process has read on its host, see
    :func:`build_fsdp2`.)

    Args:
        strategy: of a trainer that has set up its processes; without one it is the CPU.
    """
    if strategy is None:
        return OnDevice(torch.device("cpu"))
    if is_zero3(strategy):
        assert isinstance(strategy, DeepSpeedStrategy)
        return HandedOut(strategy)
    return OnDevice(strategy.root_device)


def build_fsdp2(
    build: Callable[[], VipLlavaForConditionalGeneration],
    prepare: Callable[[VipLlavaForConditionalGeneration], None],
    mesh: Any,
    *,
    device: torch.device,
    precision: str,
) -> VipLlavaForConditionalGeneration:
    """Build a network whose weights are spread over the processes of a mesh.

    Args:
        build: makes the whole network; called on the first process only.
        prepare: adds adapters and freezes; called on every process.
        mesh: one-dimensional device mesh of the data-parallel processes.
        device: of this process.
        precision: Lightning's name; in ``bf16-mixed`` sharded fp32 weights are gathered as bf16.

    Returns:
        The network, ``fully_shard`` applied to every block, to the tower and to the rest.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
    )

    rank = mesh.get_local_rank()
    built: list[VipLlavaForConditionalGeneration] = []
    first_alone(rank == 0, "reading the model", lambda: built.append(build()))
    whole = built[0] if built else None
    # Its dtype, before `prepare` holds what is frozen in another.
    facts: list[Any] = [(whole.config, whole.dtype, whole.generation_config) if whole else None]
    if whole is not None:
        prepare(whole)
    torch.distributed.broadcast_object_list(facts, src=0)
    config, dtype, generation_config = facts[0]
    model = empty_network(config, dtype)
    model.generation_config = generation_config
    prepare(model)
    _shard(model, mesh, precision)
    network: Any = model
    network.to_empty(device=device)
    # Buffers that no file holds follow from the config; `to_empty` left them undefined.
    buffers = _computed_buffers(whole, model)
    state = dict(whole.state_dict()) if whole is not None else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(network, state, options=options)
    for name, value in buffers.items():
        network.get_buffer(name).copy_(value)
    network.tie_weights()
    _add_loss_method(network)
    return model


def whole_network(
    model: VipLlavaForConditionalGeneration,
    strategy: Strategy,
    adapter: AdapterSettings | None,
) -> VipLlavaForConditionalGeneration | None:
    """Return a network whose weights are whole on the first process, None on the others.

    Every process has to call this.

    Args:
        model: the trained network.
        strategy: that it trained under.
        adapter: of its adapters, if it has any.
    """
    is_first = _is_first(strategy)
    if not (is_fsdp2(strategy) or is_zero3(strategy)):
        return model if is_first else None
    state = gather_state_dict(model, strategy)
    if state is None:
        return None
    config: Any = model.config
    whole = empty_network(config, model.dtype)
    if adapter is not None:
        add_adapters(whole, adapter)
    network: Any = whole
    network.load_state_dict(state, strict=False, assign=True)
    network.tie_weights()
    whole.generation_config = model.generation_config
    missing = [name for name, p in whole.named_parameters() if p.is_meta]
    assert not missing, missing
    return whole


def gather_state_dict(model: nn.Module, strategy: Strategy) -> dict[str, torch.Tensor] | None:
    """Gather every weight on the first process's CPU, one at a time; None on the others.

    Every process has to call this.
    """
    is_first = _is_first(strategy)
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        value = _gather(parameter, is_zero3(strategy), kept=is_first)
        if value is not None:
            state[name] = value
    return state if is_first else None


def _is_first(strategy: Any) -> bool:
    return getattr(strategy, "global_rank", 0) == 0


def _gather(parameter: nn.Parameter, zero3: bool, *, kept: bool) -> torch.Tensor | None:
    """Return a copy of the whole weight on the CPU where it is kept; every process calls this."""
    if zero3 and hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().to("cpu", copy=True) if kept else None
    full: Any = getattr(parameter.detach(), "full_tensor", None)
    value = parameter.detach() if full is None else full()
    return value.to("cpu", copy=True) if kept else None


def _shard(model: VipLlavaForConditionalGeneration, mesh: Any, precision: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if precision == "bf16-mixed":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # Not the tower or the language model as such: `fully_shard` gives a module another class, and
    # transformers finds by class which hidden states a model hands out.
    tower_blocks = [
        module
        for module in model.model.vision_tower.modules()
        if isinstance(module, GradientCheckpointingLayer)
    ]
    for block in [*tower_blocks, *model.get_submodule(BLOCKS).children()]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _computed_buffers(
    whole: VipLlavaForConditionalGeneration | None, model: nn.Module
) -> dict[str, torch.Tensor]:
    """Hand out the first process's buffers that are in no state dict."""
    stored = set(model.state_dict())
    names = [name for name, _ in model.named_buffers() if name not in stored]
    values: list[Any] = [None]
    if whole is not None:
        values = [{name: whole.get_buffer(name).cpu() for name in names}]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def _add_loss_method(network: Any) -> None:
    from torch.distributed.fsdp import register_fsdp_forward_method

    setattr(network, LOSS_METHOD, MethodType(supervised_loss_sum, network))
    register_fsdp_forward_method(network, LOSS_METHOD)


def check_rotary_precision(model: nn.Module) -> None:
    """See to it that no strategy has rounded the frequencies of the rotary embedding.

    DeepSpeed before 0.19.2 casts a whole network to half precision, buffers too: in bfloat16 a
    token at position 2,000 is then turned by 2.4 radians too far or too little. Nothing fails; the
    network only learns another embedding than the exported one has.

    Raises:
        VipLlavaError: a buffer of frequencies is not float32.
    """
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dtype != torch.float32:
            raise VipLlavaError(
                f"{name} is {buffer.dtype}, not float32: the strategy has rounded the rotary "
                "embedding's frequencies. With DeepSpeed: pip install 'deepspeed>=0.19.2'"
            )
