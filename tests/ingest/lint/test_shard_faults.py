"""Tars: what is broken is told, and the rest is looked at all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ingest.lint.corpus import (
    Members,
    found,
    lint,
    members_of,
    picture,
    record_of,
    sample_encoder,
    write_tar,
)
from tests.toy_data import said
from vipllava.conversation.encode import ConversationEncoder
from vipllava.ingest.lint.findings import LintReport
from vipllava.shards.tar_index import index_path
from vipllava.shards.tars import ShardError, write_shards
from vipllava.types import ConfigError, VipLlavaError

BAD = record_of("vg_rel", bboxes=[[300, 200, 290, 190], [20, 20, 120, 110]])


def talk(number: int) -> dict[str, Any]:
    return {"id": str(number), "conversations": said(f"What is {number}?", "A number.")}


def texts(*keys: str) -> Members:
    return [
        member
        for number, key in enumerate(keys)
        for member in members_of(key, talk(sum(key.encode()) * 100 + number))
    ]


def marked(key: str, seed: int = 0) -> Members:
    return members_of(key, record_of("v7w", model=seed), picture(seed))


def messages(report: LintReport) -> list[tuple[str, str, str, str]]:
    return [(f.code, f.shard, f.key, f.message) for f in report.findings]


def test_a_truncated_tar_among_whole_ones(tmp_path: Path, encoder: ConversationEncoder) -> None:
    write_tar(tmp_path / "toy" / "0.tar", texts("a", "b"))
    cut = write_tar(tmp_path / "toy" / "1.tar", [*marked("c", 1), *marked("d", 2), *marked("e", 3)])
    write_tar(tmp_path / "toy" / "2.tar", [*texts("f"), *members_of("g", BAD, picture())])
    data = cut.read_bytes()
    cut.write_bytes(data[: data.index(b"d.jpg") + 600])
    report = lint(tmp_path, sample_encoder(encoder))
    # Of the sample at the break nobody knows whether it had a picture.
    assert messages(report)[0] == (
        "shard-broken",
        "toy/1.tar",
        "",
        "is truncated within `d.jpg`; restore it or build it again",
    )
    assert found(report) == {("", "shard-broken"), ("g", "box-reversed")}
    assert (report.num_samples, report.num_checked) == (5, 5)


def overwrite(path: Path, start: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(data)


def no_tar(path: Path) -> None:
    path.write_bytes(b"this is no tar" * 100)


def no_bytes(path: Path) -> None:
    path.write_bytes(b"")


def broken_header(path: Path) -> None:
    overwrite(path, path.read_bytes().index(b"b.json"), b"\xff" * 300)


def without_end(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"b.json") + 1024])


def bad_index(path: Path) -> None:
    index_path(path).write_bytes(b"no index")


def other_index(path: Path) -> None:
    write_tar(path.with_name("other"), texts("x"), index=False)
    path.with_name("other").replace(path)


@pytest.mark.parametrize(
    ("harm", "expected", "num_samples"),
    [
        (no_tar, ("", "is not a whole tar"), 2),
        (no_bytes, ("", "is not a whole tar"), 2),
        (broken_header, ("", "has a broken header at byte 1024"), 2),
        (without_end, ("", "is truncated at byte 2048"), 3),
        (bad_index, ("", "toy/0.index.npz is not a shard index"), 4),
        (other_index, ("", "toy/0.index.npz is the index of another tar"), 3),
    ],
)
def test_what_can_be_wrong_with_a_tar(
    tmp_path: Path,
    encoder: ConversationEncoder,
    harm: Any,
    expected: tuple[str, str],
    num_samples: int,
) -> None:
    broken = write_tar(tmp_path / "toy" / "0.tar", texts("a", "b"))
    write_tar(tmp_path / "toy" / "1.tar", texts("y", "z"))
    harm(broken)
    report = lint(tmp_path, sample_encoder(encoder))
    [(code, shard, key, message)] = messages(report)
    assert (code, shard, key) == ("shard-broken", "toy/0.tar", expected[0])
    assert expected[1] in message
    assert report.num_samples == num_samples


def test_a_sample_that_is_not_what_was_indexed(
    tmp_path: Path, encoder: ConversationEncoder
) -> None:
    path = write_tar(tmp_path / "toy" / "0.tar", texts("a", "b", "c", "d", "e", "f"))
    data = path.read_bytes()
    at = data.index(b"A number.", data.index(b"e.json"))  # beyond the first 4096 bytes
    overwrite(path, at, b"A letter.")
    report = lint(tmp_path, sample_encoder(encoder))
    assert found(report) == {("e", "shard-broken")}
    assert report.findings[0].message.startswith("record of sample `e` (bytes ")
    assert (report.num_samples, report.num_checked) == (6, 6)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (
            [("README", b"hi"), *texts("a")],
            [("shard-broken", "", "has a member `README` that is not a file called KEY.EXT")],
        ),
        (
            [*texts("a"), ("b.jpg", picture())],
            [("shard-broken", "b", "sample `b` has an image and no `b.json`")],
        ),
        (
            [*marked("a"), ("a.png", picture())],
            [("shard-broken", "a", "sample `a` has a second image")],
        ),
        (
            [*marked("a")[:1], *texts("b"), *marked("a")[1:]],
            [("shard-broken", "a", "the members of `a` are not side by side")],
        ),
        ([], [("shard-broken", "", "holds no sample; expected KEY.json and KEY.jpg|jpeg|png")]),
        (
            [*texts("a"), ("b.json", b"{"), *texts("c")],
            [("index-missing", "", "no index"), ("record-invalid", "b", "b.json is not JSON")],
        ),
        (
            [("b.json", b"[1]"), *texts("c")],
            [
                ("index-missing", "", "no index"),
                ("record-invalid", "b", "b.json holds list; a record is a JSON object"),
            ],
        ),
        (
            [*texts("a", "b"), *members_of("a", talk(7))],
            [("index-missing", "", "no index"), ("duplicate-key", "a", "the key is also in toy/0")],
        ),
        (
            [*members_of("a", talk(7)), *members_of("a", talk(7))],
            [("index-missing", "", "no index"), ("duplicate-key", "a", "the key is also in toy/0")],
        ),
        (
            [*texts("a"), ("a.txt", b"?"), *members_of("b", BAD, picture())],
            [("index-missing", "", "no index 0.index.npz; the next"), ("box-reversed", "b", "")],
        ),
    ],
)
def test_tars_without_an_index(
    tmp_path: Path,
    encoder: ConversationEncoder,
    members: Members,
    expected: list[tuple[str, str, str]],
) -> None:
    write_tar(tmp_path / "toy" / "0.tar", members, index=False)
    report = lint(tmp_path, sample_encoder(encoder))
    assert [(f.code, f.key) for f in report.findings] == [(c, k) for c, k, _ in expected]
    for finding, (_, _, message) in zip(report.findings, expected, strict=True):
        assert message in finding.message
    assert not index_path(tmp_path / "toy" / "0.tar").exists()


def test_tars_that_are_not_there(tmp_path: Path, encoder: ConversationEncoder) -> None:
    for number in (0, 2):
        write_tar(tmp_path / "toy" / f"{number}.tar", texts(f"k{number}"))
    shards = ["toy/{0..3}.tar", "else/*.tar"]
    report = lint(tmp_path, sample_encoder(encoder), manifest={"shards": shards})
    assert [(f.code, f.shard) for f in report.findings] == [
        ("shard-broken", "toy/1.tar"),
        ("shard-broken", "toy/3.tar"),
        ("shard-broken", "else/*.tar"),
    ]
    assert "does not exist; get it" in report.findings[0].message
    assert report.num_checked == 2


def test_a_count_other_than_the_manifest_says(tmp_path: Path, encoder: ConversationEncoder) -> None:
    write_tar(tmp_path / "toy" / "0.tar", texts("a", "b"))
    samples = sample_encoder(encoder)
    assert lint(tmp_path, samples, manifest={"num_samples": 2}).findings == ()
    report = lint(tmp_path, samples, manifest={"num_samples": 3})
    assert messages(report) == [
        (
            "shard-broken",
            "",
            "",
            "2 samples in 1 tars, the manifest says 3; complete the tars or correct `num_samples`",
        )
    ]


def test_no_data_at_all(tmp_path: Path, encoder: ConversationEncoder) -> None:
    samples = sample_encoder(encoder)
    with pytest.raises(ShardError, match=r"data root .*nowhere does not exist"):
        lint(tmp_path / "nowhere", samples)
    layout = {"format": "vip_bench", "folder": "x", "shards": []}
    with pytest.raises(ShardError, match="lint reads shards"):
        lint(tmp_path, samples, manifest=layout)
    with pytest.raises(ShardError, match="`toy`: data root s3://bucket is an address; copy the"):
        lint("s3://bucket", samples)
    report = lint(tmp_path, samples)
    assert [f.code for f in report.findings] == ["shard-broken"]
    assert (report.num_samples, report.num_checked) == (0, 0)


def test_tars_at_an_address_do_not_keep_others_from_being_looked_at(
    tmp_path: Path, encoder: ConversationEncoder
) -> None:
    write_tar(tmp_path / "toy" / "0.tar", texts("a", "b"))
    shards = ["s3://bucket/{0..3}.tar", "toy/*.tar"]
    report = lint(tmp_path, sample_encoder(encoder), manifest={"shards": shards, "num_samples": 9})
    told = "is an address; copy the tars to a folder to lint them"
    assert messages(report) == [("shard-broken", shards[0], "", told)]
    assert report.num_checked == 2


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"num_workers": -1}])
def test_impossible_numbers(
    tmp_path: Path, encoder: ConversationEncoder, options: dict[str, int]
) -> None:
    with pytest.raises(ConfigError, match="expected 0 or more processes and 1 or more samples"):
        lint(tmp_path, sample_encoder(encoder), **options)


# What occurs twice.


def test_keys_that_occur_twice(tmp_path: Path, encoder: ConversationEncoder) -> None:
    write_tar(tmp_path / "toy" / "0.tar", texts("a", "b", "c"))
    write_tar(tmp_path / "toy" / "1.tar", texts("d", "b"))
    write_tar(tmp_path / "toy" / "2.tar", texts("c", "b"))
    report = lint(tmp_path, sample_encoder(encoder), num_samples=1)  # of keys all are compared
    assert [(f.code, f.shard, f.key) for f in report.findings] == [
        ("duplicate-key", "toy/1.tar", "b"),
        ("duplicate-key", "toy/2.tar", "c"),
        ("duplicate-key", "toy/2.tar", "b"),
    ]
    assert {f.message.split(";")[0] for f in report.findings} == {"the key is also in toy/0.tar"}


def test_samples_that_occur_twice(tmp_path: Path, encoder: ConversationEncoder) -> None:
    region, image = record_of("v7w"), picture()
    first = [
        *members_of("a", region, image),
        *members_of("b", talk(1)),
        *members_of("c", {**region, "id": "v7w-9", "image": "x.jpg"}, image),
    ]
    second = [
        *members_of("d", {**talk(1), "id": "other"}),
        *members_of("e", region, picture(1)),  # another picture
        *members_of("f", record_of("v7w", question="Which is a cat?"), image),  # another record
        *members_of("g", region, image),
        *members_of("h", {**talk(1), "model": 1}),
    ]
    write_tar(tmp_path / "toy" / "0.tar", first)
    write_tar(tmp_path / "toy" / "1.tar", second)
    report = lint(tmp_path, sample_encoder(encoder))
    same = "image and record are those of toy/0.tar: {}; remove one, unless it is meant"
    assert messages(report) == [
        ("duplicate-sample", "toy/0.tar", "c", same.format("a")),
        ("duplicate-sample", "toy/1.tar", "d", same.format("b")),
        ("duplicate-sample", "toy/1.tar", "g", same.format("a")),
    ]


def test_a_copied_tar_is_told_once(tmp_path: Path, encoder: ConversationEncoder) -> None:
    members = [*texts("a"), *members_of("b", BAD, picture())]
    write_tar(tmp_path / "toy" / "0.tar", members)
    write_tar(tmp_path / "toy" / "1.tar", members)
    report = lint(tmp_path, sample_encoder(encoder))
    assert [(f.code, f.shard, f.key) for f in report.findings] == [
        ("box-reversed", "toy/0.tar", "b"),
        ("duplicate-key", "toy/1.tar", "a"),
        ("duplicate-key", "toy/1.tar", "b"),
        ("box-reversed", "toy/1.tar", "b"),
    ]


# Which samples, and where the work is done.


def mixed(root: Path) -> None:
    """Three tars of 90 samples, some with faults."""
    samples = []
    for number in range(90):
        key = f"s{number:03d}"
        if number % 9 == 4:
            samples.append((key, {**BAD, "model": number}, picture(number), "jpg"))
        elif number % 9 == 7:
            samples.append((key, {**talk(0), "conversations": said("Hi", " ")}, None, None))
        else:
            samples.append((key, talk(number), None, None))
    write_shards(samples, root / "toy", max_samples=40)


def test_samples_spread_evenly(tmp_path: Path, encoder: ConversationEncoder) -> None:
    keys = [f"k{number}" for number in range(10)]
    records = [
        (key, record_of("vg_rel", answer=key, bboxes=[[300, 200, 290, 190]] * 2)) for key in keys
    ]
    write_shards([(k, r, picture(), "jpg") for k, r in records], tmp_path / "toy", max_samples=4)
    samples = sample_encoder(encoder)

    def looked_at(count: int | None) -> list[str]:
        report = lint(tmp_path, samples, num_samples=count)
        assert report.num_samples == 10
        found_keys = list(dict.fromkeys(f.key for f in report.findings))
        assert report.num_checked == len(found_keys)
        return found_keys

    assert looked_at(None) == keys
    assert looked_at(10) == looked_at(99) == keys
    assert looked_at(1) == ["k5"]
    assert looked_at(2) == ["k2", "k7"]
    assert looked_at(5) == ["k1", "k3", "k5", "k7", "k9"]


def test_two_processes_find_the_same(tmp_path: Path, encoder: ConversationEncoder) -> None:
    mixed(tmp_path)
    samples = sample_encoder(encoder)
    progress: dict[int, list[tuple[int, int]]] = {0: [], 2: []}
    reports = [
        lint(
            tmp_path,
            samples,
            num_workers=workers,
            on_progress=lambda done, total, seen=seen: seen.append((done, total)),
        )
        for workers, seen in progress.items()
    ]
    assert reports[0] == reports[1]
    assert reports[0].counts == {"box-reversed": 10, "unsupervised": 10, "duplicate-sample": 9}
    assert progress[0] == progress[2] == [(32, 90), (64, 90), (90, 90)]


class Deadly:
    """Ends the process that it is sent to."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os._exit, (1,)


def test_a_process_that_is_killed(tmp_path: Path, encoder: ConversationEncoder) -> None:
    mixed(tmp_path)
    samples = sample_encoder(encoder)
    samples.transform = Deadly()  # type: ignore[assignment]
    with pytest.raises(VipLlavaError, match=r"worker process was ended .* fewer workers"):
        lint(tmp_path, samples, num_workers=1)


def test_the_form_of_boxes_is_told_of_a_data_set(
    tmp_path: Path, encoder: ConversationEncoder
) -> None:
    boxes = ([20, 20, 60, 95], [10, 5, 90, 60], [30, 40, 70, 80])  # per cent
    talk = said("<image>\nWhat is <bbox0>?", "A cup.")
    tar: Members = []
    for number, box in enumerate(boxes * 7):
        record = record_of("regions", bboxes=[box], segmentations=..., conversations=talk)
        tar += members_of(f"s{number}", record, picture(number))
    write_tar(tmp_path / "toy" / "0.tar", tar)
    report = lint(tmp_path, sample_encoder(encoder))
    assert [(f.code, f.key, f.severity) for f in report.findings] == [("box-form", "", "warning")]
    assert report.findings[0].message.startswith(
        "all 21 boxes lie within 0..100, in larger images: they look like per cent of the image"
    )
