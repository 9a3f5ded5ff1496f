"""One YAML file per data set or benchmark: what it is, where its shards lie, under which terms.

A manifest names things; it holds no data. ``shards`` and ``folder`` are relative to a data root,
so the same manifest serves every machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Final, cast

import yaml

from vipllava.data.schemas import AUTO, KINDS
from vipllava.types import ConfigError

MANIFEST_VERSION: Final = 1
STAGES: Final = ("pretrain", "finetune", "gpt4v", "task", "evaluation")
FORMATS: Final = ("shards", "vip_bench")
MAKERS: Final = ("sample_world",)
AUTO_POLICY: Final = "auto"


class ManifestError(ConfigError):
    """A manifest is missing or breaks its schema; the message lists every problem."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a part of a data set comes from.

    Attributes:
        name: hub repository or the project that publishes it.
        what: which files of it are used.
        access: ``public``, or how to get it (e.g. ``request form``).
    """

    name: str
    what: str
    access: str = "public"


@dataclass(frozen=True, slots=True)
class Manifest:
    """One data set or benchmark.

    Attributes:
        schema_version: version of this file format.
        name: equal to the file's stem; part of every random key, so renaming reseeds.
        stage: one of ``STAGES``.
        licence: terms of use, in words.
        format: ``shards`` (WebDataset tars) or ``vip_bench`` (the official folder layout).
        record_kind: a kind of :mod:`vipllava.data.schemas`, or ``auto``: per record, by its id.
        shards: patterns relative to the data root: globs and braces (``x-{000000..000009}.tar``).
        folder: the folder of a ``vip_bench`` layout, relative to the data root.
        policy: visual-prompt policy of every record, or ``auto``: the record kind's own.
        num_samples: exact number of records, checked when opened; None if not known beforehand.
        approximate_samples: published order of magnitude, never checked.
        made_by: ``sample_world`` for data that is made on first use, else None.
        annotation_file: the published annotation list the shards are built from.
        image_roots: folders of the annotation's picture paths, relative to one data root.
        sources: where annotations and pictures come from.
        notes: what a reader should know.
    """

    schema_version: int
    name: str
    stage: str
    licence: str
    format: str = "shards"
    record_kind: str = AUTO
    shards: tuple[str, ...] = ()
    folder: str | None = None
    policy: str = AUTO_POLICY
    num_samples: int | None = None
    approximate_samples: int | None = None
    made_by: str | None = None
    annotation_file: str | None = None
    image_roots: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()
    notes: str = ""

    @property
    def patterns(self) -> tuple[str, ...]:
        """What has to exist under the data root."""
        return self.shards if self.folder is None else (self.folder,)


def list_manifests(manifests_dir: str | Path) -> list[str]:
    """Return the names of the manifests in ``manifests_dir``, sorted."""
    return sorted(path.stem for path in Path(manifests_dir).glob("*.yaml"))


def load_manifest(name_or_path: str | Path, manifests_dir: str | Path) -> Manifest:
    """Load and check one manifest.

    Args:
        name_or_path: a name in ``manifests_dir``, or the path of a YAML file of one's own.
        manifests_dir: the folder of the known manifests.

    Raises:
        ManifestError: unknown name (lists the known ones), unreadable YAML, or a file that
            breaks the schema (lists every problem).
    """
    text = os.fspath(name_or_path)
    own = text.endswith((".yaml", ".yml"))
    path = Path(text) if own else Path(manifests_dir) / f"{text}.yaml"
    if not path.is_file():
        known = ", ".join(list_manifests(manifests_dir)) or "none"
        raise ManifestError(
            f"no manifest `{text}` ({path} does not exist); known in {manifests_dir}: {known}"
        )
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(raw, Mapping):
        raise ManifestError(f"{path} holds {type(raw).__name__}; a manifest is a mapping")
    return parse_manifest(cast("Mapping[Any, Any]", raw), where=str(path), stem=path.stem)


def parse_manifest(raw: Mapping[Any, Any], *, where: str, stem: str | None = None) -> Manifest:
    """Check a mapping against the schema and freeze it.

    Args:
        raw: the YAML's content.
        where: named in errors.
        stem: the file's stem, which ``name`` has to equal.

    Raises:
        ManifestError: listing every problem.
    """
    problems: list[str] = []
    known = {f.name: f for f in fields(Manifest)}
    if unknown := sorted(str(key) for key in raw if key not in known):
        problems.append(f"unknown fields {unknown}; known: {', '.join(known)}")
    missing = [n for n, f in known.items() if f.default is MISSING and n not in raw]
    if missing:
        problems.append(f"missing fields: {', '.join(missing)}")
    values = {name: raw[name] for name in known if name in raw}

    def expect(name: str, good: bool, expected: str) -> None:
        if name in values and not good:
            problems.append(f"{name} is {values[name]!r}; expected {expected}")

    def one_of(name: str, allowed: tuple[str, ...]) -> None:
        expect(name, values.get(name) in allowed, f"one of {', '.join(allowed)}")

    expect(
        "schema_version",
        values.get("schema_version") == MANIFEST_VERSION,
        f"{MANIFEST_VERSION}, the version this release reads",
    )
    expect("name", isinstance(values.get("name"), str), "a text")
    if stem is not None:
        expect("name", values.get("name") == stem, f"`{stem}`, the file's own name")
    one_of("stage", STAGES)
    one_of("format", FORMATS)
    one_of("record_kind", (AUTO, *KINDS))
    for name in ("licence", "policy", "notes"):
        expect(name, isinstance(values.get(name), str), "a text")
    for name in ("folder", "annotation_file"):
        expect(name, values.get(name) is None or isinstance(values[name], str), "a text or null")
    for name in ("num_samples", "approximate_samples"):
        number = values.get(name)
        good = number is None or (type(number) is int and number > 0)
        expect(name, good, "a positive number or null")
    expect("made_by", values.get("made_by") in (None, *MAKERS), f"null or {', '.join(MAKERS)}")
    for name in ("shards", "image_roots"):
        _freeze_texts(values, name, problems)
    _freeze_sources(values, problems)
    for name in ("shards", "folder"):
        for pattern in _as_texts(values.get(name)):
            if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
                problems.append(f"{name} is `{pattern}`; expected a path inside the data root")
    if values.get("format", "shards") == "shards" and not values.get("shards"):
        problems.append("shards is empty; format `shards` needs at least one pattern")
    if values.get("format") == "vip_bench" and not values.get("folder"):
        problems.append("folder is empty; format `vip_bench` needs the folder of its layout")
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise ManifestError(f"{where} is not a valid manifest:\n{listed}")
    return Manifest(**values)


def _as_texts(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, (list, tuple)):
        items = cast("list[Any] | tuple[Any, ...]", value)
        return tuple(item for item in items if isinstance(item, str))
    return ()


def _freeze_texts(values: dict[str, Any], name: str, problems: list[str]) -> None:
    """Accept one text or a list of texts; store a tuple."""
    if name not in values:
        return
    value = values[name]
    texts = _as_texts(value)
    if not isinstance(value, str) and (
        not isinstance(value, (list, tuple))
        or len(texts) != len(cast("list[Any] | tuple[Any, ...]", value))
    ):
        problems.append(f"{name} is {value!r}; expected a text or a list of texts")
    values[name] = texts


def _freeze_sources(values: dict[str, Any], problems: list[str]) -> None:
    if "sources" not in values:
        return
    value = values["sources"]
    sources: list[Source] = []
    for item in cast("list[Any]", value) if isinstance(value, list) else [value]:
        try:
            source = Source(**item)
            if not all(isinstance(value, str) for value in cast("dict[str, Any]", item).values()):
                raise TypeError
            sources.append(source)
        except TypeError:
            problems.append(f"sources has {item!r}; expected texts `name`, `what`, `access`")
    values["sources"] = tuple(sources)
