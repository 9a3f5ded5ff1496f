"""The training benchmark on a tiny random network: the functions that measure a 7B on a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from benchmarks import train, train_cases
from benchmarks.train import Line
from benchmarks.train_cases import Case, published_lengths, random_network, random_samples
from vipllava.config import hardware
from vipllava.models.adapters import AdapterSettings
from vipllava.models.blocks import compile_blocks
from vipllava.models.building import network_config

CPU = torch.device("cpu")
LENGTHS = np.array([12, 9, 20, 7, 14, 10], dtype=np.int32)
PICTURED = np.array([True, False, True, True, True, False])


@pytest.fixture(scope="module")
def tiny_config():
    tower = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=None,
    )
    return network_config(
        tower,
        text,
        feature_layers=(-1, 1),
        num_tokens=62,
        image_token_id=60,
    )


@pytest.fixture
def case(tiny_config) -> Case:
    return Case(
        model="random",
        workload="full",
        device=CPU,
        make_network=lambda: random_network(tiny_config, CPU),
        samples=random_samples(tiny_config, LENGTHS, PICTURED, supervised_share=0.5),
        micro_batch_size=2,
        pack_length=32,
        pad_token_id=61,
        adapter=AdapterSettings(r=2, alpha=4),
    )


@pytest.mark.parametrize("workload", train.WORKLOADS)
def test_every_line_is_measured(case, workload):
    if not train_cases.can_train(workload):
        pytest.skip("needs peft")
    rows = train.measure(replace(case, workload=workload), warm_up=1)

    assert [(row["loop"], row["rows"], row["checkpointing"]) for row in rows] == [
        ("ours", "packed", "no"),
        ("ours", "packed", "yes"),
        ("ours", "padded", "no"),
        ("plain", "padded", "yes"),
        ("plain", "padded", "no"),
    ]
    # 72 tokens in rows of 32: three packs, one a step; six samples, two a step.
    assert [row["steps"] for row in rows] == [3, 3, 3, 3, 3]
    assert [row["mfu"] for row in rows] == ["-"] * 5
    assert all(row["samples_per_s"] > 0 and "%" in row["spread"] for row in rows)
    work = {row["tflops"] * 1e12 / row["samples_per_s"] for row in rows}
    assert max(work) == pytest.approx(min(work), rel=1e-9)  # the same samples
    reference = rows[3]
    assert reference["ratio"] == 1.0
    for row in rows:
        speed = row["samples_per_s"] / reference["samples_per_s"]
        assert row["ratio"] == pytest.approx(speed, rel=1e-9)


def test_blocks_are_recomputed_where_the_line_says_so(case):
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    network = case.network()
    network.model.language_model.layers[0].mlp.register_forward_pre_hook(count)
    train.measure(replace(case, make_network=lambda: network), warm_up=0)
    assert calls == 3 * (1 + 2) + 3 * (1 + 2 + 1)


# The compiler looks at everything that a tensor has.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_blocks_are_compiled_where_the_line_says_so(case, monkeypatch):
    made, ran = 0, 0

    def backend(graph, inputs):
        def run(*tensors):
            nonlocal ran
            ran += 1
            return graph(*tensors)

        nonlocal made
        made += 1
        return run

    ours = Line("ours", "packed", False, "sdpa")
    lines = (ours, replace(ours, compiled=True), train.reference_line())
    monkeypatch.setattr(train, "lines_of", lambda case: lines)
    monkeypatch.setattr(train, "compile_blocks", partial(compile_blocks, backend=backend))
    torch.compiler.reset()
    rows = train.measure(case, warm_up=0)

    assert [(row["compiled"], row["steps"]) for row in rows] == [("no", 3), ("yes", 3), ("no", 3)]
    assert made <= 2  # for one row's bounds, then for any
    assert ran == 2 * 3  # two blocks, three steps


def machine(*packages: str) -> hardware.Hardware:
    device = hardware.CudaDevice("NVIDIA H200", 139.7, (9, 0))
    return hardware.Hardware(cuda=(device,), installed=frozenset(packages))


@pytest.mark.parametrize(
    ("packages", "more"),
    [
        ((), [("ours", "sdpa", True)]),
        (("torch_varlen",), [("ours", "torch_varlen", False), ("ours", "torch_varlen", True)]),
        (
            ("torch_varlen", "flash_attn"),
            [
                ("ours", "flash_attention_2", False),
                ("ours", "flash_attention_2", True),
                ("plain", "flash_attention_2", False),
            ],
        ),
    ],
)
def test_a_cuda_device_has_lines_with_the_attention_of_a_run(case, monkeypatch, packages, more):
    monkeypatch.setattr(hardware, "detect", lambda: machine(*packages))
    everywhere = train.lines_of(case)
    there = train.lines_of(replace(case, device=torch.device("cuda")))
    assert there[: len(everywhere)] == everywhere
    found = [(line.loop, line.attention, line.compiled) for line in there[len(everywhere) :]]
    assert found == more


def test_both_loops_work_on_the_same_samples(case):
    padded, packed = (train.batches(case, rows) for rows in ("padded", "packed"))
    keys = [f"random/{n}" for n in range(6)]
    assert [key for batch in padded for key in batch.keys] == keys
    assert sorted(key for batch in packed for key in batch.keys) == keys
    network = case.network()
    for batch in padded:
        with torch.no_grad():
            ours = train.our_loss(network, batch)
            plain = train.plain_loss(network, train.plain_inputs(batch))
        assert float(ours) == pytest.approx(float(plain), rel=1e-5)


def test_a_line_without_memory_ends_alone(case, monkeypatch):
    def packed_is_too_much(network, batch):
        if batch.input_ids.shape[1] == case.pack_length:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB")
        return our_loss(network, batch)

    our_loss = train.our_loss
    monkeypatch.setattr(train, "our_loss", packed_is_too_much)
    rows = train.measure(case, warm_up=0)
    short = ["out of memory", "out of memory"]
    assert [row["samples_per_s"] for row in rows[:2]] == short
    assert [(row["ratio"], row["steps"]) for row in rows[:2]] == [("-", 0)] * 2
    assert [row["steps"] for row in rows[2:]] == [3, 3, 3]


def test_other_errors_are_no_want_of_memory(case, monkeypatch):
    def broken(network, batch):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(train, "our_loss", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train.measure(case, warm_up=0)


def test_lengths_are_the_recipes():
    captions, pictured = published_lengths("projector", 20_000)
    assert captions.mean() == pytest.approx(601, abs=0.5)
    assert pictured.all()
    instructions, pictured = published_lengths("full", 20_000)
    assert instructions.mean() == pytest.approx(774, abs=5)
    assert pictured.mean() == pytest.approx(0.94, abs=0.03)
    assert instructions.max() <= 2048


@pytest.mark.parametrize(
    ("gib", "names"),
    [
        (139.7, ["7b", "7b", "7b, 24 of 32 blocks"]),
        (79.2, ["7b", "7b", "7b, 16 of 32 blocks"]),
        (23.6, ["7b", "7b, 24 of 32 blocks", "7b"]),
    ],
)
def test_a_cuda_device_gets_as_many_blocks_as_it_bears(gib, names, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "can_train", lambda workload: True)
    monkeypatch.setattr(train, "tiny_case", lambda workload, data_root: None)
    monkeypatch.setattr(train, "measure", lambda case: [case] if case else [])
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    memory = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: memory)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")

    rows = train.run(tmp_path)["rows"]
    cases = [row for row in rows if isinstance(row, Case)]
    found = [row.model if isinstance(row, Case) else row["model"] for row in rows]
    assert found == names
    assert [case.workload for case in cases] == ["projector", "lora", "full"][: len(cases)]
    if gib == 23.6:  # not even four blocks in full
        assert rows[2]["samples_per_s"] == "out of memory"
    tokens = [sum(s.encoded.length for s in case.samples) for case in cases]
    assert [n / len(case.samples) for n, case in zip(tokens, cases, strict=True)] == [
        pytest.approx(mean, abs=1) for mean in (601.9, 793.2, 793.2)[: len(cases)]
    ]
