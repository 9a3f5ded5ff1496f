"""One YAML file per data set or benchmark: what it is, where its parts come from and lie.

A manifest names things; it holds no data. Its paths are relative to a data root, so the same
manifest serves every machine. ``docs/manifests.md`` describes the fields for those who write one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final, cast

import yaml

from vipllava.records import AUTO, KINDS, kind_of
from vipllava.shards.sources import SOURCES_FOLDER, DataSource, Fields, is_inside, read_sources
from vipllava.types import ConfigError

MANIFEST_VERSION: Final = 2
STAGES: Final = ("pretrain", "finetune", "gpt4v", "task", "evaluation")
FORMATS: Final = ("shards", "vip_bench")
MAKERS: Final = ("sample_world",)
AUTO_POLICY: Final = "auto"
_REMOTE: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|pipe:")


class ManifestError(ConfigError):
    """A manifest is missing or breaks its schema; the message lists every problem."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """One data set or benchmark."""

    schema_version: int  # version of this file format, ``MANIFEST_VERSION``
    name: str  # equal to the file's stem; part of every random key, so renaming reseeds
    stage: str  # one of ``STAGES``
    licence: str  # terms of use, in words
    # ``shards`` (WebDataset tars) or ``vip_bench`` (the official folder layout)
    format: str = "shards"
    record_kind: str = AUTO  # a kind of :mod:`vipllava.records`, or ``auto``: per record, by its id
    # a Python module that is imported first because it registers record kinds of one's own; None
    # without
    kind_module: str | None = None
    # patterns relative to the data root: globs and braces (``x-{000000..000009}.tar``); or
    # addresses (``https://``, ``s3://``, ``gs://``, ``pipe:COMMAND``), with braces only
    shards: tuple[str, ...] = ()
    folder: str | None = None  # the folder of a ``vip_bench`` layout, relative to the data root
    # visual-prompt policy of every record, or ``auto``: the record kind's own
    policy: str = AUTO_POLICY
    # whether images are turned as their EXIF blocks say, which browsers and annotation tools do;
    # false where boxes and masks count the pixels as they lie in the file (the published data)
    apply_exif_orientation: bool = True
    # exact number of samples in the shards, or of questions of a benchmark, checked when opened;
    # None if not known beforehand (building may reject broken inputs)
    num_samples: int | None = None
    # published number of records; nothing fails where it differs
    approximate_samples: int | None = None
    made_by: str | None = None  # ``sample_world`` for data that is made on first use, else None
    # the published annotation list the shards are built from, relative to the data root
    annotation_file: str | None = None
    # only its records of these kinds belong to the data set; empty: all
    annotation_kinds: tuple[str, ...] = ()
    # folders of the images, relative to the data root. A record names its image either with the
    # root (``coco/train2017/x.jpg``) or within one (``00453/x.jpg``).
    image_roots: tuple[str, ...] = ()
    sources: tuple[DataSource, ...] = ()  # where annotations and images come from
    notes: str = ""  # what a reader should know

    @property
    def patterns(self) -> tuple[str, ...]:
        """What has to exist under the data root."""
        return self.shards if self.folder is None else (self.folder,)

    def has_record(self, record: Mapping[str, Any]) -> bool:
        """Whether a record of the annotation list belongs to this data set."""
        return not self.annotation_kinds or kind_of(record) in self.annotation_kinds


def is_remote(path: str) -> bool:
    """Whether a pattern or data root is an address rather than a path."""
    return _REMOTE.match(path) is not None


def list_manifests(manifests_dir: str | Path) -> list[str]:
    """Return the names of the manifests in ``manifests_dir``, sorted."""
    return sorted(path.stem for path in Path(manifests_dir).glob("*.yaml"))


def load_manifest(name_or_path: str | Path, manifests_dir: str | Path) -> Manifest:
    """Load and check one manifest.

    Args:
        name_or_path: a name in ``manifests_dir``, or the path of a YAML file of one's own.

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
    folders = (path.parent / SOURCES_FOLDER, Path(manifests_dir) / SOURCES_FOLDER)
    return parse_manifest(
        cast("Mapping[Any, Any]", raw), where=str(path), stem=path.stem, sources_dirs=folders
    )


def parse_manifest(
    raw: Mapping[Any, Any],
    *,
    where: str,
    stem: str | None = None,
    sources_dirs: tuple[Path, ...] = (),
) -> Manifest:
    """Check a mapping against the schema and freeze it.

    Args:
        raw: the YAML's content.
        where: named in errors.
        stem: the file's, which ``name`` has to equal.
        sources_dirs: folders of the source files that ``sources`` may name.

    Raises:
        ManifestError: listing every problem.
    """
    problems: list[str] = []
    read = Fields(raw, Manifest, "", problems)
    values = read.values
    version = f"{MANIFEST_VERSION}, which this release reads"
    read.expect("schema_version", values.get("schema_version") == MANIFEST_VERSION, version)
    if stem is not None:
        read.expect("name", values.get("name") == stem, f"`{stem}`, the file's own name")
    read.expect_one_of("stage", STAGES)
    read.expect_one_of("format", FORMATS)
    if (module := values.get("kind_module")) is not None:
        try:
            import_module(module)
        except (ImportError, TypeError, ValueError, AttributeError) as error:
            importable = f"the name of a module that Python can import ({error}): install it, or "
            read.expect("kind_module", False, f"{importable}put its folder on PYTHONPATH")
    read.expect_one_of("record_kind", (AUTO, *KINDS))
    if values.get("made_by") is not None:
        read.expect_one_of("made_by", MAKERS)
    if "sources" in values:
        values["sources"] = read_sources(values["sources"], sources_dirs, problems)
    read.expect_inside("folder", "annotation_file")
    for name in ("shards", "image_roots"):
        for path in values.get(name, ()):
            if not is_inside(path) and not (name == "shards" and is_remote(path)):
                read.problem(f"{name} is `{path}`; expected a path inside the data root")
    if unknown := sorted(set(values.get("annotation_kinds", ())) - set(KINDS)):
        read.problem(f"annotation_kinds has {unknown}; known: {', '.join(KINDS)}")
    if values.get("format", "shards") == "shards" and not values.get("shards"):
        read.problem("shards is empty; format `shards` needs at least one pattern")
    if values.get("format") == "vip_bench" and not values.get("folder"):
        read.problem("folder is empty; format `vip_bench` needs the folder of its layout")
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise ManifestError(f"{where} is not a valid manifest:\n{listed}")
    return Manifest(**values)
