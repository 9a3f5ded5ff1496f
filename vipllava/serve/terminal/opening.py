"""What a chat is opened with: the model or server, the picture, where output goes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from vipllava.serve.terminal.options import naming_marks
from vipllava.types import VipLlavaError
from vipllava.visual_prompts.marks import Mark, plan_marks

if TYPE_CHECKING:
    from PIL import Image

    from vipllava.inference.session import Chat

QUICKSTART: Final = Path("runs/quickstart")
"""Where the quick start's models lie, seen from the current folder."""
_SUFFIXES: Final = frozenset(".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .avif .ppm".split())


def split_arguments(
    first: str | None, second: str | None, *, has_server: bool
) -> tuple[str | None, str | None]:
    """Return model and picture of a command line where either may be left out.

    Alone, what looks like a picture is one: the name of a picture file, ``-``, an address.

    Raises:
        VipLlavaError: there is a model, and a server as well.
    """
    if second is not None:
        if has_server:
            raise VipLlavaError(
                f"{first}: the model of a server is named by --name, not as the first argument"
            )
        return first, second
    if first is None or has_server:
        return None, first
    return (None, first) if _looks_like_picture(first) else (first, None)


def _looks_like_picture(text: str) -> bool:
    if text == "-" or text.startswith(("http://", "https://", "data:")):
        return True
    return Path(text).suffix.lower() in _SUFFIXES and not Path(text).is_dir()


def newest_export(folder: Path = QUICKSTART) -> Path:
    """Return the model that a quick start has trained last.

    Raises:
        VipLlavaError: there is none.
    """
    found = [path.parent for path in folder.glob("*/export/config.json")]
    if not found:
        raise VipLlavaError(
            f"no MODEL is given, and {folder}/*/export has none: give a folder or Hugging Face id, "
            "or make the quick start's by `make quickstart` (vipllava quickstart)"
        )
    return max(found, key=lambda path: ((path / "config.json").stat().st_mtime_ns, path))


def open_session(
    source: str | None,
    image: str | None,
    marks: Sequence[Mark],
    loading: Mapping[str, Any],
    server: Mapping[str, Any],
    *,
    allow_urls: bool,
) -> Chat:
    """Open the picture, then the model, and begin a conversation.

    Args:
        source: the model, or None for the quick start's.
        image: ``-`` for the standard input, else see :func:`open_picture`; None for a
            conversation without an image.
        marks: on the picture.
        loading: how a model is loaded, see :func:`vipllava.inference.model.load`.
        server: ``base_url``, ``name`` and ``api_key_env``; without the first a model is loaded.
        allow_urls: see :func:`open_picture`.

    Raises:
        VipLlavaError: one of them cannot be opened, or a mark lies outside of the picture.
    """
    from vipllava.inference.image_sources import open_image
    from vipllava.inference.model import connect, load

    if image is None and marks:
        raise VipLlavaError("there are marks and no IMAGE: give the picture that they are on")
    picture = None
    if image == "-":
        picture = open_image(standard_input("IMAGE -").buffer, key="the standard input")
    elif image is not None:
        picture = open_picture(image, allow_urls=allow_urls)
    if picture is not None:
        with naming_marks():
            plan_marks(marks, picture.size)  # complains, before a model is loaded
    base_url, key = server["base_url"], server["api_key_env"]
    if base_url is None:
        model = load(source or newest_export(), **loading)
    else:
        model = connect(base_url, server["name"] or _only_model(base_url, key), key)
    return model.chat(picture, marks)


def standard_input(asked: str) -> TextIO:
    """Return the standard input.

    Args:
        asked: the words of the command line that stand for it.

    Raises:
        VipLlavaError: it is closed.
    """
    stream: TextIO | None = sys.stdin
    if stream is None or stream.closed:
        raise VipLlavaError(f"{asked}: the standard input is closed")
    return stream


def _only_model(base_url: str, api_key_env: str | None) -> str:
    """Return the name of the one model that a server has."""
    from vipllava.inference.endpoint_client import EndpointSettings, short
    from vipllava.inference.openai_engine import OpenAIEngine

    async def find_names() -> list[str]:
        engine = OpenAIEngine(EndpointSettings(base_url, "any", api_key_env))
        try:
            return [each.name for each in await engine.served_models()]
        finally:
            await engine.close()

    names = asyncio.run(find_names())
    if len(names) != 1:
        raise VipLlavaError(
            f"{base_url} serves {short(', '.join(names)) or 'no model'}: say which one by --name"
        )
    return names[0]


def open_picture(source: str, *, allow_urls: bool) -> Image.Image:
    """Open a picture by its path, or by its address where that is allowed.

    Raises:
        VipLlavaError: see :func:`vipllava.inference.image_sources.open_image`.
    """
    from vipllava.inference.image_sources import open_image

    if source.startswith(("http://", "https://")) and not allow_urls:
        raise VipLlavaError(f"{source} is an address: it is fetched with --allow-urls alone")
    return open_image(source, allow_urls=allow_urls, key="IMAGE")
