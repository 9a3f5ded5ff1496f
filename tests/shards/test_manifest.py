from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from vipllava.shards.manifest import (
    Manifest,
    ManifestError,
    is_remote,
    list_manifests,
    load_manifest,
    parse_manifest,
)
from vipllava.shards.sources import DataSource, ImageList, SourceFile

KNOWN = Path(__file__).parents[2] / "data_manifests"

GOOD = """
schema_version: 2
name: mine
stage: finetune
licence: CC0
shards: mine/*.tar
sources: [{name: somewhere, what: pictures}]
"""


def write(folder: Path, text: str, name: str = "mine") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def parse(**changes: Any) -> Manifest:
    return parse_manifest({**yaml.safe_load(GOOD), **changes}, where="test")


PUBLISHED = """
    llava_pretrain_558k llava_finetune_665k vip_llava_region_520k vip_llava_stage2_mix
    vip_llava_stage3_mix v7w_test pointqa_twice_test vcr_train vcr_val refcocog_train refcocog_val
    vip_bench
""".split()
SHIPPED = [
    *PUBLISHED,
    *("sample_pretrain", "sample_finetune", "sample_gpt4v", "sample_regions", "sample_vip_bench"),
    "user_data",
]
"""What is ours: a user of a checkout puts manifests beside them, as docs/your_data.md says."""


def test_every_shipped_manifest_is_valid() -> None:
    assert set(list_manifests(KNOWN)) >= set(SHIPPED)
    for name in SHIPPED:
        manifest = load_manifest(name, KNOWN)
        assert manifest.name == name
        assert manifest.licence
        assert yaml.safe_load((KNOWN / f"{name}.yaml").read_text())["schema_version"] == 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_data_set_says_where_each_part_comes_from(name: str) -> None:
    """Fetching everything leaves nothing that the manifest needs without an origin."""
    manifest = load_manifest(name, KNOWN)
    places = {file.into for source in manifest.sources for file in source.files}
    places |= {source.image_list.into for source in manifest.sources if source.image_list}
    assert set(manifest.image_roots) <= places
    if manifest.annotation_file is not None:
        folder, _, file_name = manifest.annotation_file.rpartition("/")
        kept = [
            file
            for source in manifest.sources
            for file in source.files
            if (file.name, file.into) == (file_name, folder or ".")
        ]
        assert len(kept) == 1
    for source in manifest.sources:
        assert source.licence
        assert source.address
        assert source.access in ("public", "form", "by_hand")


def test_published_boxes_count_pixels_as_stored_and_users_upright_ones() -> None:
    turned = {n for n in list_manifests(KNOWN) if load_manifest(n, KNOWN).apply_exif_orientation}
    assert turned == {
        "sample_finetune",
        "sample_gpt4v",
        "sample_pretrain",
        "sample_regions",
        "sample_vip_bench",
        "user_data",
    }
    assert parse().apply_exif_orientation
    with pytest.raises(ManifestError, match="apply_exif_orientation is 'no'; expected true or fal"):
        parse(apply_exif_orientation="no")


def test_every_shipped_source_is_used() -> None:
    named: set[str] = set()
    for name in SHIPPED:
        raw = yaml.safe_load((KNOWN / f"{name}.yaml").read_text())
        named |= {source for source in raw.get("sources", []) if isinstance(source, str)}
    assert named == {path.stem for path in (KNOWN / "sources").glob("*.yaml")}


def test_values_and_defaults(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    manifest = load_manifest("mine", tmp_path)
    assert manifest.shards == ("mine/*.tar",)
    assert manifest.sources == (DataSource("somewhere", "pictures", "public"),)
    assert (manifest.record_kind, manifest.policy, manifest.num_samples) == ("auto", "auto", None)


def test_a_path_works_outside_the_folder(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert load_manifest(path, KNOWN).name == "mine"


def test_an_unknown_name_lists_the_known(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(ManifestError, match=r"no manifest `yours`.*known in .*: mine"):
        load_manifest("yours", tmp_path)


def test_all_problems_at_once(tmp_path: Path) -> None:
    bad = (
        "schema_version: 9\nname: other\nstage: warmup\nshard: x\nrecord_kind: vqr\nnum_samples: -1"
    )
    write(tmp_path, bad)
    with pytest.raises(ManifestError) as error:
        load_manifest("mine", tmp_path)
    for part in (
        "unknown fields ['shard']",
        "missing fields: licence",
        "schema_version is 9",
        "name is 'other'; expected `mine`",
        "stage is 'warmup'; expected one of pretrain, finetune",
        "record_kind is 'vqr'",
        "num_samples is -1",
        "shards is empty",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("version", [0, 1, 3, "2", True, None, 1.0])
def test_other_versions_are_refused(version: object) -> None:
    with pytest.raises(ManifestError, match=r"schema_version is .*; expected 2, which this"):
        parse(schema_version=version)


def test_sources_in_files_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "sources").mkdir()
    coco = "name: COCO\nwhat: pictures\nfiles: [{url: http://x/a.zip, into: coco, unpack: a}]"
    (tmp_path / "sources" / "coco.yaml").write_text(coco)
    own = tmp_path / "elsewhere"
    own.mkdir()
    path = write(own, GOOD.replace("[{name: somewhere, what: pictures}]", "[coco]"))
    file = SourceFile("coco", url="http://x/a.zip", unpack="a")
    expected = (DataSource("COCO", "pictures", files=(file,)),)
    assert load_manifest(path, tmp_path).sources == expected
    write(tmp_path, GOOD.replace("[{name: somewhere, what: pictures}]", "[coco]"))
    assert load_manifest("mine", tmp_path).sources == expected
    path.write_text(GOOD.replace("[{name: somewhere, what: pictures}]", "[vg, {name: x}]"))
    with pytest.raises(ManifestError) as error:
        load_manifest(path, tmp_path)
    assert "sources names `vg`, which is not there; known: coco" in str(error.value)
    assert "sources: missing fields: what in {'name': 'x'}" in str(error.value)
    (tmp_path / "sources" / "coco.yaml").write_text("a: [")
    with pytest.raises(ManifestError, match=r"coco\.yaml is not readable YAML"):
        load_manifest("mine", tmp_path)


def test_all_that_a_source_can_say() -> None:
    source = {
        "name": "Big Set (2017)",
        "what": "pictures",
        "access": "form",
        "address": "https://x/form",
        "licence": "CC0",
        "hub": "org/set",
        "revision": "v1",
        "files": [{"file": "a/*", "into": "a", "size": 3, "md5": "0" * 32, "sha256": "f" * 64}],
        "image_list": {"file": "a/l.json", "url_field": "url", "into": "a/images"},
    }
    assert parse(sources=[source]).sources == (
        DataSource(
            "Big Set (2017)",
            "pictures",
            "form",
            "https://x/form",
            "CC0",
            "org/set",
            "v1",
            (SourceFile("a", file="a/*", size=3, md5="0" * 32, sha256="f" * 64),),
            ImageList("a/l.json", "url", "a/images"),
        ),
    )
    assert parse(sources=[source]).sources[0].key == "big-set-2017"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": None}, "name is None; expected a text"),
        ({"acess": "form"}, r"unknown fields \['acess'\]"),
        ({"access": "mail"}, "access is 'mail'; expected one of public, form, by_hand"),
        ({"access": "form"}, "address is missing"),
        ({"address": 3}, "address is 3; expected a text"),
        ({"files": "x.zip"}, "files has 'x.zip'; expected a mapping"),
        ({"files": [{"url": "http://x/a"}]}, "missing fields: into"),
        ({"files": [{"into": "a"}]}, "has to have exactly one of `file` and `url`"),
        ({"files": [{"into": "a", "url": "ftp://x/a"}]}, "url is 'ftp://x/a'; expected an http"),
        ({"files": [{"into": "a", "file": "a.zip"}]}, "`a.zip` needs the source's `hub`"),
        ({"files": [{"into": "a", "url": "http://["}]}, r"url is 'http://\['; expected an http"),
        ({"name": "a\0"}, r"name is 'a\\x00'; expected a text"),
        ({"name": "\ud83d"}, r"name is '\\ud83d'; expected a text"),
        ({"files": [{"into": "../a", "url": "http://x/a"}]}, "into is '../a'; expected a path ins"),
        ({"files": [{"into": "/a", "url": "http://x/a"}]}, "into is '/a'; expected a path inside"),
        ({"files": [{"into": "a", "url": "http://x/a", "size": 0}]}, "size is 0; expected a pos"),
        (
            {"files": [{"into": "a", "url": "http://x/a", "md5": "xyz"}]},
            "md5 is 'xyz'; expected 32",
        ),
        ({"image_list": {"file": "a", "into": "b"}}, "missing fields: url_field"),
        ({"image_list": {"file": "../a", "into": "b", "url_field": "c"}}, "_list: file is"),
        ({"image_list": 5}, "image_list has 5"),
    ],
)
def test_sources_that_cannot_be_used(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ManifestError, match=words):
        parse(sources=[{"name": "x", "what": "y", **change}])


def test_records_of_a_part_of_a_list() -> None:
    part = parse(annotation_kinds=["vcr", "refcocog-gpt4v"])
    assert part.has_record({"id": "vcr-1"})
    assert part.has_record({"id": "refcocog-gpt4v-1"})
    assert not part.has_record({"id": "refcocog-1"})
    assert not part.has_record({"id": 5, "image": "x.jpg"})
    assert parse().has_record({"id": 5})
    with pytest.raises(ManifestError, match=r"annotation_kinds has \['vrc'\]; known: image_level"):
        parse(annotation_kinds=["vrc"])


def test_the_parts_of_stage_2_are_the_whole() -> None:
    region = load_manifest("vip_llava_region_520k", KNOWN)
    image = load_manifest("llava_finetune_665k", KNOWN)
    whole = load_manifest("vip_llava_stage2_mix", KNOWN)
    assert region.annotation_file == whole.annotation_file
    assert set(region.image_roots) | set(image.image_roots) == set(whole.image_roots)
    for record in ({"id": "vcr-1"}, {"id": "vg_rel-1"}, {"id": "flickr30k-1"}, {"id": "v7w-1"}):
        assert region.has_record(record)
    for record in ({"id": "000000033471", "image": "x"}, {"id": "wgByO4Y_0"}, {"id": 7}):
        assert not region.has_record(record)


@pytest.mark.parametrize(
    "pattern", ["s3://bucket/{000..009}.tar", "https://host/a.tar", "gs://b/x.tar", "pipe:cat ../x"]
)
def test_shards_may_be_addresses(pattern: str) -> None:
    assert is_remote(pattern)
    assert parse(shards=pattern).shards == (pattern,)
    assert not is_remote("folder/x.tar")
    assert not is_remote("/data")


@pytest.mark.parametrize("name", ["folder", "annotation_file", "image_roots"])
def test_other_paths_stay_inside_the_data_root(name: str) -> None:
    with pytest.raises(ManifestError, match=f"{name} is [`']../x[`']; expected a path inside"):
        parse(**{name: "../x"})


@pytest.mark.parametrize("pattern", ["/data/*.tar", "../*.tar"])
def test_patterns_stay_inside_the_data_root(tmp_path: Path, pattern: str) -> None:
    write(tmp_path, GOOD.replace("mine/*.tar", pattern))
    with pytest.raises(ManifestError, match="inside the data root"):
        load_manifest("mine", tmp_path)


@pytest.mark.parametrize("text", ["a: [", "- 1", "sources: 3"])
def test_what_is_no_manifest(tmp_path: Path, text: str) -> None:
    write(tmp_path, text)
    with pytest.raises(ManifestError, match=r"mine\.yaml"):
        load_manifest("mine", tmp_path)
