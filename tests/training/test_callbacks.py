from __future__ import annotations

import io
from dataclasses import replace

import pytest
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from tests import tiny_meta
from tests.training.toy_training import LIGHTNING_WARNINGS, Loader, make_samples
from vipllava.checkpoints.loading import load_tokenizer, open_source
from vipllava.training.callbacks import ExportCallback, ParameterTable

pytestmark = LIGHTNING_WARNINGS

META = replace(tiny_meta.META, stage="pretrain", chat_template="plain", image_aspect="square")


def test_parameter_table_is_shown_at_the_start(make_module, make_trainer):
    text = io.StringIO()
    table = ParameterTable(Console(file=text, width=60))
    make_trainer(callbacks=[table]).fit(
        make_module(trainable=["projector"]), Loader(make_samples(2), 2, 1)
    )

    rows = [line.split() for line in text.getvalue().replace("│", " ").splitlines()]
    assert ["vision_tower", "41,648", "0"] in rows
    assert ["projector", "4,352", "4,352"] in rows
    assert ["language_model", "36,000", "0"] in rows
    assert ["all", "82,000", "4,352"] in rows


def test_export_at_the_end_of_fit(make_module, make_trainer, spec, tmp_path):
    module = make_module()
    export = ExportCallback(tmp_path / "run" / "export", load_tokenizer(spec), META)
    make_trainer(callbacks=[export]).fit(module, Loader(make_samples(2), 2, 1))

    opened = open_source(str(tmp_path / "run" / "export"))
    assert opened.meta == META
    assert len(opened.tokenizer) == 261
    trained, found = module.network.state_dict(), opened.network().state_dict()
    assert all((trained[name] == weight).all() for name, weight in found.items())


def test_a_failed_run_exports_nothing(make_module, make_trainer, spec, tmp_path):
    class Fails(Callback):
        def on_train_batch_end(self, *args: object) -> None:
            raise RuntimeError("power cut")

    export = ExportCallback(tmp_path / "export", load_tokenizer(spec), META)
    with pytest.raises(RuntimeError, match="power cut"):
        make_trainer(callbacks=[export, Fails()]).fit(make_module(), Loader(make_samples(4), 2, 1))
    assert not (tmp_path / "export").exists()
