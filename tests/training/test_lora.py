"""LoRA and QLoRA through the LightningModule: what trains, what is saved, what is exported."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

pytest.importorskip("peft")

from tests.tiny_model import META
from tests.training.toy_training import LIGHTNING_WARNINGS, Loader, make_samples
from vipllava.checkpoints.loading import load_tokenizer, open_source
from vipllava.models.adapters import AdapterSettings, adapter_parameters
from vipllava.models.freezing import parameter_table
from vipllava.models.quantization import QuantizationSettings
from vipllava.training.callbacks import ExportCallback
from vipllava.types import ConfigError

pytestmark = LIGHTNING_WARNINGS
SMALL = AdapterSettings(r=4, alpha=8, dropout=0.1)


def test_only_adapters_and_projector_train_and_are_saved(make_module, make_trainer, tmp_path):
    module = make_module(adapter=SMALL)
    module.configure_model()
    before = {name: p.detach().clone() for name, p in module.network.named_parameters()}
    save = ModelCheckpoint(tmp_path / "ckpt", filename="last", every_n_train_steps=1)
    trainer = make_trainer(callbacks=[save], enable_checkpointing=True)
    trainer.fit(module, Loader(make_samples(8), 2, 1))

    changed = {
        name
        for name, p in module.network.named_parameters()
        if not torch.equal(p.detach(), before[name])
    }
    projector = {name for name in before if "multi_modal_projector" in name}
    assert changed == set(adapter_parameters(module.network)) | projector
    saved = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)["state_dict"]
    assert {name.removeprefix("model.") for name in saved} == changed
    rows = {row.part: row for row in parameter_table(module.network)}
    # 7 linear layers a block: r x (inputs + outputs); 16 wide keys and values, 48 in the MLP.
    blocks = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert rows["language_model"].num_trainable == blocks


def test_a_run_leaves_the_adapter_and_the_merged_model(make_module, make_trainer, spec, tmp_path):
    from tests.models.test_adapters import logits_of

    base = ExportCallback(tmp_path / "base" / "export", load_tokenizer(spec), META)
    make_trainer("first", callbacks=[base]).fit(make_module(), Loader(make_samples(4), 2, 1))
    started = replace(spec, checkpoint=str(base.directory))

    export = ExportCallback(
        tmp_path / "run" / "export", load_tokenizer(spec), META, base=str(base.directory)
    )
    module = make_module(model=started, adapter=SMALL)
    make_trainer("second", callbacks=[export]).fit(module, Loader(make_samples(8), 2, 1))

    merged = open_source(str(tmp_path / "run" / "export")).network()
    adapted = open_source(str(tmp_path / "run" / "adapter")).network()
    assert (logits_of(merged) - logits_of(adapted)).abs().max() <= 1e-5
    difference = logits_of(merged) - logits_of(open_source(str(base.directory)).network())
    assert difference.abs().max() > 0.01


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
def test_qlora_lowers_the_loss_and_leaves_a_whole_model(make_module, make_trainer, spec, tmp_path):
    pytest.importorskip("bitsandbytes")
    bits = QuantizationSettings(compute_dtype="float32")
    export = ExportCallback(tmp_path / "run" / "export", load_tokenizer(spec), META)
    module = make_module(adapter=SMALL, quantization=bits, learning_rate=2e-2)
    losses = []

    class Noting(type(export)):
        def on_train_batch_end(self, trainer, *args):
            if "train/loss" in trainer.callback_metrics:
                losses.append(float(trainer.callback_metrics["train/loss"]))

    export.__class__ = Noting
    make_trainer(callbacks=[export], max_epochs=12).fit(module, Loader(make_samples(4), 4, 1))

    assert losses[-1] < 0.7 * losses[0]
    opened = open_source(str(tmp_path / "run" / "export"))
    assert "quantization_config" not in opened.config.to_dict()
    assert opened.network().lm_head.weight.dtype == torch.float32


def test_few_bits_without_an_adapter_cannot_train(make_module):
    with pytest.raises(
        ConfigError, match=r"weights held in 4 bits cannot train: give them adapter="
    ):
        make_module(quantization=QuantizationSettings())
