"""Building pages: texts are escaped, pictures travel inside, nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import io
import re

import pytest
from PIL import Image

from vipllava.report import html
from vipllava.report.html import Html, embed_image, escape, markup, page, read_templates, table


def test_text_is_escaped_and_markup_is_not():
    built = markup('<p class="{kind}">{}{}</p>', '1 < 2 & "x"', markup("<b>{}</b>", "y"), kind='"')
    assert built == '<p class="&quot;">1 &lt; 2 &amp; &quot;x&quot;<b>y</b></p>'
    assert escape(["<", Html("<br>"), None, [3, " ", 0.5]]) == "&lt;<br>3 0.5"
    assert markup("{}", "{0}") == "{0}"


def test_line_breaks_of_a_template_file_are_layout(monkeypatch: pytest.MonkeyPatch):
    text = '<template id="a">\n  <p>two\n    words {b}\n  </p>\n  {c}\n</template>\n\n'
    monkeypatch.setattr(html, "read_asset", lambda _: f'{text}<template id="d">x</template>\n')
    assert read_templates("test.html") == {"a": "<p>two words {b}</p>{c}", "d": "x"}


def test_table_sets_totals_apart():
    built = table(["name", "n"], [["a", 1]], ["all", "<2>"])
    assert '<tr><th scope="row">a</th><td>1</td></tr>' in built
    assert '<tr class="total"><th scope="row">all</th><td>&lt;2&gt;</td></tr>' in built


@pytest.mark.parametrize(("lossless", "kind"), [(True, "png"), (False, "jpeg")])
def test_an_image_travels_inside(lossless: bool, kind: str):
    built = embed_image(Image.new("RGB", (6, 4), (10, 200, 30)), "a <b>", lossless=lossless)
    match = re.fullmatch(
        rf'<img src="data:image/{kind};base64,([^"]+)" alt="a &lt;b&gt;" width="6" height="4"/>',
        built,
    )
    assert match
    image = Image.open(io.BytesIO(base64.b64decode(match[1])))
    assert (image.format, image.size) == (kind.upper(), (6, 4))


@pytest.mark.parametrize(("quality", "thin_line_stays_red"), [(92, True), (88, False)])
def test_high_quality_keeps_thin_lines_coloured(quality: int, thin_line_stays_red: bool):
    image = Image.new("RGB", (16, 16), (40, 90, 60))
    image.paste((255, 0, 0), (8, 0, 9, 16))
    code = embed_image(image, "", quality=quality).split("base64,")[1].split('"')[0]
    shown = Image.open(io.BytesIO(base64.b64decode(code)))
    red, green, blue = shown.getpixel((8, 8))
    assert (red > 225 and green < 30 and blue < 30) == thin_line_stays_red


def test_page_is_a_whole_document(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(html, "read_asset", {"a.css": "p { }", "b.css": "b { }"}.__getitem__)
    text = page("A & B", Html("<p>x</p>"), "a.css", "b.css")
    assert text.startswith('<!doctype html>\n<html lang="en"><head><meta charset="utf-8"/>')
    assert "<title>A &amp; B</title><style>p { }b { }</style>" in text
    assert text.endswith("<body><p>x</p></body></html>\n")
