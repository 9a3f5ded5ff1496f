from __future__ import annotations

from dataclasses import replace

import pytest
from lightning.pytorch.callbacks import Callback

from tests import tiny_model
from tests.training.toy_training import LIGHTNING_WARNINGS, Loader, make_samples
from vipllava.checkpoints.loading import load_tokenizer, open_source
from vipllava.training.callbacks import ExportCallback, ParameterTable

pytestmark = LIGHTNING_WARNINGS

META = replace(tiny_model.META, stage="pretrain", chat_template="plain", image_aspect="square")


def test_what_trains_is_said_once(make_module, make_trainer, caplog):
    with caplog.at_level("INFO", logger="vipllava.training.callbacks"):
        make_trainer(callbacks=[ParameterTable()]).fit(
            make_module(trainable=["projector"]), Loader(make_samples(2), 2, 1)
        )
    name = ParameterTable.__module__
    (message,) = [record.getMessage() for record in caplog.records if record.name == name]
    assert [line.split() for line in message.splitlines()] == [
        ["what", "trains:"],
        ["vision_tower", "41,648", "parameters,", "0", "train"],
        ["projector", "4,352", "parameters,", "4,352", "train"],
        ["language_model", "36,000", "parameters,", "0", "train"],
    ]


def test_export_at_the_end_of_fit(make_module, make_trainer, spec, tmp_path):
    module = make_module()
    export = ExportCallback(tmp_path / "run" / "export", load_tokenizer(spec), META)
    make_trainer(callbacks=[export]).fit(module, Loader(make_samples(2), 2, 1))

    opened = open_source(str(tmp_path / "run" / "export"))
    assert opened.meta == META
    assert len(opened.tokenizer) == 261
    trained, found = module.network.state_dict(), opened.network().state_dict()
    assert all((trained[name] == weight).all() for name, weight in found.items())


def test_what_was_put_into_an_earlier_export_stays(make_module, make_trainer, spec, tmp_path):
    export = ExportCallback(tmp_path / "run" / "export", load_tokenizer(spec), META)
    for number in (1, 2, 3):
        trainer = make_trainer(f"log-{number}", callbacks=[export])
        trainer.fit(make_module(trainable=["projector"]), Loader(make_samples(2), 2, 1))
        (tmp_path / "run" / "export" / "notes.txt").write_text(f"mine {number}")
    run = tmp_path / "run"
    notes = {p.parts[-3]: p.read_text() for p in run.glob("*/export/notes.txt")}
    assert notes == {"before-1": "mine 1", "before-2": "mine 2"}
    assert (run / "before-2" / "projector" / "mm_projector.bin").is_file()
    assert (run / "export" / "notes.txt").read_text() == "mine 3"


def test_a_failed_run_exports_nothing(make_module, make_trainer, spec, tmp_path):
    class Fails(Callback):
        def on_train_batch_end(self, *args: object) -> None:
            raise RuntimeError("power cut")

    export = ExportCallback(tmp_path / "export", load_tokenizer(spec), META)
    with pytest.raises(RuntimeError, match="power cut"):
        make_trainer(callbacks=[export, Fails()]).fit(make_module(), Loader(make_samples(4), 2, 1))
    assert not (tmp_path / "export").exists()
