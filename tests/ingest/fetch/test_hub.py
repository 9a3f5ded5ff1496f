"""huggingface_hub itself against a small hub on loopback."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.files.file_server import Reply, run_server
from tests.ingest.fetch.fake_hub import COMMIT, REPO, Hub, run_hub
from vipllava.files.download import DownloadError
from vipllava.files.retries import Patience
from vipllava.ingest.fetch.hub import HubFile, fetch_hub_file, list_hub_files

BIG = bytes(range(256)) * 2000
QUICK = Patience(max_attempts=2, timeout_s=5, backoff_s=0)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with run_hub() as running:
        yield running


def test_files_are_listed_by_pattern(hub: Hub) -> None:
    hub.add("bbox/questions.jsonl", b"{}\n")
    hub.add("bbox/images/1.png", b"png", large=True)
    hub.add("meta.json", b"[]")
    found = list_hub_files(REPO, "bbox/*")
    assert [file.path for file in found] == ["bbox/images/1.png", "bbox/questions.jsonl"]
    assert found[0] == HubFile(
        REPO,
        COMMIT,
        "bbox/images/1.png",
        3,
        hashlib.sha256(b"png").hexdigest(),
        hashlib.sha1(b"blob 3\0png").hexdigest(),
    )
    assert found[1].sha256 is None
    assert [file.path for file in list_hub_files(REPO, "meta.json", revision="v1")] == ["meta.json"]
    with pytest.raises(DownloadError, match=r"org/set has no file `human/\*` at its main branch"):
        list_hub_files(REPO, "human/*")


@pytest.mark.parametrize("large", [False, True])
def test_a_file_comes_whole(hub: Hub, tmp_path: Path, large: bool) -> None:
    hub.add("deep/big.bin", BIG, large=large)
    told: list[tuple[int, int | None]] = []
    file = list_hub_files(REPO, "deep/big.bin")[0]
    target = tmp_path / "set" / "big.bin"
    fetch_hub_file(file, target, on_progress=lambda *now: told.append(now))
    assert target.read_bytes() == BIG
    assert told[-1] == (len(BIG), len(BIG))
    fetch_hub_file(file, target)
    assert len(hub.server.asked(hub.place("deep/big.bin"))) == 1


@pytest.mark.parametrize("validators", [True, False])
def test_a_later_call_goes_on(hub: Hub, tmp_path: Path, validators: bool) -> None:
    """A commit never changes: the server need not vouch for it."""
    hub.server.validators = validators
    hub.add("big.bin", BIG, Reply(send=200_000), Reply(500), large=True)
    file = list_hub_files(REPO, "big.bin")[0]
    with pytest.raises(DownloadError, match=r"big\.bin: given up after 2 attempts in .*500"):
        fetch_hub_file(file, tmp_path / "big.bin", patience=QUICK)
    assert not (tmp_path / "big.bin").exists()
    fetch_hub_file(file, tmp_path / "big.bin", patience=QUICK)
    assert (tmp_path / "big.bin").read_bytes() == BIG
    asked = [None, "bytes=200000-", "bytes=200000-"]
    assert hub.server.asked(hub.place("big.bin")) == asked


def test_other_bytes_than_stated_are_refused(hub: Hub, tmp_path: Path) -> None:
    hub.add("large.bin", BIG, large=True)
    hub.add("small.bin", b"small")
    listed = list_hub_files(REPO, "*.bin")
    hub.server.serve(hub.place("large.bin"), BIG[::-1])
    hub.server.serve(hub.place("small.bin"), b"other")
    for file, words in zip(listed, ["its sha256 is", "its git hash is not"], strict=True):
        with pytest.raises(DownloadError, match=words):
            fetch_hub_file(file, tmp_path / "a", patience=QUICK)
        assert not (tmp_path / "a").exists()


def test_a_file_of_another_commit_is_replaced(hub: Hub, tmp_path: Path) -> None:
    hub.add("a.bin", b"new!")
    file = list_hub_files(REPO, "a.bin")[0]
    (tmp_path / "a.bin").write_bytes(b"old!")
    fetch_hub_file(file, tmp_path / "a.bin", patience=QUICK)
    assert (tmp_path / "a.bin").read_bytes() == b"new!"


def test_the_login_is_sent_to_the_hub_and_to_nobody_else(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub redirects to where the bytes lie; that server must not see the token."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.add("a.bin", b"bytes", large=True)
    file = list_hub_files(REPO, "a.bin")[0]
    with run_server() as store:
        elsewhere = store.serve("blob", b"bytes")
        hub.server.serve(hub.place("a.bin"), b"bytes", Reply(302, headers={"Location": elsewhere}))
        fetch_hub_file(file, tmp_path / "a.bin", patience=QUICK)
        assert (tmp_path / "a.bin").read_bytes() == b"bytes"
        assert store.logins == [None]
    assert hub.server.logins[-1] == "Bearer hf_secret"


def test_refusals_name_the_remedy(hub: Hub, tmp_path: Path) -> None:
    api = f"api/datasets/{REPO}"
    hub.server.always[api] = Reply(403)
    with pytest.raises(DownloadError, match=r"org/set: the hub denies access; accept the data set"):
        list_hub_files(REPO, "*", patience=QUICK)
    with pytest.raises(DownloadError, match=r"org/none: .*correct `hub` or `revision`"):
        list_hub_files("org/none", "*", patience=QUICK)
    del hub.server.always[api]
    hub.add("a.bin", b"a")
    file = list_hub_files(REPO, "a.bin")[0]
    hub.server.always[hub.place("a.bin")] = Reply(401)
    with pytest.raises(DownloadError, match=r"a\.bin of .*org/set: the hub denies access; accept"):
        fetch_hub_file(file, tmp_path / "a.bin", patience=QUICK)


def test_a_hub_that_is_gone(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with run_server() as gone:
        pass
    monkeypatch.setattr(constants, "ENDPOINT", gone.address)
    with pytest.raises(DownloadError, match=r"org/set: given up after 2 attempts"):
        list_hub_files(REPO, "*", patience=QUICK)


def test_offline_mode_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(DownloadError, match=r"switched off by HF_HUB_OFFLINE"):
        list_hub_files(REPO, "*", patience=QUICK)
