"""Downloads from a real server on loopback that is slow, breaks off, lies or fails."""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import preloaded
from tests.files.file_server import FileServer, Reply, run_server
from vipllava.files import download as downloading
from vipllava.files import retries as patience
from vipllava.files.download import DownloadError, download
from vipllava.files.retries import Patience
from vipllava.types import ConfigError

BODY = bytes(range(256)) * 400  # 102400 bytes, every 256 of them alike only within a period
QUICK = Patience(max_attempts=3, timeout_s=5, backoff_s=0)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with run_server() as running:
        yield running


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_whole_file_and_nothing_else(server: FileServer, tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    url = server.serve("a.bin", BODY)
    target = tmp_path / "deep" / "a.bin"
    assert download(url, target, on_progress=lambda *now: told.append(now)) == len(BODY)
    assert target.read_bytes() == BODY
    assert leftovers(target.parent) == {"a.bin"}
    assert told[-1] == (len(BODY), len(BODY))


def test_it_goes_on_where_the_connection_broke(server: FileServer, tmp_path: Path) -> None:
    url = server.serve("a.bin", BODY, Reply(send=30_000), Reply(send=20_000))
    download(url, tmp_path / "a.bin", patience=QUICK)
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert server.asked("a.bin") == [None, "bytes=30000-", "bytes=50000-"]


def test_a_later_call_goes_on_too(server: FileServer, tmp_path: Path) -> None:
    url = server.serve("a.bin", BODY, *[Reply(send=10_000)] * 3)
    target = tmp_path / "a.bin"
    with pytest.raises(DownloadError) as caught:
        download(url, target, patience=QUICK)
    assert re.fullmatch(
        rf"{url}: given up after 3 attempts in \d+ s; the last one: the connection ended after "
        rf"30000 of 102400 bytes\. 30000 bytes are kept in {tmp_path / '.a.bin.part'}: run the "
        "same command again to go on",
        str(caught.value),
    )
    assert not target.exists()
    download(url, target, patience=QUICK)
    assert target.read_bytes() == BODY
    assert server.asked("a.bin")[-1] == "bytes=30000-"
    assert leftovers(tmp_path) == {"a.bin"}


def test_a_killed_process_is_continued(server: FileServer, tmp_path: Path) -> None:
    url = server.serve("a.bin", BODY, Reply(wait_s=60))
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from vipllava.files.download import download\n"
        "download(sys.argv[1], Path(sys.argv[2]), "
        "on_progress=lambda *now: print('bytes', flush=True))\n"
    )
    command = [sys.executable, "-c", script, url, str(tmp_path / "a.bin")]
    with preloaded.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"bytes\n"
        process.kill()
    kept = (tmp_path / ".a.bin.part").stat().st_size
    assert 0 < kept < len(BODY)
    download(url, tmp_path / "a.bin", patience=QUICK)
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert server.asked("a.bin")[-1] == f"bytes={kept}-"


def test_a_file_that_changed_meanwhile_is_fetched_anew(server: FileServer, tmp_path: Path) -> None:
    url = server.serve("a.bin", BODY, *[Reply(send=10_000)] * 3)
    with pytest.raises(DownloadError):
        download(url, tmp_path / "a.bin", patience=QUICK)
    server.serve("a.bin", BODY[::-1])
    download(url, tmp_path / "a.bin", patience=QUICK)
    assert (tmp_path / "a.bin").read_bytes() == BODY[::-1]


@pytest.mark.parametrize(("ranges", "validators"), [(False, True), (True, False), (False, False)])
def test_servers_that_cannot_resume(
    server: FileServer, tmp_path: Path, ranges: bool, validators: bool
) -> None:
    server.ranges, server.validators = ranges, validators
    url = server.serve("a.bin", BODY, Reply(send=90_000), Reply(send=60_000))
    download(url, tmp_path / "a.bin", patience=QUICK)
    assert (tmp_path / "a.bin").read_bytes() == BODY


def test_a_partial_file_of_another_address_is_not_continued(
    server: FileServer, tmp_path: Path
) -> None:
    url = server.serve("a.bin", BODY, *[Reply(send=10_000)] * 3)
    with pytest.raises(DownloadError):
        download(url, tmp_path / "x", patience=QUICK)
    other = server.serve("b.bin", BODY[::-1])
    download(other, tmp_path / "x", patience=QUICK)
    assert (tmp_path / "x").read_bytes() == BODY[::-1]
    assert server.asked("b.bin") == [None]


@pytest.mark.parametrize("note", ["", "[]", "{", '{"url": 3}', '{"validator": []}'])
def test_a_damaged_note_is_not_trusted(server: FileServer, tmp_path: Path, note: str) -> None:
    (tmp_path / ".a.bin.part").write_bytes(b"rubbish")
    (tmp_path / ".a.bin.part.json").write_text(note)
    url = server.serve("a.bin", BODY)
    download(url, tmp_path / "a.bin", patience=QUICK)
    assert (tmp_path / "a.bin").read_bytes() == BODY


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_failure_is_waited_out(server: FileServer, tmp_path: Path, status: int) -> None:
    url = server.serve("a.bin", BODY, Reply(status), Reply(status, headers={"Retry-After": "0"}))
    download(url, tmp_path / "a.bin", patience=QUICK)
    assert (tmp_path / "a.bin").read_bytes() == BODY


def test_a_lasting_failure_ends(server: FileServer, tmp_path: Path) -> None:
    url = server.serve("a.bin", BODY, always=Reply(500))
    with pytest.raises(
        DownloadError, match=r"3 attempts in \d+ s; the last one: the server answer"
    ):
        download(url, tmp_path / "a.bin", patience=QUICK)
    assert len(server.requests) == 3
    assert leftovers(tmp_path) == set()


@pytest.mark.parametrize(
    ("status", "words"), [(401, "a login"), (403, "denies access"), (404, "has moved")]
)
def test_a_refusal_is_not_repeated(
    server: FileServer, tmp_path: Path, status: int, words: str
) -> None:
    url = server.serve("a.bin", BODY, always=Reply(status))
    with pytest.raises(DownloadError, match=words) as caught:
        download(url, tmp_path / "a.bin", patience=QUICK)
    assert url in str(caught.value)
    assert len(server.requests) == 1


def test_a_server_that_falls_silent(server: FileServer, tmp_path: Path) -> None:
    url = server.serve("a.bin", BODY, Reply(wait_s=0.6))
    patience = Patience(max_attempts=2, timeout_s=0.2, backoff_s=0)
    download(url, tmp_path / "a.bin", patience=patience)
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert len(server.requests) == 2


def test_a_server_that_is_slow_but_moves(server: FileServer, tmp_path: Path) -> None:
    url = server.serve("a.bin", BODY, Reply(wait_s=0.3))
    download(url, tmp_path / "a.bin", patience=Patience(1, timeout_s=5))
    assert (tmp_path / "a.bin").read_bytes() == BODY


def test_nobody_answers(tmp_path: Path) -> None:
    with run_server() as gone:
        address = gone.url("a.bin")
    with pytest.raises(DownloadError, match=r"given up after 3.*Check the address and the network"):
        download(address, tmp_path / "a.bin", patience=QUICK)


def test_truncated_where_the_length_says_so(server: FileServer, tmp_path: Path) -> None:
    url = server.serve("a.bin", BODY, always=Reply(send=0))
    with pytest.raises(DownloadError, match="ended after 0 of 102400 bytes"):
        download(url, tmp_path / "a.bin", patience=QUICK)
    assert not (tmp_path / "a.bin").exists()


@pytest.mark.parametrize("claim", [50_000, -1])
def test_truncated_without_a_true_length(server: FileServer, tmp_path: Path, claim: int) -> None:
    """The server takes half the file for the whole: only what the manifest knows helps."""
    url = server.serve("a.bin", BODY, always=Reply(send=50_000, claim=claim))
    digest = hashlib.sha256(BODY).hexdigest()
    with pytest.raises(DownloadError, match=r"has 50000 bytes|sha256 is"):
        download(url, tmp_path / "a.bin", size=len(BODY), patience=QUICK)
    with pytest.raises(DownloadError, match=f"sha256 is .* the manifest says {digest}.*discarded"):
        download(url, tmp_path / "a.bin", sha256=digest, patience=QUICK)
    assert not (tmp_path / "a.bin").exists()


def test_another_size_is_refused_before_it_is_downloaded(
    server: FileServer, tmp_path: Path
) -> None:
    url = server.serve("a.bin", BODY)
    with pytest.raises(DownloadError, match="has 102400 bytes, the manifest says 5"):
        download(url, tmp_path / "a.bin", size=5, patience=QUICK)
    assert leftovers(tmp_path) == set()


def test_checksums(server: FileServer, tmp_path: Path) -> None:
    url, md5 = server.serve("a.bin", BODY), hashlib.md5(BODY).hexdigest()
    download(url, tmp_path / "a.bin", size=len(BODY), md5=md5, patience=QUICK)
    with pytest.raises(DownloadError, match="its md5 is"):
        download(url, tmp_path / "b.bin", md5="0" * 32, patience=QUICK)
    assert leftovers(tmp_path) == {"a.bin"}


def test_an_existing_file_stays_until_the_new_one_is_whole(
    server: FileServer, tmp_path: Path
) -> None:
    (tmp_path / "a.bin").write_bytes(b"old")
    url = server.serve("a.bin", BODY, always=Reply(send=10))
    with pytest.raises(DownloadError):
        download(url, tmp_path / "a.bin", patience=QUICK)
    assert (tmp_path / "a.bin").read_bytes() == b"old"


def test_progress_forgives_a_shaky_line(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "FRUITFUL", 10_000)
    url = server.serve("a.bin", BODY, always=Reply(send=10_000))
    download(url, tmp_path / "a.bin", patience=QUICK)
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert len(server.requests) == 11


def test_a_liar_does_not_keep_us_for_ever(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Much comes with each attempt, but never more than before."""
    monkeypatch.setattr(patience, "FRUITFUL", 10_000)
    server.validators = False
    url = server.serve("a.bin", BODY, always=Reply(send=50_000))
    with pytest.raises(DownloadError, match="given up after 3 attempts"):
        download(url, tmp_path / "a.bin", patience=QUICK)
    assert len(server.requests) == 3


def test_a_full_disk_is_told_before_and_during(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.serve("a.bin", BODY)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(DownloadError, match=r"no space left for .*102400 bytes are to come"):
            download(url, tmp_path / "a.bin", patience=QUICK)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(downloading.os, "fsync", full)
        with pytest.raises(DownloadError, match=r"no space left.*Free some space there"):
            download(url, tmp_path / "a.bin", patience=QUICK)
    assert not (tmp_path / "a.bin").exists()
    download(url, tmp_path / "a.bin", patience=QUICK)
    assert (tmp_path / "a.bin").read_bytes() == BODY


def test_a_folder_that_cannot_be_written(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    url = server.serve("a.bin", BODY)
    with pytest.raises(DownloadError, match="cannot write"):
        download(url, tmp_path / "file" / "a.bin", patience=QUICK)


def test_only_web_addresses(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="no http or https address"):
        download("file:///etc/hostname", tmp_path / "a")


def test_an_address_with_letters_of_the_world(server: FileServer, tmp_path: Path) -> None:
    server.serve("m%C3%BCnchen%20%E5%9B%BE/a%20b.bin", BODY)
    for path in ("münchen 图/a b.bin", "m%C3%BCnchen%20图/a%20b.bin"):
        download(f"{server.address}/{path}?x=ü", tmp_path / "a.bin", patience=QUICK)
        assert (tmp_path / "a.bin").read_bytes() == BODY
    sent = downloading._as_sent("http://me@例え.テスト:8080/a?b=c d#e")
    assert sent == "http://me@xn--r8jz45g.xn--zckzah:8080/a?b=c%20d#e"
    signed = "https://host/a%2Fb?sig=x%3D&|"
    assert downloading._as_sent(signed) == signed


@pytest.mark.parametrize("url", ["http://[", "http://host/\ud83d", "https://" + "ü" * 70 + "/a"])
def test_what_is_no_address(tmp_path: Path, url: str) -> None:
    with pytest.raises(DownloadError, match=r"is no http or https address \(.*\); correct it"):
        download(url, tmp_path / "a", patience=QUICK)


@pytest.mark.parametrize(
    "bad", [{"max_attempts": 0}, {"timeout_s": 0.0}, {"backoff_s": -1.0}, {"total_s": 0.0}]
)
def test_impossible_patience(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="cannot work"):
        Patience(**bad)  # type: ignore[arg-type]
