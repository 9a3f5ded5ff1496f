"""Models by id, through huggingface_hub itself, against a small hub on loopback."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.files.file_server import Reply
from tests.ingest.fetch.fake_hub import REPO, Hub, run_hub
from vipllava.checkpoints.loading import build_model, load_tokenizer
from vipllava.models.building import ModelSpec
from vipllava.models.hub_models import load_config, local_folder
from vipllava.types import CheckpointError

REFUSED = {"gated": "GatedRepo", "unknown": "RepoNotFound"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with run_hub("models") as running:
        yield running


def _publish(hub: Hub, folder: str) -> None:
    for path in sorted(Path(folder).iterdir()):
        hub.add(path.name, path.read_bytes(), large=path.suffix == ".safetensors")


def _spec(tiny_sources, language_model: str) -> ModelSpec:
    return ModelSpec(
        vision_tower=tiny_sources.vision_tower,
        language_model=language_model,
        feature_layers=(-1, -2, 1),
        chat_template="llava_v1",
        image_size=28,
    )


@contextmanager
def _offline() -> Iterator[None]:
    """Undone before the hub itself goes, which has a value of its own to put back."""
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield


def _fetched(hub: Hub) -> set[str]:
    return {path.rpartition("/")[2] for path, _ in hub.server.requests if "/resolve/" in path}


def test_a_model_by_its_id(hub, tiny_sources):
    _publish(hub, tiny_sources.language_model)
    for other in ("model.onnx", "consolidated.safetensors", "pytorch_model.bin"):
        hub.add(other, b"another copy of the weights")
    spec = _spec(tiny_sources, REPO)

    tokenizer = load_tokenizer(spec)
    assert "model.safetensors" not in _fetched(hub)
    model = build_model(spec, tokenizer)
    here = build_model(_spec(tiny_sources, tiny_sources.language_model))
    assert _fetched(hub) == {p.name for p in Path(tiny_sources.language_model).iterdir()}
    for name, tensor in here.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name

    # What is in the cache needs no network.
    before = len(hub.server.requests)
    with _offline():
        build_model(spec)
    assert len(hub.server.requests) == before


def test_pickles_where_there_is_nothing_better(hub):
    for name in ("config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"):
        hub.add(name, b"{}")
    assert {path.name for path in local_folder(REPO, "language_model").iterdir()} == {
        "config.json",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
    }
    with _offline():
        assert local_folder(REPO, "language_model").is_dir()


def test_a_gated_model(hub):
    refusal = Reply(403, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "no access"})
    hub.add("config.json", b"{}")
    hub.server.always[hub.place("config.json")] = refusal
    with pytest.raises(
        CheckpointError, match=r"language_model='org/set' is gated: ask for access at https://.*"
    ):
        local_folder(REPO, "language_model")


def test_an_id_that_does_not_exist(hub):
    for path in list(hub.server.files):
        hub.server.always[path] = Reply(404, headers={"X-Error-Code": "RepoNotFound"})
    with pytest.raises(CheckpointError, match=r"vision_tower='org/set' is no folder here and no"):
        local_folder(REPO, "vision_tower")


def test_no_network(hub):
    with (
        _offline(),
        pytest.raises(CheckpointError, match=r"not in the cache.*hf download org/set"),
    ):
        local_folder(REPO, "checkpoint")
    with pytest.raises(CheckpointError, match=r"checkpoint='a/b/c' does not exist: give an"):
        local_folder("a/b/c", "checkpoint")


def test_a_hub_that_is_not_there(hub, monkeypatch, caplog):
    """As on a compute node: its errors are httpx's own, and what is in the cache will do."""
    from huggingface_hub import close_session, constants

    hub.add("config.json", b"{}")
    hub.add("model.safetensors", b"weights")
    in_cache = local_folder(REPO, "language_model", weights=False)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries five times
    close_session()

    assert local_folder(REPO, "language_model", weights=False) == in_cache
    (record,) = [r for r in caplog.records if r.name.startswith("vipllava")]
    assert "language_model=org/set: the Hugging Face Hub cannot be reached" in record.getMessage()
    for missing, weights in ((REPO, True), ("org/other", False)):
        with pytest.raises(CheckpointError, match=f"not in the cache.*hf download {missing}"):
            local_folder(missing, "language_model", weights=weights)


def test_a_hub_that_fails(hub, monkeypatch):
    # The client waits between its five tries.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add("config.json", b"{}")
    for path in list(hub.server.files):
        hub.server.always[path] = Reply(500)
    with pytest.raises(CheckpointError, match=r"could not be downloaded \(.*500.*check the net"):
        local_folder(REPO, "checkpoint")


def test_a_run_in_place_of_its_model(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=r"it holds checkpoints\): name the folder that save"):
        load_config(str(tmp_path), "checkpoint")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"export\): its model is {tmp_path}/export"):
        load_config(str(tmp_path), "checkpoint")
