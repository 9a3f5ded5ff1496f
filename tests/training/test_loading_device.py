"""Which process loads what, where, and held in what, for devices that are not the host.

The meta device stands for a GPU: what a run decides by its device can be seen on it, and nothing
is computed. ZeRO-3 and FSDP2 are in test_sharded, on real processes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

from vipllava.models import building
from vipllava.models.adapters import AdapterSettings
from vipllava.models.quantization import QuantizationSettings

META = torch.device("meta")
HALF, WHOLE = torch.bfloat16, torch.float32
PARTS = ("vision_tower", "projector", "language_model", "adapters")


def _strategy(kind: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    if kind == "single":
        return SingleDeviceStrategy(META)
    if kind == "ddp":
        environment = LightningEnvironment()
        strategy = DDPStrategy(
            parallel_devices=[torch.device("cpu"), META], cluster_environment=environment
        )
        monkeypatch.setenv("LOCAL_RANK", "1")
        return strategy
    pytest.importorskip("deepspeed")
    return DeepSpeedStrategy(
        config={"zero_optimization": {"stage": 2}},
        parallel_devices=[META],
        cluster_environment=LightningEnvironment(),
    )


def _configure(module: Any, strategy: Any) -> None:
    """Have a module make its network as Lightning does, in the strategy's contexts."""
    strategy.precision_plugin = MixedPrecision("bf16-mixed", "cuda")
    module._trainer = SimpleNamespace(strategy=strategy, precision="bf16-mixed")
    with strategy.tensor_init_context():
        module.configure_model()
    module._trainer = None


def _dtypes(network: Any) -> list[set[torch.dtype]]:
    """Return what each of PARTS is held in; adapters are no part of the language model here."""
    found: dict[str, set[torch.dtype]] = {part: set() for part in PARTS}
    for name, parameter in network.named_parameters():
        assert parameter.device == META, name
        part = next((p for p in ("vision_tower", "projector") if p in name), "language_model")
        found["adapters" if ".lora_" in name else part].add(parameter.dtype)
    assert all(buffer.device == META for buffer in network.buffers())
    return list(found.values())


@pytest.mark.parametrize("kind", ["single", "ddp", "zero2"])
@pytest.mark.parametrize(
    ("trainable", "adapter", "dtypes"),
    [
        (["projector"], None, [{HALF}, {WHOLE}, {HALF}, set()]),
        (["projector", "language_model"], None, [{HALF}, {WHOLE}, {WHOLE}, set()]),
        (
            ["projector", "language_model"],
            AdapterSettings(r=4),
            [{HALF}, {WHOLE}, {HALF}, {WHOLE}],
        ),
        (["language_model"], AdapterSettings(r=4), [{HALF}, {HALF}, {HALF}, {WHOLE}]),
    ],
)
def test_weights_are_on_the_device_before_setup_and_held_as_they_train(
    make_module, monkeypatch, kind, trainable, adapter, dtypes
):
    module = make_module(trainable=trainable, adapter=adapter)
    _configure(module, _strategy(kind, monkeypatch))

    # DeepSpeed holds everything in half precision, with master weights of its own.
    expected = [{HALF} if found else set() for found in dtypes] if kind == "zero2" else dtypes
    assert _dtypes(module.network) == expected
    trains = {n for n, p in module.network.named_parameters() if p.requires_grad}
    assert trains
    assert all(("lora_" in n) == (adapter is not None) for n in trains if "projector" not in n)


def test_adapters_begin_with_the_same_values_beside_weights_in_half(make_module, make_trainer):
    """Drawn in float32: beside a weight in bfloat16 peft would round them to that."""
    factors = []
    for precision in ("32-true", "bf16-mixed"):
        module = make_module(adapter=AdapterSettings(r=4))
        module.trainer = make_trainer(precision=precision)
        module.configure_model()
        factors.append({n: p for n, p in module.network.named_parameters() if ".lora_" in n})

    assert len(factors[0]) == 28
    for name, value in factors[0].items():
        assert factors[1][name].dtype == WHOLE
        assert torch.equal(factors[1][name], value), name


def test_weights_in_few_bits_go_to_the_device_of_their_process(make_module, monkeypatch):
    pytest.importorskip("bitsandbytes")

    class Asked(Exception):
        pass

    def load(*arguments: Any, **options: Any) -> None:
        raise Asked(options["device_map"])

    monkeypatch.setattr(building, "load_strictly", load)
    module = make_module(adapter=AdapterSettings(r=4), quantization=QuantizationSettings())
    with pytest.raises(Asked) as asked:
        _configure(module, _strategy("ddp", monkeypatch))
    assert asked.value.args == ({"": META},)
