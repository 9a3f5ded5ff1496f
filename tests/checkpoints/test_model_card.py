"""The usage lines of a model card, run as they stand there, for every format that answers."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_model import META, save_tiny_export, tiny_parts
from tests.toy_data import encode_picture
from vipllava import cli
from vipllava.checkpoints.adapter_format import save_adapter
from vipllava.checkpoints.convert import convert
from vipllava.models.adapters import AdapterSettings, add_adapters


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_sources: Any) -> Path:
    """A folder of one model in three formats, and a picture."""
    here = tmp_path_factory.mktemp("models")
    (here / "picture.jpg").write_bytes(encode_picture(160, 120))
    export = save_tiny_export(
        tiny_sources, here / "hf",
        vision_tower=tiny_sources.vision_tower, language_model=tiny_sources.language_model,
    )  # fmt: skip
    config = json.loads((export / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 2048  # a default answer has 512
    (export / "config.json").write_text(json.dumps(config))
    convert(str(export), here / "llava", format="llava")
    network, _ = tiny_parts(tiny_sources)
    settings = AdapterSettings(r=2, alpha=4, dropout=0.0)
    add_adapters(network, settings)
    save_adapter(network, here / "lora", META, base=str(export), settings=settings)
    return here


@pytest.mark.parametrize("format", ["hf", "llava", "lora"])
def test_its_lines_run(
    place: Path,
    format: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(place)
    card = (place / format / "README.md").read_text("utf-8").replace("FOLDER", format)
    used = card.partition("\n## Use\n")[2].partition("\n## ")[0]
    session: dict[str, Any] = {}
    python = re.findall(r"(?ms)^```python\n(.*?)^```", used)[0]
    exec(compile(python, "README.md", "exec"), session)
    with session["model"]:
        assert session["reply"].question == "What is within the red rectangle?"
    assert capsys.readouterr().out == f"{session['reply'].text}\n"
    (shell,) = re.findall(r"(?ms)^```bash\n(.*?)^```", used)
    chat, *others = (shlex.split(line, comments=True) for line in shell.splitlines())
    assert cli.main(chat[1:]) == 0
    assert capsys.readouterr().out == f"{session['reply'].text}\n"
    assert others == [["vipllava", "serve", format], ["vipllava", "demo", format]]


def test_what_only_trains_has_none(place: Path):
    convert(str(place / "hf"), place / "projector", format="projector")
    card = (place / "projector" / "README.md").read_text("utf-8")
    assert "vl.load" not in card
    assert "stage.checkpoint=FOLDER" in card
