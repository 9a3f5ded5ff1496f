from __future__ import annotations

import errno
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.files.file_server import FileServer, Reply, run_server
from vipllava.files.download import DiskError
from vipllava.files.retries import Patience
from vipllava.ingest.fetch import image_lists
from vipllava.ingest.fetch.image_lists import (
    ImageListError,
    ImageListOutcome,
    fetch_images,
    make_jpegs,
    read_image_list,
)
from vipllava.shards.sources import ImageList

IMAGES = ImageList("ocr/dataset.json", "imageURL", "ocr/images")
QUICK = Patience(max_attempts=2, timeout_s=5, backoff_s=0)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with run_server() as running:
        yield running


def image(fmt: str, colour: tuple[int, int, int] = (200, 30, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), colour).save(buffer, fmt)
    return buffer.getvalue()


def write_list(root: Path, urls: dict[str, str]) -> None:
    (root / "ocr").mkdir(exist_ok=True)
    entries = {key: {"imageURL": url, "title": "?"} for key, url in urls.items()}
    (root / "ocr" / "dataset.json").write_text(json.dumps(entries))


def names(root: Path) -> set[str]:
    return {path.name for path in (root / "ocr" / "images").iterdir()}


def fetch(root: Path) -> ImageListOutcome:
    return fetch_images(IMAGES, root, num_workers=2, patience=QUICK)


def test_everything_ends_as_a_real_jpeg(server: FileServer, tmp_path: Path) -> None:
    jpeg = image("JPEG")
    urls = {
        "001": server.serve("a.jpg", jpeg),
        "002": server.serve("b.gif", image("GIF")),
        "003": server.serve("c.jpg", image("PNG")),  # a lie, as some of them are
        "004": server.serve("d", image("WEBP")),
    }
    write_list(tmp_path, urls)
    outcome = fetch(tmp_path)
    assert outcome == ImageListOutcome(4, 3, ())
    assert names(tmp_path) == {"001.jpg", "002.jpg", "003.jpg", "004.jpg"}
    assert (tmp_path / "ocr/images/001.jpg").read_bytes() == jpeg
    for name in names(tmp_path):
        with Image.open(tmp_path / "ocr/images" / name) as stored:
            assert stored.format == "JPEG"
            red, green, blue = stored.convert("RGB").getpixel((5, 5))  # type: ignore[misc]
            assert abs(red - 200) < 12
            assert abs(green - 30) < 12
            assert abs(blue - 40) < 12


def test_failures_are_listed_and_tried_again(server: FileServer, tmp_path: Path) -> None:
    good = image("JPEG")
    urls = {
        "1": server.serve("1.jpg", good),
        "2": server.serve("2.jpg", b"<html>gone"),
        "3": server.url("3.jpg"),
        "4": server.serve("4.jpg", good, always=Reply(500)),
        "5": server.serve("5.jpg", good[:-40], always=Reply(send=100)),
    }
    write_list(tmp_path, urls)
    outcome = fetch(tmp_path)
    assert outcome.num_listed == 5
    assert [failure.name for failure in outcome.failures] == ["2", "3", "4", "5"]
    assert [failure.address for failure in outcome.failures] == [urls[k] for k in "2345"]
    for failure, words in zip(
        outcome.failures, ["no image", "404", "500", "connection ended"], strict=True
    ):
        assert words in failure.reason
    assert names(tmp_path) == {"1.jpg"}
    for path in ("2.jpg", "3.jpg", "4.jpg", "5.jpg"):
        server.always.pop(path, None)
        server.serve(path, good)
    server.requests.clear()
    assert fetch(tmp_path) == ImageListOutcome(5, 0, ())
    assert server.asked("1.jpg") == []


def test_the_published_scripts_result_is_put_right(server: FileServer, tmp_path: Path) -> None:
    """Files as that script leaves them: other extensions, and .jpg that are none."""
    folder = tmp_path / "ocr" / "images"
    folder.mkdir(parents=True)
    (folder / "1.gif").write_bytes(image("GIF"))
    (folder / "2.jpg").write_bytes(image("PNG"))
    (folder / "3.jpg").write_bytes(b"<html>")
    (folder / "4.jpeg").write_bytes(image("JPEG"))
    (folder / "5.jpg").write_bytes(image("JPEG"))
    (folder / "notes.txt").write_text("mine")
    write_list(tmp_path, {key: server.url(f"{key}.jpg") for key in "12345"})
    server.serve("3.jpg", image("JPEG"))
    assert fetch(tmp_path) == ImageListOutcome(5, 2, ())
    assert server.asked("3.jpg") == [None]
    assert len(server.requests) == 1
    assert names(tmp_path) == {*(f"{key}.jpg" for key in "12345"), "notes.txt"}
    assert all((folder / f"{key}.jpg").read_bytes().startswith(b"\xff\xd8\xff") for key in "12345")


def test_what_cannot_be_decoded_stays_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"<html>")
    (tmp_path / "folder.jpg").mkdir()
    converted, failures = make_jpegs(tmp_path)
    assert converted == 0
    assert [failure.name for failure in failures] == ["1.jpg"]
    assert (tmp_path / "1.jpg").read_bytes() == b"<html>"


def test_progress(server: FileServer, tmp_path: Path) -> None:
    url = server.serve("a.jpg", image("JPEG"))
    write_list(tmp_path, {str(key): url for key in range(30)})
    told: list[tuple[int, int | None]] = []
    fetch_images(IMAGES, tmp_path, num_workers=2, on_progress=lambda *now: told.append(now))
    assert told == [(done, 30) for done in range(1, 31)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read as JSON .*No such file"),
        ("[", "cannot be read as JSON"),
        ("[]", "holds list"),
        ('{"1": "x"}', "entry `1` has imageURL None"),
        ('{"../1": {"imageURL": "http://x"}}', "entry `../1`"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "list.json").write_text(text)
    with pytest.raises(ImageListError, match=words):
        read_image_list(tmp_path / "list.json", "imageURL")


def test_a_full_disk_stops_all(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_list(tmp_path, {"1": server.serve("1.jpg", image("JPEG"))})

    def full(*_: object) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(image_lists, "_store", full)
    with pytest.raises(DiskError, match="no space left"):
        fetch(tmp_path)
    assert names(tmp_path) == set()
