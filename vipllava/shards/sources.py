"""Where the parts of a data set come from, as its manifest says.

One part (a set of pictures, an annotation list) is a :class:`Source`. Parts that several data sets
share are files of their own, ``data_manifests/sources/NAME.yaml``, and manifests name them. What
the fields mean for somebody who writes one is in ``docs/manifests.md``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, Final, cast
from urllib.parse import unquote, urlsplit

import yaml

ACCESS: Final = ("public", "form", "by_hand")
SOURCES_FOLDER: Final = "sources"
_HEX: Final = {"md5": 32, "sha256": 64}
_WEB: Final = ("http", "https")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source, or the files of a hub repository that match a pattern.

    Attributes:
        into: folder of the result, relative to the data root.
        file: name in the hub repository (``bbox/*``: all that match), or, where a person has to
            get the file, the name under which it is expected.
        url: http(s) address; exactly one of ``file`` and ``url`` is given.
        unpack: for an archive the folder within it whose content goes ``into`` (``.``: all of it);
            None for a file that is kept as it is.
        num_files: how many files the archive brings, where known.
        size: bytes of the file itself, where known.
        md5, sha256: hex digests of the file itself, where known.
    """

    into: str
    file: str | None = None
    url: str | None = None
    unpack: str | None = None
    num_files: int | None = None
    size: int | None = None
    md5: str | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        """The file's own name, or the pattern."""
        return self.file or unquote(PurePosixPath(urlsplit(self.url or "").path).name)

    @property
    def is_pattern(self) -> bool:
        """Whether ``file`` stands for several files."""
        return bool(re.search(r"[*?\[]", self.file or ""))


@dataclass(frozen=True, slots=True)
class PictureList:
    """Pictures that are published as a list of addresses, one download each.

    Attributes:
        file: JSON object of id to entry, relative to the data root.
        url_field: the entry's field that holds the address.
        into: folder of the pictures, relative to the data root; each ends as ``ID.jpg``, a real
            JPEG whatever was downloaded.
    """

    file: str
    url_field: str
    into: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where a part of a data set comes from.

    Attributes:
        name: hub repository or the project that publishes it.
        what: which files of it are used.
        access: ``public``, or how to get it: ``form`` or ``by_hand``.
        address: page of the project, of its form, or where a browser gets the files.
        licence: terms of use, in words.
        hub: data set repository of the Hugging Face hub that holds ``files``.
        revision: branch, tag or commit of ``hub``.
        files: what to download, or to expect.
        picture_list: pictures to download one by one.
    """

    name: str
    what: str
    access: str = "public"
    address: str | None = None
    licence: str | None = None
    hub: str | None = None
    revision: str | None = None
    files: tuple[SourceFile, ...] = ()
    picture_list: PictureList | None = None

    @property
    def key(self) -> str:
        """The name as a folder is called."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") or "source"


def read_sources(
    value: object, sources_dirs: tuple[Path, ...], problems: list[str]
) -> tuple[Source, ...]:
    """Check the ``sources`` of a manifest and freeze them.

    Args:
        value: a list of names of source files and of mappings.
        sources_dirs: where ``NAME.yaml`` is looked for; the first that has it counts.
        problems: gets a line for each thing that is wrong.
    """
    sources: list[Source] = []
    for item in cast("list[Any]", value) if isinstance(value, list) else [value]:
        source = (
            _load_source(item, sources_dirs, problems)
            if isinstance(item, str)
            else _read_source(item, "sources", problems)
        )
        if source is not None:
            sources.append(source)
    return tuple(sources)


def _load_source(name: str, folders: tuple[Path, ...], problems: list[str]) -> Source | None:
    path = next((p for f in folders if (p := f / f"{name}.yaml").is_file()), None)
    if path is None:
        known = sorted({p.stem for folder in folders for p in folder.glob("*.yaml")})
        problems.append(
            f"sources names `{name}`, which is not there; known: {', '.join(known) or 'none'}"
        )
        return None
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        problems.append(f"source {path} is not readable YAML: {error}")
        return None
    return _read_source(raw, f"source {path.name}", problems)


def _read_source(raw: object, where: str, problems: list[str]) -> Source | None:
    values = _fields_of(raw, Source, where, problems)
    if values is None:
        return None
    found = len(problems)
    for name in ("name", "what", "address", "licence", "hub", "revision"):
        _expect(values, name, str, "a text", where, problems, null=name not in ("name", "what"))
    if "access" in values and values["access"] not in ACCESS:
        problems.append(
            f"{where}: access is {values['access']!r}; expected one of {', '.join(ACCESS)}"
        )
    elif values.get("access", "public") != "public" and not values.get("address"):
        problems.append(
            f"{where}: address is missing; access `{values['access']}` needs the page where a "
            "person gets the files"
        )
    if "files" in values:
        items: Any = values["files"]
        read = [
            _read_file(item, values, f"{where}: files", problems)
            for item in (cast("list[Any]", items) if isinstance(items, list) else [items])
        ]
        values["files"] = tuple(file for file in read if file is not None)
    if values.get("picture_list") is not None:
        values["picture_list"] = _read_picture_list(values["picture_list"], where, problems)
    return Source(**values) if len(problems) == found else None


def _read_file(
    raw: object, source: Mapping[str, Any], where: str, problems: list[str]
) -> SourceFile | None:
    values = _fields_of(raw, SourceFile, where, problems)
    if values is None:
        return None
    found = len(problems)
    for name in ("file", "url", "unpack"):
        _expect(values, name, str, "a text", where, problems)
    for name in ("num_files", "size"):
        number = values.get(name)
        if number is not None and (type(number) is not int or number <= 0):
            problems.append(f"{where}: {name} is {number!r}; expected a positive number")
    for name, length in _HEX.items():
        digest = values.get(name)
        good = isinstance(digest, str) and re.fullmatch(f"[0-9a-f]{{{length}}}", digest)
        if digest is not None and not good:
            problems.append(f"{where}: {name} is {digest!r}; expected {length} hex digits")
    for name in ("into", "file", "unpack"):
        if name == "into" or values.get(name) is not None:
            _expect_inside(values[name], f"{where}: {name}", problems)
    file, url = values.get("file"), values.get("url")
    if (file is None) == (url is None):
        problems.append(f"{where} has {raw!r}; expected exactly one of `file` and `url`")
    elif url is not None and (not isinstance(url, str) or urlsplit(url).scheme not in _WEB):
        problems.append(f"{where}: url is {url!r}; expected an http or https address")
    elif file is not None and not source.get("hub") and source.get("access", "public") == "public":
        problems.append(f"{where}: `{file}` needs the source's `hub`, or a `url` instead")
    return SourceFile(**values) if len(problems) == found else None


def _read_picture_list(raw: object, where: str, problems: list[str]) -> PictureList | None:
    values = _fields_of(raw, PictureList, f"{where}: picture_list", problems)
    if values is None:
        return None
    found = len(problems)
    _expect(values, "url_field", str, "a text", where, problems, null=False)
    for name in ("file", "into"):
        _expect_inside(values[name], f"{where}: picture_list.{name}", problems)
    return PictureList(**values) if len(problems) == found else None


def _fields_of(
    raw: object, kind: type[Any], where: str, problems: list[str]
) -> dict[str, Any] | None:
    """Return the known fields, or None after saying why the rest cannot be read."""
    known = {f.name: f for f in fields(kind)}
    if not isinstance(raw, Mapping):
        problems.append(f"{where} has {raw!r}; expected a mapping with {', '.join(known)}")
        return None
    values = {str(name): value for name, value in cast("Mapping[Any, Any]", raw).items()}
    wrong: list[str] = []
    if unknown := sorted(set(values) - set(known)):
        wrong.append(f"{where} has unknown fields {unknown}; known: {', '.join(known)}")
    missing = [n for n, f in known.items() if f.default is MISSING and n not in values]
    if missing:
        wrong.append(f"{where} has {raw!r}; missing: {', '.join(missing)}")
    problems += wrong
    return None if wrong else values


def _expect(
    values: Mapping[str, Any],
    name: str,
    kind: type[Any],
    expected: str,
    where: str,
    problems: list[str],
    *,
    null: bool = True,
) -> None:
    value = values.get(name)
    if not isinstance(value, kind) and not (null and value is None):
        problems.append(f"{where}: {name} is {value!r}; expected {expected}")


def _expect_inside(path: object, where: str, problems: list[str]) -> None:
    if not isinstance(path, str) or not path or not is_inside(path):
        problems.append(f"{where} is {path!r}; expected a path inside the data root")


def is_inside(path: str) -> bool:
    """Whether a relative path stays below the folder that it is relative to."""
    return not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts
