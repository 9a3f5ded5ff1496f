"""A folder goes up as it is, private, or stays with a word on what to do."""

from __future__ import annotations

import huggingface_hub
import pytest

from vipllava.checkpoints.folders import upload
from vipllava.types import CheckpointError


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    done: list[tuple] = []

    class Api:
        def __init__(self, endpoint):
            pass

        def create_repo(self, repository, *, private, exist_ok):
            done.append(("create", repository, private, exist_ok))
            return f"https://hub/{repository}"

        def upload_folder(self, *, repo_id, folder_path):
            if "full" in repo_id:
                raise OSError("no network")
            done.append(("upload", repo_id, folder_path))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return done


def test_a_private_repository_is_made(calls, tmp_path):
    assert upload(tmp_path, "me/model") == "https://hub/me/model"
    assert calls == [("create", "me/model", True, True), ("upload", "me/model", str(tmp_path))]


def test_a_refusal_says_how_to_go_on(calls, tmp_path):
    with pytest.raises(CheckpointError, match=r"\(no network\): log in with `hf auth login`.*hf"):
        upload(tmp_path, "me/full")
