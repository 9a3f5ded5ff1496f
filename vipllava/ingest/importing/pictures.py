"""The pictures of an export: where they lie, how large they are, and which way up boxes count.

Cameras store a picture as the sensor lies, and its EXIF block says how to turn it. Whether a tool
counts the pixels that it shows (upright) or those of the file (stored) shows in the size that the
export states, where the two differ by a quarter turn. Where nothing tells, the tool's habit counts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

from vipllava.ingest.image_format import format_of
from vipllava.ingest.importing.source import (
    Frame,
    ImportFormat,
    ImportingError,
    Size,
    SourceImage,
    is_writable,
)
from vipllava.records.image_decode import Frames, image_frames
from vipllava.types import RecordError

_SHOWN: Final = 3
_LOCAL_FILES: Final = "d"
"""The query field of an address of Label Studio's that names a file of its own machine."""
_UPLOADED: Final = re.compile(r"[0-9a-f]{8}-(.+)")
"""What Label Studio calls a picture that was uploaded: as it was called, behind eight digits."""


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """A picture that was found."""

    image: SourceImage
    path: Path | None  # absolute; None for one that the export holds
    frames: Frames
    extension: str  # of an embedded picture's format

    @property
    def place(self) -> str:
        """File and id, for messages."""
        return f"{self.image.file}, {self.image.id}"

    def data(self) -> bytes:
        """Read the encoded picture."""
        return image_data(self.image, self.path)


def image_data(image: SourceImage, path: Path | None) -> bytes:
    """Read a picture from its file, or without one from the export; OSError or RecordError."""
    if path is not None:
        return path.read_bytes()
    return image.embedded() if image.embedded is not None else b""


def likely_names(name: str) -> tuple[list[str], bool]:
    """Return the paths that a name may mean, the likeliest first, and whether the first is one.

    A name may be a path of another machine, with its separators, or an address: then all that is
    known here may be its end.
    """
    parts = urlsplit(name)
    is_path = True
    if parts.scheme in ("http", "https", "s3", "gs", "file", "azure-blob"):
        name, is_path = unquote(parts.path), False
    elif parts.query and (local := parse_qs(parts.query).get(_LOCAL_FILES)):
        name, is_path = local[0], False
    path = PurePosixPath(name.replace("\\", "/"))
    within = [part for part in path.parts if part not in ("/", "..") and not part.endswith(":")]
    ends = ["/".join(within[start:]) for start in range(len(within))]
    if "upload" in within and (uploaded := _UPLOADED.fullmatch(path.name)):
        ends.append(uploaded[1])
    foreign = path.is_absolute() or len(within) < len(path.parts) - path.parts.count("..")
    return [str(path), *(end for end in ends if end != str(path))], is_path and not foreign


def open_images(
    images: Iterable[SourceImage],
    only: Path | None,
    fault: Callable[[str, str, str], None],
    tell: Callable[[int], None],
) -> list[OpenedImage]:
    """Find the pictures and read their headers; what is missing or unreadable is a fault.

    Args:
        images: with the folders to look in.
        only: the folder that the user names, in place of those.
        fault: see :class:`vipllava.ingest.importing.source.Export`.
        tell: hears how many pictures were looked at.
    """
    opened: list[OpenedImage] = []
    found_as: dict[Path, str] = {}
    for count, image in enumerate(images, start=1):
        tell(count)
        place = f"{image.file}, {image.id}"
        folders = (only,) if only is not None else image.folders
        path, is_whole = _find(image.name, folders)
        if path is None and image.embedded is None:
            looked = ", ".join(map(str, folders[:_SHOWN]))
            message = f"its picture {image.name} is missing: looked in {looked}"
            fault("image-missing", place, f"{message}; name its folder with images=DIR")
            continue
        if not is_whole:
            fault("image-by-name", place, f"{image.name} was found as {path}")
        if path and not is_writable(str(path)):
            fault("image-missing", place, f"the name of its picture, {path!r}, is no UTF-8; rename")
            continue
        if path and (other := found_as.setdefault(path, image.name)) != image.name:
            message = f"{path} was found for {other} and for {image.name}, too; name the folder"
            fault("image-ambiguous", place, f"{message} that both start from with images=DIR")
            continue
        try:
            data = image_data(image, path)
            frames = image_frames(data, key=image.name)
        except OSError as error:
            fault("image-missing", place, f"its picture {path} cannot be read: {error}")
        except RecordError as error:
            fault(error.fault, place, str(error))
        else:
            opened.append(OpenedImage(image, path, frames, format_of(data) or "img"))
    return opened


def decide_frame(
    opened: Sequence[OpenedImage], form: ImportFormat, given: Frame | None
) -> tuple[Frame, str]:
    """Return which pixels are counted, and why, in words.

    Raises:
        ImportingError: pictures disagree, or nothing tells.
    """
    turned = [each for each in opened if each.frames.is_turned]
    if given is not None:
        return given, f"as exif={given} says"
    if not turned:
        return "upright", "no picture has an EXIF orientation"
    says: dict[Frame, list[OpenedImage]] = {"upright": [], "stored": []}
    for each in turned:
        frames = each.frames
        if frames.stored != frames.upright and each.image.stated in (frames.stored, frames.upright):
            says["upright" if each.image.stated == frames.upright else "stored"].append(each)
    if says["upright"] and says["stored"]:
        one, other = says["upright"][0], says["stored"][0]
        raise ImportingError(
            f"{form.title} counts upright pixels in {one.place}, and pixels as stored in "
            f"{other.place}, as their sizes say: export them anew from one tool, or turn the "
            "pictures themselves (`magick mogrify -auto-orient`) and annotate those"
        )
    for frame, pictures in says.items():
        if pictures:
            many = f"{len(pictures)} of {len(turned)} pictures with an EXIF orientation"
            return frame, f"the sizes that the export states of {many} say so"
    if form.frame is None:
        raise ImportingError(
            f"{len(turned)} pictures have an EXIF orientation (the first: {turned[0].place}), and "
            f"nothing in the {form.title} file tells whether its boxes count upright pixels, as "
            "most tools show them, or pixels as they lie in the file: pass exif=upright or "
            "exif=stored"
        )
    return form.frame, f"{form.why} ({len(turned)} pictures have an EXIF orientation)"


def frame_size(each: OpenedImage, frame: Frame) -> Size:
    """Return the size of a picture in a frame.

    Raises:
        RecordError: the export states one that it has in neither.
    """
    frames, stated = each.frames, each.image.stated
    if stated is not None and stated not in (frames.stored, frames.upright):
        width, height = frames.stored
        raise RecordError(
            f"the export says {stated[0]} x {stated[1]}, the picture {each.path or ''} has "
            f"{width} x {height} pixels: it was resized after it was annotated, or is another one",
            "image-size",
        )
    return frames.upright if frame == "upright" else frames.stored


def common_folder(opened: Sequence[OpenedImage], only: Path | None) -> Path | None:
    """Return the folder that all pictures lie in, absolute; None if the export holds them all.

    Raises:
        ImportingError: they have nothing in common.
    """
    paths = [each.path for each in opened if each.path is not None]
    if not paths:
        return None
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    if only is not None and folder.is_relative_to(root := absolute(only)):
        return root
    if folder == Path(folder.anchor):
        raise ImportingError(
            f"the pictures {paths[0]} and {paths[-1]} lie in folders that have nothing in common; "
            "put them into one folder and name it with images=DIR"
        )
    return folder


def absolute(path: Path) -> Path:
    """Return a path from the top, without ``..``; links stay."""
    return Path(os.path.abspath(path.expanduser()))  # noqa: PTH100 - Path.absolute keeps `..`


def _find(name: str, folders: Sequence[Path]) -> tuple[Path | None, bool]:
    """Return the picture, and whether it was found under the path that a relative name says."""
    names, is_path = likely_names(name)
    for end in names:
        for folder in folders:
            if _is_file(path := folder / end):  # `/` of a path from the top is that path
                return absolute(path), end == names[0] or not is_path
    return None, True


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file system takes
        return False
