"""What reads foreign data, fed with mutations: ``python -m tests.fuzz.targets NAME COUNT``.

Anything but a short error of the project's own, a case of more than 20 seconds, or one that takes
more than two gigabytes above what the process has at its start, ends it with a traceback.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from hypothesis import HealthCheck, given, settings

from tests.fuzz.mutations import exports, images, records, tars
from tests.ingest.importing.exports import put_pictures
from tests.toy_data import encode_picture, make_manifest
from vipllava.ingest.building.annotations import iter_annotations
from vipllava.ingest.building.incoming import ingest
from vipllava.ingest.importing.run import import_annotations
from vipllava.ingest.tar_listing import list_tar
from vipllava.keyed_random import generator_for
from vipllava.records import parse_record
from vipllava.records.image_decode import decode_image, image_size
from vipllava.shards.tar_index import estimate_tokens, index_tar, parse_object
from vipllava.shards.tars import ShardSet
from vipllava.types import VipLlavaError

MOST_BYTES: Final = 2 << 30
MOST_S: Final = 20
LONGEST: Final = 1500
LONGEST_LISTED: Final = 5000  # of a message that lists faults
_IMAGE: Final = encode_picture()
_ROOT: Final = Path()  # a temporary folder


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Let the project's own errors pass that a person can read."""
    message = ""
    try:
        yield
    except VipLlavaError as error:
        message = str(error)
    assert len(message) <= LONGEST, f"a message of {len(message)} letters: {message[:200]}"


def read_record(case: tuple[str, bytes]) -> None:
    """A record as it comes out of a tar, and out of an annotation list."""
    kind, text = case
    with own_errors():
        record = parse_object(text, "x.tar: k.json")
        assert estimate_tokens(record) >= 0
        for name in ("auto", kind):
            for image in (_IMAGE, None):
                with own_errors():
                    parse_record(
                        record, key="k", dataset="d", image=image, kind=name,
                        rng=generator_for("fuzz"),
                    )  # fmt: skip
    manifest = make_manifest(image_roots=["images"])
    for name, content in (("list.json", b"[%b]" % text), ("list.jsonl", text)):
        (_ROOT / name).write_bytes(content)
        with own_errors():
            for item in iter_annotations(_ROOT / name):
                with own_errors():
                    ingest(item, manifest, _ROOT, Counter())


def make_lint() -> Callable[[tuple[str, bytes]], None]:
    """A record as lint sees it: marks drawn, texts encoded, labels proved. Imports torch."""
    from tests.ingest.lint.corpus import lint_one, sample_encoder
    from tests.toy_stream import make_encoder

    samples = sample_encoder(make_encoder(), size=28)

    def read(case: tuple[str, bytes]) -> None:
        kind, text = case
        with own_errors():
            record = parse_object(text, "x.tar: k.json")
            for name in ("auto", kind):
                image = None if kind == "text_only" else _IMAGE
                for finding in lint_one(record, samples, image=image, kind=name):
                    assert len(finding.message) <= LONGEST

    return read


def read_image(data: bytes) -> None:
    """An image: what decodes has the size that its header said."""
    with own_errors():
        size = image_size(data, key="k")
        image = decode_image(data, "k")
        assert (image.mode, image.size) == ("RGB", size)


def read_tar(data: bytes) -> None:
    """A tar as training reads it, and as lint and verify do."""
    path = _ROOT / "x.tar"
    path.write_bytes(data)
    listing = list_tar(path, "x.tar")
    for row in range(len(listing.keys)):
        with own_errors():
            listing.read(row)
    with own_errors(), path.open("rb") as file:
        index = index_tar(file, "x.tar")
        shards = ShardSet("d", [path], [index])
        assert [shards.read(row).key for row in range(len(shards))] == list(listing.keys)
        shards.close()


def read_export(case: tuple[str, bytes]) -> None:
    """An export of an annotation tool: imported, or refused with nothing written."""
    form, data = case
    source = _ROOT / "export" / ("labels/kitchen.txt" if form == "yolo" else "export.json")
    source.write_bytes(data)
    shutil.rmtree(_ROOT / "data", ignore_errors=True)
    try:
        import_annotations(
            form, source.parents[1] if form == "yolo" else source, _ROOT / "data" / "mine",
            data_root=_ROOT / "data", max_bad_rate=0.5,
        )  # fmt: skip
    except VipLlavaError as error:
        message = str(error)
    else:
        for line in (_ROOT / "data" / "mine" / "records.jsonl").read_bytes().splitlines():
            record = parse_object(line, "records.jsonl")
            record.pop("segmentations", None)
            parse_record(
                record, key="k", dataset="d", image=_IMAGE, kind="regions",
                rng=generator_for("fuzz"), size=(record["width"], record["height"]),
            )  # fmt: skip
        return
    assert len(message) <= LONGEST_LISTED, f"a message of {len(message)} letters: {message[:200]}"
    assert not (_ROOT / "data" / "mine").exists(), message


TARGETS: Final[dict[str, tuple[Any, Callable[[], Callable[[Any], None]]]]] = {
    "records": (records(), lambda: read_record),
    "images": (images, lambda: read_image),
    "tars": (tars(), lambda: read_tar),
    "lint": (records(), make_lint),
    "exports": (exports(), lambda: read_export),
}


def fuzz(name: str, count: int) -> None:
    """Run ``count`` cases, the same ones each time."""
    strategy, make_reader = TARGETS[name]
    read = make_reader()

    def alarm(*_: object) -> None:
        raise AssertionError(f"not done after {MOST_S} seconds")

    signal.signal(signal.SIGALRM, alarm)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def run(case: Any) -> None:
        signal.alarm(MOST_S)
        try:
            read(case)
        finally:
            signal.alarm(0)

    run()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        (_ROOT / "images").mkdir()
        (_ROOT / "images" / "a.jpg").write_bytes(_IMAGE)
        put_pictures(_ROOT / "export" / "images")
        (_ROOT / "export" / "labels").mkdir()
        (_ROOT / "export" / "classes.txt").write_text("cup\nfork\n")
        fuzz(sys.argv[1], int(sys.argv[2]))
