"""A template written down in Jinja renders what the template renders."""

from __future__ import annotations

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from vipllava.conversation import get_template, template_names
from vipllava.conversation.templates import jinja_template
from vipllava.types import Turn

_TEXTS = st.text(max_size=20)


@st.composite
def _conversations(draw: st.DrawFn) -> tuple[list[Turn], bool]:
    num_turns = draw(st.integers(1, 5))
    with_image = draw(st.sampled_from([None, *range(0, num_turns, 2)]))
    turns = [
        Turn("assistant" if i % 2 else "user", draw(_TEXTS), has_image=i == with_image)
        for i in range(num_turns)
    ]
    return turns, num_turns % 2 == 1


def _render(source: str, messages: list[dict], prompt: bool) -> str:
    rendered, _ = render_jinja_template(
        conversations=[messages], chat_template=source, add_generation_prompt=prompt
    )
    return rendered[0]


def _messages(turns: list[Turn], *, lists: bool = True) -> list[dict]:
    messages = []
    for turn in turns:
        content: object = turn.text
        if lists or turn.has_image:
            content = [{"type": "text", "text": turn.text}]
            content = [{"type": "image"}, *content] if turn.has_image else content
        messages.append({"role": turn.role, "content": content})
    return messages


@pytest.mark.parametrize("name", template_names())
@settings(max_examples=40, deadline=None)
@given(conversation=_conversations(), lists=st.booleans())
def test_jinja_renders_what_the_template_does(
    name: str, conversation: tuple[list[Turn], bool], lists: bool
) -> None:
    turns, prompt = conversation
    template = get_template(name)
    source = jinja_template(template)
    found = _render(source, _messages(turns, lists=lists), prompt)
    assert found == template.render(turns, generation_prompt=prompt)


def test_what_else_is_said() -> None:
    turns = [Turn("user", "What?", has_image=True)]
    source = jinja_template(get_template("llava_v1"), bos="<s> ", after_image=" ")
    rendered = _render(source, _messages(turns), True)
    plain = get_template("llava_v1").render(turns, generation_prompt=True)
    assert rendered == "<s> " + plain.replace("<image>", "<image> ")

    spelled = jinja_template(get_template("llama_3"), bos="<s>")
    assert _render(spelled, _messages(turns), True).startswith("<|begin_of_text|><|start")


@pytest.mark.parametrize("name", ["llava_v1", "llava_v0", "llama_3", "phi_3", "chatml"])
def test_a_system_message_replaces_the_templates_own(name: str) -> None:
    template = get_template(name)
    turns = [Turn("user", "What?")]
    messages = [{"role": "system", "content": "Be brief."}, *_messages(turns)]
    own = template.render(turns, generation_prompt=True)
    said = _render(jinja_template(template), messages, True)
    start, _, end = said.partition("Be brief.")
    assert own.startswith(start)
    assert own.endswith(end)
    assert "assistant gives" not in said
    assert "You are a helpful" not in said


@pytest.mark.parametrize(
    ("name", "messages", "problem"),
    [
        ("plain", [{"role": "system", "content": "x"}], "no system message"),
        ("llava_v1", [{"role": "tool", "content": "x"}], "unknown role tool"),
        (
            "llava_v1",
            [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}],
            "one picture a turn",
        ),
    ],
)
def test_what_no_template_can_say_is_an_error(
    name: str, messages: list[dict], problem: str
) -> None:
    with pytest.raises(jinja2.TemplateError, match=problem):
        _render(jinja_template(get_template(name)), messages, False)
