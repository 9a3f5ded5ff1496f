"""The exact strings of every template, and the registry."""

from __future__ import annotations

import dataclasses

import pytest

from vipllava.conversation import get_template, template_names
from vipllava.types import ConfigError, Turn

HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)
VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
TURNS = [
    Turn("user", "Q1", has_image=True),
    Turn("assistant", "A1"),
    Turn("user", "Q2"),
    Turn("assistant", "A2"),
]
RENDERED = {
    "plain": "<image>A1\nA2\n",
    "llava_v1": f"{HUMAN} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>",
    "llava_v0": (f"{HUMAN}###Human: <image>\nQ1###Assistant: A1###Human: Q2###Assistant: A2###"),
    "llama_3": (
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{VISION}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nQ1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>"
    ),
    "phi_3": (
        f"<|system|>\n{VISION}<|end|>\n<|user|>\n<image>\nQ1<|end|>\n<|assistant|>\nA1<|end|>\n"
        "<|user|>\nQ2<|end|>\n<|assistant|>\nA2<|end|>\n"
    ),
    "chatml": (
        f"<|im_start|>system\n{VISION}<|im_end|>\n"
        "<|im_start|>user\n<image>\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n"
    ),
}
PROMPT_ENDS = {
    "plain": "<image>",
    "llava_v1": " ASSISTANT:",
    "llava_v0": "###Assistant:",
    "llama_3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "phi_3": "<|assistant|>\n",
    "chatml": "<|im_start|>assistant\n",
}


@pytest.mark.parametrize("name", RENDERED)
def test_rendered_conversation(name: str) -> None:
    assert get_template(name).render(TURNS) == RENDERED[name]


@pytest.mark.parametrize("name", RENDERED)
def test_an_image_without_a_question_has_no_newline(name: str) -> None:
    turns = [Turn("user", "", has_image=True), *TURNS[1:]]
    expected = RENDERED[name].replace("<image>\nQ1", "<image>")
    assert get_template(name).render(turns) == expected


@pytest.mark.parametrize("name", RENDERED)
def test_generation_prompt(name: str) -> None:
    template = get_template(name)
    prompt = template.render(TURNS[:1], generation_prompt=True)
    assert prompt.endswith(PROMPT_ENDS[name])
    assert template.render(TURNS).startswith(prompt)


def test_every_template_is_tested() -> None:
    assert set(template_names()) == set(RENDERED) == set(PROMPT_ENDS)


def test_special_tokens_are_those_of_the_strings() -> None:
    for name in template_names():
        template = get_template(name)
        own_strings = template.render([Turn(turn.role, "", turn.has_image) for turn in TURNS])
        for token in template.special_tokens:
            assert token in own_strings, (name, token)
        rest = "".join(template.split_special_tokens(own_strings))
        assert rest == own_strings
        for piece in template.split_special_tokens(own_strings):
            assert piece in template.special_tokens or "<|" not in piece, (name, piece)


def test_stops() -> None:
    assert get_template("llava_v1").stop_tokens == ("</s>",)
    assert get_template("llama_3").stop_tokens == ("<|end_of_text|>", "<|eot_id|>")
    assert get_template("phi_3").stop_tokens == ("<|endoftext|>", "<|end|>")
    assert get_template("chatml").stop_tokens == ("<|im_end|>",)
    assert get_template("llava_v0").stop_strings == ("###",)
    assert get_template("plain").stop_strings == ("\n",)


def test_a_template_is_a_frozen_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_template("plain").system = "changed"  # type: ignore[misc]


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(
        ConfigError,
        match="unknown chat template 'vicuna': use one of chatml, llama_3, llava_v0, llava_v1, "
        "phi_3, plain",
    ):
        get_template("vicuna")
