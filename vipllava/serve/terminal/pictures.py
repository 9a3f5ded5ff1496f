"""Pictures in a terminal: Kitty's graphics protocol, iTerm2's inline images, or half blocks.

Which one is decided by environment variables alone: a question to the terminal would have to wait
for an answer that most do not give.

=========  ======================================================================================
kitty      ``KITTY_WINDOW_ID``, ``KONSOLE_VERSION`` of 22.04 or newer, ``GHOSTTY_RESOURCES_DIR``,
           or ``TERM`` is ``xterm-kitty`` or ``xterm-ghostty``
iterm      ``TERM_PROGRAM`` is ``iTerm.app``, ``WezTerm`` or ``mintty``, or ``LC_TERMINAL`` is
           ``iTerm2`` (which ssh hands on)
blocks     any other terminal that spells UTF-8; inside of tmux and screen, which keep pictures back
none       no terminal, ``TERM`` is ``dumb`` or empty, ``NO_COLOR`` is set, another encoding
=========  ======================================================================================

Half blocks have 24-bit colours where ``COLORTERM`` is ``truecolor`` or ``24bit``, else 256.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Final, Literal, TextIO, get_args

from PIL import Image

Protocol = Literal["kitty", "iterm", "blocks", "none"]
PROTOCOLS: Final = get_args(Protocol)

_CHUNK: Final = 4096
"""Letters of one piece of Kitty's protocol, the most that it allows."""
_LONGEST_SIDE: Final = 1024
"""Pixels of what is sent: more than a terminal shows, and little enough for a slow line."""
_MOST_COLUMNS: Final = 80
_KONSOLE: Final = 220400
_STEPS: Final = (0, 95, 135, 175, 215, 255)
"""Of a channel in the cube of 256 colours."""


def detect_protocol(
    environment: Mapping[str, str], *, is_terminal: bool, encoding: str | None
) -> Protocol:
    """Return how pictures are shown where a program's output goes to.

    Args:
        environment: the variables of the process, see the module.
        is_terminal: whether it is one.
        encoding: of the output.
    """
    term = environment.get("TERM", "")
    if not is_terminal or term in ("", "dumb"):
        return "none"
    inside = term.startswith(("screen", "tmux")) or "TMUX" in environment or "STY" in environment
    if not inside:
        konsole = environment.get("KONSOLE_VERSION", "")
        if (
            "KITTY_WINDOW_ID" in environment
            or "GHOSTTY_RESOURCES_DIR" in environment
            or term in ("xterm-kitty", "xterm-ghostty")
            or (konsole.isdecimal() and int(konsole) >= _KONSOLE)
        ):
            return "kitty"
        program = environment.get("TERM_PROGRAM")
        if program in ("iTerm.app", "WezTerm", "mintty") or (
            environment.get("LC_TERMINAL") == "iTerm2"
        ):
            return "iterm"
    spells = (encoding or "").lower().replace("-", "") == "utf8"
    return "blocks" if spells and not environment.get("NO_COLOR") else "none"


def has_true_colour(environment: Mapping[str, str]) -> bool:
    """Tell whether a terminal shows 24-bit colours."""
    return environment.get("COLORTERM", "").lower() in ("truecolor", "24bit")


def write_picture(
    stream: TextIO,
    image: Image.Image,
    protocol: Protocol,
    size: tuple[int, int],
    *,
    true_colour: bool,
) -> None:
    """Show a picture at the beginning of a line, and begin a new one.

    Args:
        stream: the terminal.
        image: any mode.
        protocol: how; ``none`` writes nothing.
        size: columns and rows of the terminal; the picture leaves some of them free.
        true_colour: of half blocks, see :func:`has_true_colour`.
    """
    if protocol == "none":
        return
    columns, rows = cells_of(image.size, size)
    image = image.convert("RGB")
    if protocol == "kitty":
        stream.write(kitty_text(image, columns))
    elif protocol == "iterm":
        stream.write(iterm_text(image, columns))
    else:
        stream.write(blocks_text(image, (columns, rows), true_colour=true_colour))
    stream.write("\n")
    stream.flush()


def cells_of(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the columns and rows that a picture takes; a cell is taken for twice as high as wide.

    Args:
        image_size: width and height, pixels.
        size: columns and rows of the terminal.
    """
    most_columns = max(1, min(size[0] - 1, _MOST_COLUMNS))
    most_rows = max(1, size[1] - 6)  # the question stays in sight
    width, height = image_size
    scale = min(most_columns / width, 2 * most_rows / height)
    columns = min(most_columns, max(1, round(width * scale)))
    return columns, min(most_rows, max(1, round(height * scale / 2)))


def kitty_text(image: Image.Image, columns: int) -> str:
    """Return what shows an RGB picture in a terminal with Kitty's protocol, as PNG in pieces.

    The terminal is asked to say nothing (``q=2``): its answer would stand in the next question.
    """
    data = base64.b64encode(_png(image)).decode()
    pieces = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)]
    texts: list[str] = []
    for number, piece in enumerate(pieces):
        more = f"m={int(number + 1 < len(pieces))}"
        keys = f"a=T,f=100,q=2,c={columns},{more}" if number == 0 else f"q=2,{more}"
        texts.append(f"\x1b_G{keys};{piece}\x1b\\")
    return "".join(texts)


def iterm_text(image: Image.Image, columns: int) -> str:
    """Return what shows an RGB picture in a terminal with iTerm2's protocol, as PNG."""
    data = _png(image)
    keys = f"inline=1;size={len(data)};width={columns};height=auto;preserveAspectRatio=1"
    return f"\x1b]1337;File={keys}:{base64.b64encode(data).decode()}\x07"


def blocks_text(image: Image.Image, cells: tuple[int, int], *, true_colour: bool) -> str:
    """Return an RGB picture as upper half blocks: two pixels above each other in a cell.

    Args:
        image: scaled to the cells.
        cells: columns and rows.
        true_colour: whether colours have 24 bits, else they are the nearest of 256.
    """
    columns, rows = cells
    small = image.resize((columns, 2 * rows), Image.Resampling.BOX)
    data = small.tobytes()
    pixels = [tuple(data[start : start + 3]) for start in range(0, len(data), 3)]
    lines: list[str] = []
    for row in range(rows):
        line, before = "", None
        for column in range(columns):
            upper = pixels[2 * row * columns + column]
            lower = pixels[(2 * row + 1) * columns + column]
            if (upper, lower) != before:
                line += f"\x1b[38;{_colour(upper, true_colour)};48;{_colour(lower, true_colour)}m"
                before = upper, lower
            line += "▀"
        lines.append(f"{line}\x1b[0m")
    return "\n".join(lines)


def _colour(rgb: tuple[int, ...], true_colour: bool) -> str:
    if true_colour:
        return "2;" + ";".join(map(str, rgb))
    red, green, blue = (min(range(6), key=lambda n: abs(_STEPS[n] - each)) for each in rgb)
    return f"5;{16 + 36 * red + 6 * green + blue}"


def _png(image: Image.Image) -> bytes:
    small = image.copy()
    small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    encoded = io.BytesIO()
    small.save(encoded, "PNG")
    return encoded.getvalue()
