"""Which models can be asked, while servers come and go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import pytest

from tests.serve.page.fake_engine import FakeEngine
from vipllava.serve.page.markdown import answer_html
from vipllava.serve.page.models import ModelList, NoSuchModel

A, B = "http://127.0.0.1:8001/v1", "http://127.0.0.1:8002/v1"


class Servers:
    """What each address has now; one that is not there does not answer."""

    def __init__(self, seconds: float = 0.0, **own: FakeEngine) -> None:
        self.there: dict[str, list[str]] = {}
        self.made: list[tuple[str, str]] = []
        self.list = ModelList(own, [A + "/", B, A], list_names=self.names, make_engine=self.make,
            seconds_between=seconds,
        )  # fmt: skip

    async def names(self, address: str) -> Sequence[str]:
        if address not in self.there:
            raise OSError("refused")
        return self.there[address]

    def make(self, address: str, model: str) -> FakeEngine:
        self.made.append((address, model))
        return FakeEngine()

    def refresh(self) -> tuple[str, ...]:
        return asyncio.run(self.list.refresh())


def test_models_of_servers_come_behind_those_of_this_process():
    servers = Servers(own=FakeEngine())
    assert servers.refresh() == ("own",)
    assert servers.list.silent == ((A, "refused"), (B, "refused"))
    servers.there = {A: ["x", "y"], B: ["z"]}
    assert servers.refresh() == ("own", "x", "y", "z")
    assert servers.list.silent == ()
    first = servers.list.engine("y")
    assert servers.list.engine("y") is first
    assert servers.made == [(A, "y")]
    asyncio.run(servers.list.close())
    assert isinstance(first, FakeEngine)
    assert first.closed


def test_two_of_one_name_say_where_they_are():
    servers = Servers(x=FakeEngine())
    servers.there = {A: ["x"], B: ["x"]}
    assert servers.refresh() == ("x", "x (127.0.0.1:8001)", "x (127.0.0.1:8002)")
    servers.list.engine("x (127.0.0.1:8002)")
    assert servers.made == [(B, "x")]


def test_a_server_may_be_silent_once(caplog: pytest.LogCaptureFixture):
    servers = Servers()
    servers.there = {A: ["x"]}
    assert servers.refresh() == ("x",)
    servers.there = {}
    assert servers.refresh() == ("x",)
    assert servers.list.silent == ((B, "refused"),)
    with caplog.at_level(logging.WARNING):
        assert servers.refresh() == ()
    assert f"{A} does not answer: refused" in caplog.text
    with pytest.raises(NoSuchModel, match="x does not answer now; there are: none"):
        servers.list.engine("x")
    servers.there = {A: ["x"]}
    assert servers.refresh() == ("x",)


def test_servers_are_not_asked_again_within_seconds():
    servers = Servers(60.0)
    servers.there = {A: ["x"]}
    assert servers.refresh() == ("x",)
    servers.there = {A: ["y"]}
    assert servers.refresh() == ("x",)


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("**a** _b_ `c`", "<p><strong>a</strong> <em>b</em> <code>c</code></p>\n"),
        ("a\nb", "<p>a<br>\nb</p>\n"),
        ("<script>x</script>", "<p>&lt;script&gt;x&lt;/script&gt;</p>\n"),
        ("<div>\n\nx", "<p>&lt;div&gt;</p>\n<p>x</p>\n"),
        ("[a](javascript:x)", "<p>[a](javascript:x)</p>\n"),
        ("[a](JaVaScRiPt:x)", "<p>[a](JaVaScRiPt:x)</p>\n"),
        ("[a](&#106;avascript:x)", "<p>[a](javascript:x)</p>\n"),
        ("[a](data:image/png;base64,AA)", "<p>[a](data:image/png;base64,AA)</p>\n"),
        ("[a](//evil.example)", "<p>[a](//evil.example)</p>\n"),
        ("[a](/gradio_api/file)", "<p>[a](/gradio_api/file)</p>\n"),
        (
            '[a](https://x.org/"onclick=1)',
            '<p><a href="https://x.org/%22onclick=1" target="_blank" '
            'rel="noopener noreferrer nofollow">a</a></p>\n',
        ),
        ("```html\n<b>\n```", '<pre><code class="language-html">&lt;b&gt;\n</code></pre>\n'),
        ("&lt;b&gt;", "<p>&lt;b&gt;</p>\n"),
    ],
)
def test_markdown_without_html(text: str, html: str):
    assert answer_html(text).replace("<br />", "<br>") == html


def test_an_image_loads_nothing():
    html = answer_html(
        "![pixel](http://203.0.113.1/x.png) ![y][r]\n\n[r]: http://203.0.113.1/y.png"
    )
    assert "<img" not in html
    assert 'href="http://203.0.113.1/x.png"' in html
