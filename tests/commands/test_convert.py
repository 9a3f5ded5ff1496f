"""The command line of `vipllava convert`; tests/checkpoints has the conversions themselves."""

from __future__ import annotations

import pytest

from tests.tiny_model import tiny_spec
from vipllava import cli
from vipllava.checkpoints import folders
from vipllava.checkpoints.hf_format import save_export
from vipllava.checkpoints.loading import open_spec


@pytest.fixture
def export(tiny_sources, tmp_path):
    spec = tiny_spec(tiny_sources)
    opened = open_spec(spec)
    return save_export(opened.network(), opened.tokenizer, tmp_path / "export", opened.meta)


def test_help(capsys):
    assert cli.main(["convert", "--help"]) == 0
    out = capsys.readouterr().out
    for word in ("SRC", "DST", "lora-merged", "--vision-tower", "--base", "--push-to-hub"):
        assert word in out


def test_a_conversion_says_what_it_did(export, tmp_path, capsys):
    assert cli.main(["convert", str(export), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert f"{export} is a VipLlava in the Hugging Face format" in out
    assert f"{tmp_path / 'out'} (hf, bfloat16)" in out
    assert "logits agree, greatest difference" in out


def test_the_result_is_uploaded_on_request(export, tmp_path, capsys, monkeypatch):
    calls = []

    def upload(directory, repository):
        calls.append((directory, repository))
        return "https://hub/me/model"

    monkeypatch.setattr(folders, "upload", upload)
    words = ["convert", str(export), str(tmp_path / "out"), "--push-to-hub", "me/model"]
    assert cli.main(words) == 0
    assert calls == [(tmp_path / "out", "me/model")]
    assert "uploaded to https://hub/me/model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "gguf"], "'gguf' is not one of 'hf', 'llava', 'projector'"),
        (["--feature-layers", "-2,b"], "expected whole numbers, such as -2,-5"),
        (["--push-to-hub", "model"], "expected OWNER/NAME"),
        (["--device", "cuda:77"], "--device 'cuda:77' is not there"),
        (["--vision-towr", "x"], "(Possible options: --vision-tower)"),
    ],
)
def test_what_cannot_be_meant(export, tmp_path, capsys, words, message):
    assert cli.main(["convert", str(export), str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_destination_is_needed(export, capsys):
    assert cli.main(["convert", str(export)]) == 2
    assert "DST" in capsys.readouterr().err
