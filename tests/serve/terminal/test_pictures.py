"""Pictures in terminals: what is written, decoded back to pixels as a terminal does."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from vipllava.serve.terminal.pictures import (
    PROTOCOLS,
    blocks_text,
    cells_of,
    detect_protocol,
    has_true_colour,
    iterm_text,
    kitty_text,
    write_picture,
)


@pytest.fixture
def noise() -> Image.Image:
    """Noise does not compress: Kitty's protocol takes it in several pieces."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "GHOSTTY_RESOURCES_DIR": "/usr/share"}, "kitty"),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "230800"}, "kitty"),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "200400"}, "blocks"),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "x"}, "blocks"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "mintty"}, "iterm"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "vscode"}, "blocks"),
        ({"TERM": "screen-256color", "LC_TERMINAL": "iTerm2"}, "blocks"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux-1000/default,1,0"}, "blocks"),
        ({"TERM": "xterm-kitty", "STY": "1.pts"}, "blocks"),
        ({"TERM": "xterm-256color"}, "blocks"),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, "none"),
        ({"TERM": "xterm-256color", "NO_COLOR": ""}, "blocks"),
        ({"TERM": "dumb", "KITTY_WINDOW_ID": "1"}, "none"),
        ({}, "none"),
    ],
)
def test_the_environment_says_how_pictures_are_shown(environment: dict[str, str], protocol: str):
    assert detect_protocol(environment, is_terminal=True, encoding="utf-8") == protocol
    assert detect_protocol(environment, is_terminal=False, encoding="utf-8") == "none"
    other = detect_protocol(environment, is_terminal=True, encoding="latin-1")
    assert other == ("none" if protocol == "blocks" else protocol)


@pytest.mark.parametrize(
    ("value", "true"), [("truecolor", True), ("24bit", True), ("yes", False), (None, False)]
)
def test_colours_have_24_bits_where_the_terminal_says_so(value: str | None, true: bool):
    assert has_true_colour({} if value is None else {"COLORTERM": value}) is true


def test_kitty_gets_a_png_in_pieces(noise: Image.Image):
    text = kitty_text(noise, columns=40)
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    assert "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in pieces) == text
    assert len(pieces) > 2
    assert pieces[0][0] == "a=T,f=100,q=2,c=40,m=1"
    assert {keys for keys, _ in pieces[1:-1]} == {"q=2,m=1"}
    assert pieces[-1][0] == "q=2,m=0"
    assert {len(data) for _, data in pieces[:-1]} == {4096}
    assert 0 < len(pieces[-1][1]) <= 4096
    decoded = Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in pieces))))
    assert decoded.format == "PNG"
    assert decoded.tobytes() == noise.tobytes()


def test_kitty_gets_a_small_picture_in_one_piece():
    text = kitty_text(Image.new("RGB", (4, 4), "red"), columns=3)
    assert re.fullmatch(r"\x1b_Ga=T,f=100,q=2,c=3,m=0;[A-Za-z0-9+/=]+\x1b\\", text)


def test_iterm_gets_a_png(noise: Image.Image):
    found = re.fullmatch(r"\x1b\]1337;File=([^:]*):([A-Za-z0-9+/=]+)\x07", iterm_text(noise, 40))
    assert found is not None
    data = base64.b64decode(found[2])
    size = f"size={len(data)}"
    assert found[1] == f"inline=1;{size};width=40;height=auto;preserveAspectRatio=1"
    assert Image.open(io.BytesIO(data)).tobytes() == noise.tobytes()


def test_a_large_picture_is_sent_smaller():
    found = re.search(r":([^\x07]*)", iterm_text(Image.new("RGB", (4000, 3000)), 40))
    assert found is not None
    assert Image.open(io.BytesIO(base64.b64decode(found[1]))).size == (1024, 768)


def cells(text: str) -> list[list[tuple[str, str]]]:
    """The colours of every cell, above and below, as a terminal keeps them."""
    rows: list[list[tuple[str, str]]] = []
    for line in text.split("\n"):
        row: list[tuple[str, str]] = []
        colours: tuple[str, str] | None = None
        for found in re.finditer(r"\x1b\[38;([25];[\d;]*);48;([25];[\d;]*)m|\x1b\[(0)m|(.)", line):
            if found[4]:
                assert (found[4], colours is None) == ("▀", False)
                assert colours is not None
                row.append(colours)
            else:
                colours = None if found[3] else (found[1], found[2])
        assert colours is None, "a line ends in colour"
        rows.append(row)
    return rows


def test_half_blocks_are_two_pixels_a_cell(noise: Image.Image):
    small = noise.resize((9, 8))
    shown = cells(blocks_text(small, (9, 4), true_colour=True))
    pixels = np.asarray(small)
    assert [len(row) for row in shown] == [9, 9, 9, 9]
    for row in range(4):
        for column in range(9):
            above, below = (pixels[2 * row + k, column] for k in (0, 1))
            wanted = tuple("2;" + ";".join(map(str, each)) for each in (above, below))
            assert shown[row][column] == wanted


def test_half_blocks_of_one_colour_say_it_once():
    text = blocks_text(Image.new("RGB", (6, 2), (255, 0, 0)), (6, 1), true_colour=True)
    assert text == "\x1b[38;2;255;0;0;48;2;255;0;0m▀▀▀▀▀▀\x1b[0m"


def test_half_blocks_of_256_colours_take_the_nearest():
    picture = Image.new("RGB", (2, 2))
    picture.putdata([(255, 0, 0), (0, 0, 0), (90, 140, 250), (255, 255, 255)])
    # 16 + 36 r + 6 g + b with steps 0, 95, 135, 175, 215, 255
    assert cells(blocks_text(picture, (2, 1), true_colour=False)) == [
        [("5;196", "5;69"), ("5;16", "5;231")]
    ]


@pytest.mark.parametrize(
    ("image", "terminal", "wanted"),
    [
        ((800, 600), (200, 60), (80, 30)),  # as wide as allowed
        ((800, 600), (41, 60), (40, 15)),  # the terminal's width
        ((600, 800), (200, 26), (30, 20)),  # its height, less the room for a question
        ((10, 10), (200, 26), (40, 20)),
        ((1, 10_000), (80, 24), (1, 18)),
        ((10_000, 1), (80, 24), (79, 1)),
        ((5, 5), (1, 1), (1, 1)),
    ],
)
def test_a_picture_keeps_its_form(
    image: tuple[int, int], terminal: tuple[int, int], wanted: tuple[int, int]
):
    assert cells_of(image, terminal) == wanted


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_any_picture_is_shown_and_a_line_begun(protocol: str, noise: Image.Image):
    written = io.StringIO()
    rgba = noise.convert("RGBA")
    write_picture(written, rgba, protocol, (80, 24), true_colour=True)  # type: ignore[arg-type]
    text = written.getvalue()
    begins = {"kitty": "\x1b_Ga=T", "iterm": "\x1b]1337;File=", "blocks": "\x1b[38;2;", "none": ""}
    assert text.startswith(begins[protocol])
    assert text.endswith("\n") is (protocol != "none")
    assert rgba.mode == "RGBA"
