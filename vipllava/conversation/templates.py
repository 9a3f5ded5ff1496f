"""Chat templates as values: the exact strings that checkpoints were trained with.

How their strings become ids is written once, in :mod:`vipllava.conversation.encode`. The template
belongs to the checkpoint (it is saved beside the weights) and is never guessed from a path.

A rendered conversation is::

    bos system
    user_prefix       [user_lead <image> image_suffix | user_lead] user text      user_end
    assistant_prefix  assistant_lead assistant text  assistant_end  after_assistant
    user_prefix_later ...

The generation prompt ends after ``assistant_prefix``. Supervised is what follows it: lead, text
and ``assistant_end``, and nothing else. The lead belongs to the text because tokenizers write a
space and the word after it as one token: the model must produce it. Between an image and a user
text that is empty nothing stands, as in the released data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from vipllava.types import ConfigError, Turn

IMAGE_PLACEHOLDER = "<image>"
"""Stands for the picture in rendered text; never looked up in a text that somebody typed."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """One chat template."""

    name: str  # key in the registry; what a checkpoint stores
    user_prefix: str  # role string of the first user turn
    user_prefix_later: str  # role string of a user turn that follows an assistant turn
    assistant_prefix: str  # role string of an assistant turn; ends the generation prompt
    assistant_end: str  # end of an assistant turn; supervised. A special token, or plain text
    # The beginning-of-sequence token where the template spells it, not the tokenizer.
    bos: str = ""
    system: str = ""  # everything before the first user turn
    user_lead: str = ""  # between role string and user text (or the image before it)
    image_suffix: str = "\n"  # between the image and the text after it, where there is one
    user_end: str = ""  # end of a user turn
    assistant_lead: str = ""  # between role string and assistant text; supervised with it
    after_assistant: str = ""  # what follows the end before the next turn; not supervised
    # Tokens that end generation, those that the tokenizer has. Its own EOS always does, too.
    stop_tokens: tuple[str, ...] = ()
    stop_strings: tuple[str, ...] = ()  # texts that end generation where the end is not a token
    drops_user_text: bool = False  # stage 1 sees image and caption only
    # The special tokens in the strings above; a tokenizer must have each as one token.
    special_tokens: tuple[str, ...] = ()

    @property
    def ends_with_token(self) -> bool:
        """Whether an assistant turn ends with a special token rather than with plain text."""
        return self.assistant_end in self.special_tokens

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> str:
        """Return the conversation as one string, for people and for tests.

        Ids are not made from this string: in it, text that a user typed and the template's own
        strings can no longer be told apart. With ``generation_prompt`` it ends with the role string
        of the assistant turn to come.
        """
        pieces = [self.bos, self.system]
        for number, turn in enumerate(turns):
            if turn.role == "user":
                pieces += (self.user_prefix_later if number else self.user_prefix, self.user_lead)
                if turn.has_image:
                    pieces += (IMAGE_PLACEHOLDER, self.image_suffix if turn.text else "")
                pieces += ("" if self.drops_user_text else turn.text, self.user_end)
            else:
                pieces += (self.assistant_prefix, self.assistant_lead, turn.text)
                pieces += (self.assistant_end, self.after_assistant)
        if generation_prompt:
            pieces.append(self.assistant_prefix)
        return "".join(pieces)

    def split_special_tokens(self, text: str) -> list[str]:
        """Cut one of the template's own strings around the special tokens it contains."""
        if not self.special_tokens:
            return [text] if text else []
        pattern = "|".join(map(re.escape, self.special_tokens))
        return [piece for piece in re.split(f"({pattern})", text) if piece]


_HUMAN_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_VISION_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)

SYSTEM_TEXTS = (_HUMAN_SYSTEM, _VISION_SYSTEM)
"""What the templates say by themselves before the first turn, role strings left out."""

_TEMPLATES = {template.name: template for template in (
    ChatTemplate(
        "plain", user_prefix="", user_prefix_later="", image_suffix="",
        assistant_prefix="", assistant_end="\n", stop_strings=("\n",), drops_user_text=True,
    ),
    ChatTemplate(
        "llava_v1", system=_HUMAN_SYSTEM,
        user_prefix=" USER:", user_prefix_later="USER:", user_lead=" ",
        assistant_prefix=" ASSISTANT:", assistant_lead=" ", assistant_end="</s>",
        stop_tokens=("</s>",), special_tokens=("</s>",),
    ),
    ChatTemplate(
        "llama_3", bos="<|begin_of_text|>",
        system=f"<|start_header_id|>system<|end_header_id|>\n\n{_VISION_SYSTEM}<|eot_id|>",
        user_prefix="<|start_header_id|>user<|end_header_id|>\n\n",
        user_prefix_later="<|start_header_id|>user<|end_header_id|>\n\n", user_end="<|eot_id|>",
        assistant_prefix="<|start_header_id|>assistant<|end_header_id|>\n\n",
        assistant_end="<|eot_id|>", stop_tokens=("<|end_of_text|>", "<|eot_id|>"),
        special_tokens=(
            "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
        ),
    ),
    ChatTemplate(
        "phi_3", system=f"<|system|>\n{_VISION_SYSTEM}<|end|>\n",
        user_prefix="<|user|>\n", user_prefix_later="<|user|>\n", user_end="<|end|>\n",
        assistant_prefix="<|assistant|>\n", assistant_end="<|end|>", after_assistant="\n",
        stop_tokens=("<|endoftext|>", "<|end|>"),
        special_tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    ChatTemplate(
        # The "###" after an answer opens the next role string and closes the answer at once.
        # It is written as the answer's end, so that the model learns to stop.
        "llava_v0", system=_HUMAN_SYSTEM,
        user_prefix="###Human:", user_prefix_later="Human:", user_lead=" ",
        assistant_prefix="###Assistant:", assistant_lead=" ", assistant_end="###",
        stop_strings=("###",),
    ),
    ChatTemplate(
        "chatml", system=f"<|im_start|>system\n{_VISION_SYSTEM}<|im_end|>\n",
        user_prefix="<|im_start|>user\n", user_prefix_later="<|im_start|>user\n",
        user_end="<|im_end|>\n", assistant_prefix="<|im_start|>assistant\n",
        assistant_end="<|im_end|>", after_assistant="\n",
        stop_tokens=("<|im_end|>",), special_tokens=("<|im_start|>", "<|im_end|>"),
    ),
)}  # fmt: skip


def template_names() -> tuple[str, ...]:
    """Return the names of all templates, sorted."""
    return tuple(sorted(_TEMPLATES))


def get_template(name: str) -> ChatTemplate:
    """Return the template called ``name``; ConfigError lists those that exist."""
    if name not in _TEMPLATES:
        known = ", ".join(template_names())
        raise ConfigError(f"unknown chat template {name!r}: use one of {known}")
    return _TEMPLATES[name]


_TEXT_OF: Final = """\
{%- macro text_of(message) -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'text' -%}{{ item['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""


def jinja_template(template: ChatTemplate, *, bos: str = "", after_image: str = "") -> str:
    """Return a template as Jinja, so that it travels with a checkpoint into other engines.

    A message's content is a text, or a list of ``{"type": "image"}`` and ``{"type": "text", "text":
    ...}``, as engines pass it. What is rendered equals :meth:`ChatTemplate.render`; a system
    message of the caller's replaces the template's own text.

    Args:
        template: what to write down.
        bos: said first, where the template spells no beginning itself: engines tokenize a rendered
            chat without adding one.
        after_image: said right behind the picture's token; a space makes some tokenizers give the
            ids that a checkpoint was trained with, see
            :func:`vipllava.checkpoints.processor.build_processor`.
    """
    # Where no text follows there is no suffix, and before a special token no word to begin.
    follows = template.split_special_tokens(template.user_end + template.assistant_prefix)
    alone = "" if follows and follows[0] in template.special_tokens else after_image
    before_text = after_image + template.image_suffix
    behind_image = _say(alone)
    if before_text != alone:
        behind_image = "{%- if text_of(message) -%}\n" + _say(before_text)
        behind_image += "{%- else -%}\n" + _say(alone) + "{%- endif -%}\n"
    user_text = "" if template.drops_user_text else "{{- text_of(message) -}}\n"
    lines = [
        _TEXT_OF,
        _say(template.bos or bos),
        "{%- if messages[0]['role'] == 'system' -%}\n",
    ]
    own = next((text for text in SYSTEM_TEXTS if text in template.system), None)
    if own is None:
        lines.append("{{- raise_exception('this chat template has no system message') -}}\n")
    else:
        before, _, behind = template.system.partition(own)
        lines += [_say(before), "{{- text_of(messages[0]) -}}\n", _say(behind)]
        lines.append("{%- set turns = messages[1:] -%}\n")
    lines += [
        "{%- else -%}\n",
        _say(template.system),
        "{%- set turns = messages -%}\n{%- endif -%}\n",
        "{%- for message in turns -%}\n",
        "{%- if message['role'] == 'user' -%}\n",
        f"{{{{- {json.dumps(template.user_prefix)} if loop.first else "
        f"{json.dumps(template.user_prefix_later)} -}}}}\n",
        _say(template.user_lead),
        "{%- if message['content'] is not string -%}\n",
        "{%- for item in message['content'] if item['type'] == 'image' -%}\n",
        "{%- if not loop.first -%}\n{{- raise_exception('one picture a turn') -}}\n{%- endif -%}\n",
        _say(IMAGE_PLACEHOLDER),
        behind_image,
        "{%- endfor -%}\n{%- endif -%}\n",
        user_text,
        _say(template.user_end),
        "{%- elif message['role'] == 'assistant' -%}\n",
        _say(template.assistant_prefix + template.assistant_lead),
        "{{- text_of(message) -}}\n",
        _say(template.assistant_end + template.after_assistant),
        "{%- else -%}\n",
        "{{- raise_exception('unknown role ' ~ message['role']) -}}\n",
        "{%- endif -%}\n{%- endfor -%}\n",
        "{%- if add_generation_prompt -%}\n",
        _say(template.assistant_prefix),
        "{%- endif -%}",
    ]
    return "".join(lines)


def _say(text: str) -> str:
    return f"{{{{- {json.dumps(text)} -}}}}\n" if text else ""
