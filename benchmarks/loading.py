"""Memory and time of loading a sharded checkpoint in every format, each in a process of its own.

The network is CLIP's real ViT-L/14-336, the real projector's width and a Llama of half a billion
random parameters, in bfloat16: 1.7 GB in shards of 200 MB. ``peak_ratio`` is by how much the
process's resident memory grew at most until every page of every weight had been looked at, over
the size of the weights in the dtype that they are loaded in; pages that the kernel keeps mapped
from the files count like any other; ``private_ratio`` leaves these out, which the kernel takes back
when it needs room. The rows ``transformers`` are ``from_pretrained`` alone on the first folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

_SHARD_BYTES: Final = 200 * 10**6
_SAMPLING_S: Final = 0.002
_REPEATS: Final = 3
_LANGUAGE_MODEL: Final = {
    "vocab_size": 32000,
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
}
_VISION_TOWER: Final = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_FILES: Final = {
    "hf": ("hf",),
    "llava": ("llava",),
    "parts": ("vision_tower", "language_model"),
    "transformers": ("hf",),
}
"""What is loaded, and the folders it is loaded from."""
_DTYPES: Final = {"bfloat16": 1, "float32": 2}
"""Dtypes to load in, and how much larger than the files the weights then are."""
_ROOT: Final = Path(__file__).resolve().parent.parent


def run() -> dict[str, Any]:
    """Measure; a row for each format."""
    return {"rows": measure(_LANGUAGE_MODEL, _VISION_TOWER)}


def measure(language_model: dict[str, int], vision_tower: dict[str, int]) -> list[dict[str, Any]]:
    """Write a checkpoint in every format and load each in new processes.

    Args:
        language_model: arguments of its ``LlamaConfig``.
        vision_tower: arguments of its ``CLIPVisionConfig``.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="vipllava-bench-") as folder:
        _in_process("write", folder, json.dumps(language_model), json.dumps(vision_tower))
        for dtype, growth in _DTYPES.items():
            for kind, names in _FILES.items():
                files = [f for name in names for f in (Path(folder) / name).glob("*.safetensors")]
                size = sum(file.stat().st_size for file in files)
                runs = [_in_process("load", folder, kind, dtype) for _ in range(_REPEATS)]
                middle = sorted(runs, key=lambda found: found["peak_bytes"])[_REPEATS // 2]
                row = {
                    "checkpoint": kind,
                    "files": len(files),
                    "gigabytes": size / 1e9,
                    "loaded in": dtype,
                    "peak_ratio": middle["peak_bytes"] / (growth * size),
                    "private_ratio": middle["private_bytes"] / (growth * size),
                    "load_s": middle["seconds"],
                }
                rows.append(row)
    return rows


def _in_process(*words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loading", *words],
        cwd=_ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def _write(folder: Path, language_model: dict[str, int], vision_tower: dict[str, int]) -> None:
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from vipllava.checkpoints.convert import convert
    from vipllava.checkpoints.hf_format import save_export
    from vipllava.checkpoints.loading import open_spec

    torch.set_default_dtype(torch.bfloat16)
    parts: dict[str, Any] = {
        "vision_tower": CLIPVisionModel(CLIPVisionConfig(**vision_tower)),  # pyright: ignore
        "language_model": LlamaForCausalLM(LlamaConfig(**language_model)),  # pyright: ignore
    }
    torch.set_default_dtype(torch.float32)
    for name, model in parts.items():
        model.save_pretrained(folder / name, max_shard_size=_SHARD_BYTES)
    tokenizer = _ROOT / "vipllava" / "sample_world" / "base" / "language_model"
    for file in tokenizer.glob("tokenizer*.json"):
        (folder / "language_model" / file.name).write_bytes(file.read_bytes())
    opened = open_spec(_spec(folder))
    save_export(opened.network(dtype=torch.bfloat16), opened.tokenizer, folder / "hf", opened.meta)
    convert(str(folder / "hf"), folder / "llava", format="llava", **_tower_of(folder))
    for name in ("hf", "llava"):
        _split(folder / name)


def _spec(folder: Path, dtype: str = "bfloat16") -> Any:
    from vipllava.models.building import ModelSpec

    return ModelSpec(
        vision_tower=str(folder / "vision_tower"),
        language_model=str(folder / "language_model"),
        feature_layers=(-1, -2, -3, -4, 1),
        chat_template="llava_v1",
        image_size=json.loads((folder / "vision_tower" / "config.json").read_text())["image_size"],
        dtype=dtype,
    )


def _tower_of(folder: Path) -> dict[str, Any]:
    spec = _spec(folder)
    return {"vision_tower": spec.vision_tower, "feature_layers": spec.feature_layers}


def _split(folder: Path) -> None:
    from vipllava.models.tensor_files import open_tensors, write_tensors

    whole = folder / "whole.safetensors"
    (folder / "model.safetensors").rename(whole)
    write_tensors(folder, open_tensors(whole, "checkpoint").items(), _SHARD_BYTES)
    whole.unlink()


def _load(folder: Path, kind: str, dtype: str) -> dict[str, float]:
    import torch
    from transformers import VipLlavaForConditionalGeneration

    from vipllava.checkpoints.loading import build_model, open_source

    torch_dtype = getattr(torch, dtype)
    start = time.monotonic()
    with _Peak() as peak:
        if kind == "transformers":
            model: Any = VipLlavaForConditionalGeneration.from_pretrained(
                folder / "hf", dtype=torch_dtype
            )
        elif kind == "parts":
            model = build_model(_spec(folder, dtype))
        else:
            opened = open_source(str(folder / kind), **_tower_of(folder))
            model = opened.network(dtype=torch_dtype)
        for parameter in model.parameters():
            assert parameter.dtype == torch_dtype
            parameter.data.view(torch.uint8).flatten()[:: os.sysconf("SC_PAGE_SIZE")].max()
    return {
        "peak_bytes": peak.bytes,
        "private_bytes": peak.private_bytes,
        "seconds": time.monotonic() - start,
    }


class _Peak:
    """By how much memory grew at most, sampled from a thread: all of it, and without file pages."""

    def __enter__(self) -> _Peak:
        self._before = self._highest = _memory()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()
        self.bytes, self.private_bytes = (
            high - low for high, low in zip(self._highest, self._before, strict=True)
        )

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLING_S):
            self._look()

    def _look(self) -> None:
        now = _memory()
        self._highest = (max(self._highest[0], now[0]), max(self._highest[1], now[1]))


def _memory() -> tuple[int, int]:
    """Return the resident bytes, and those of them that no file holds as well."""
    _, resident, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
    page = os.sysconf("SC_PAGE_SIZE")
    return resident * page, (resident - of_files) * page


def main(words: list[str]) -> None:
    """Do what the process was started for; the last line that it prints is its result."""
    task, folder, *rest = words
    if task == "write":
        _write(Path(folder), *(json.loads(word) for word in rest))
        sys.stdout.write("{}\n")
    else:
        sys.stdout.write(json.dumps(_load(Path(folder), *rest)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
