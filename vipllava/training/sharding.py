"""Networks that no process holds whole: how they come into being, and how they are put together.

Under FSDP2 and ZeRO-3 every process keeps a part of each weight. The first process reads the
checkpoint, the others make empty networks, and each weight is handed out as it is read, so that a
node never holds a copy per process. At the end each weight is gathered on the first process again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import nn
from transformers import VipLlavaForConditionalGeneration
from transformers.modeling_layers import GradientCheckpointingLayer

from vipllava.models.adapters import BLOCKS, AdapterSettings, add_adapters
from vipllava.models.building import empty_network
from vipllava.models.supervised_loss import supervised_loss_sum
from vipllava.types import CheckpointError, VipLlavaError

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

        Raises:
            CheckpointError: it is no such folder.
        """
        from torch.distributed.checkpoint import state_dict as states
        from torch.distributed.checkpoint.state_dict_loader import load

        path = Path(self.broadcast(str(checkpoint_path)))
        if not (path / _METADATA).is_file():
            raise CheckpointError(
                f"{path} is no checkpoint that FSDP2 wrote: go on with the strategy that wrote it, "
                "or make a model of it with `vipllava convert` and start from that"
            )
        module: Any = self.model
        trained = states.StateDictOptions(ignore_frozen_params=True, cpu_offload=True)
        weights = {"state_dict": states.get_model_state_dict(module, options=trained)}
        load(weights, checkpoint_id=path)
        module.load_state_dict(weights["state_dict"], strict=False)
        options = states.StateDictOptions(cpu_offload=True)
        for number, optimizer in enumerate(self.optimizers):
            name = f"optimizer_{number}"
            state = {name: states.get_optimizer_state_dict(module, optimizer)}
            load(state, checkpoint_id=path)
            states.set_optimizer_state_dict(
                module, optimizer, optim_state_dict=state[name], options=options
            )
        return torch.load(path / _METADATA, weights_only=weights_only)


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
def zero3_loading(strategy: Strategy) -> Iterator[None]:
    """Let transformers hand out weights among the processes while it builds.

    Its own ``zero.Init`` takes the place of Lightning's, which stands around ``configure_model``:
    two of them would take each weight apart twice, and adapters may not be taken apart before
    they have their first values.
    """
    if not is_zero3(strategy):
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import (
        restore_init_context,
        shutdown_init_context,
    )
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    assert isinstance(strategy, DeepSpeedStrategy)
    # transformers holds it by a weak reference: it has to outlive the building (lightning #19259).
    alive = HfDeepSpeedConfig(strategy.config)
    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()
        del alive


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
    whole = build() if rank == 0 else None
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
        value = _gather(parameter, is_zero3(strategy))
        if is_first:
            state[name] = value
        del value
    return state if is_first else None


def _is_first(strategy: Any) -> bool:
    return getattr(strategy, "global_rank", 0) == 0


def _gather(parameter: nn.Parameter, zero3: bool) -> torch.Tensor:
    if zero3 and hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().cpu().clone()
    full: Any = getattr(parameter.detach(), "full_tensor", None)
    value = parameter.detach() if full is None else full()
    return value.cpu().clone()


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
