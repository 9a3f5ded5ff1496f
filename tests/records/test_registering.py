"""Record kinds that a program adds."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.toy_data import make_manifest, said
from vipllava.keyed_random import generator_for
from vipllava.records import (
    KINDS,
    RecordKind,
    kind_of,
    parse_record,
    record_texts,
    register_kind,
)
from vipllava.records.fields import Fields, Parsed
from vipllava.shards.manifest import ManifestError
from vipllava.types import RecordError, VipLlavaError


def parse_notes(fields: Fields, rng: np.random.Generator) -> Parsed:
    return Parsed(fields.conversation())


NOTES = RecordKind("notes", parse_notes, texts=("notes", "question"), prefix="notes-v2")


@pytest.fixture(autouse=True)
def only_own_kinds() -> Iterator[None]:
    before = dict(KINDS)
    yield
    for name in KINDS.keys() - before:
        del KINDS[name]


def test_it_is_known_like_the_others() -> None:
    assert kind_of({"id": "notes-v2-1"}) == "text_only"
    assert record_texts({"notes": "n"}) == [None] * len(record_texts({}))
    register_kind(NOTES)
    assert list(KINDS)[-1] == "notes"
    assert kind_of({"id": "notes-v2-1"}) == "notes"
    assert kind_of({"id": "notes-v2"}) == "notes"
    assert kind_of({"id": "notes-v21-1"}) == "text_only"
    assert [text for text in record_texts({"notes": "n", "question": "q"}) if text] == ["q", "n"]
    assert record_texts({"notes": "n", "conversations": said("a", "b")}) == ["a", "b"]
    assert make_manifest(record_kind="notes", annotation_kinds=["notes"]).record_kind == "notes"
    record = {"id": "notes-v2-1", "conversations": said("a", "b")}
    rng = generator_for("t")
    assert parse_record(record, key="k", dataset="d", image=None, rng=rng).policy == "none"
    with pytest.raises(RecordError, match=r"^d/k: unknown record kind `note`; .*, regions, notes$"):
        parse_record(record, key="k", dataset="d", image=None, kind="note", rng=rng)
    with pytest.raises(ManifestError, match=r"record_kind is 'note'; .*regions, notes"):
        make_manifest(record_kind="note")


def test_the_longest_prefix_counts() -> None:
    register_kind(NOTES)
    register_kind(RecordKind("old", parse_notes, texts=("notes",), prefix="notes"))
    assert [kind_of({"id": f"notes-{rest}"}) for rest in ("1", "v2-1", "v3")] == [
        "old",
        "notes",
        "old",
    ]


@pytest.mark.parametrize(
    ("name", "prefix", "problem"),
    [
        ("vcr", None, "a kind of name `vcr` exists; choose another name .*auto, image_level"),
        ("auto", None, "a kind of name `auto` exists"),
        ("notes", "refcocog-gpt4v", "a kind of prefix `refcocog-gpt4v` exists"),
    ],
)
def test_what_exists_is_refused(name: str, prefix: str | None, problem: str) -> None:
    before = dict(KINDS)
    with pytest.raises(VipLlavaError, match=f"record kind `{name}`: {problem}"):
        register_kind(RecordKind(name, parse_notes, texts=("notes",), prefix=prefix))
    assert before == KINDS


@pytest.mark.parametrize("texts", [(), "notes"])
def test_a_kind_without_texts_is_refused(texts: Any) -> None:
    with pytest.raises(VipLlavaError, match=r"record kind `notes`: texts is .*; expected a tuple"):
        RecordKind("notes", parse_notes, texts=texts)


def test_what_was_registered_travels() -> None:
    register_kind(NOTES)
    sent = pickle.dumps({"kinds": KINDS})
    del KINDS["notes"]
    assert pickle.loads(sent)["kinds"] is KINDS
    assert KINDS["notes"] == NOTES


@pytest.mark.parametrize("module", ["no_such_kinds", "", 7, ".kinds"])
def test_a_module_that_cannot_be_imported(module: object) -> None:
    with pytest.raises(ManifestError, match=r"kind_module is .*; expected the name of a module"):
        make_manifest(kind_module=module)


def test_a_module_is_imported_before_the_kind_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kinds_of_mine.py").write_text(
        "from tests.records.test_registering import NOTES\n"
        "from vipllava.records import register_kind\n"
        "register_kind(NOTES)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    manifest = make_manifest(record_kind="notes", kind_module="kinds_of_mine")
    assert (manifest.record_kind, manifest.kind_module) == ("notes", "kinds_of_mine")
