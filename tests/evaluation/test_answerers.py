"""The same answers batched, one at a time, in one process and in two; refused requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.evaluation.answering import grey_sample
from tests.toy_data import encode_picture
from vipllava.checkpoints.export_meta import ExportMeta
from vipllava.checkpoints.hf_format import save_export
from vipllava.checkpoints.loading import build_model, load_tokenizer
from vipllava.evaluation.answerers import EngineAnswerer, EngineSettings, make_answerer
from vipllava.evaluation.asking import Protocol, ask_items
from vipllava.evaluation.bench import Item, Prediction
from vipllava.evaluation.journal import Journal
from vipllava.models.building import ModelSpec
from vipllava.types import ConfigError, Failure, Request, Turn, VipLlavaError
from vipllava.visual_prompts.policies import VisualPromptPolicy


def items(count: int = 14) -> list[Item]:
    samples = [grey_sample(str(n), "star" * (1 + n % 5)) for n in range(count)]
    images = [encode_picture(40 + n, 40, "PNG", seed=n) for n in range(count)]
    return [
        Item(f"toy/{n}", replace(sample, image=image))
        for n, (sample, image) in enumerate(zip(samples, images, strict=True))
    ]


@pytest.fixture(scope="module")
def checkpoint(tiny_sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = ModelSpec(
        vision_tower=tiny_sources.vision_tower,
        language_model=tiny_sources.language_model,
        feature_layers=(-1, -2, 1),
        chat_template="llava_v1",
        image_size=28,
    )
    tokenizer = load_tokenizer(spec)
    folder = tmp_path_factory.mktemp("model") / "export"
    meta = ExportMeta("finetune", "llava_v1", "pad", 28, 4, (-1, -2, 1), "a", "b")
    save_export(build_model(spec, tokenizer, seed=1), tokenizer, folder, meta)
    return folder


def ask(checkpoint: Path, folder: Path, processes: int, batch_size: int) -> list[Prediction]:
    protocol = Protocol({"refcocog": VisualPromptPolicy()}, seed=1, marks=("kept", "removed"))
    settings = EngineSettings(str(checkpoint), "cpu", "float32")

    def answerer():
        return make_answerer(settings, processes, max_new_tokens=6, batch_size=batch_size)

    found = ask_items(items(), protocol, answerer, Journal(folder, {}))
    return [each for predictions in found.values() for each in predictions]


def test_batches_and_processes_do_not_matter(checkpoint: Path, tmp_path: Path):
    one_by_one = ask(checkpoint, tmp_path / "1", processes=1, batch_size=1)
    assert len({each.answer for each in one_by_one}) > 5
    assert all(each.failure is None for each in one_by_one)
    assert [each.key for each in one_by_one] == [item.key for item in items()] * 2
    assert ask(checkpoint, tmp_path / "8", processes=1, batch_size=8) == one_by_one
    # Jobs of four questions, so that both processes get several.
    assert ask(checkpoint, tmp_path / "two", processes=2, batch_size=1) == one_by_one


class Refuses:
    """Answers with the key, and refuses some requests, as an engine does."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def answer(
        self, requests: Sequence[Request], *, max_new_tokens: int = 64, batch_size: int = 16
    ) -> list[str]:
        if max_new_tokens < 1:
            raise ConfigError("max_new_tokens=0 must be at least 1")
        if long := [request.key for request in requests if request.key in ("3", "40")]:
            raise VipLlavaError(f"request {long[0]} has 9000 tokens")
        self.sizes.append(len(requests))
        return [request.key for request in requests]


def test_a_request_that_is_refused_costs_no_other_answer():
    requests = [Request(None, [Turn("user", "?")], str(number)) for number in range(60)]
    engine = Refuses()
    found = dict(EngineAnswerer(engine, batch_size=2).answer(iter(requests)))
    assert sorted(found) == list(range(60))
    assert found[3] == Failure("request 3 has 9000 tokens")
    assert found[40] == Failure("request 40 has 9000 tokens")
    assert all(found[n] == str(n) for n in range(60) if n not in (3, 40))
    assert sum(engine.sizes) == 58
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        next(EngineAnswerer(engine, max_new_tokens=0).answer(requests))
