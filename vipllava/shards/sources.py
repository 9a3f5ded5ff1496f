"""Where the parts of a data set come from, as its manifest says.

One part (a set of images, an annotation list) is a :class:`DataSource`. Parts that several data
sets share are files of their own, ``data_manifests/sources/NAME.yaml``, and manifests name them.
What the fields mean for somebody who writes one is in ``docs/manifests.md``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, Final, cast
from urllib.parse import unquote, urlsplit

import yaml

ACCESS: Final = ("public", "form", "by_hand")
SOURCES_FOLDER: Final = "sources"
_HEX: Final = {"md5": 32, "sha256": 64}
_WEB: Final = ("http", "https")


def _is_text(value: object) -> bool:
    """Whether a value is a text that can be a name: no zero, no half of a surrogate pair."""
    try:
        return isinstance(value, str) and b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


_CHECKS: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "str": (_is_text, "a text"),
    "str | None": (lambda value: value is None or _is_text(value), "a text or null"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "int | None": (
        lambda value: value is None or (type(value) is int and value > 0),
        "a positive number or null",
    ),
}
"""How a field of a type is checked, and what is expected."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source, or the files of a hub repository that match a pattern."""

    into: str  # folder of the result, relative to the data root
    # name in the hub repository (``bbox/*``: all that match), or, where a person has to get the
    # file, the name under which it is expected
    file: str | None = None
    url: str | None = None  # http(s); exactly one of ``file`` and ``url`` is given
    # for an archive the folder within it whose content goes ``into`` (``.``: all of it)
    unpack: str | None = None
    num_files: int | None = None  # that the archive brings, where known
    size: int | None = None  # bytes of the file itself, where known
    md5: str | None = None  # hex digests of the file itself, where known
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
class ImageList:
    """Pictures that are published as a list of addresses, one download each."""

    file: str  # JSON object of id to entry, relative to the data root
    url_field: str  # the entry's field that holds the address
    # folder of the images, relative to the data root; each ends as ``ID.jpg``, a real JPEG whatever
    # was downloaded
    into: str


@dataclass(frozen=True, slots=True)
class DataSource:
    """Where a part of a data set comes from."""

    name: str  # hub repository or the project that publishes it
    what: str  # which files of it are used
    access: str = "public"  # ``public``, or how to get it: ``form`` or ``by_hand``
    # page of the project, of its form, or where a browser gets the files
    address: str | None = None
    licence: str | None = None  # terms of use, in words
    hub: str | None = None  # data set repository of the Hugging Face hub that holds ``files``
    revision: str | None = None  # branch, tag or commit of ``hub``
    files: tuple[SourceFile, ...] = ()  # what to download, or to expect
    image_list: ImageList | None = None  # pictures to download one by one

    @property
    def key(self) -> str:
        """The name as a folder is called."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") or "source"


class Fields:
    """The fields of a mapping, checked against those of a dataclass.

    Args:
        raw: what should be the mapping.
        kind: the dataclass. A field of the type ``tuple[str, ...]`` may be given as one text.
        where: named in what is wrong; may be empty.
        problems: gets a line for each thing that is wrong.
    """

    def __init__(self, raw: object, kind: type[Any], where: str, problems: list[str]) -> None:
        self.values: dict[str, Any] = {}
        self._kind = kind
        self._prefix = f"{where}: " if where else ""
        self._problems = problems
        self._found = len(problems)
        known = {f.name: f for f in fields(kind)}
        if not isinstance(raw, Mapping):
            problems.append(f"{where} has {raw!r}; expected a mapping with {', '.join(known)}")
            return
        given = {str(name): value for name, value in cast("Mapping[Any, Any]", raw).items()}
        if unknown := sorted(set(given) - set(known)):
            self.problem(f"unknown fields {unknown}; known: {', '.join(known)}")
        if missing := [n for n, f in known.items() if f.default is MISSING and n not in given]:
            content = f" in {raw!r}" if where else ""
            self.problem(f"missing fields: {', '.join(missing)}{content}")
        self.values = {name: given[name] for name in known if name in given}
        for name, value in self.values.items():
            type_name = str(known[name].type)
            if type_name in _CHECKS:
                check, expected = _CHECKS[type_name]
                self.expect(name, check(value), expected)
            elif type_name == "tuple[str, ...]":
                texts = cast("Sequence[Any]", value if isinstance(value, list | tuple) else [value])
                good = all(map(_is_text, texts))
                self.expect(name, good, "a text or a list of texts")
                self.values[name] = tuple(texts) if good else ()

    def problem(self, text: str) -> None:
        """Note something that is wrong."""
        self._problems.append(self._prefix + text)

    def expect(self, name: str, good: bool, expected: str) -> None:
        """Note a field that is given and not good."""
        if name in self.values and not good:
            self.problem(f"{name} is {self.values[name]!r}; expected {expected}")

    def expect_one_of(self, name: str, allowed: Sequence[str]) -> None:
        """Note a field that has none of some values."""
        self.expect(name, self.values.get(name) in allowed, f"one of {', '.join(allowed)}")

    def expect_inside(self, *names: str) -> None:
        """Note fields that lead out of the data root."""
        for name in names:
            value = self.values.get(name)
            good = value is None or (isinstance(value, str) and value != "" and is_inside(value))
            self.expect(name, good, "a path inside the data root")

    def make(self) -> Any:
        """Return the dataclass; None if anything is wrong."""
        return self._kind(**self.values) if len(self._problems) == self._found else None


def read_sources(
    value: object, sources_dirs: tuple[Path, ...], problems: list[str]
) -> tuple[DataSource, ...]:
    """Check the ``sources`` of a manifest, names of source files and mappings, and freeze them.

    ``NAME.yaml`` is looked for in ``sources_dirs``; the first that has it counts. ``problems`` gets
    a line for each thing that is wrong.
    """
    sources: list[DataSource | None] = []
    for item in _as_list(value):
        where = "sources"
        if isinstance(item, str):
            path = next((p for f in sources_dirs if (p := f / f"{item}.yaml").is_file()), None)
            if path is None:
                known = sorted({p.stem for folder in sources_dirs for p in folder.glob("*.yaml")})
                problems.append(
                    f"sources names `{item}`, which is not there; known: "
                    f"{', '.join(known) or 'none'}"
                )
                continue
            where = f"source {path.name}"
            try:
                item = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
                problems.append(f"source {path} is not readable YAML: {error}")
                continue
        sources.append(_read_source(item, where, problems))
    return tuple(source for source in sources if source is not None)


def _read_source(raw: object, where: str, problems: list[str]) -> DataSource | None:
    read = Fields(raw, DataSource, where, problems)
    values = read.values
    read.expect_one_of("access", ACCESS)
    access = values.get("access")
    if access in ACCESS[1:] and not values.get("address"):
        read.problem(
            f"address is missing; access `{access}` needs the page where a person gets the files"
        )
    if "files" in values:
        files = [_read_file(item, values, where, problems) for item in _as_list(values["files"])]
        values["files"] = tuple(file for file in files if file is not None)
    if values.get("image_list") is not None:
        images = Fields(values["image_list"], ImageList, f"{where}: image_list", problems)
        images.expect_inside("file", "into")
        values["image_list"] = images.make()
    return read.make()


def _read_file(
    raw: object, source: Mapping[str, Any], where: str, problems: list[str]
) -> SourceFile | None:
    read = Fields(raw, SourceFile, f"{where}: files", problems)
    values = read.values
    for name, length in _HEX.items():
        digest = values.get(name)
        good = digest is None or re.fullmatch(f"[0-9a-f]{{{length}}}", str(digest)) is not None
        read.expect(name, good, f"{length} hex digits")
    read.expect_inside("into", "file", "unpack")
    file, url = values.get("file"), values.get("url")
    if (file is None) == (url is None):
        read.problem(f"{raw!r} has to have exactly one of `file` and `url`")
    elif url is not None:
        try:
            is_address = urlsplit(str(url)).scheme in _WEB
        except ValueError:
            is_address = False
        read.expect("url", is_address, "an http or https address")
    elif not source.get("hub") and source.get("access", "public") == "public":
        read.problem(f"`{file}` needs the source's `hub`, or a `url` instead")
    return read.make()


def _as_list(value: object) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else [value]


def is_inside(path: str) -> bool:
    """Whether a relative path stays below the folder that it is relative to."""
    return not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts
