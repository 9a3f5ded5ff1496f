"""Answers as Markdown without HTML: what a model writes is shown, and does nothing."""

from __future__ import annotations

import functools
import re
from typing import Any

from markdown_it import MarkdownIt

_LINK = re.compile(r"(?:https?://|mailto:)[^\s]", re.IGNORECASE)


class _Safe(MarkdownIt):
    """Knows links to the web and to people, and no others."""

    def validateLink(self, url: str) -> bool:
        """Tell whether a link may be one."""
        return bool(_LINK.match(url))


@functools.cache
def _parser() -> MarkdownIt:
    parser = _Safe("commonmark", {"html": False, "breaks": True, "linkify": False})
    parser.enable(["table", "strikethrough"]).disable(["image", "html_inline", "html_block"])

    def link_open(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
        token = tokens[index]
        token.attrSet("target", "_blank")
        token.attrSet("rel", "noopener noreferrer nofollow")
        return self.renderToken(tokens, index, options, env)

    parser.add_render_rule("link_open", link_open)
    return parser


def answer_html(text: str) -> str:
    """Return an answer as HTML that holds no HTML of the model's, and loads nothing."""
    return _parser().render(text)
