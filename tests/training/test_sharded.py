"""FSDP2 and ZeRO on two processes end in the export that one process ends in.

Sharded, each process is given another seed: weights come from the first one, and from there before
DeepSpeed's engine starts; the job insists on it (``sharded_job._check_parts``).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import byte_tokenizer
from tests.tiny_model import tiny_spec
from tests.training import loading_job
from tests.training.launching import start
from tests.training.sharded_job import Job
from vipllava.checkpoints.llava_format import read_projector
from vipllava.checkpoints.loading import open_source
from vipllava.checkpoints.training_state import read_training_state
from vipllava.models.tensor_files import read_tensor

LORA = {"r": 4, "alpha": 8, "dropout": 0.0}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return an export's weights by the names of the Hugging Face format."""
    opened = open_source(str(folder))
    return {name: read_tensor(tensor) for name, tensor in opened.tensors.items()}


@pytest.fixture(scope="module")
def spec(tiny_sources) -> dict:
    return asdict(tiny_spec(tiny_sources))


WORKLOADS = {
    "projector": {"trainable": ["projector"]},
    "full": {"trainable": ["projector", "language_model"]},
    "lora": {"trainable": ["projector", "language_model"], "adapter": LORA},
}


@pytest.fixture(scope="module")
def expected(spec, tmp_path_factory) -> dict[str, Path]:
    """What one process ends in, by workload."""
    root = tmp_path_factory.mktemp("one")
    return {
        name: start(Job(str(root / name), "one", spec, **workload), 1)
        for name, workload in WORKLOADS.items()
    }


SLOW = pytest.mark.slow  # DeepSpeed takes half a minute to start here
CASES = [
    pytest.param(strategy, workload, marks=[] if strategy == "fsdp2" else SLOW)
    for strategy in ("fsdp2", "zero3", "zero2")
    for workload in WORKLOADS
    if (strategy, workload) != ("zero3", "full")
]


@pytest.mark.parametrize(("strategy", "workload"), [*CASES, ("zero3", "full")])
def test_two_processes_export_what_one_does(spec, expected, tmp_path, strategy, workload):
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    save = workload != "lora"
    job = Job(str(tmp_path / "two"), strategy, spec, **WORKLOADS[workload], save=save)
    folder = start(job, 2)

    one, two = (json.loads((f / "losses.json").read_text()) for f in (expected[workload], folder))
    assert two == pytest.approx(one, rel=1e-5)
    assert len(one) == 4
    # Callbacks that look at the logits see the same ones, and no process waits for another.
    shown = [(f / "samples" / "000000.jsonl").read_text() for f in (expected[workload], folder)]
    assert shown[0] == shown[1] != ""
    before = weights(expected[workload] / "export")
    after = weights(folder / "export")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        # Adam divides by the root of tiny squares: sums in another order show up there.
        torch.testing.assert_close(after[name], weight, rtol=1e-4, atol=2e-5, msg=name)
    if workload == "projector":
        alone, among = (read_projector(f / "projector") for f in (expected[workload], folder))
        assert alone.keys() == among.keys() == {n for n in after if n.startswith("multi_modal")}
        for name, weight in among.items():
            assert torch.equal(read_tensor(weight), after[name]), name
    if save:
        # What an early end leaves behind: the same weights, out of the training checkpoint.
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["000004.ckpt"]
        state = read_training_state(folder / "checkpoints" / "000004.ckpt")
        assert {name for name in after if name.startswith("multi_modal_projector.")} <= set(state)
        for name, tensor in state.items():
            assert torch.equal(read_tensor(tensor).to(after[name].dtype), after[name]), name
    else:
        assert (folder / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_no_process_holds_the_whole_network_while_zero3_builds_it(spec, tmp_path, monkeypatch):
    """Here the device is the host: a process's half is in its memory, its file mapping is not."""
    pytest.importorskip("deepspeed")
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=5,
        num_attention_heads=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "language")
    byte_tokenizer().save_pretrained(tmp_path / "language")
    large = {**spec, "language_model": str(tmp_path / "language")}

    # What is freed goes back to the system: else glibc's holes count as much again.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    folder = start(loading_job.Job(str(tmp_path / "two"), large), 2)

    for rank in range(2):
        facts = json.loads((folder / f"{rank}.json").read_text())
        assert facts["whole"] > 320 * 2**20
        assert 0.45 < facts["peak"] / facts["whole"] < 0.7, (rank, facts)
