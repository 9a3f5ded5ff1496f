from __future__ import annotations

from pathlib import Path

import pytest

from vipllava.data.manifest import ManifestError, Source, list_manifests, load_manifest

KNOWN = Path(__file__).parents[2] / "data_manifests"

GOOD = """
schema_version: 1
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


def test_every_shipped_manifest_is_valid() -> None:
    names = list_manifests(KNOWN)
    assert {"sample_pretrain", "sample_finetune", "sample_gpt4v", "sample_regions"} <= set(names)
    for name in names:
        assert load_manifest(name, KNOWN).name == name


def test_values_and_defaults(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    manifest = load_manifest("mine", tmp_path)
    assert manifest.shards == ("mine/*.tar",)
    assert manifest.sources == (Source("somewhere", "pictures", "public"),)
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
