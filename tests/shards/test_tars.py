from __future__ import annotations

import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.shards.tar_files import write_tar
from tests.toy_data import encode_picture, make_manifest, toy_samples
from vipllava.shards.tars import ShardError, ShardSet, index_shard, open_shards, write_shards
from vipllava.stream.sample_encoder import SampleSource
from vipllava.types import RecordError


def build(root: Path, count: int = 20, **options: int) -> ShardSet:
    write_shards(toy_samples(count), root / "toy", max_samples=8, **options)
    return open_shards(make_manifest(), root)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    shards = build(tmp_path)
    assert len(shards) == 20
    assert [Path(path).name for path in shards.paths] == [f"shard-00000{n}.tar" for n in range(3)]
    for position, (key, record, image, extension) in enumerate(toy_samples(20)):
        entry = shards.read(position)
        assert (entry.key, dict(entry.record), entry.image) == (key, record, image)
        assert entry.image_extension == extension
        assert shards.key(position) == key
    assert list(shards.keys()) == [key for key, *_ in toy_samples(20)]


def test_the_index_knows_image_sizes(tmp_path: Path) -> None:
    shards = build(tmp_path)
    positions = np.array([0, 4, 19])
    assert shards.image_sizes(positions).tolist() == [[64, 48], [0, 0], [0, 0]]  # text only
    assert shards.has_image(positions).tolist() == [True, False, False]
    assert shards.image_sizes(positions).dtype == np.int32


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    first = write_shards(toy_samples(5), tmp_path / "a")
    second = write_shards(toy_samples(5), tmp_path / "b")
    for name in (first[0].name, "shard-000000.index.npz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len(first) == len(second) == 1


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves the tar open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_plain_webdataset_reads_the_tars(tmp_path: Path) -> None:
    import webdataset

    paths = write_shards(toy_samples(5), tmp_path / "toy")
    read = list(webdataset.WebDataset([str(p) for p in paths], shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [key for key, *_ in toy_samples(5)]
    assert read[0]["jpg"] == toy_samples(1)[0][2]
    assert json.loads(read[4]["json"])["id"] == "s004"


def test_a_shard_set_travels_to_workers(tmp_path: Path) -> None:
    shards = build(tmp_path)
    shards.read(0)
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.read(19).key == "s019"
    assert copy.fingerprint == shards.fingerprint


def test_a_missing_index_is_made(tmp_path: Path) -> None:
    build(tmp_path)
    index = tmp_path / "toy" / "shard-000000.index.npz"
    before = index.read_bytes()
    index.unlink()
    open_shards(make_manifest(), tmp_path)
    assert index.read_bytes() == before


def test_no_partial_file_stays_when_writing_fails(tmp_path: Path) -> None:
    samples = toy_samples(3)
    samples.append(("bad key!", {}, None, None))
    with pytest.raises(RecordError, match="bad key!"):
        write_shards(samples, tmp_path / "toy")
    assert list((tmp_path / "toy").iterdir()) == []


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (("a.b", {}, None, None), "letters, digits"),
        (("a" * 91, {}, None, None), "at most 90"),
        (("s000", {"id": 1}, None, None), "given twice"),
        (("k", {"x": float("nan")}, None, None), "`k` is not JSON"),
        (("k", {"x": {1, 2}}, None, None), "`k` is not JSON"),
        (("k", {}, b"\xff", "tiff"), "extension 'tiff'"),
        (("k", {}, b"not a picture", "jpg"), "k: .*are no image"),
    ],
)
def test_what_cannot_be_stored(tmp_path: Path, sample: tuple, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        write_shards([toy_samples(1)[0], sample], tmp_path / "toy")


def test_nothing_to_write_and_old_tars(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no sample was given"):
        write_shards([], tmp_path / "toy")
    write_shards(toy_samples(1), tmp_path / "toy")
    with pytest.raises(ShardError, match="already holds 1 tars"):
        write_shards(toy_samples(1), tmp_path / "toy")


# What can be wrong with data on disk.


def test_missing_data_root(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"nowhere does not exist; set data_root"):
        open_shards(make_manifest(), tmp_path / "nowhere")


def test_missing_folder_says_where_the_data_come_from(tmp_path: Path) -> None:
    manifest = make_manifest(sources=[{"name": "hub/repository", "what": "all"}])
    with pytest.raises(
        ShardError, match=r"toy/\*\.tar does not exist .*`vipllava data fetch toy`$"
    ):
        open_shards(manifest, tmp_path)
    manifest = make_manifest(annotation_file="toy.json")
    with pytest.raises(ShardError, match=r"root, or run `vipllava shards build toy`$"):
        open_shards(manifest, tmp_path)
    with pytest.raises(ShardError, match=r"set data_root, or run `vipllava sample-data`$"):
        open_shards(make_manifest(made_by="sample_world"), tmp_path)


def test_a_brace_names_every_tar(tmp_path: Path) -> None:
    build(tmp_path)
    pattern = "toy/shard-{000000..000002}.tar"
    assert len(open_shards(make_manifest(shards=pattern), tmp_path)) == 20
    with pytest.raises(ShardError, match=r"shard-000003\.tar does not exist"):
        open_shards(make_manifest(shards=pattern.replace("2}", "3}")), tmp_path)


def test_a_wrong_count(tmp_path: Path) -> None:
    build(tmp_path)
    with pytest.raises(ShardError, match=r"has 20 samples in 3 tars .* says 21"):
        open_shards(make_manifest(num_samples=21), tmp_path)


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_truncated_tar(tmp_path: Path, keep: float, indexed: bool) -> None:
    build(tmp_path, 8)
    path = tmp_path / "toy" / "shard-000000.tar"
    data = path.read_bytes()
    members = len(data) - 10240  # the end of a tar is padding
    path.write_bytes(data[: int(members * keep)])
    if not indexed:
        path.with_name("shard-000000.index.npz").unlink()
    with pytest.raises(ShardError, match=r"shard-000000\.(tar|index).*truncated|is not a whole"):
        open_shards(make_manifest(), tmp_path)


def test_a_broken_header_in_the_middle(tmp_path: Path) -> None:
    paths = write_shards(toy_samples(3), tmp_path / "toy")
    with tarfile.open(paths[0]) as tar:
        offset = tar.getmember("s001.json").offset
    data = bytearray(paths[0].read_bytes())
    data[offset : offset + 64] = b"\xff" * 64
    paths[0].write_bytes(data)
    with pytest.raises(ShardError, match=f"broken header at byte {offset}"):
        index_shard(paths[0])


def test_a_file_that_is_no_tar(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "x.tar").write_bytes(b"hello" * 500)
    with pytest.raises(ShardError, match=r"x\.tar is not a whole tar"):
        open_shards(make_manifest(), tmp_path)


@pytest.mark.parametrize("what", ["record", "image"])
def test_a_flipped_bit_is_noticed_when_read(tmp_path: Path, what: str) -> None:
    shards = build(tmp_path)
    row = shards.index.row(2)
    offset = 512 * (row.record_block if what == "record" else row.image_block)
    tar = Path(shards.paths[0])
    data = bytearray(tar.read_bytes())
    data[offset + 5] ^= 1
    tar.write_bytes(data)
    shards = open_shards(make_manifest(), tmp_path)
    assert shards.read(0).key == "s000"
    with pytest.raises(ShardError, match=rf"shard-000000\.tar: {what} of sample `s002`"):
        shards.read(2)


def test_the_index_of_another_tar(tmp_path: Path) -> None:
    build(tmp_path)
    folder = tmp_path / "toy"
    other = (folder / "shard-000001.index.npz").read_bytes()
    (folder / "shard-000000.index.npz").write_bytes(other)
    with pytest.raises(ShardError, match=r"000000\.index\.npz is the index of another tar"):
        open_shards(make_manifest(), tmp_path)


def test_a_broken_index_and_its_remedy(tmp_path: Path) -> None:
    build(tmp_path)
    index = tmp_path / "toy" / "shard-000000.index.npz"
    index.write_bytes(index.read_bytes()[:100])
    with pytest.raises(ShardError, match=r"is not a shard index .*delete"):
        open_shards(make_manifest(), tmp_path)


def test_a_tar_that_vanished(tmp_path: Path) -> None:
    shards = build(tmp_path)
    Path(shards.paths[1]).unlink()
    with pytest.raises(ShardError, match=r"shard-000001\.tar cannot be read: .*No such.*1 attempt"):
        shards.read(8)


def test_one_key_in_two_tars(tmp_path: Path) -> None:
    write_shards(toy_samples(2), tmp_path / "toy", prefix="a")
    write_shards(toy_samples(2), tmp_path / "toy", prefix="b")
    with pytest.raises(ShardError, match=r"key `s000` is in .*a-000000\.tar and in .*b-000000"):
        open_shards(make_manifest(), tmp_path)


JPEG = encode_picture()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": JPEG}, "sample `a` has an image and no `a.json`"),
        ({"a.json": b"[1]"}, "a.json holds list; a record is a JSON object"),
        ({"a.json": b"{"}, "a.json is not JSON"),
        ({"a.json": b"[" * 10**5 + b"]" * 10**5}, r"a.json is not JSON \(lists and .* 64 levels"),
        ({"a.json": b'{"a": ' * 70 + b"1" + b"}" * 70}, "more than 64 levels"),
        (
            {"a.json": b"{}", "b.json": b"{}", "a.jpg": JPEG},
            "members of `a` are not side by side, or the key occurs twice",
        ),
        ({"a.json": b"{}", "a.jpg": JPEG, "a.png": JPEG}, "`a` has a second image"),
        ({"README": b"hi"}, "x.tar has a member `README` that is not a file called KEY.EXTENSION"),
        ({}, "holds no sample"),
    ],
)
def test_tars_that_hold_no_samples(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    write_tar(tmp_path / "toy" / "x.tar", members)
    with pytest.raises(ShardError, match=message):
        open_shards(make_manifest(), tmp_path)


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "toy" / "x.tar"
    path.parent.mkdir()
    path.touch()
    with pytest.raises(
        ShardError, match=r"x\.tar is not a whole tar .*restore it or build it again"
    ):
        open_shards(make_manifest(), tmp_path)


def test_a_picture_that_is_missing(tmp_path: Path) -> None:
    key, record, _, _ = toy_samples(1)[0]
    write_tar(tmp_path / "toy" / "x.tar", {f"{key}.json": json.dumps(record).encode()})
    shards = open_shards(make_manifest(), tmp_path)
    source = SampleSource(shards, "auto", "auto", 0)
    with pytest.raises(RecordError, match=r"x\.tar: toy/s000: .*image"):
        source.sample(0)


def test_a_foreign_tar_with_folders_and_other_members(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = {"part/0.json": b"{}", "part/0.jpg": JPEG, "part/0.txt": b"?", "part/1.json": b"{}"}
    write_tar(tmp_path / "toy" / "x.tar", members)
    shards = open_shards(make_manifest(), tmp_path)
    assert list(shards.keys()) == ["part/0", "part/1"]
    assert "['txt'] are not read" in caplog.text
